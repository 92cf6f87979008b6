"""A cell's teacher as files: its weights, its accuracy by the input that it gets here, and what about that its user
should doubt."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field
from safetensors.torch import save

from kdbench.cards import TEACHER_TOLERANCE
from kdbench.data.pictures import AnyData, Pictures
from kdbench.engine.data.batch import Split
from kdbench.engine.data.streamed import split_for_testing
from kdbench.engine.folders import teacher_folder
from kdbench.engine.networks.build import build_model
from kdbench.engine.networks.weights import load_teacher_file, locate
from kdbench.engine.teachers.anchors import Route
from kdbench.engine.teachers.loading import load_teacher
from kdbench.engine.teachers.teacher import Teacher
from kdbench.errors import CellError, UserError
from kdbench.files import ROUTE, atomic, sha256_of, write_json, write_summed
from kdbench.forms import Percent
from kdbench.reading import of_form, read_as, read_summed
from kdbench.recipe.beside import origin_of
from kdbench.recipe.model_specs import DataSpec
from kdbench.recipe.specs import TeacherSpec, recorded
from kdbench.record import finished_record, student_file

logger = logging.getLogger("kdbench")

# File with the weights of several teachers that are one.
ALL_WEIGHTS = "weights.safetensors"
# What was seen on pictures as they were tested on for a stated accuracy.
_PUBLISHED = "as_published.json"
# Percentage points that another order of classes must bring before it is told.
_MORE = 5.0


@dataclass(frozen=True)
class TeacherFile:
    """Where a teacher's weights lie, their sha256, and the accuracy measured with them (percent; None for a teacher of
    other classes, which cannot be tested on these data), and the checkpoints of its training where they were kept.
    `source_accuracy`: on the source, where `accuracy` is that on a target domain. `data`: fingerprint of the data that
    it was trained on here. `doubts`: sentences that its user should read. `members`: of several teachers, the sha256 of
    each one's weights."""

    file: Path
    sha256: str
    accuracy: float | None
    route: Route | None = None
    source_accuracy: float | None = None
    data: str | None = None
    doubts: tuple[str, ...] = ()
    members: tuple[str, ...] = ()


def trained(folder: Path) -> TeacherFile | None:
    """A teacher that was trained here, or None when it is not finished. UserError where its weights are gone, or are
    not those that its record names."""
    record = finished_record(folder)
    if record is None:
        return None
    file = student_file(record)
    checkpoints = tuple(checkpoint.model_dump(mode="json") for checkpoint in record.route)
    route = Route(folder / ROUTE, checkpoints) if checkpoints else None
    return TeacherFile(file, sha256_of(file), record.result.test.last, route, data=record.data.fingerprint)


def given_weights(spec: TeacherSpec, download: bool) -> TeacherFile:
    """A teacher whose card or recipe names a weight file."""
    assert spec.weights is not None
    return TeacherFile(locate(spec.weights, download), spec.weights.sha256, None)


@dataclass(frozen=True)
class _Members:
    """sha256 of every teacher's own file."""

    members: tuple[str, ...]


def all_weights(
    spec: TeacherSpec, folder: Path, data: DataSpec, of_one: Callable[[TeacherSpec, Path], TeacherFile]
) -> TeacherFile:
    """The weights of several teachers in one file in their own folder, written anew where one's have changed.

    Args:
        folder: of all of them. of_one: gives the weights of one, by its own folder.
    """
    file = folder / ALL_WEIGHTS
    try:
        each = [of_one(one, teacher_folder(one, folder.parent.parent)) for one in spec.members]
    except (UserError, CellError):
        # On another machine there is what was sent.
        if not file.is_file():
            raise
        return TeacherFile(file, sha256_of(file), None, members=read_as(_Members, file.with_suffix(".json")).members)
    whole = build_model(spec.model, data)
    for one, part, weights in zip(spec.members, whole.parts, each, strict=True):  # type: ignore[arg-type]
        load_teacher_file(part.network, weights.file, one, data)
    found = save(whole.state_dict())
    if not file.is_file() or file.read_bytes() != found:
        with atomic(file) as temporary:
            temporary.write_bytes(found)
    write_json(file.with_suffix(".json"), {"members": [weights.sha256 for weights in each]})
    return TeacherFile(file, sha256_of(file), None, members=tuple(weights.sha256 for weights in each))


