"""One training step of a cohort, from top to bottom: batch, teacher, and of each student values, losses, backward,
optimizer, meter.

Everything that a step uses is on the device already. It copies no value to the host and no number of the host to the
device, so a stretch of steps can run eagerly, or be recorded once and replayed. What varies between methods is in what
it calls: the stage's turns, its teacher, its batch source. What the host does between steps is in `program.py`.

A member is a cell while it trains. A turn is a group of losses and the optimizers that step on them.
"""

from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from kdbench.engine.data.batch import Sets
from kdbench.engine.data.batches import Batches
from kdbench.engine.member import Member
from kdbench.engine.networks.network import autocast
from kdbench.engine.stage import Numbers, Turn, batch_norms, union
from kdbench.engine.teachers.teacher import PointValues, Taught, Teacher
from kdbench.errors import SharedChange


def shared_part(batches: Batches, teacher: Teacher | None, members: Collection[Member]) -> tuple[Sets, Taught]:
    """What the members of a cohort share: the step's input sets, and what the teacher gives on them."""
    sets = input_sets(batches, members)
    taught = teacher_pass(teacher, sets, members)
    return sets, lambda: taught


def input_sets(batches: Batches, members: Iterable[Member]) -> Sets:
    """The input sets of the present step that members read; goes on to the next step."""
    names = sets_of(members)
    sets = batches.sets(names)
    batches.advance(names)
    return sets


def sets_of(members: Iterable[Member]) -> list[str]:
    """Input sets that the data give and some member reads."""
    return list(dict.fromkeys(name for member in members for name in member.stage.shared_sets))


def teacher_pass(teacher: Teacher | None, sets: Sets, members: Iterable[Member]) -> PointValues:
    """One pass of the shared teacher for all that members need of it."""
    return teacher.shared(sets, union(member.stage.teacher_points for member in members)) if teacher else {}


def losses_of(
    member: Member, turn: Turn, sets: Sets, taught: Taught, numbers: Numbers
) -> tuple[Tensor, dict[str, Tensor], int]:
    """A turn's weighted sum of losses, these by name, and how many images it saw."""
    with autocast(member.computing.precision, member.device):
        seen, values = inputs_of(member, turn, sets, taught)
        losses = {name: turn.terms[name](values, seen, numbers.told[name]) for name in turn.active}
        loss = weighted_sum(losses, numbers.weights, member.device)
    # Images of the data set count; a stage that reads none of them counts its largest input set.
    counted = [seen["data"]] if "data" in member.stage.shared_sets else seen.values()
    return loss, losses, max(len(batch.images) for batch in counted)


def backward(turn: Turn, loss: Tensor, losses: Mapping[str, Tensor], numbers: Numbers) -> dict[Tensor, Tensor]:
    """Leave the gradients of a turn's loss in `.grad`.

    Returns:
        Of the parameters whose optimizer takes them apart: the gradients of terms that read a teacher, which are not in
        `.grad` then.
    """
    separate = turn.separate
    if not separate:
        if losses:
            loss.backward()
        return {}
    taught = {name: term for name, term in losses.items() if "teacher" in turn.terms[name].spec.loss.inputs}
    others = {name: term for name, term in losses.items() if name not in taught}
    found = {}
    if taught:
        weighted_sum(taught, numbers.weights, loss.device).backward(retain_graph=bool(others))
        found = {parameter: parameter.grad for parameter in separate if parameter.grad is not None}
        for parameter in found:
            parameter.grad = None
    if others:
        weighted_sum(others, numbers.weights, loss.device).backward()
    return found


