"""Trains the cells of a `TrainCells` task, from their folders to their records."""

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from kdbench.data.pictures import AnyData
from kdbench.engine import checkpoint
from kdbench.engine.cell import TrainingCell
from kdbench.engine.computing.capture import CapturedProgram, program_of
from kdbench.engine.computing.choosing import NO_COMPILER, possible
from kdbench.engine.computing.memory import peak_memory
from kdbench.engine.data.batches import Batches
from kdbench.engine.evaluation import scores
from kdbench.engine.finish import finish, machine
from kdbench.engine.inputs import SourceFiles
from kdbench.engine.log import MetricsLog
from kdbench.engine.loop import TrainingLoop
from kdbench.engine.member import Member
from kdbench.engine.networks.network import Network
from kdbench.engine.program import Cohort, Program
from kdbench.engine.ranks import LOST, Ranks
from kdbench.engine.scheduling import Begun, begin
from kdbench.engine.teachers.loading import fingerprint
from kdbench.engine.together import Together
from kdbench.engine.workers import messages
from kdbench.engine.workers.materials import Materials, taught_first
from kdbench.engine.workers.pool import LEAVE_SECONDS
from kdbench.errors import CellError, UserError, failure
from kdbench.files import CHECKPOINT, disk_full, locked, sweep
from kdbench.models.points import any_gradient
from kdbench.record import Record, finished_record

# How long to wait for a cell's folder: an orphan of a killed run holds it only until it has left.
LOCK_SECONDS = 2 * LEAVE_SECONDS

# Why a network does not run as a graph whose gradients a loss reads.
_TWICE = "a loss reads gradients of a network, and a compiled graph cannot be differentiated twice"

Emit = Callable[[messages.Event], None]


def train_cells(
    task: messages.TrainCells, materials: Materials, emit: Emit, stopping: Callable[[], bool], ranks: Ranks
) -> None:
    """Train a program's cells. Cells' failures are told as events; the others go on.

    Args:
        ranks: that train it together, all of which call this.
    """
    with ExitStack() as locks:
        for cell in task.cells:
            taken = UserError(f"another process works in {cell.folder}", hint="wait for it, or stop it")
            locks.enter_context(locked(cell.folder / ".cell.lock", LOCK_SECONDS, taken))
            sweep(cell.folder)
        cells = [cell for cell in task.cells if not _finished_meanwhile(cell, emit)]
        if not cells:
            return
        training = ranks.all_well(lambda: Training(task, cells, materials, emit, ranks), lambda built: built.alike())
        stop = stopping if ranks.size == 1 else ranks.agreed(stopping, training.state)
        loop = TrainingLoop(
            training.program,
            training.report,
            training.finish,
            stop,
            materials.settings.checkpoint_seconds,
            lambda cell, text: emit(messages.Doing(text=text, cell=training.cells[cell].id)),
        )
        try:
            loop.run()
            # Where ranks have come apart at the very end, they all learn of it.
            stop()
        except SystemExit as end:
            # All but the cell that was in the middle of a step. A GPU that waits for a lost rank never gets there.
            if end.code != LOST or materials.device.type == "cpu":
                loop.save()
            raise
        for trained, of in training.cells.items():
            if trained.failure is not None:
                emit(messages.CellFailed(cell=of.id, message=trained.failure))


