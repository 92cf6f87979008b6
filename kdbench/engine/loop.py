"""The training loop: the cells of a program side by side."""

import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from kdbench.engine import checkpoint
from kdbench.engine.cell import TrainingCell, time_of
from kdbench.engine.data.batch import MOST_STEPS
from kdbench.engine.evaluation import PARTS, scores
from kdbench.engine.program import Program, make_graphs
from kdbench.engine.teachers.anchors import keep_checkpoint

logger = logging.getLogger("kdbench")

PROGRESS_SECONDS = 0.25


@dataclass
class TrainingLoop:
    """Cells that train side by side. One that fails or is finished leaves the others untouched.

    Args:
        program: that runs their steps.
        report: called with a cell for progress, and after an evaluation.
        finish: called with a cell whose member is finished, to write its record.
        stop: asked before every step; True ends the loop after a checkpoint.
        checkpoint_seconds: time between checkpoints.
        tell: called with (cell, text) when a member does something long beside its steps.
    """

    program: Program
    report: Callable[[TrainingCell], None]
    finish: Callable[[TrainingCell], None]
    stop: Callable[[], bool]
    checkpoint_seconds: float = 60.0
    tell: Callable[[TrainingCell, str], None] = lambda cell, text: None
    _reported: float = field(default=0.0, init=False)
    _saved: float = field(default=0.0, init=False)

    def run(self) -> bool:
        """Train all members to their end. False when stopped before that (everything is checkpointed)."""
        self._saved = time.monotonic()
        if members := [cell.member for cell in self.program.cells if cell.active]:
            make_graphs(members)
        while active := [cell for cell in self.program.cells if cell.active]:
            # Members resume each from their own checkpoint: those that are behind catch up alone.
            step = min(cell.member.step for cell in active)
            if not self._due(active) and not self._stretch([c for c in active if c.member.step == step]):
                self.save()
                return False
            if time.monotonic() - self._saved >= self.checkpoint_seconds:
                self.save()
        return True

    def _due(self, cells: Sequence[TrainingCell]) -> bool:
        """Do what comes before the next step: an evaluation, a checkpoint of a route, a record. False when nothing."""
        if self.stop():
            return False
        for due, act in (
            (lambda cell: cell.member.evaluation_due, self._evaluate),
            (lambda cell: cell.member.route_due, self._keep),
            (lambda cell: cell.member.finished, self._finish),
        ):
            for cell in cells:
                if due(cell):
                    with cell.failures():
                        act(cell)
                    return True
        return False

    def _stretch(self, cells: list[TrainingCell]) -> bool:
        """A stretch of steps of cells that are at the same step. False when stopped."""
        for cell in cells:
            if self.stop() or not self._ready(cell):
                return False
        # Up to where others wait: from there on they go together.
        ahead = [cell.member.step - cells[0].member.step for cell in self.program.cells if cell.active]
        most = min((steps for steps in ahead if steps > 0), default=MOST_STEPS)
        for _ in range(self._prepare([cell for cell in cells if cell.active], most)):
            cells = [cell for cell in cells if cell.active]
            if self.stop():
                return False
            self.program.step(cells)
            self._progress(cells)
            if not all(cell.active for cell in cells) or time.monotonic() - self._saved >= self.checkpoint_seconds:
                break
        return True

    def _prepare(self, cells: list[TrainingCell], most: int) -> int:
        """Prepare the next steps of cells, which is a part of their training; how many these are."""
        if not cells:
            return 0
        self._settle()
        with time_of(cells):
            steps = self.program.prepare(cells, most)
        self._progress([cell for cell in cells if cell.failure is not None])
        return steps if any(cell.active for cell in cells) else 0

    def _ready(self, cell: TrainingCell) -> bool:
        """Let a member prepare its next steps. False when it was stopped before it could."""
        begin, done = time.perf_counter(), True
        with cell.failures():
            done = cell.member.ready(lambda text: self.tell(cell, text), self.stop)
        if done:
            # What was stopped is lost, as with a kill: whoever resumes spends the time again.
            cell.member.log.seconds += time.perf_counter() - begin
        if cell.failure is not None:
            self._progress([cell])
        return done

    def _progress(self, cells: Sequence[TrainingCell]) -> None:
        due = time.monotonic() - self._reported >= PROGRESS_SECONDS
        for cell in cells:
            if cell.failure is not None or due:
                self._reported = time.monotonic()
                self.report(cell)
                due = False

    def _evaluate(self, cell: TrainingCell) -> None:
        member, log = cell.member, cell.member.log
        self._settle()
        begin = time.perf_counter()
        member.check_finite()
        train, images = member.meter.result(), member.meter.images
        member.meter.clear()
        # The step just done may have ended a stage; what was trained since the last point belongs to that stage.
        span = member.timeline.spans[member.timeline.stage(member.step - 1)]
        measured = self.program.evaluate(cell)
        for part in (part for part in PARTS if part in measured):
            # A student may come back from that, as batch norms do; what has ended has no accuracy then.
            if member.finished and not math.isfinite(measured[part]["loss"]):
                raise member.diverged(max(member.step - 1, 0), f"{part}/loss", trained=True)
        known = log.history[-1].get("unmeasured", {}) if log.history else {}
        for metric, points in measured.get("unmeasured", {}).items():
            if metric not in known:
                logger.warning("%s: the metric '%s' has no value: %s", cell.folder, metric, [*points.values()][0])
        since = log.history[-1]["seconds"] if log.history else 0.0
        entry = {
            "step": member.step,
            "epoch": round(member.timeline.epochs(member.step), 4),
            "stage": span.name,
            "lr": log.rate,
            "train": train,
            **measured,
            "images_per_second": round(images / max(log.seconds - since, 1e-9), 1),
            "seconds": round(log.seconds, 4),
        }
        log.history.append(entry)
        member.keep_best()
        assert cell.metrics_log is not None
        cell.metrics_log.append(entry)
        log.evaluation_seconds += time.perf_counter() - begin
        self.report(cell)

    def _keep(self, cell: TrainingCell) -> None:
        """Keep a checkpoint of the cell's route."""
        self._settle()
        member, validation = cell.member, cell.member.batches.validation
        begin = time.perf_counter()
        member.check_finite()
        member.set_modes(evaluating=True)
        measured = scores(member.answers, validation).plain() if len(validation) else None
        member.set_modes()
        epoch = member.timeline.epochs(member.step)
        keep_checkpoint(cell.folder, member.log.route, member.student.model, member.step, epoch, measured)
        member.log.evaluation_seconds += time.perf_counter() - begin

    def _finish(self, cell: TrainingCell) -> None:
        self.finish(cell)
        cell.recorded = True

    def _settle(self) -> None:
        """Wait for the steps that a GPU still has before it: they are training, not the evaluation that follows."""
        device = self.program.cohorts[0].batches.device
        if device.type == "cuda":
            with time_of([cell for cell in self.program.cells if cell.active]):
                torch.cuda.synchronize(device)

    def save(self) -> None:
        """Write the checkpoints of all members that are still training."""
        self._settle()
        for cell in self.program.cells:
            if cell.active:
                with cell.failures():
                    assert cell.metrics_log is not None
                    cell.metrics_log.flush()
                    checkpoint.save(cell.folder, {"key": cell.key, **cell.member.state()})
        self._saved = time.monotonic()
