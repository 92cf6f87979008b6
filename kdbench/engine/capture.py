"""Stretches of steps recorded once and replayed: on a GPU, a whole step of all cells as one CUDA graph.

The first steps of a kind run as ever; they are the warm-up, after which all that lasts from step to step exists. Then
a step is recorded, which computes nothing, and from then on replayed. In between the host does what it always does.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from kdbench.engine.batches import MOST_STEPS
from kdbench.engine.cell import TrainingCell
from kdbench.engine.compute import Computing
from kdbench.engine.member import Member
from kdbench.engine.program import Group, Program, sets_of
from kdbench.engine.step import shared_part, train

log = logging.getLogger("kdbench")

# Steps that run eagerly before one is recorded: what compiles or chooses its kernels does so in them.
WARM = 4
# Recording takes about a second: fewer steps are not worth it.
FEWEST = 20

Call = Callable[[], None]


class Recorder(Protocol):
    """What can record a call."""

    def run(self, call: Call) -> None:
        """Run a call where recorded ones run."""
        ...

    def record(self, call: Call) -> Call:
        """Record a call, which computes nothing now. Returns what replays it."""
        ...

    def side_by_side(self, calls: Sequence[Call]) -> None:
        """Run calls that do not depend on each other, inside `run` or `record`."""
        ...

    def drawn(self) -> int:
        """A number that changes whenever something was drawn at random."""
        ...


class CudaRecorder:
    """CUDA graphs on a stream of their own; calls side by side have a stream each.

    Follows PyTorch's notes on CUDA graphs (docs.pytorch.org, notes/cuda).
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device)
        self.side: list[torch.cuda.Stream] = []
        # Graphs of one program never run at the same time.
        self.pool = torch.cuda.graph_pool_handle()

    def run(self, call: Call) -> None:
        here = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(here)
        with torch.cuda.stream(self.stream):
            call()
        here.wait_stream(self.stream)

    def record(self, call: Call) -> Call:
        torch.cuda.synchronize(self.device)
        graph = torch.cuda.CUDAGraph()
        # Other threads, such as those that decode pictures, may use the GPU meanwhile.
        with torch.cuda.graph(graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"):
            call()
        replay: Call = graph.replay
        return replay

    def side_by_side(self, calls: Sequence[Call]) -> None:
        here = torch.cuda.current_stream(self.device)
        while len(self.side) < len(calls):
            self.side.append(torch.cuda.Stream(self.device))
        for stream, call in zip(self.side, calls, strict=False):
            stream.wait_stream(here)
            with torch.cuda.stream(stream):
                call()
        for stream in self.side[: len(calls)]:
            here.wait_stream(stream)

    def drawn(self) -> int:
        index = self.device.index if self.device.index is not None else torch.cuda.current_device()
        return int(torch.cuda.default_generators[index].get_offset())


@dataclass
class Recording:
    """A recorded step.

    Attributes:
        shared: replays the groups' shared parts and all cells that draw nothing.
        alone: cells that draw at random, each with what replays it: its draws begin at an address of its own.
        images: how many each cell sees in a step.
        holds: what must live as long as this does: tensors that one graph leaves to another, and what the key names.
    """

    shared: Call = lambda: None
    alone: dict[TrainingCell, Call] = field(default_factory=dict)
    images: dict[TrainingCell, int] = field(default_factory=dict)
    holds: list[Any] = field(default_factory=list)


class CapturedProgram(Program):
    """Records the step of every kind of stretch once, and replays it.

    Attributes:
        eager: why stages run as ever. Failing to record never ends a run.
    """

    def __init__(self, groups: Sequence[Group], recorder: Recorder) -> None:
        super().__init__(groups)
        self.recorder = recorder
        self.recordings: dict[Any, Recording | None] = {}
        self.warmed: dict[Any, int] = {}
        self.drawing: set[TrainingCell] = set()
        self.eager: dict[tuple[Member, str], str] = {}
        self.done: set[tuple[Member, str]] = set()
        self._key: Any = None

    def prepare(self, cells: Collection[TrainingCell], most: int = MOST_STEPS) -> int:
        steps = super().prepare(cells, most)
        self._key = self._kind(cells)
        if self._key not in self.recordings and (why := self._why_not(cells, steps)):
            for cell in cells:
                self.eager.setdefault(_stage(cell), why)
            self._key = None
        return steps

    def step(self, cells: Collection[TrainingCell]) -> None:
        if self._key is None or self.recordings.get(self._key, 0) is None:
            super().step(cells)
        elif recording := self.recordings.get(self._key):
            self._replay(recording, cells)
        elif self.warmed.setdefault(self._key, 0) < WARM:
            self.warmed[self._key] += 1
            self._warm(cells)
        else:
            self.recordings[self._key] = self._record(cells)
            self.done |= set(map(_stage, cells)) if self.recordings[self._key] else set()
            self.step(cells)

    def replayed(self, member: Member) -> bool:
        return any(of is member for of, _ in self.done)

    def eager_stages(self, member: Member) -> dict[str, str]:
        own = {key: why for key, why in self.eager.items() if key[0] is member and key not in self.done}
        return {stage: why for (_, stage), why in own.items()}

    def _kind(self, cells: Collection[TrainingCell]) -> Any:
        """What makes two steps the same computation, on the same memory: the cells' stages, terms, optimizers' states
        and sources, and the sizes of their batches."""
        kinds: list[Any] = []
        for stage in (cell.member.stage for cell in cells):
            counting = tuple(tuple(turn.active) for turn in stage.turns)
            states = tuple(one.renewed for one in stage.optimizers)
            kinds.append((stage, counting, states, stage.source.memory() if stage.source else None))
        kinds += [group.batches.sizes(sets_of(members)) for group, members in self._present(cells)]
        return tuple(kinds)

    def _why_not(self, cells: Collection[TrainingCell], steps: int) -> str | None:
        """Why a stretch of these cells cannot be recorded, or is not worth it; None where it can."""
        for cell in cells:
            member = cell.member
            stage = member.stage
            if stage.source is not None and stage.source.by_step:
                return stage.source.by_step
            if not all(one.on_device for one in stage.optimizers):
                return "its optimizer takes its rates from the host"
            if stage.span.stop - member.step < FEWEST:
                return f"fewer than {FEWEST} steps are left of it"
        for group, _ in self._present(cells):
            if group.teacher is not None and group.teacher.logits_elsewhere(group.batches.device):
                return "its teacher's logits do not lie on the device"
        return None if steps > 1 else "every step of it is of another kind"

    def _warm(self, cells: Collection[TrainingCell]) -> None:
        """A step as recorded ones run, which also tells which cells draw at random."""
        images: dict[TrainingCell, int] = {}

        def call() -> None:
            for group, members in self._present(cells):
                sets, teacher_values = shared_part(group.batches, group.teacher, members)
                for cell in group.among(cells):
                    with cell.failures():
                        cell.member.before_step()
                        before = self.recorder.drawn()
                        images[cell] = train(cell.member, sets, teacher_values)
                        if self.recorder.drawn() != before:
                            self.drawing.add(cell)

        self._between(cells, lambda: self.recorder.run(call), images)

    def _record(self, cells: Collection[TrainingCell]) -> Recording | None:
        """The step of these cells, recorded; None where that fails, which is told."""
        recording = Recording(holds=[self._key])
        quiet = [cell for cell in cells if cell not in self.drawing]
        calls: dict[TrainingCell, Call] = {}

        def shared() -> None:
            for group, members in self._present(cells):
                sets, teacher_values = shared_part(group.batches, group.teacher, members)
                recording.holds += [sets, teacher_values]
                for cell in group.among(cells):
                    calls[cell] = lambda cell=cell, sets=sets, teacher_values=teacher_values: recording.images.update(  # type: ignore[misc]
                        {cell: train(cell.member, sets, teacher_values)}
                    )
            self.recorder.side_by_side([calls[cell] for cell in quiet])

        try:
            recording.shared = self.recorder.record(shared)
            for cell in cells:
                if cell in self.drawing:
                    recording.alone[cell] = self.recorder.record(lambda cell=cell: calls[cell]())  # type: ignore[misc]
        except (RuntimeError, ValueError) as error:
            why = f"recording failed: {next(iter(str(error).strip().splitlines()), type(error).__name__)}"
            for cell in cells:
                self.eager[_stage(cell)] = why
            log.warning("a step could not be recorded, so its stretch runs eagerly: %s", why)
            return None
        return recording

    def _replay(self, recording: Recording, cells: Collection[TrainingCell]) -> None:
        def run() -> None:
            recording.shared()
            for cell, replay in recording.alone.items():
                cell.member.before_step()
                replay()

        self._between(cells, run, recording.images)

    def _between(self, cells: Collection[TrainingCell], run: Call, images: dict[TrainingCell, int]) -> None:
        """What the host does before and after a step: feed the batches, count, share the time out."""
        begin = time.perf_counter()
        for group, members in self._present(cells):
            group.batches.feed(sets_of(members))
        run()
        for cell in cells:
            if cell.failure is None:
                cell.member.after_step(images[cell])
        for cell in cells:
            cell.member.log.seconds += (time.perf_counter() - begin) / len(cells)


def _stage(cell: TrainingCell) -> tuple[Member, str]:
    return cell.member, cell.member.stage.span.name


def program_of(groups: Sequence[Group], computing: Computing) -> Program:
    """The program that trains groups of cells as they are to be computed."""
    device = groups[0].batches.device
    if computing.cuda_graphs and device.type == "cuda":
        return CapturedProgram(groups, CudaRecorder(device))
    return Program(groups)