class Training:
    """Builds the cells of a program, tells how they get on, and writes their records.

    Attributes:
        cells: what trains -> its part of the task; those that could not be built are told and left out.
    """

    def __init__(
        self, task: messages.TrainCells, cells: list[messages.CellTask], materials: Materials, emit: Emit, ranks: Ranks
    ) -> None:
        materials.code.check(task)
        self.task, self.emit, self.device, self.ranks = task, emit, materials.device, ranks
        self.computing = possible(task.computing, self.device)
        if self.computing.compile != task.computing.compile:
            emit(messages.Announcement(text=f"warning: {NO_COMPILER}"))
        first = taught_first(cell.spec for cell in cells)
        self.domains: tuple[AnyData, AnyData | None] = materials.domains(first)
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        self.file = materials.teacher_file(first, task.teacher_folder)
        self.teacher = materials.teacher(first, self.file, self.computing)
        self.table, self.logits = materials.logits([cell.spec for cell in cells], self.file, self.teacher, task.logits)
        self.untouched = fingerprint(self.teacher.network.model) if self.teacher else None
        self.cells: dict[TrainingCell, messages.CellTask] = {}
        self._logits_on: dict[Batches, Tensor] = {}
        seeds = dict.fromkeys(cell.spec.seed for cell in cells)
        cohorts = [self._cohort([cell for cell in cells if cell.spec.seed == seed]) for seed in seeds]
        self.program = Together(cohorts, ranks) if ranks.size > 1 else program_of(cohorts, self.computing)

    def _cohort(self, cells: list[messages.CellTask]) -> Cohort:
        """Cells of one seed, built; those that could not be are told."""
        first = taught_first(cell.spec for cell in cells)
        batches = Batches(first, self.domains[0], self.device, self.domains[1], self.ranks)
        teacher = self.teacher
        if teacher is not None and self.logits is not None:
            # Every seed may have another training part, whose images are in other places of the table.
            teacher = teacher.with_logits(self.logits, batches.positions)
        cohort = Cohort(batches, teacher, [])
        for cell in cells:
            begin(cell.folder, Begun(threads=self.task.threads, logits=self.table))
            try:
                built = self._built(cell, cohort)
            except (CellError, UserError) as error:
                self.emit(messages.CellFailed(cell=cell.id, message=str(error)))
            except (Exception, SystemExit) as error:  # noqa: BLE001 - one cell's user code must not end the others
                self.emit(messages.CellFailed(cell=cell.id, message=str(disk_full(error) or failure(error))))
            else:
                cohort.cells.append(built)
                self.cells[built] = cell
        return cohort

    def _built(self, cell: messages.CellTask, cohort: Cohort) -> TrainingCell:
        """A cell of a cohort, from its checkpoint if there is one."""
        spec, (data, target) = cell.spec, self.domains
        teacher, file = (cohort.teacher, self.file) if spec.teacher is not None else (None, None)
        key = {
            "identity": spec.identity(),
            "data": data.fingerprint,
            **({"target": target.fingerprint} if target else {}),
            "threads": self.task.threads,
            "computing": self.computing.plain(),
            "device": self.device.type,
            "teacher": file.sha256 if file else None,
            **({"sync_batch_norm": True} if self.ranks.sync_batch_norm else {}),
        }
        files = SourceFiles(file.sha256 if file else "", cell.folder, self.task.shared)
        member = Member(spec, cohort.batches, teacher, self.device, self.computing, files)
        name = f"{spec.method.label}, seed {spec.seed}"
        state = checkpoint.load(
            cell.folder, key, member.state(), lambda text: self.emit(messages.Announcement(text=f"{name}: {text}"))
        )
        if state is not None:
            try:
                member.load_state(state)
            except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
                kept = cell.folder / CHECKPOINT
                raise CellError(
                    f"{kept} does not fit this cell ({error}): remove it, and the cell starts again"
                ) from None
        before = member.log.ranks or ([1] if state is not None else [])
        if [self.ranks.size] != (before or [1])[-1:]:
            member.log.ranks = [*before, self.ranks.size]
        return TrainingCell(member, cell.folder, key, MetricsLog(cell.folder, member.log.history))

    def report(self, cell: TrainingCell) -> None:
        """Tell how far all cells are that are still training."""
        for other, of in self.cells.items():
            if other.failure is not None:
                if other is cell:
                    self.emit(messages.CellFailed(cell=of.id, message=other.failure))
            elif other.active or other is cell:
                member = other.member
                self.emit(
                    messages.Progress(
                        cell=of.id,
                        step=member.step,
                        total=member.timeline.total,
                        stage=member.stage.span.name,
                        accuracy=member.log.history[-1]["test"]["accuracy"] if member.log.history else None,
                    )
                )

    def alike(self) -> list[Any]:
        """What must be the same on all ranks: the data, and which cells could be built."""
        return [[d.fingerprint for d in self.domains if d is not None], [cell.id for cell in self.cells.values()]]

    def state(self) -> list[int]:
        """How far every cell is, -1 for those that no longer train."""
        return [cell.member.step if cell.active else -1 for cell in self.cells]

    def _teacher_logits(self, member: Member) -> Tensor | None:
        """The teacher's on a member's test part, for which another seed may hold out other images; None of a teacher of
        other classes."""
        spec, batches = member.spec.teacher, member.batches
        if member.teacher is None or self.file is None or spec is None or spec.classes is not None:
            return None
        if batches not in self._logits_on:
            self._logits_on[batches] = scores(member.teacher.network, batches.test).logits
        return self._logits_on[batches]

    def finish(self, cell: TrainingCell) -> None:
        """Write a cell's files and its record.

        Raises:
            CellError: a frozen teacher is not what it was.
        """
        member = cell.member
        if member.teacher is not None and fingerprint(member.teacher.network.model) != self.untouched:
            raise CellError(
                "the frozen teacher changed while its students trained: a defect of the method's loss, or of kdbench"
            )
        if member.anchors is not None:
            member.anchors.check()
        compute = {
            **machine(self.device, self.task.threads),
            **way_of(member, self.program),
            "cohort": len(self.program.cohort_of(cell).cells),
            **({"seeds_together": len(self.program.cohorts)} if len(self.program.cohorts) > 1 else {}),
            "peak_memory_bytes": peak_memory(self.device),
            **({"ranks": member.log.ranks} if member.log.ranks else {}),
            **({"sync_batch_norm": True} if self.ranks.sync_batch_norm else {}),
        }
        assert cell.metrics_log is not None
        # A record makes the folder whole: all else stands there before.
        cell.metrics_log.close()
        record = finish(
            member,
            cell.folder,
            self.cells[cell].names,
            self.domains,
            self.file if member.teacher else None,
            self._teacher_logits(member),
            compute,
        )
        self.emit(_finished(self.cells[cell], record))


