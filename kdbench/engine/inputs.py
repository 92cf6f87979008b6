"""Batch sources: what makes a stage's input sets beside those of the data set, or in their place.

A source is built once for a stage of a cell and asked at every step. It sees both networks but never trains them, draws
by address like everything else, and keeps nothing in memory that a resumed cell could not have again.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from kdbench.engine.batches import Batch, Normalizer, Sets
from kdbench.engine.build import Values, resolve
from kdbench.engine.network import Network
from kdbench.recipe.schema import CellSpec, SourceSpec


@dataclass(frozen=True)
class Eyes:
    """A network as a source sees it: gradients may go to its images, never to its weights."""

    network: Network
    normalizer: Normalizer

    def logits(self, images: Tensor) -> Tensor:
        """Logits of bytes or pixel values on the scale of [0, 1], in float32, in the mode that the network is in."""
        return self.network(self.normalizer(images), ["logits"])["logits"]


@dataclass(frozen=True)
class Workplace:
    """What a source is built with.

    Attributes:
        spec: the cell. stage: the name of the source's stage.
        teacher: frozen, in eval mode; None for a cell without one. teacher_sha256: of its weights ("" where unknown).
        folder: the cell's own; None for cells that only try something out.
        shared: where to keep what several cells may use.
    """

    spec: CellSpec
    stage: str
    device: torch.device
    teacher: Eyes | None
    teacher_sha256: str = ""
    folder: Path | None = None
    shared: Path | None = None


@dataclass(frozen=True)
class Moment:
    """What a source is given at a step.

    Attributes:
        step: of the cell. progress: of the stage, in [0, 1).
        sets: the input sets that its card reads. values: network -> set -> "logits" on them.
        student: in train mode or as the stage says; a source that changes the mode need not restore it.
        begin, end: the cell's steps between which the stage lies, the last one left out.
        ahead: it is only looked at, before its time has come: nothing that lasts may come of it.
    """

    step: int
    progress: float
    sets: Sets
    values: Mapping[str, Values]
    student: Eyes
    begin: int = 0
    end: int = 0
    ahead: bool = False


@dataclass(frozen=True)
class Cost:
    """What a source takes beside its stage's own passes, at most.

    Attributes:
        teacher, student: images that pass a network while the stage trains, forward and back to the images.
        prepared: such images of the teacher before any cell trains. key: of what is prepared: the largest of one key
            serves all cells that have it.
        at_once: images in the largest of these passes.
        held: bytes that it keeps on the device while the cell trains.
    """

    teacher: float = 0.0
    student: float = 0.0
    prepared: float = 0.0
    key: str = ""
    at_once: int = 0
    held: int = 0


class Source(ABC):
    """A card's target is a subclass, built with a Workplace first and its options as keywords.

    Attributes:
        streams: names of the streams that it draws from, for the record.
    """

    streams: ClassVar[tuple[str, ...]] = ()

    @classmethod  # noqa: B027 - most have nothing to prepare
    def prepare(
        cls, place: Workplace, tell: Callable[[str], None], stopping: Callable[[], bool], **options: Any
    ) -> None:
        """Make what cells share, before any of them trains: in files under `place.shared`, resumable, once.

        Args:
            tell: is told what is being done, now and then. stopping: asked now and then; True: leave, to resume later.
        """

    def ready(self, moment: Moment, tell: Callable[[str], None], stopping: Callable[[], bool]) -> bool:
        """Make what takes long and the coming step needs, while a stop is still possible: asked once before each step.

        Args:
            moment: without sets and values.
            tell: is told what is being done. stopping: asked now and then; True: leave as if it had not been begun.

        Returns:
            False when stopped. The step is not taken then, and a resumed cell asks again.
        """
        return True

    @abstractmethod
    def sets(self, moment: Moment) -> dict[str, Batch]:
        """The input sets of a step that the card says it gives."""

    def cost(self, steps: int) -> Cost:
        """What a stage of so many steps takes, for estimates of time and memory."""
        return Cost()

    def state(self) -> dict[str, Any]:
        """What a resumed cell needs beside what lies in files, as tensors and plain data."""
        return {}

    def load_state(self, state: dict[str, Any]) -> None:  # noqa: B027 - most have no state
        """Go on from `state`."""

    def record(self) -> dict[str, Any]:
        """What a finished cell's record says of it, as plain data."""
        return {}


def build_source(spec: SourceSpec, place: Workplace) -> Source:
    source: Source = resolve(spec.target)(place, **spec.options)
    return source
