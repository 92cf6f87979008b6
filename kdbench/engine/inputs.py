"""Batch sources: what makes a stage's input sets beside those of the data set, or in their place.

A source is built once for a stage of a cell and asked at every step. It sees both networks but never trains them, draws
by address like everything else, and keeps nothing in memory that a resumed cell could not have again.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch

from kdbench.engine.data.batch import MOST_STEPS, Batch, Sets
from kdbench.engine.networks.network import Network
from kdbench.engine.targets import code_of, import_target
from kdbench.engine.terms import Values
from kdbench.recipe.method_specs import SourceSpec
from kdbench.recipe.specs import CellSpec


@dataclass(frozen=True)
class SourceFiles:
    """Where a source keeps its files, and whose they are.

    Attributes:
        teacher_sha256: of the teacher's weights ("" where unknown).
        folder: the cell's own; None for cells that only try something out.
        shared: where to keep what several cells may use.
    """

    teacher_sha256: str = ""
    folder: Path | None = None
    shared: Path | None = None


@dataclass(frozen=True)
class SourceContext:
    """What a source is built with.

    Attributes:
        spec: the cell. stage: the name of the source's stage.
        teacher: frozen, in eval mode; None for a cell without one.
    """

    spec: CellSpec
    stage: str
    device: torch.device
    teacher: Network | None
    files: SourceFiles = SourceFiles()


@dataclass(frozen=True)
class SourceStep:
    """What a source is given at a step.

    Attributes:
        step: of the cell. progress: of the stage, in [0, 1).
        student: in train mode or as the stage says; a source that changes the mode need not restore it.
        begin, end: the cell's steps between which the stage lies, the last one left out.
        sets: the input sets that its card reads. values: network -> set -> "logits" on them.
        ahead: it is only looked at, before its time has come: nothing that lasts may come of it.
    """

    step: int
    progress: float
    student: Network
    begin: int = 0
    end: int = 0
    sets: Sets = field(default_factory=dict)
    values: Mapping[str, Values] = field(default_factory=dict)
    ahead: bool = False


@dataclass(frozen=True)
class Cost:
    """What a source takes beside its stage's own passes, at most.

    Attributes:
        teacher, student: images that pass a network while the stage trains, forward and back to the images.
        operations: floating-point operations of networks of its own while the stage trains.
        prepared: such images of the teacher before any cell trains. key: of what is prepared: the largest of one key
            serves all cells that have it.
        at_once: images in the largest of these passes.
        held: bytes that it keeps on the device while the cell trains.
        times: images in each of its sets, for each of the batch.
    """

    teacher: float = 0.0
    student: float = 0.0
    operations: float = 0.0
    prepared: float = 0.0
    key: str = ""
    at_once: int = 0
    held: int = 0
    times: int = 1


class Source(ABC):
    """A card's target is a subclass, built with a SourceContext first and its options as keywords.

    Attributes:
        streams: names of the streams that it draws from, for the record.
        by_step: why the host must act at every step, so that its stage cannot run in stretches; None where it need not.
    """

    streams: ClassVar[tuple[str, ...]] = ()
    by_step: str | None = "its class does not say that a stretch of steps can do without the host"

    @classmethod  # noqa: B027 - most have nothing to prepare
    def prepare(
        cls, context: SourceContext, tell: Callable[[str], None], stopping: Callable[[], bool], **options: Any
    ) -> None:
        """Make what cells share, before any of them trains: in files under `files.shared`, resumable, once.

        Args:
            tell: is told what is being done, now and then. stopping: asked now and then; True: leave, to resume later.
        """

    def ready(self, now: SourceStep, tell: Callable[[str], None], stopping: Callable[[], bool]) -> bool:
        """Make what takes long and the coming steps need, while a stop is still possible: asked before a stretch.

        Args:
            now: the stretch's first step, without sets and values.
            tell: is told what is being done. stopping: asked now and then; True: leave as if it had not been begun.

        Returns:
            False when stopped. The steps are not taken then, and a resumed cell asks again.
        """
        return True

    def stretch(self, now: SourceStep) -> int:
        """For how many steps what `ready` made will hold. Asked right after it."""
        return 1 if self.by_step else MOST_STEPS

    def memory(self) -> Any:
        """What tells whether its sets still come from the same memory: a recorded step is made anew when it changes."""
        return None

    @abstractmethod
    def sets(self, now: SourceStep) -> dict[str, Batch]:
        """The input sets of a step that the card says it gives. Unless the host acts at every step, this reads no value
        from the device, makes no tensor of the host's, and uses nothing of `now` but `student`, `sets`, `values`."""

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


def build_source(spec: SourceSpec, context: SourceContext) -> Source:
    with code_of(f"source '{spec.name}' ({spec.target})", spec.target):
        source: Source = import_target(spec.target)(context, **spec.options)
    return source
