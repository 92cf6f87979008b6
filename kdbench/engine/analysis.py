"""Analyses of finished cells: what `kdbench analyse NAME` gives to the target of a card, and what it writes.

The target is a function or a class. It is called with an `Analysis` first and its options as keywords, and is iterated
over: each element is a row of the table, as a plain dictionary.
"""

import re
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kdbench.engine.computing.device import use
from kdbench.engine.data.batch import at_most
from kdbench.engine.data.datasets import load_data
from kdbench.engine.data.streamed import split_for_testing
from kdbench.engine.finish import git_state, machine
from kdbench.engine.folders import teacher_folder
from kdbench.engine.networks.network import Network, Normalizer
from kdbench.engine.networks.trained import load_student
from kdbench.engine.networks.weights import locate
from kdbench.engine.options import Options
from kdbench.engine.teachers.files import ALL_WEIGHTS, trained
from kdbench.engine.teachers.loading import load_teacher
from kdbench.errors import UserError
from kdbench.files import home, no_formula, sha256_of, write_json, write_text
from kdbench.recipe.model_specs import DataSpec
from kdbench.recipe.planning import cell_name
from kdbench.recipe.recorded import cell_of
from kdbench.recipe.specs import CellSpec, TeacherSpec
from kdbench.record import Record, read_records, student_file
from kdbench.registry import Registry
from kdbench.version import __version__

AnalysisRow = Mapping[str, Any]
# Logits [N, K] of pixel values [N, C, H, W] on the scale of [0, 1].
PixelLogits = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class FinishedCell:
    """A finished cell.

    Attributes:
        record: what it left.
        spec: its recipe, built from the cards of this installation.
    """

    record: Record
    spec: CellSpec

    @property
    def name(self) -> str:
        """As it is called in tables: its method, what else was compared, its seed."""
        cell = self.record.cell
        return f"{cell_name(cell.label, cell.axes)}, seed {cell.seed}"

    @property
    def columns(self) -> dict[str, Any]:
        """The columns by which a row is recognized as this cell's."""
        cell = self.record.cell
        axes = sorted(cell.axes.items(), key=lambda axis: axis[0].startswith("method."))
        return {
            "recipe": self.record.recipe,
            "method": cell.method,
            "label": cell.label,
            "axes": ", ".join(f"{path} {value}" for path, value in axes if path != "method"),
            "seed": cell.seed,
            "student": cell.student,
        }

    def check_made_from(self, fingerprint: str, teacher_name: str, teacher_sha256: str) -> None:
        """Raise a UserError if the cell was trained on other data, or by another teacher of this name.

        Args:
            fingerprint: of the cell's data as they are here.
            teacher_name, teacher_sha256: of the teacher that the cell is compared with.
        """
        data, teacher = self.record.data, self.record.teacher
        compared = [(f"data '{data.name}'", data.fingerprint, fingerprint)]
        if teacher is not None and teacher.name == teacher_name:
            compared.append((f"teacher '{teacher.name}'", teacher.sha256, teacher_sha256))
        for what, then, now in compared:
            if then != now:
                raise UserError(
                    f"this cell was trained with other {what}: {then[:12]}, here it is {now[:12]}",
                    where=str(self.record.folder),
                    hint="give the data and the runs that belong to it (--data, --runs), or run its recipe again",
                )


class ImagesToTest(NamedTuple):
    """Test images of a data set.

    Attributes:
        pixels: float32 [N, C, H, W] on the scale of [0, 1].
        labels: int64 [N].
        classes: their names.
        fingerprint: of the whole data set.
    """

    pixels: Tensor
    labels: Tensor
    classes: Sequence[str]
    fingerprint: str


