"""A stretch of steps that are the same computation, and what the host does before and between them."""

import json
import time
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from kdbench.engine.cell import TrainingCell, time_of
from kdbench.engine.data.batch import MOST_STEPS, Sets
from kdbench.engine.data.batches import Batches
from kdbench.engine.evaluation import evaluate
from kdbench.engine.member import Member
from kdbench.engine.stage import union
from kdbench.engine.step import sets_of, shared_part, train
from kdbench.engine.teachers.teacher import Taught, Teacher
from kdbench.models.points import place_of_gradient


@dataclass(eq=False)
class Cohort:
    """Cells with one data order, side by side behind one teacher pass."""

    batches: Batches
    teacher: Teacher | None
    cells: list[TrainingCell]

    def among(self, cells: Collection[TrainingCell]) -> list[TrainingCell]:
        """Its cells that are among these."""
        return [cell for cell in self.cells if cell in cells]


class Program:
    """Runs stretches of steps of cells that are at the same step, one after the other.

    Args:
        cohorts: of all cells; those of several seeds may train in one program.
    """

    def __init__(self, cohorts: Sequence[Cohort]) -> None:
        self.cohorts = cohorts

    def prepare(self, cells: Collection[TrainingCell], most: int = MOST_STEPS) -> int:
        """Put what the coming steps need on the device. A cell for which that fails leaves the others untouched.

        Args:
            most: steps, at most.

        Returns:
            how many steps can be taken before the host has to act again.
        """
        for cohort, members in self._present(cells):
            most = min(most, cohort.batches.seek(members[0].step, members[0].timeline, sets_of(members)))
        for cell in cells:
            with cell.failures():
                most = max(cell.member.steps_alike(most), 1)
        for cell in cells:
            with cell.failures():
                cell.member.prepare(most)
        return most

    def step(self, cells: Collection[TrainingCell]) -> None:
        """One step of these cells. One that fails leaves the others untouched."""
        self.feed(cells)
        self.take(cells)

    def feed(self, cells: Collection[TrainingCell]) -> None:
        """The host's part of the coming step's batches."""
        with time_of(cells):
            for cohort, members in self._present(cells):
                cohort.batches.feed(sets_of(members))

    def take(self, cells: Collection[TrainingCell]) -> None:
        """A step on batches that were fed."""
        for cohort, members in self._present(cells):
            begin = time.perf_counter()
            sets, taught = shared_part(cohort.batches, cohort.teacher, members)
            shared = (time.perf_counter() - begin) / len(members)
            for cell in cohort.among(cells):
                begin = time.perf_counter()
                with cell.failures():
                    cell.member.before_step()
                    cell.member.after_step(self.train(cell.member, sets, taught))
                cell.member.log.seconds += time.perf_counter() - begin + shared

    def train(self, member: Member, sets: Sets, taught: Taught) -> int:
        """A member's part of a step; how many images it saw."""
        return train(member, sets, taught)

    def evaluate(self, cell: TrainingCell) -> dict[str, Any]:
        """Metrics of a cell at its present step, as `Measurement.plain` gives them."""
        return evaluate(cell.member)

    @property
    def cells(self) -> list[TrainingCell]:
        return [cell for cohort in self.cohorts for cell in cohort.cells]

    def cohort_of(self, cell: TrainingCell) -> Cohort:
        return next(cohort for cohort in self.cohorts if cell in cohort.cells)

    def _present(self, cells: Collection[TrainingCell]) -> Iterator[tuple[Cohort, list[Member]]]:
        """Cohorts that have some of these cells, with their members."""
        for cohort in self.cohorts:
            if members := [cell.member for cell in cohort.among(cells)]:
                yield cohort, members


def make_graphs(members: Sequence[Member]) -> None:
    """Make the graphs of all networks and losses, where they pay: one of each network for all that its users ask of it.

    Args:
        members: of all cohorts of a program: batches of all have one shape, and all have one teacher's network.
    """
    batches = members[0].batches
    here = batches.ranks.share(batches.batch_size)
    shape = (here.stop - here.start, *batches.image_shape)
    by_student: dict[str, list[Member]] = {}
    for member in members:
        student = member.spec.student
        by_student.setdefault(
            json.dumps([student.target, student.options, student.image_size], sort_keys=True), []
        ).append(member)
    for alike in by_student.values():
        uses = sum((member.student_uses() for member in alike), Counter[frozenset[str]]())
        for member in alike:
            member.student.prepare(uses, shape, training=True)
    if (teacher := next((member.teacher for member in members if member.teacher), None)) is not None:
        teacher.network.prepare(_teacher_uses(members, teacher), shape, training=False)
    # Each operation of an eager loss goes through memory: a seventh of the time of five methods together on an H200.
    for member in (one for one in members if one.computing.compile and one.device.type == "cuda"):
        for span in (span for span in member.timeline.spans if span.steps >= member.computing.worth):
            for term in member.modules.terms_of(span.name).values():
                term.compile_loss(shape[0])


def _teacher_uses(members: Sequence[Member], teacher: Teacher) -> Counter[frozenset[str]]:
    """Sets of hook points that may be asked of a graph of the teacher's network, and for how many steps yet."""
    ends = sorted({span.stop for member in members for span in member.timeline.spans})
    uses: Counter[frozenset[str]] = Counter()
    begin = min((member.step for member in members), default=0)
    for end in (end for end in ends if end > begin):
        asked = union(member.teacher_uses(begin) for member in members if begin < member.timeline.total)
        for name, points in asked.items():
            plain = frozenset(point for point in points if place_of_gradient(point) is None)
            uses[plain - ({"logits"} if teacher.logits is not None and name == "data" else set())] += end - begin
        begin = end
    return uses
