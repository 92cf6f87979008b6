"""A stretch of steps leaves the host alone: no value is read, no tensor is made of the host's numbers, and every step
is the same sequence of operations. What cannot be so says why on its class."""

from __future__ import annotations

from typing import Any

import pytest
from tiny import CPU, images, shortened, student_of, target_for, untrained_teacher
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from kdbench.engine.batches import Batches
from kdbench.engine.member import Member
from kdbench.engine.step import shared_part, train
from kdbench.recipe.planning import plan
from kdbench.recipe.schema import CellSpec
from kdbench.registry import Registry

REGISTRY = Registry()
METHODS = REGISTRY.names("methods")
# Operations that give the host a value of the device, and those that bring a value of the host to it.
READS = {"aten::_local_scalar_dense", "aten::is_nonzero", "aten::equal", "aten::nonzero", "aten::masked_select"}
MAKES = {"aten::lift_fresh", "aten::lift_fresh_copy"}


class Recorder(TorchDispatchMode):
    """Notes every operation with its numbers, and the shapes and types of its tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[str, tuple[Any, ...]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        flat, _ = tree_flatten((args, kwargs or {}))
        told = tuple((tuple(a.shape), a.dtype) if isinstance(a, Tensor) else str(a) for a in flat)
        self.operations.append((func._schema.name, told))
        return func(*args, **(kwargs or {}))


def cell(method: str, **more: Any) -> CellSpec:
    recipe = {
        # With all that a method may need: validation images, and a route of the teacher.
        "data": {"name": "digits", "validation": 100},
        "teacher": "wrn_16_2_digits_route",
        "student": student_of(method),
        "protocol": {"name": "digits", "augmentation": {"padding": 1, "mode": "reflect", "flip": True}},
        "method": method,
    }
    spec = plan(recipe | target_for(method, REGISTRY) | more, REGISTRY).cells[0].spec
    n = len(spec.method.stages)
    spec = shortened(spec, steps=16 * n, batch=2)
    equal = {
        name: stage.model_copy(update={"share": 1 / n if i < n - 1 else None})
        for i, (name, stage) in enumerate(spec.method.stages.items())
    }
    method_of_equal_stages = spec.method.model_copy(update={"stages": equal})
    return spec.model_copy(update={"method": method_of_equal_stages, "evaluations": 0})


def recorded(member: Member, batches: Any, teacher: Any, steps: int) -> list[list[tuple[str, tuple[Any, ...]]]]:
    """The operations of each of these steps, which are of one stretch. The first ones of it are not recorded: they
    make what lasts."""
    sets = member.stage.shared_sets
    found = []
    for number in range(steps):
        batches.feed(sets)
        member.before_step()
        with Recorder() as recorder:
            given, taught = shared_part(batches, teacher, [member])
            images_seen = train(member, given, taught)
        member.after_step(images_seen)
        if number >= 2:
            found.append(recorder.operations)
    return found


def stretch(member: Member, batches: Any) -> int:
    """Prepare the member's coming steps; how many they are."""
    assert member.ready(lambda text: None, lambda: False)
    steps = batches.seek(member.step, member.timeline, member.stage.shared_sets)
    steps = member.steps_alike(steps)
    member.prepare(steps)
    return int(steps)


@pytest.mark.parametrize("method", METHODS)
def test_steps_of_a_stretch_are_one_computation_of_the_device(method: str) -> None:
    spec = cell(method)
    target = images(spec.target, per_class=8, seed=1) if spec.target else None
    batches = Batches(spec, images(spec.data, per_class=24), CPU, target)
    teacher = untrained_teacher(spec)
    member = Member(spec, batches, teacher, CPU)
    for index, span in enumerate(member.timeline.spans):
        member.step = span.start
        member.enter(index)
        source = member.sources.get(span.name)
        if source is not None and source.by_step:
            assert stretch(member, batches) == 1
            continue
        longest = stretch(member, batches)
        while longest < 4 and member.step + longest < span.stop:
            # A weight that is 0 at first, an epoch that ends: the next one is longer.
            member.step += longest
            longest = stretch(member, batches)
        assert longest >= 4, f"stage {span.name}"
        steps = recorded(member, batches, teacher, min(longest, 6))
        names = {name for name, _ in steps[0]}
        assert not names & READS, f"stage {span.name} reads values: {names & READS}"
        assert not names & MAKES, f"stage {span.name} makes tensors on the host: {names & MAKES}"
        for later in steps[1:]:
            for a, b in zip(steps[0], later, strict=True):
                assert a == b, f"stage {span.name}: {a} is {b} at a later step"
