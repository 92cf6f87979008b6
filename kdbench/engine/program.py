"""A stretch of steps that are the same computation, and what the host does before and between them."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Sequence

from kdbench.engine.batches import Batches
from kdbench.engine.cell import TrainingCell
from kdbench.engine.member import Member
from kdbench.engine.network import together
from kdbench.engine.step import shared_part, train
from kdbench.engine.teacher import Teacher


class Program:
    """Runs stretches of steps of members that are at the same step.

    Args:
        batches, teacher: that the members share.
    """

    def __init__(self, batches: Batches, teacher: Teacher | None) -> None:
        self.batches, self.teacher = batches, teacher

    def prepare(self, members: Sequence[Member], most: int | None = None) -> int:
        """Put what the coming steps need on the device.

        Args:
            most: steps, at most.

        Returns:
            how many steps can be taken before the host has to act again.
        """
        steps = self.batches.seek(members[0].step, members[0].timeline, _sets_of(members))
        for member in members:
            steps = member.steps_alike(min(steps, most or steps))
        for member in members:
            member.prepare(steps)
        return steps

    def step(self, cells: Sequence[TrainingCell]) -> None:
        """One step of these cells. One that fails leaves the others untouched."""
        begin = time.perf_counter()
        members = [cell.member for cell in cells]
        self.batches.feed(_sets_of(members))
        sets, taught = shared_part(self.batches, self.teacher, members)
        shared = (time.perf_counter() - begin) / len(cells)
        for cell in cells:
            begin = time.perf_counter()
            with cell.failures():
                cell.member.before_step()
                cell.member.after_step(train(cell.member, sets, taught))
            cell.member.log.seconds += time.perf_counter() - begin + shared


def make_graphs(members: Sequence[Member], batches: Batches, teacher: Teacher | None) -> None:
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


def _teacher_uses(members: Sequence[Member], teacher: Teacher) -> dict[frozenset[str], int]:
    """Sets of hook points that will be asked of the teacher's network, and for how many steps yet."""
    ends = sorted({span.stop for member in members for span in member.timeline.spans})
    uses: dict[frozenset[str], int] = {}
    begin = min((member.step for member in members), default=0)
    for end in (end for end in ends if end > begin):
        asked: dict[str, set[str]] = {}
        for member in (member for member in members if begin < member.timeline.total):
            for name, points in member.teacher_uses(begin).items():
                asked.setdefault(name, set()).update(points)
        for name, of_set in asked.items():
            found = frozenset(of_set - ({"logits"} if teacher.logits is not None and name == "data" else set()))
            uses[found] = uses.get(found, 0) + end - begin
        begin = end
    return uses


def _sets_of(members: Iterable[Member]) -> list[str]:
    """Input sets that the data give and some member reads."""
    return list(dict.fromkeys(name for member in members for name in member.stage.shared_sets))
