"""What networks say of made images: whether one that had no part in making them sees the classes they were made for."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from kdbench.engine.batches import SLICE
from kdbench.engine.boundaries import Classifier, readable_spec, student_of
from kdbench.engine.runner import Options, teacher_folder
from kdbench.engine.teachers import load_teacher, locate, trained
from kdbench.errors import UserError
from kdbench.recipe.networks import teacher_alone
from kdbench.recipe.schema import DataSpec, TeacherSpec
from kdbench.registry import Registry
from kdbench.results.record import read_records
from kdbench.sources.made import POOL, MadeImages


@dataclass(frozen=True)
class Judgement:
    """Of one pool by one network.

    Attributes:
        pool: its folder. maker: the name of the network that the images were made from. settings: how they were made,
            and of how many classes.
        judge: the network's name. images: of the pool. right: share in [0, 1] that it classifies as they were made for.
    """

    pool: Path
    maker: str
    settings: dict[str, Any]
    judge: str
    images: int
    right: float


def pools_in(folders: Iterable[Path]) -> list[MadeImages]:
    """All pools at or below folders, sorted by path.

    Raises:
        UserError: a folder with none, or a pool that cannot be read.
    """
    found: dict[Path, MadeImages] = {}
    for folder in folders:
        files = sorted(folder.rglob(POOL)) if folder.is_dir() else []
        if not files:
            raise UserError(
                "there are no made images here",
                where=str(folder),
                hint="pools lie in runs/sources/synthesized, once a recipe with a source of images was run",
            )
        for file in files:
            try:
                key = json.loads(file.read_text(encoding="utf-8"))
            except (OSError, ValueError) as error:
                raise UserError(f"a pool of images cannot be read: {error}", where=str(file)) from None
            found.setdefault(file.parent.resolve(), MadeImages(file.parent, key))
    return [found[path] for path in sorted(found) if found[path].whole()]


@dataclass(frozen=True)
class Judge:
    """A network that may be asked. data: whose classes and images it knows. load: gives its logits of pixel values."""

    name: str
    data: DataSpec
    load: Callable[[torch.device], Classifier]


def teacher_as_judge(name: str, registry: Registry, options: Options) -> Judge:
    """The teacher of a card."""
    spec, data = teacher_alone(name, registry, "--by")
    return Judge(name, data, lambda device: load_teacher(spec, data, _weights(spec, options), device).eyes().logits)


def students_as_judges(folder: Path, options: Options) -> list[Judge]:
    """The students of all finished cells below a folder."""
    found = []
    for record in read_records([folder]):
        spec = readable_spec(record)
        load = functools.partial(student_of, record, spec, options.registries)
        found.append(Judge(f"{record.cell.label}, seed {record.cell.seed}", spec.data, load))
    return found


def judge(
    pools: Sequence[MadeImages], judges: Sequence[Judge], device: torch.device, tell: Callable[[str], None]
) -> Iterator[Judgement]:
    """Every pool by every network that takes such images.

    Images are judged as they were kept: pixel values that may leave [0, 1], each network with its own normalization.

    Raises:
        UserError: weights that are not there, or a network for other images or classes.
    """
    for one in judges:
        for pool in pools:
            _check(one, pool)
    for one in judges:
        see = one.load(device)
        for pool in pools:
            key = _made_with(pool)
            tell(f"{one.name}: {pool.folder}")
            right = count = 0
            for batch in pool.whole():
                images, labels = (part.to(device) for part in pool.read(batch))
                for part, expected in zip(
                    images.float().split(SLICE[device.type]), labels.split(SLICE[device.type]), strict=True
                ):
                    with torch.no_grad():
                        right += int((see(part).argmax(dim=1) == expected).sum())
                    count += len(expected)
            made = {"classes": len(key["classes"]), **key["settings"]}
            yield Judgement(pool.folder, key["teacher"], made, one.name, count, right / count)


def _made_with(pool: MadeImages) -> dict[str, Any]:
    """How a pool was made; what an adaptive cell added says to which pool."""
    found: dict[str, Any] = pool.key.get("added_to", pool.key)
    return found


def _check(one: Judge, pool: MadeImages) -> None:
    key, data = _made_with(pool), one.data
    shape = [data.channels, data.image_size, data.image_size]
    if key["image_shape"] != shape or max(key["classes"]) >= data.classes:
        raise UserError(
            f"'{one.name}' knows {data.classes} classes of images of {_sizes(shape)}, and these are of "
            f"{_sizes(key['image_shape'])}, of classes up to {max(key['classes'])}",
            where=str(pool.folder),
        )


def _sizes(shape: Sequence[int]) -> str:
    return "×".join(map(str, shape))


def _weights(spec: TeacherSpec, options: Options) -> Path:
    if spec.weights is not None:
        return locate(spec.weights, options.download)
    folder = teacher_folder(spec, options.runs)
    found = trained(folder)
    if found is None:
        raise UserError(
            f"the teacher '{spec.name}' is not there: a recipe trains it",
            where=str(folder),
            hint="run its recipe, or say with --runs which folder of runs holds it",
        )
    return found.file
