"""The training loop: cells that share data, seed and teacher, side by side behind one teacher pass."""

from __future__ import annotations

import json
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from kdbench.engine import checkpoint
from kdbench.engine.anchors import keep
from kdbench.engine.batches import Batches
from kdbench.engine.build import where_raised
from kdbench.engine.compute import REFERENCE
from kdbench.engine.evaluation import evaluate, score
from kdbench.engine.log import MetricsLog
from kdbench.engine.member import Member, Teacher
from kdbench.engine.network import together
from kdbench.errors import CellError, UserError

PROGRESS_SECONDS = 0.25


@dataclass
class Seat:
    """A member's place in the cohort: its folder, its log, and why it left, if it did."""

    member: Member
    folder: Path
    key: dict[str, Any]
    log: MetricsLog
    failure: str | None = None
    recorded: bool = False

    @property
    def active(self) -> bool:
        return self.failure is None and not self.recorded


@dataclass
class Cohort:
    """Members with one data order. A member that fails or is finished leaves the others untouched.

    Args:
        report: called with (seat, None) for progress and (seat, metrics) after an evaluation.
        finish: called with a seat whose member is finished, to write its record.
        stop: asked before every step; True ends the loop after a checkpoint.
        checkpoint_seconds: time between checkpoints.
        tell: called with (seat, text) when a member does something long beside its steps.
    """

    seats: list[Seat]
    batches: Batches
    teacher: Teacher | None
    report: Callable[[Seat, dict[str, Any] | None], None]
    finish: Callable[[Seat], None]
    stop: Callable[[], bool]
    checkpoint_seconds: float = 60.0
    tell: Callable[[Seat, str], None] = lambda seat, text: None
    _reported: float = field(default=0.0, init=False)

    def run(self) -> bool:
        """Train all members to their end. False when stopped before that (everything is checkpointed)."""
        saved = time.monotonic()
        make_graphs([seat.member for seat in self.seats if seat.active], self.batches, self.teacher)
        while active := [seat for seat in self.seats if seat.active]:
            if self.stop():
                self.save()
                return False
            if due := next((seat for seat in active if seat.member.evaluation_due), None):
                with _failures(due):
                    self._evaluate(due)
            elif due := next((seat for seat in active if seat.member.route_due), None):
                with _failures(due):
                    self._keep(due)
            elif done := next((seat for seat in active if seat.member.finished), None):
                with _failures(done):
                    self.finish(done)
                done.recorded = True
            else:
                # Members resume each from their own checkpoint: those that are behind catch up alone.
                step = min(seat.member.step for seat in active)
                now = [seat for seat in active if seat.member.step == step]
                if not self.step(now, step):
                    self.save()
                    return False
                self._tell(now)
            if time.monotonic() - saved >= self.checkpoint_seconds:
                self.save()
                saved = time.monotonic()
        return True

    def _tell(self, seats: list[Seat]) -> None:
        due = time.monotonic() - self._reported >= PROGRESS_SECONDS
        for seat in seats:
            if seat.failure is not None or due:
                self._reported = time.monotonic()
                self.report(seat, None)
                due = False

    def step(self, seats: list[Seat], step: int) -> bool:
        """One optimizer step of each of these members, behind one teacher pass. False when stopped before it."""
        if not all(self._ready(seat) for seat in seats):
            return False
        seats = [seat for seat in seats if seat.failure is None]
        if not seats:
            return True
        begin = time.perf_counter()
        names = dict.fromkeys(name for seat in seats for name in seat.member.shared_sets())
        sets = self.batches.sets(step, seats[0].member.timeline, names)
        values = self.teacher.step(sets, asked_of_teacher(seat.member for seat in seats)) if self.teacher else {}
        shared = time.perf_counter() - begin
        for seat in seats:
            begin = time.perf_counter()
            with _failures(seat):
                seat.member.train_step({name: sets[name] for name in seat.member.shared_sets()}, values)
            seat.member.seconds += time.perf_counter() - begin + shared / len(seats)
        return True

    def _ready(self, seat: Seat) -> bool:
        """Let a member prepare its step. False when it was stopped before it could."""
        begin, done = time.perf_counter(), True
        with _failures(seat):
            done = seat.member.ready(lambda text: self.tell(seat, text), self.stop)
        if done:
            # What was stopped is lost, as with a kill: whoever resumes spends the time again.
            seat.member.seconds += time.perf_counter() - begin
        return done

    def _evaluate(self, seat: Seat) -> None:
        member = seat.member
        self._settle()
        begin = time.perf_counter()
        member.check_finite()
        meter, member.meter = member.meter, type(member.meter)()
        train = meter.result()
        # The step just done may have ended a stage; what was trained since the last point belongs to that stage.
        span = member.timeline.spans[member.timeline.stage(member.step - 1)]
        measured = evaluate(member, self.batches, self.teacher)
        since = member.history[-1]["seconds"] if member.history else 0.0
        entry = {
            "step": member.step,
            "epoch": round(member.timeline.epochs(member.step), 4),
            "stage": span.name,
            "lr": member.last_rate,
            "train": train,
            **measured,
            "images_per_second": round(meter.images / max(member.seconds - since, 1e-9), 1),
            "seconds": round(member.seconds, 4),
        }
        member.history.append(entry)
        seat.log.append(entry)
        member.evaluation_seconds += time.perf_counter() - begin
        self.report(seat, entry)

    def _keep(self, seat: Seat) -> None:
        """Keep a checkpoint of the seat's route."""
        member, validation = seat.member, self.batches.validation
        begin = time.perf_counter()
        member.check_finite()
        member.student.model.eval()
        measured = score(member, validation)[0] if len(validation) else None
        member.set_modes()
        epoch = member.timeline.epochs(member.step)
        keep(seat.folder, member.kept, member.student.model, member.step, epoch, measured)
        member.evaluation_seconds += time.perf_counter() - begin

    def _settle(self) -> None:
        """Wait for the steps that a GPU still has before it: they are training, not the evaluation that follows."""
        if self.batches.device.type != "cuda":
            return
        begin = time.perf_counter()
        torch.cuda.synchronize(self.batches.device)
        active = [seat for seat in self.seats if seat.active]
        for seat in active:
            seat.member.seconds += (time.perf_counter() - begin) / len(active)

    def save(self) -> None:
        """Write the checkpoints of all members that are still training."""
        for seat in self.seats:
            if seat.active:
                with _failures(seat):
                    checkpoint.save(seat.folder, {"key": seat.key, **seat.member.state()})