def with_accuracy(
    spec: TeacherSpec, file: TeacherFile, folder: Path, data_spec: DataSpec, data: AnyData, device: torch.device
) -> TeacherFile:
    """A teacher's file with its accuracy by the input that it gets here: its record's where it was trained here by the
    same, else measured once and kept in its folder.

    Raises:
        UserError: the recipe states another accuracy.
    """
    if spec.classes is not None:
        return replace(file, accuracy=None)
    on_record: tuple[float, str] | None = None
    found: list[str] = []
    if spec.trained_by is None:
        beside = origin_of(file.file)
        if beside is not None and beside.accuracy is not None and beside.target is None:
            on_record = (beside.accuracy, "the record beside its weights")
        if beside is not None and beside.fingerprint != data.fingerprint:
            found = [f"the teacher '{spec.name}' was trained on other data of that name, of another fingerprint"]
    elif spec.trained_by.target is None and spec.trained_by.data.tested_on == "test" and file.accuracy is not None:
        on_record = (file.accuracy, "the record of its training")
        training, before = spec.trained_by, spec.trained_by.data
        same = spec.normalization == training.protocol.normalization
        same &= spec.model.image_size == training.student.image_size and file.data == data.fingerprint
        if isinstance(data, Pictures):
            same &= (before.options, before.image_size) == (data_spec.options, data_spec.image_size)
        if same:
            return replace(file, doubts=doubts(spec, Seen(file.accuracy), data_spec.classes, None))
    published = None
    if spec.accuracy is not None and (own := _own_view(spec, data_spec, data)) is not None:
        published = _seen(spec, file, folder / _PUBLISHED, data_spec, *own, device)
        _check_accuracy(spec, file, published)
        on_record = (spec.accuracy, "the accuracy that is stated for pictures as it was tested on")
    kept_in = folder / ("teacher.json" if spec.trained_by is None else "as_used.json")
    seen = _seen(spec, file, kept_in, data_spec, data_spec, data, device)
    if published is None:
        _check_accuracy(spec, file, seen)
    return replace(file, accuracy=seen.accuracy, doubts=(*doubts(spec, seen, data_spec.classes, on_record), *found))


def _check_accuracy(spec: TeacherSpec, file: TeacherFile, seen: Seen) -> None:
    if spec.accuracy is not None and abs(seen.accuracy - spec.accuracy) > TEACHER_TOLERANCE:
        raise UserError(
            f"the teacher '{spec.name}' reaches {seen.accuracy:.2f} % where {spec.accuracy:.2f} % is stated",
            where=str(file.file),
            hint="check the data and the order of their classes, the model's options and the normalization, and, of "
            "pictures, the 'resize' of its tests",
        )


def _own_view(spec: TeacherSpec, data_spec: DataSpec, data: AnyData) -> tuple[DataSpec, AnyData] | None:
    """The data as they were tested on for a teacher's stated accuracy, where it is not as they are tested on here."""
    if not isinstance(data, Pictures):
        return None
    known, short_side = spec.knows(data_spec), spec.resize or data.short_side
    same = (known.image_size, short_side) == (data_spec.image_size, data.short_side)
    return None if same else (known, replace(data, short_side=short_side))


def on_target(
    spec: TeacherSpec,
    file: TeacherFile,
    folder: Path,
    source: DataSpec,
    target_spec: DataSpec,
    target: AnyData,
    device: torch.device,
) -> TeacherFile:
    """The same with its accuracy on the target domain's test split, measured once and kept beside it."""
    if spec.classes is not None:
        return file
    seen = _seen(spec, file, folder / f"on_{target_spec.name}.json", source, target_spec, target, device)
    by_source = spec.trained_by is None or spec.trained_by.target is None
    return replace(file, accuracy=seen.accuracy, source_accuracy=file.accuracy if by_source else None)


@dataclass(frozen=True)
class Seen:
    """Of a network's answers on a test split, in percent.

    accuracy: of right ones. reordered: what it would be if every output stood for the class that it answers most, where
    these are all different ones; None where they are not. unused: how many of the split's classes it never answers.
    largest: what always answering the split's most frequent class would have; None where that was not looked at.
    """

    accuracy: Percent
    reordered: Percent | None = None
    unused: Annotated[int, Field(ge=0)] = 0
    largest: Percent | None = None


