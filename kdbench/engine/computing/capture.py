"""Stretches of steps recorded once and replayed: on a GPU, a whole step of all cells as one CUDA graph.

The first steps of a kind run as ever; they are the warm-up, after which all that lasts from step to step exists. Then
a step is recorded, which computes nothing, and from then on replayed. In between the host does what it always does.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from kdbench.engine.cell import TrainingCell
from kdbench.engine.computing.compute import Computing
from kdbench.engine.computing.recorder import Call, CudaRecorder
from kdbench.engine.data.batch import MOST_STEPS, Sets
from kdbench.engine.evaluation import Measurement, evaluate
from kdbench.engine.member import Member
from kdbench.engine.program import Cohort, Program
from kdbench.engine.step import input_sets, sets_of, teacher_pass, train
from kdbench.engine.teachers.teacher import PointValues
from kdbench.errors import first_line

logger = logging.getLogger("kdbench")

# Steps that run eagerly before one is recorded. In the first of them kernels are compiled and chosen, and what lasts
# from step to step is made.
WARM = 2
# Recording takes about a second: fewer steps are not worth it.
FEWEST = 20


@dataclass(frozen=True)
class Recording:
    """A recorded step.

    Attributes:
        shared: replays what the cells share, and all cells that are in no other call.
        alone: cells that draw at random, each with what replays it: its draws begin at an address of its own. And cells
            that cannot be recorded, each with its step itself.
        images: how many each cell sees in a step.
        calls: what was recorded. They hold what one graph leaves to another, and must live as long.
    """

    shared: Call
    alone: dict[TrainingCell, Call]
    images: dict[TrainingCell, int]
    calls: tuple[list[SharedPart], dict[TrainingCell, Call]]


@dataclass(frozen=True)
class RecordedEvaluation:
    """An evaluation, and what replays it: what it found lies in the same memory every time."""

    measurement: Measurement
    replay: Call


class SharedPart:
    """What the cells of a cohort share in a step, and who has to wait for what.

    Attributes:
        sets: the input sets, as they were made last.
    """

    def __init__(self, cohort: Cohort, members: Collection[Member], recorder: CudaRecorder) -> None:
        self.cohort, self.members, self.recorder = cohort, members, recorder
        self.sets: Sets = {}
        self._values: PointValues = {}
        self._wait: Call | None = None

    def begin(self) -> None:
        """Make the input sets."""
        self.sets = input_sets(self.cohort.batches, self.members)

    def teach(self) -> None:
        """The teacher's pass. Students may begin theirs meanwhile."""
        self._values = teacher_pass(self.cohort.teacher, self.sets, self.members)
        self._wait = self.recorder.so_far()

    def taught(self) -> PointValues:
        if self._wait is not None:
            self._wait()
        return self._values

    def end(self) -> None:
        """Nobody has to wait any more."""
        self._wait = None