class Analysis:
    """What an analysis is given. It writes down the hashes of all data and networks that are asked for.

    Attributes:
        folders: that the user named, with finished cells below them.
        device: where networks and images are.
        tell: prints a line of progress.

    Args:
        name: the key of the analysis's card.
        options: runs, data, registries and device.
        out: folder for what is written.
    """

    def __init__(
        self, name: str, folders: Sequence[Path], options: Options, out: Path, tell: Callable[[str], None]
    ) -> None:
        self.name, self.folders, self.options, self.out, self.tell = name, folders, options, out, tell
        self.device = use(torch.device(options.device))
        self.registry = Registry(options.registries)
        self.noted: dict[str, list[dict[str, Any]]] = {"data": [], "networks": []}
        self.pictures: list[Path] = []

    @cached_property
    def cells(self) -> list[FinishedCell]:
        """The finished cells below `folders`, those of a recipe in the order of its comparison."""
        return self.cells_below(*self.folders)

    def cells_below(self, *folders: Path) -> list[FinishedCell]:
        """Raises a UserError if there is none, or one that cannot be built from the cards here."""
        if not folders:
            raise UserError("there is nothing to analyse", hint="give a folder with finished cells")
        records = read_records(folders)
        records.sort(key=lambda one: (one.recipe, one.cell.order or 0, one.cell.seed))
        return [FinishedCell(one, cell_of(one.spec, self.registry, str(one.folder))) for one in records]

    def test_images(self, data: DataSpec, count: int) -> ImagesToTest:
        """`count` evenly spaced test images, or a few less.

        Raises:
            UserError: `count` is below 1, or the data are not there.
        """
        if count < 1:
            raise UserError(f"{count} images are too few", where=self.name, hint="ask for at least 1")
        loaded = load_data(data, data.roots(self.options.roots()), self.options.download, home() / "cache")
        part = split_for_testing(data, loaded, self.device)
        slices = list(at_most(count, part).slices())
        self.note("data", name=data.name, fingerprint=loaded.fingerprint)
        pixels = torch.cat([images.float() / 255 for images, _ in slices])
        return ImagesToTest(pixels, torch.cat([labels for _, labels in slices]), loaded.classes, loaded.fingerprint)

    def student(self, cell: FinishedCell) -> PixelLogits:
        """The student of a finished cell, in eval mode. UserError if its weights are not beside its record."""
        file = student_file(cell.record)
        model = load_student(file.parent, self.options.registries).to(self.device).requires_grad_(False)
        self.note("networks", name=f"{cell.record.recipe}/{file.parent.resolve().name}", sha256=sha256_of(file))
        normalizer = Normalizer(
            cell.spec.protocol.normalization, cell.spec.student.takes(cell.spec.data).image_shape[1:], self.device
        )
        return lambda images: model(normalizer(images))

    def teacher(self, spec: TeacherSpec, data: DataSpec, *runs: Path) -> tuple[Network, str]:
        """A teacher, frozen and in eval mode, and the sha256 of its weights.

        Args:
            runs: folders of runs in which to look before that of the options.

        Raises:
            UserError: its weights are not there.
        """
        file = _weights_of(spec, self.options, *runs)
        self.note("networks", name=spec.name, sha256=(digest := sha256_of(file)))
        return load_teacher(spec, data, file, self.device).network, digest

    def note(self, kind: str, **facts: Any) -> None:
        """Write down something that was analysed, for the file beside the CSV: once, if it comes again."""
        if facts not in (found := self.noted.setdefault(kind, [])):
            found.append(facts)

    def picture(self, name: str) -> Path:
        """The file for a picture that the analysis draws.

        Args:
            name: what it shows, in one word.
        """
        self.pictures.append(self.out / f"{self.name}_{name}.png")
        return self.pictures[-1]

    def write(self, rows: Sequence[AnalysisRow]) -> list[Path]:
        """Write the rows as CSV and, beside it, the command and hashes of all that was analysed, with neither times nor
        paths of the machine: the same analysis gives the same files.

        Returns:
            all files of the analysis.
        """
        file = self.out / f"{self.name}.csv"
        write_text(file, as_csv(rows))
        about = {
            "command": command_line(["kdbench", *sys.argv[1:]], Path.cwd()),
            "kdbench": __version__,
            "git": git_state(),
            "machine": machine(self.device, torch.get_num_threads()),
            **self.noted,
            "csv": {"name": file.name, "sha256": sha256_of(file)},
        }
        write_json(file.with_suffix(".json"), about)
        return [file, file.with_suffix(".json"), *self.pictures]


def _weights_of(teacher: TeacherSpec, options: Options, *runs: Path) -> Path:
    """The file of a teacher's weights: its card's, or what its training left in a folder of runs."""
    if teacher.weights is not None:
        return locate(teacher.weights, options.download)
    folders = [teacher_folder(teacher, folder) for folder in (*runs, options.runs)]
    if teacher.members and (whole := [folder / ALL_WEIGHTS for folder in folders if (folder / ALL_WEIGHTS).is_file()]):
        return whole[0]
    file = next((found.file for found in map(trained, folders) if found is not None), None)
    if file is None:
        hint = "run its recipe, or name with --runs the folder of runs that holds it"
        raise UserError(f"the teacher '{teacher.name}' is not there: a recipe trains it", str(folders[0]), hint)
    return file


def as_csv(rows: Sequence[AnalysisRow]) -> str:
    """Rows as CSV with all their columns, floats with six digits."""
    import pandas

    safe = [{name: no_formula(value) for name, value in row.items()} for row in rows]
    text: str = pandas.DataFrame(safe).to_csv(index=False, float_format="%.6g", lineterminator="\n")
    return text


def command_line(arguments: Sequence[str], folder: Path) -> str:
    """A command as a shell takes it, without the machine's paths.

    Absolute paths become relative to the folder in which the command ran; of those outside it only the last part is
    left, after "…/".
    """

    def shown(found: re.Match[str]) -> str:
        path = Path(found[0])
        return str(path.relative_to(folder)) if path.is_relative_to(folder) else f"…/{path.name}"

    # At the beginning, after an option's "=", or in a list.
    return shlex.join(re.sub(r"(?<![^=\[,\s'\"])/[^,\]'\"]*", shown, argument) for argument in arguments)
