"""Stretches of steps recorded once and replayed: on a GPU, a whole step of all cells as one CUDA graph.

The first steps of a kind run as ever; they are the warm-up, after which all that lasts from step to step exists. Then
a step is recorded, which computes nothing, and from then on replayed. In between the host does what it always does.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch

from kdbench.engine.batches import MOST_STEPS, Sets
from kdbench.engine.cell import TrainingCell
from kdbench.engine.compute import Computing
from kdbench.engine.member import Member
from kdbench.engine.program import Group, Program, sets_of
from kdbench.engine.step import shared_part, train
from kdbench.engine.teacher import PointValues

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


@dataclass(frozen=True)
class Recording:
    """A recorded step.

    Attributes:
        shared: replays what the cells share, and all cells that draw nothing.
        alone: cells that draw at random, each with what replays it: its draws begin at an address of its own.
        images: how many each cell sees in a step.
        calls: what was recorded. They hold what one graph leaves to another, and must live as long.
    """

    shared: Call
    alone: dict[TrainingCell, Call]
    images: dict[TrainingCell, int]
    calls: tuple[Call, dict[TrainingCell, Call]]


class CapturedProgram(Program):
    """Records the step of every kind of stretch once, and replays it.

    Attributes:
        recordings: by the kind of stretch; None where recording failed, which never ends a run.
        eager: why stages run as ever. done: stages of which a step was recorded.
    """

    def __init__(self, groups: Sequence[Group], recorder: Recorder) -> None:
        super().__init__(groups)
        self.recorder = recorder
        self.recordings: dict[Any, Recording | None] = {}
        self.warmed: dict[Any, int] = {}
        self.drawing: set[TrainingCell] = set()
        self.eager: dict[tuple[Member, str], str] = {}
        self.done: set[tuple[Member, str]] = set()
        # Of the present stretch; None where it is not to be recorded.
        self._kind: Any = None

    def prepare(self, cells: Collection[TrainingCell], most: int = MOST_STEPS) -> int:
        steps = super().prepare(cells, most)
        present = [cell for cell in cells if cell.active]
        self._kind = self._kind_of(present)
        if self._kind not in self.recordings and (why := self._why_not(present, steps)):
            for cell in present:
                self.eager.setdefault(_stage(cell), why)
            self._kind = None
        return steps

    def step(self, cells: Collection[TrainingCell]) -> None:
        kind = self._kind
        if kind is not None and kind not in self.recordings:
            if self.warmed.setdefault(kind, 0) < WARM:
                self.warmed[kind] += 1
                self._warm(cells)
                return
            self.recordings[kind] = self._record(cells)
        recording = self.recordings.get(kind)
        if recording is None:
            super().step(cells)
        else:
            self._replay(recording, cells)

    def replayed(self, member: Member) -> bool:
        return any(of is member for of, _ in self.done)

    def eager_stages(self, member: Member) -> dict[str, str]:
        own = {key: why for key, why in self.eager.items() if key[0] is member and key not in self.done}
        return {stage: why for (_, stage), why in own.items()}

    def _kind_of(self, cells: Collection[TrainingCell]) -> Any:
        """What makes two steps the same computation, on the same memory: the cells' stages, terms, optimizers' states
        and sources, and the sizes of their batches."""
        kinds: list[Any] = []
        for stage in (cell.member.stage for cell in cells):
            active = tuple(tuple(turn.active) for turn in stage.turns)
            states = tuple(one.renewed for one in stage.optimizers)
            kinds.append((stage, active, states, stage.source.memory() if stage.source else None))
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

    def _calls(
        self, cells: Collection[TrainingCell], images: dict[TrainingCell, int]
    ) -> tuple[Call, dict[TrainingCell, Call]]:
        """A step of these cells: a call for what they share, and then one for each cell, which notes its images."""
        parts: dict[TrainingCell, tuple[Sets, PointValues]] = {}

        def shared() -> None:
            for group, members in self._present(cells):
                part = shared_part(group.batches, group.teacher, members)
                parts.update(dict.fromkeys(group.among(cells), part))

        def trained(cell: TrainingCell) -> None:
            images[cell] = train(cell.member, *parts[cell])

        return shared, {cell: partial(trained, cell) for cell in cells}

    def _warm(self, cells: Collection[TrainingCell]) -> None:
        """A step as recorded ones run, which also tells which cells draw at random."""
        images: dict[TrainingCell, int] = {}
        shared, own = self._calls(cells, images)

        def watched(cell: TrainingCell) -> None:
            with cell.failures():
                cell.member.before_step()
                before = self.recorder.drawn()
                own[cell]()
                if self.recorder.drawn() != before:
                    self.drawing.add(cell)

        def step() -> None:
            shared()
            self.recorder.side_by_side([partial(watched, cell) for cell in cells])

        self._between(cells, lambda: self.recorder.run(step), images)

    def _record(self, cells: Collection[TrainingCell]) -> Recording | None:
        """The step of these cells, recorded; None where that fails, which is told."""
        images: dict[TrainingCell, int] = {}
        shared, own = self._calls(cells, images)

        def together() -> None:
            shared()
            self.recorder.side_by_side([own[cell] for cell in cells if cell not in self.drawing])

        try:
            replay = self.recorder.record(together)
            alone = {cell: self.recorder.record(own[cell]) for cell in cells if cell in self.drawing}
        except (RuntimeError, ValueError) as error:
            why = f"recording failed: {next(iter(str(error).strip().splitlines()), type(error).__name__)}"
            self.eager |= dict.fromkeys(map(_stage, cells), why)
            log.warning("a step could not be recorded, so its stretch runs eagerly: %s", why)
            return None
        self.done |= set(map(_stage, cells))
        return Recording(replay, alone, images, (together, own))

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
            if cell.active:
                cell.member.after_step(images[cell])
        each = (time.perf_counter() - begin) / len(cells)
        for cell in cells:
            cell.member.log.seconds += each


def _stage(cell: TrainingCell) -> tuple[Member, str]:
    return cell.member, cell.member.stage.span.name


def program_of(groups: Sequence[Group], computing: Computing) -> Program:
    """The program that trains groups of cells as they are to be computed."""
    device = groups[0].batches.device
    if computing.cuda_graphs and device.type == "cuda":
        return CapturedProgram(groups, CudaRecorder(device))
    return Program(groups)