class CapturedProgram(Program):
    """Records the step of every kind of stretch once, and replays it; and each cell's evaluation.

    Attributes:
        recordings: by the kind of stretch; None where recording failed, which never ends a run.
        apart: cells of the present stretch that cannot be recorded, and why. They take their steps after the others'.
        unrecordable: stages of cells whose recording failed, and why.
        eager: why stages run as ever. done: stages of which a step was recorded.
        evaluated: kinds of evaluations that there were. evaluations: those that are recorded; None where that failed.
    """

    def __init__(self, cohorts: Sequence[Cohort], recorder: CudaRecorder) -> None:
        super().__init__(cohorts)
        self.recorder = recorder
        self.recordings: dict[Any, Recording | None] = {}
        self.warmed: dict[Any, int] = {}
        self.drawing: set[TrainingCell] = set()
        self.apart: dict[TrainingCell, str] = {}
        self.unrecordable: dict[tuple[Member, str], str] = {}
        self.eager: dict[tuple[Member, str], str] = {}
        self.done: set[tuple[Member, str]] = set()
        self.evaluated: set[Any] = set()
        self.evaluations: dict[Any, RecordedEvaluation | None] = {}
        # Of the present stretch; None where it is not to be recorded.
        self._kind: Any = None

    def prepare(self, cells: Collection[TrainingCell], most: int = MOST_STEPS) -> int:
        steps = super().prepare(cells, most)
        present = [cell for cell in cells if cell.active]
        self.apart = {
            cell: why for cell in present if (why := self.unrecordable.get(_stage(cell)) or _why_apart(cell.member))
        }
        self.eager |= {_stage(cell): why for cell, why in self.apart.items()}
        self._kind = self._kind_of(present)
        if not any(kind[0] == self._kind for kind in self.recordings) and (why := self._why_not(present)):
            self._kind = None
            for cell in present:
                self.eager.setdefault(_stage(cell), why)
        return steps

    def step(self, cells: Collection[TrainingCell]) -> None:
        self.feed(cells)
        if self._kind is None:
            self.take(cells)
            return
        kind = (self._kind, *(cohort.batches.sizes(sets_of(members)) for cohort, members in self._present(cells)))
        if kind not in self.recordings:
            if self.warmed.setdefault(kind, 0) < WARM:
                self.warmed[kind] += 1
                self._warm(cells)
                return
            self.recordings[kind] = self._record(cells)
            if self.recordings[kind] is not None:
                self._drop_before(kind)
        recording = self.recordings[kind]
        if recording is None:
            self.take(cells)
        else:
            self._between(cells, recording.shared, recording.alone, recording.images)

    def eager_stages(self, member: Member) -> dict[str, str]:
        """Stages of a member whose steps could not be replayed, and why."""
        own = {key: why for key, why in self.eager.items() if key[0] is member and key not in self.done}
        return {stage: why for (_, stage), why in own.items()}

    def _kind_of(self, cells: Collection[TrainingCell]) -> Any:
        """What makes two steps with batches of one size the same computation, on the same memory: the cells' stages,
        terms, optimizers' states and sources."""
        kinds: list[Any] = []
        for stage in (cell.member.stage for cell in cells):
            active = tuple(tuple(turn.active) for turn in stage.turns)
            states = tuple(one.renewed for one in stage.optimizers)
            kinds.append((stage, active, states, stage.source.memory() if stage.source else None))
        return tuple(kinds)

    def _drop_before(self, kind: Any) -> None:
        """Drop recordings of the same steps on memory that a source has left: it does not come back to that."""

        def but_for_memory(one: Any) -> Any:
            return [cell[:3] for cell in one[0]], one[1:]

        for old in [one for one in self.recordings if one != kind and but_for_memory(one) == but_for_memory(kind)]:
            del self.recordings[old]

    def _why_not(self, cells: Collection[TrainingCell]) -> str:
        """Why a stretch of these cells cannot be recorded, or is not worth it; "" where it can."""
        if self.apart and len(self.apart) == len(cells):
            return next(iter(self.apart.values()))
        for cohort, _ in self._present(cells):
            if cohort.teacher is not None and cohort.teacher.logits_elsewhere(cohort.batches.device):
                return "its teacher's logits do not lie on the device"
        if min(cell.member.stage.span.stop - cell.member.step for cell in cells) < FEWEST:
            return f"fewer than {FEWEST} steps are left of it"
        return ""

    def _calls(
        self, cells: Collection[TrainingCell], images: dict[TrainingCell, int]
    ) -> tuple[list[SharedPart], dict[TrainingCell, Call]]:
        """A step of these cells: what each cohort shares, and a call for each cell, which notes its images."""
        parts: dict[TrainingCell, SharedPart] = {}
        for cohort, members in self._present(cells):
            part = SharedPart(cohort, members, self.recorder)
            parts.update(dict.fromkeys(cohort.among(cells), part))

        def trained(cell: TrainingCell) -> None:
            images[cell] = train(cell.member, parts[cell].sets, parts[cell].taught)

        return [*dict.fromkeys(parts.values())], {cell: partial(trained, cell) for cell in cells}

    def _side_by_side(self, parts: Sequence[SharedPart], own: Sequence[Call]) -> None:
        """What cohorts share, with the steps of cells beside their teachers' passes."""
        self.recorder.side_by_side([part.begin for part in parts])
        self.recorder.side_by_side([*(part.teach for part in parts), *own])
        for part in parts:
            part.end()

    def _warm(self, cells: Collection[TrainingCell]) -> None:
        """A step as recorded ones run, which also tells which cells draw at random."""
        images: dict[TrainingCell, int] = {}
        parts, own = self._calls(cells, images)

        def watched(cell: TrainingCell) -> None:
            with cell.failures():
                cell.member.before_step()
                before = self.recorder.drawn()
                own[cell]()
                if self.recorder.drawn() != before:
                    self.drawing.add(cell)

        def step() -> None:
            self._side_by_side(parts, [partial(watched, cell) for cell in cells if cell not in self.apart])

        alone = {cell: own[cell] for cell in cells if cell in self.apart}
        self._between(cells, partial(self.recorder.run, step), alone, images)

    def _record(self, cells: Collection[TrainingCell]) -> Recording | None:
        """The step of these cells, recorded; None where that fails, which is told.

        A cell whose own step fails is put apart, and the others are recorded without it.
        """
        images: dict[TrainingCell, int] = {}
        parts, own = self._calls(cells, images)
        apart = {cell: own[cell] for cell in cells if cell in self.apart}
        drawing = [cell for cell in cells if cell in self.drawing and cell not in apart]
        at_work: list[TrainingCell] = []

        def recorded(cell: TrainingCell) -> None:
            at_work.append(cell)
            own[cell]()
            at_work.remove(cell)

        def together() -> None:
            with_others = [cell for cell in cells if cell not in apart and cell not in drawing]
            self._side_by_side(parts, [partial(recorded, cell) for cell in with_others])

        try:
            replay = self.recorder.record(together)
            alone = {cell: self.recorder.record(partial(recorded, cell)) for cell in drawing}
        except Exception as error:  # noqa: BLE001 - whatever a recording does not bear, eager steps do or tell
            why = f"recording failed: {_root_cause(error)}"
            failed = at_work or cells
            self.eager |= dict.fromkeys(map(_stage, failed), why)
            logger.warning("a step could not be recorded, so it runs eagerly: %s", why)
            if not at_work or len(apart) + len(at_work) == len(cells):
                return None
            self.unrecordable |= dict.fromkeys(map(_stage, at_work), why)
            self.apart |= dict.fromkeys(at_work, why)
            return self._record(cells)
        for cell in (cell for cell in cells if cell not in apart):
            self.done.add(_stage(cell))
            cell.member.log.replayed = True
        # Their images are known after their step.
        images |= dict.fromkeys(apart, 0)
        return Recording(replay, alone | apart, images, (parts, own))

    def _between(
        self,
        cells: Collection[TrainingCell],
        together: Call,
        alone: dict[TrainingCell, Call],
        images: dict[TrainingCell, int],
    ) -> None:
        """A step of all, with what the host does after it: count, share the time out."""
        begin = time.perf_counter()
        own: dict[TrainingCell, float] = {}
        together()
        for cell, call in alone.items():
            alone_since = time.perf_counter()
            with cell.failures():
                cell.member.before_step()
                call()
            own[cell] = time.perf_counter() - alone_since
        for cell in cells:
            if cell.active:
                cell.member.after_step(images[cell])
        each = (time.perf_counter() - begin - sum(own.values())) / len(cells)
        for cell in cells:
            cell.member.log.seconds += each + own.get(cell, 0.0)

    def evaluate(self, cell: TrainingCell) -> dict[str, Any]:
        return evaluate(cell.member, partial(self._measured, cell))

    def evaluations_replayed(self, member: Member) -> bool:
        """Whether evaluations of a member were replayed."""
        return any(kind[0].member is member and recorded for kind, recorded in self.evaluations.items())

    def _measured(self, cell: TrainingCell, measurement: Measurement) -> Measurement:
        """A cell's first evaluation runs as ever, the next is recorded where more are to come, all others replayed."""
        kind = (cell, measurement.stages, _memory(cell.member))
        if kind in self.evaluated and kind not in self.evaluations and measurement.resident and _more_to_come(cell):
            self.evaluations[kind] = self._recorded(measurement)
        self.evaluated.add(kind)
        recorded = self.evaluations.get(kind)
        if recorded is None:
            self.recorder.run(measurement.compute)
            return measurement
        recorded.replay()
        return recorded.measurement

    def _recorded(self, measurement: Measurement) -> RecordedEvaluation | None:
        try:
            recorded = RecordedEvaluation(measurement, self.recorder.record(measurement.compute))
            if measurement.metrics is not None and measurement.metrics.failed:
                raise RuntimeError(next(iter(measurement.metrics.failed.values())))
            return recorded
        except Exception as error:  # noqa: BLE001 - whatever a recording does not bear, the evaluation itself does
            logger.warning("an evaluation could not be recorded, so it runs eagerly: %s", _root_cause(error))
            return None


