"""What networks see in synthesized images: whether one that had no part in making them sees the classes that they were
made for (Yin et al., CVPR 2020, table 2)."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from kdbench.engine.analysis import Analysis, AnalysisRow, PixelLogits
from kdbench.engine.data.batch import at_once
from kdbench.errors import UserError, counted
from kdbench.methods.deep_inversion.made import POOL, MadeImages
from kdbench.recipe.model_specs import DataSpec
from kdbench.recipe.planning import teacher_of_card


@dataclass(frozen=True)
class Judge:
    """A network that is asked.

    Attributes:
        data: whose images it knows.
        classes: labels of those that it was trained on.
        place: a cell's run and folder: cells of two runs may have one name.
    """

    name: str
    data: DataSpec
    classes: frozenset[int]
    logits: PixelLogits
    place: str = ""


def judge(analysis: Analysis, *, by: str | list[str]) -> Iterator[AnalysisRow]:
    """Let networks classify synthesized images.

    Args:
        by: keys of teacher cards, or folders of finished cells.

    Yields:
        for each pool below the folders and each network what `judged` gives.

    Raises:
        UserError: no images below a folder; a network that is not there, or that knows none of the images.
    """
    # Pools first: who names the wrong folder need not have the networks at hand to be told.
    pools = pools_below(analysis.folders)
    judges: list[Judge] = []
    for name in dict.fromkeys([by] if isinstance(by, str) else by):
        judges += _students(Path(name), analysis) if Path(name).is_dir() else [_teacher(name, analysis)]
    named = Counter(one.name for one in judges)
    judges = [replace(one, name=f"{one.name} ({one.place})") if named[one.name] > 1 else one for one in judges]
    for name, pool in pools.items():
        batches = pool.whole()
        analysis.note("pools", name=name, batches=len(batches), sha256=pool.digest(batches))
    yield from judged(pools, judges, analysis.device, analysis.tell)


def pools_below(folders: Iterable[Path]) -> dict[str, MadeImages]:
    """All pools at or below folders that hold images, by their paths below these; in full where these are alike.

    Raises:
        UserError: a folder with none, or a pool that cannot be read.
    """
    found: dict[str, MadeImages] = {}
    for folder in dict.fromkeys(folders):
        files = sorted(folder.rglob(POOL)) if folder.is_dir() else []
        own = [pool for file in files if (pool := MadeImages.at(file.parent)).whole()]
        if not own:
            hint = "a recipe with a source of such images keeps them in runs/sources/synthesized"
            raise UserError("there are no synthesized images here", str(folder), hint)
        for pool in own:
            name = str(pool.folder.relative_to(folder)) if pool.folder != folder else folder.name
            found[str(pool.folder) if name in found else name] = pool
    if not found:
        raise UserError("there are no images to judge", hint="give a folder with synthesized images: runs/sources")
    return found


def _teacher(name: str, analysis: Analysis) -> Judge:
    spec, data = teacher_of_card(name, analysis.registry, "by")
    classes = frozenset(spec.known_classes or range(data.classes))
    return Judge(name, data, classes, analysis.teacher(spec, data)[0].logits)


def _students(folder: Path, analysis: Analysis) -> list[Judge]:
    """The students of all finished cells below a folder."""
    found = []
    for cell in analysis.cells_below(folder):
        spec = cell.spec
        # A student that began with a teacher's weights may know that teacher's classes too.
        begun = spec.teacher.known_classes if spec.teacher and spec.method.starts_from == "teacher" else None
        classes = frozenset([*(spec.data.only_classes or range(spec.data.classes)), *(begun or [])])
        place = f"{cell.record.recipe}/{cell.record.read_from.name}"
        found.append(Judge(cell.name, spec.data, classes, analysis.student(cell), place))
    return found


def judged(
    pools: Mapping[str, MadeImages], judges: Sequence[Judge], device: torch.device, tell: Callable[[str], None]
) -> Iterator[dict[str, Any]]:
    """Every pool by every network that takes such images and knows their classes.

    Images are judged as they were kept: pixel values that may leave [0, 1], each network with its own normalization.

    Yields:
        pool: its path below the folder that was named. maker: the model that the images were made from.
        judge: the network's name. images: of the pool.
        right: share in [0, 1] that the network classifies as what they were made for.
        classes: how many they were made for. And the settings with which they were made.

    Raises:
        UserError: a network that takes none of the pools.
    """
    unfit = [{name: _unfit(one, pool) for name, pool in pools.items()} for one in judges]
    for one, reasons in zip(judges, unfit, strict=True):
        if "" not in reasons.values():
            told = "; ".join(dict.fromkeys(reasons.values()))
            raise UserError(f"'{one.name}' can judge none of these images: {told}", where="by")
    for one, reasons in zip(judges, unfit, strict=True):
        for name, pool in pools.items():
            if reason := reasons[name]:
                tell(f"{one.name}: left out {name}, {reason}")
                continue
            tell(f"{one.name}: {name}")
            images, right = _right(one, pool, device)
            key = _made_with(pool)
            made = {"classes": len(key["classes"]), **pool.key.get("settings", key["settings"])}
            counts = {"images": images, "right": right / images}
            yield {"pool": name, "maker": key["teacher"], "judge": one.name, **counts, **made}


@torch.no_grad()
def _right(one: Judge, pool: MadeImages, device: torch.device) -> tuple[int, int]:
    """How many images a pool has, and how many of them a network classifies as what they were made for."""
    count = right = 0
    for batch in pool.whole():
        read = [values.to(device) for values in pool.read(batch)]
        images, labels = (values.split(at_once(device, read[0].shape[-1])) for values in read)
        for some, expected in zip(images, labels, strict=True):
            right += int((one.logits(some.float()).argmax(dim=1) == expected).sum())
            count += len(expected)
    return count, right


def _made_with(pool: MadeImages) -> dict[str, Any]:
    """How a pool was made; what an adaptive cell added says to which pool."""
    found: dict[str, Any] = pool.key.get("added_to", pool.key)
    return found


def _unfit(one: Judge, pool: MadeImages) -> str:
    """Why a network cannot judge a pool; nothing if it can."""
    key, data = _made_with(pool), one.data
    shape = [*data.image_shape]
    if key["image_shape"] != shape:
        return f"images of {_sizes(key['image_shape'])}, where it knows {_sizes(shape)}"
    if pool.key.get("data_classes", data.classes) != data.classes:
        return f"data of {counted(pool.key['data_classes'], 'class')}, where it knows {data.classes}"
    if unknown := sorted(set(key["classes"]) - one.classes):
        return f"classes that it was not trained on: {', '.join(map(str, unknown))}"
    return ""


def _sizes(shape: Sequence[int]) -> str:
    return "×".join(map(str, shape))