def _finished_meanwhile(cell: messages.CellTask, emit: Emit) -> bool:
    """Whether an orphan of a killed run finished a cell while this task waited for its folder."""
    record = finished_record(cell.folder)
    if record is None:
        return False
    emit(_finished(cell, record))
    return True


def _finished(cell: messages.CellTask, record: Record) -> messages.CellFinished:
    return messages.CellFinished(cell=cell.id, accuracy=record.result.test.last, seconds=record.compute.seconds)


def way_of(member: Member, program: Program) -> dict[str, Any]:
    """How a member was computed, as its record says it."""
    way, teacher = member.computing, member.teacher
    asks = any("logits" in member.teacher_uses(span.start).get("data", []) for span in member.timeline.spans)
    networks: list[Network] = [member.student, *([teacher.network] if teacher else [])]
    terms = [term for span in member.timeline.spans for term in member.modules.terms_of(span.name).values()]
    failed = [network.untraceable for network in networks] + [term.not_compiled for term in terms]
    failed += [_TWICE] if way.compile and any(map(any_gradient, member.points_read)) else []
    not_compiled = "; ".join(dict.fromkeys(filter(None, failed)))
    recorded = program if isinstance(program, CapturedProgram) else None
    eager = recorded.eager_stages(member) if recorded else {}
    return {
        "precision": way.precision,
        "layout": way.layout,
        # Where a way with graphs was chosen, but no stage here is long enough for one, there are none.
        "compile": member.compiled,
        "cuda_graphs": member.log.replayed,
        "teacher_logits": "table" if asks and teacher is not None and teacher.logits is not None else "computed",
        "evaluation": f"float32, {'replayed' if recorded and recorded.evaluations_replayed(member) else 'eager'}",
        **({"not_compiled": not_compiled} if not_compiled else {}),
        **({"eager": eager} if eager else {}),
    }