@torch.no_grad()
def look(teacher: Teacher, split: Split, classes: int) -> Seen:
    """A network's answers on a split of so many classes."""
    device = split.labels.device
    counts = torch.zeros(classes * classes, dtype=torch.int64, device=device)
    for images, labels in split.slices():
        answers = teacher(images, ["logits"])["logits"].argmax(dim=1)
        counts += torch.bincount(answers * classes + labels, minlength=classes * classes)
    table = counts.view(classes, classes)
    used = table.sum(dim=1) > 0
    most, meant = table[used].max(dim=1)
    n = len(split.labels)
    different = len(meant.unique()) == len(meant)
    return Seen(
        round(100 * int(table.trace()) / n, 4),
        round(100 * int(most.sum()) / n, 4) if different else None,
        int((~used & (table.sum(dim=0) > 0)).sum()),
        round(100 * int(table.sum(dim=0).max()) / n, 4),
    )


def _seen(
    spec: TeacherSpec,
    file: TeacherFile,
    kept_in: Path,
    known: DataSpec,
    tested: DataSpec,
    data: AnyData,
    device: torch.device,
) -> Seen:
    """A teacher of the data `known` on the test split of others, or of these."""
    key: dict[str, Any] = {
        "sha256": file.sha256,
        "data": data.fingerprint,
        "model": recorded(spec.model),
        "normalization": spec.normalization.model_dump(mode="json"),
        # A file that was kept for another entry must not do for the one that is read where none is named.
        **dict.fromkeys(("entry", "weights_layout")),
        **spec.choice,
    }
    if kept_in.name == _PUBLISHED:
        key["resize"] = spec.resize
    if isinstance(data, Pictures):
        # Their fingerprint is that of the files, whatever is taken of them.
        key["tested"] = {"short_side": data.short_side, "image_size": tested.image_size}

    def measure() -> Seen:
        split = split_for_testing(tested, data, device)
        return look(load_teacher(spec, known, file.file, device), split, tested.classes)

    return kept(kept_in, key, {"name": spec.name}, measure)


def kept(file: Path, key: dict[str, Any], about: dict[str, Any], measure: Callable[[], Seen]) -> Seen:
    """What was seen before under the same key, else what is measured now, which is kept in the file.

    Args:
        about: is kept beside it, and does not count.
    """
    if file.exists():
        try:
            found = read_summed(dict[str, Any], file)
            seen = of_form(Seen, {field.name: found.get(field.name) for field in fields(Seen)}, str(file))
            if all(found.get(name) == value for name, value in key.items()):
                return seen
        except UserError as error:
            logger.warning("%s; the teacher is measured again", str(error))
    seen = measure()
    said = {name: value for name, value in key.items() if value is not None}
    write_summed(file, {**about, **said, **asdict(seen)})
    return seen


def doubts(spec: TeacherSpec, seen: Seen, classes: int, expected: tuple[float, str] | None) -> tuple[str, ...]:
    """What its user should know of a teacher before it teaches, in one sentence; a question stands at its end.

    Args:
        expected: an accuracy that is on record for it, and where.
    """
    found = []
    chance = 100 / classes
    if classes > 1 and seen.accuracy < min(2 * chance, chance + 10):
        found.append(f"it is near chance, {chance:.2f} %")
    elif classes > 1 and seen.largest is not None and seen.accuracy <= seen.largest:
        found.append(f"who always answers the most frequent class has {seen.largest:.2f} %")
    # One that is known not to have learned all classes may leave some out.
    if seen.unused and spec.known_classes is None:
        found.append(f"it never answers {seen.unused} of the {classes} classes")
    if expected is not None and abs(seen.accuracy - expected[0]) > TEACHER_TOLERANCE:
        found.append(f"{expected[1]} says {expected[0]:.2f} %")
    if seen.reordered is not None and seen.reordered > seen.accuracy + _MORE:
        found.append(
            f"with its outputs in another order it would have {seen.reordered:.2f} %: are the classes of its training "
            "in the order of these data, and its images normalized as here?"
        )
    reached = f"the teacher '{spec.name}' reaches {seen.accuracy:.2f} % with the input that it gets here"
    return (f"{reached}: {'; '.join(found)}",) if found else ()
