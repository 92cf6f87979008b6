"""What networks say of made images: whether one that had no part in making them sees the classes they were made for."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from kdbench.engine.batches import SLICE
from kdbench.engine.options import Options
from kdbench.engine.teachers import load_teacher
from kdbench.errors import UserError
from kdbench.methods.bss.analysis import Classifier, student_of, weights_of
from kdbench.methods.deep_inversion.made import POOL, MadeImages
from kdbench.recipe.networks import teacher_alone
from kdbench.recipe.recorded import cell_of
from kdbench.recipe.specs import DataSpec
from kdbench.record import read_records, student_file
from kdbench.registry import Registry


@dataclass(frozen=True)
class Judgement:
    """Of one pool by one network.

    Attributes:
        pool: its path below the folder that was asked for. maker: the model that the images were made from.
        settings: how they were made, and of how many classes.
        judge: the network's name. images: of the pool. right: share in [0, 1] that it classifies as they were made for.
    """

    pool: str
    maker: str
    settings: dict[str, Any]
    judge: str
    images: int
    right: float


@dataclass(frozen=True)
class Judge:
    """A network that may be asked.

    Attributes:
        data: whose images it knows. classes: labels of those that it was trained on.
        weights: the file of its weights.
        load: gives its logits of pixel values, on a device.
    """

    name: str
    data: DataSpec
    classes: frozenset[int]
    weights: Path
    load: Callable[[torch.device], Classifier]


def pools_in(folders: Iterable[Path]) -> dict[str, MadeImages]:
    """All pools at or below folders that hold images, by their paths below these.

    Raises:
        UserError: a folder with none, or a pool that cannot be read.
    """
    found: dict[str, MadeImages] = {}
    for folder in folders:
        own = {}
        for file in sorted(folder.rglob(POOL)) if folder.is_dir() else []:
            if (pool := MadeImages.at(file.parent)).whole():
                below = str(file.parent.relative_to(folder))
                own[folder.name if below == "." else below] = pool
        if not own:
            raise UserError(
                "there are no made images here",
                where=str(folder),
                hint="pools lie in runs/sources/synthesized, once a recipe with a source of images was run",
            )
        found |= own
    return found


def teacher_as_judge(name: str, registry: Registry, options: Options) -> Judge:
    """The teacher of a card. UserError where its weights are not to be had."""
    spec, data = teacher_alone(name, registry, "--by")
    file = weights_of(spec, options)
    classes = frozenset(spec.known_classes or range(data.classes))
    return Judge(name, data, classes, file, lambda device: load_teacher(spec, data, file, device).network.logits)


def students_as_judges(folder: Path, options: Options) -> list[Judge]:
    """The students of all finished cells below a folder."""
    found, registry = [], Registry(options.registries)
    for record in read_records([folder]):
        spec = cell_of(record.spec, registry, str(record.folder))
        others = [f"{path} {value}" for path, value in record.cell.axes.items() if not path.startswith("method")]
        name = ", ".join([record.cell.label, *others, f"seed {record.cell.seed}"])
        # A student that began with a teacher's weights may know that teacher's classes too.
        begun = spec.teacher.known_classes if spec.teacher and spec.method.starts_from == "teacher" else None
        classes = frozenset([*(spec.data.only_classes or range(spec.data.classes)), *(begun or [])])
        load = functools.partial(student_of, record, spec, options.registries)
        found.append(Judge(name, spec.data, classes, student_file(record), load))
    return found


def judge(
    pools: Mapping[str, MadeImages], judges: Sequence[Judge], device: torch.device, tell: Callable[[str], None]
) -> Iterator[Judgement]:
    """Every pool by every network that takes such images and knows their classes.

    Images are judged as they were kept: pixel values that may leave [0, 1], each network with its own normalization.

    Raises:
        UserError: a network that takes none of the pools.
    """
    fitting = {one.name: [name for name, pool in pools.items() if not _strange(one, pool)] for one in judges}
    for one in judges:
        if not fitting[one.name]:
            reasons = dict.fromkeys(_strange(one, pool) for pool in pools.values())
            raise UserError(f"'{one.name}' can judge none of these images: {'; '.join(reasons)}", where="--by")
    for one in judges:
        see = one.load(device)
        for name, pool in pools.items():
            if name not in fitting[one.name]:
                tell(f"{one.name}: left out {name}, {_strange(one, pool)}")
                continue
            tell(f"{one.name}: {name}")
            right = count = 0
            for batch in pool.whole():
                images, labels = (part.to(device) for part in pool.read(batch))
                for part, expected in zip(
                    images.float().split(SLICE[device.type]), labels.split(SLICE[device.type]), strict=True
                ):
                    with torch.no_grad():
                        right += int((see(part).argmax(dim=1) == expected).sum())
                    count += len(expected)
            key = _made_with(pool)
            made = {"classes": len(key["classes"]), **pool.key.get("settings", key["settings"])}
            yield Judgement(name, key["teacher"], made, one.name, count, right / count)


def _made_with(pool: MadeImages) -> dict[str, Any]:
    """How a pool was made; what an adaptive cell added says to which pool."""
    found: dict[str, Any] = pool.key.get("added_to", pool.key)
    return found


def _strange(one: Judge, pool: MadeImages) -> str:
    """Why a network cannot judge a pool; nothing if it can."""
    key, data = _made_with(pool), one.data
    shape = [data.channels, data.image_size, data.image_size]
    if key["image_shape"] != shape:
        return f"images of {_sizes(key['image_shape'])}, where it knows {_sizes(shape)}"
    if pool.key.get("data_classes", data.classes) != data.classes:
        return f"data of {pool.key['data_classes']} classes, where it knows {data.classes}"
    if unknown := sorted(set(key["classes"]) - one.classes):
        return f"classes that it was not trained on: {', '.join(map(str, unknown))}"
    return ""


def _sizes(shape: Sequence[int]) -> str:
    return "×".join(map(str, shape))
