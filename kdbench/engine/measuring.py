"""What a network knows of a test part, looked at once and kept; and what about that should make its user doubt."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field

from kdbench.cards import TEACHER_TOLERANCE
from kdbench.engine.batch import SLICE, Split
from kdbench.engine.teacher import Teacher
from kdbench.errors import UserError
from kdbench.files import write_json
from kdbench.reading import of_form, read_json

log = logging.getLogger("kdbench")

Percent = Annotated[float, Field(ge=0, le=100, strict=True)]
# Percentage points that another order of classes must bring before it is told.
_MORE = 5.0


@dataclass(frozen=True)
class Seen:
    """Of a network's answers on a test part, in percent.

    accuracy: of right ones. reordered: what it would be if every output stood for the class that it answers most, where
    these are all different ones; None where they are not. unused: how many of the part's classes it never answers.
    """

    accuracy: Percent
    reordered: Percent | None = None
    unused: Annotated[int, Field(ge=0)] = 0


@torch.no_grad()
def look(teacher: Teacher, part: Split, classes: int) -> Seen:
    """A network's answers on a part of so many classes."""
    device = part.labels.device
    counts = torch.zeros(classes * classes, dtype=torch.int64, device=device)
    for images, labels in part.slices(SLICE[device.type]):
        answers = teacher(images, ["logits"])["logits"].argmax(dim=1)
        counts += torch.bincount(answers * classes + labels, minlength=classes * classes)
    table = counts.view(classes, classes)
    used = table.sum(dim=1) > 0
    most, meant = table[used].max(dim=1)
    n = len(part.labels)
    different = len(meant.unique()) == len(meant)
    return Seen(
        round(100 * int(table.trace()) / n, 4),
        round(100 * int(most.sum()) / n, 4) if different else None,
        int((~used & (table.sum(dim=0) > 0)).sum()),
    )


def kept(file: Path, key: dict[str, Any], about: dict[str, Any], measure: Callable[[], Seen]) -> Seen:
    """What was seen before under the same key, else what is measured now, which is kept in the file.

    Args:
        about: is kept beside it, and does not count.
    """
    if file.exists():
        try:
            found = read_json(file)
            seen = of_form(Seen, {field.name: found.get(field.name) for field in fields(Seen)}, str(file))
            if all(found.get(name) == value for name, value in key.items()):
                return seen
        except UserError as error:
            log.warning("%s; the teacher is measured again", str(error))
    seen = measure()
    write_json(file, {**about, **key, **asdict(seen)})
    return seen


def doubts(name: str, seen: Seen, classes: int, expected: tuple[float, str] | None, partial: bool) -> list[str]:
    """What its user should know of a teacher before it teaches.

    Args:
        expected: an accuracy that is on record for it, and where.
        partial: it is known not to have learned all classes.
    """
    found = []
    chance = 100 / classes
    if classes > 1 and seen.accuracy < min(2 * chance, chance + 10):
        found.append(f"it is near chance, {chance:.2f} %")
    if seen.reordered is not None and seen.reordered > seen.accuracy + _MORE:
        found.append(
            f"with its outputs in another order it would have {seen.reordered:.2f} %: are the classes of its training "
            "in the order of these data?"
        )
    if seen.unused and not partial:
        found.append(f"it never answers {seen.unused} of the {classes} classes")
    if expected is not None and abs(seen.accuracy - expected[0]) > TEACHER_TOLERANCE:
        found.append(f"{expected[1]} says {expected[0]:.2f} %")
    return [f"the teacher '{name}' reaches {seen.accuracy:.2f} % with the input that it gets here: {f}" for f in found]