def _why_apart(member: Member) -> str | None:
    """Why steps of a member cannot be recorded, whatever the others do; None where they can."""
    if member.stage.by_step:
        return member.stage.by_step
    if not all(one.on_device for one in member.stage.optimizers):
        return "its optimizer takes its rates from the host"
    return None


def _more_to_come(cell: TrainingCell) -> bool:
    """Whether it pays to record an evaluation: at least two are left."""
    return sum(at > cell.member.step for at in cell.member.timeline.evaluations) >= 2


def _memory(member: Member) -> tuple[int, ...]:
    """Where all lies that an evaluation reads of a member: a recording of it is of no use elsewhere."""
    return tuple(t.data_ptr() for module in member.modules.all for t in (*module.parameters(), *module.buffers()))


def _root_cause(error: BaseException) -> str:
    """What an error says, or what came before it: a recording that fails tells only that it ended badly."""
    while error.__context__ is not None:
        error = error.__context__
    return first_line(error)


def _stage(cell: TrainingCell) -> tuple[Member, str]:
    return cell.member, cell.member.stage.span.name


def program_of(cohorts: Sequence[Cohort], computing: Computing) -> Program:
    """The program that trains cohorts as they are to be computed."""
    device = cohorts[0].batches.device
    if computing.cuda_graphs and device.type == "cuda":
        return CapturedProgram(cohorts, CudaRecorder(device))
    return Program(cohorts)