def asked_of_teacher(members: Iterable[Member]) -> dict[str, list[str]]:
    """What members need of their shared teacher at their present step: input set -> hook points."""
    asked: dict[str, dict[str, None]] = {}
    for member in members:
        for name, points in member.teacher_points().items():
            asked.setdefault(name, {}).update(dict.fromkeys(points))
    return {name: list(points) for name, points in asked.items()}


def make_graphs(members: list[Member], batches: Batches, teacher: Teacher | None) -> None:
    """Make the graphs of all networks, where they pay: one of each network for all that its users ask of it."""
    shape = (batches.batch_size, *batches.image_shape)
    by_student: dict[str, list[Member]] = {}
    for member in members:
        student = member.spec.student
        by_student.setdefault(json.dumps([student.target, student.options], sort_keys=True), []).append(member)
    for alike in by_student.values():
        uses = together(member.student_uses() for member in alike)
        for member in alike:
            member.student.prepare(uses, shape, training=True)
    if teacher is not None:
        teacher.network.prepare(_teacher_uses(members, teacher), shape, training=False)


def _teacher_uses(members: list[Member], teacher: Teacher) -> dict[frozenset[str], int]:
    """Sets of hook points that will be asked of the teacher's network, and for how many steps yet."""
    ends = sorted({span.stop for member in members for span in member.timeline.spans})
    uses: dict[frozenset[str], int] = {}
    begin = min((member.step for member in members), default=0)
    for end in (end for end in ends if end > begin):
        asked: dict[str, set[str]] = {}
        for member in (member for member in members if begin < member.timeline.total):
            for name, points in member.teacher_points(begin).items():
                asked.setdefault(name, set()).update(points)
        for name, of_set in asked.items():
            found = frozenset(of_set - ({"logits"} if teacher.logits is not None and name == "data" else set()))
            uses[found] = uses.get(found, 0) + end - begin
        begin = end
    return uses


class _failures:
    """Turns an exception of one member into its failure; the others go on."""

    def __init__(self, seat: Seat) -> None:
        self.seat = seat

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> bool:
        if error is None or not isinstance(error, Exception):
            return False
        if isinstance(error, CellError | UserError):
            self.seat.failure = str(error)
            return True
        way = self.seat.member.computing
        hint = "" if way == REFERENCE else f"; it was computed in {way.name}: does it run with compute=reference?"
        trace_file = self.seat.folder / "error.txt"
        trace_file.write_text("".join(traceback.format_exception(error)), encoding="utf-8")
        self.seat.failure = f"{type(error).__name__}: {error} {where_raised(error)}; the whole is in {trace_file}{hint}"
        return True