def train(
    member: Member,
    sets: Sets,
    taught: Taught,
    losses_of: Callable[..., Any] = losses_of,
    backward: Callable[..., dict[Tensor, Tensor]] = backward,
) -> int:
    """One optimizer step of a member; more than one where its stage trains in turns.

    Args:
        sets, taught: the cohort's, of which the member takes what is its own.
        losses_of: how a turn's losses are computed. backward: how their gradients are.

    Returns:
        how many images it saw.

    Raises:
        SharedChange: the method's own code changed in place what other members are given.
    """
    stage = member.stage
    given = Given(sets, taught)
    numbers = stage.next_numbers()
    found: dict[str, Tensor] = {}
    total = torch.zeros((), device=member.device)
    for turn in stage.turns:
        loss, losses, images = losses_of(member, turn, sets, given.taught, numbers)
        # Backward may reach parameters of other turns, whose gradients are dropped.
        for optimizer in stage.optimizers:
            optimizer.optimizer.zero_grad(set_to_none=True)
        distillation = backward(turn, loss, losses, numbers)
        for optimizer in turn.optimizers:
            optimizer.step(numbers.rates[optimizer], stage.spec.clip, distillation)
        total = total + loss.detach()
        found |= losses
    given.check(member)
    member.answers.follow()
    member.meter.add(found | {"loss": total})
    return images


class Given:
    """What a member is given and others read too: the cohort's input sets and its teacher's values."""

    def __init__(self, sets: Sets, taught: Taught) -> None:
        self._taught = taught
        # torch counts how often a tensor was changed in place.
        self._noted: dict[str, tuple[Tensor, int]] = {}
        for name, batch in sets.items():
            self._note(f"of input set '{name}'", vars(batch))

    def taught(self) -> PointValues:
        """The teacher's values."""
        values = self._taught()
        for name, points in values.items():
            self._note(f"of the teacher on '{name}'", points)
        return values

    def _note(self, where: str, tensors: Mapping[str, Any]) -> None:
        for what, tensor in tensors.items():
            if isinstance(tensor, Tensor):
                self._noted.setdefault(f"'{what}' {where}", (tensor, tensor._version))

    def check(self, member: Member) -> None:
        """Raises SharedChange where something was changed since it was given."""
        changed = [what for what, (tensor, version) in self._noted.items() if tensor._version != version]
        if changed:
            raise SharedChange(
                f"method '{member.spec.method.name}', stage '{member.stage.span.name}': a loss or the batch source "
                f"changes {', '.join(changed)} in place",
                hint="other methods train on the same values: write 'images * 2', not 'images.mul_(2)'",
            )


def weighted_sum(losses: Mapping[str, Tensor], weights: Mapping[str, Tensor], device: torch.device) -> Tensor:
    """Sum of weight × loss, in the order of the losses."""
    total = torch.zeros((), device=device)
    for name, loss in losses.items():
        total = total + weights[name] * loss
    return total


def inputs_of(member: Member, turn: Turn, sets: Sets, taught: Taught) -> tuple[Sets, dict[str, PointValues]]:
    """A turn's input sets, and both networks' values on them: network -> input set -> hook point -> value.

    A batch source sees the logits on what it reads before it makes its own sets.
    """
    stage = member.stage
    seen = {name: sets[name] for name in stage.shared_sets}
    values: dict[str, PointValues] = {"student": {}, "teacher": {}}
    run_student(member, turn, seen, values)
    if stage.teacher_points:
        # Until here the shared teacher may run beside the student. What others asked of it is not this member's.
        shared = taught()
        values["teacher"] = {name: dict(shared[name]) for name in stage.teacher_points}
    run_teacher(member, turn, seen, values)
    if turn.reads(stage.made):
        made = member.make(seen, values)
        seen |= made
        run_student(member, turn, made, values)
        run_teacher(member, turn, made, values)
    return seen, values


def run_student(member: Member, turn: Turn, sets: Sets, values: dict[str, PointValues]) -> None:
    """Add the student's values on these input sets, where a turn reads them."""
    student, stage = member.student, member.stage
    for name, points in turn.points["student"].items():
        if name in sets:
            policy = stage.spec.batch_norm.get(name, "shared")
            # Compiled graphs are traced with batch norms in their usual mode.
            run = student.step if policy == "shared" else student
            with batch_norms(student.model, policy):
                batch = sets[name]
                values["student"][name] = run(student.normalizer(batch.images), points, batch.labels)


def run_teacher(member: Member, turn: Turn, sets: Sets, values: dict[str, PointValues]) -> None:
    """Add the values of a member's own teacher on these input sets, where a turn reads them and they are not there."""
    for name, points in turn.points["teacher"].items():
        if name in sets and name not in values["teacher"]:
            assert member.stage.teacher is not None
            values["teacher"][name] = member.stage.teacher(sets[name].images, points, sets[name].labels)
