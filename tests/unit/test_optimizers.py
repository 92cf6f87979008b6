"""SGD by rates that lie on the device is torch's, bit for bit, and forgets its momentum in place."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from captured import cell
from tiny import member_of, train
from torch import nn

from kdbench.engine.checks.cells import check_cell
from kdbench.engine.optimizers import SGD, ScheduledOptimizer
from kdbench.engine.step import losses_of, shared_part
from kdbench.errors import UserError
from kdbench.recipe.planning import plan
from kdbench.registry import Registry
from kdbench.schedules import Moment, constant

# Vector units take 4 to 16 values at once and leave a tail; large tensors are shared out among threads.
SIZES = [*range(1, 36), 127, 1000, 4097, 70_001]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"weight_decay": 5e-4},
        {"momentum": 0.9, "weight_decay": 5e-4},
        {"momentum": 0.9, "weight_decay": 1e-4, "nesterov": True},
    ],
    ids=str,
)
def test_it_is_torchs_bit_for_bit(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    values = [torch.randn(n) for n in SIZES]
    values += [torch.randn(8, 5, 3, 3), torch.randn(8, 5, 3, 3).to(memory_format=torch.channels_last)]
    own, torchs = ([nn.Parameter(v.clone(memory_format=torch.preserve_format)) for v in values] for _ in range(2))
    ours, theirs = SGD(own, lr=0.1, **options), torch.optim.SGD(torchs, lr=0.1, **options)
    for rate in (0.1, 0.1 * 0.2, 0.1 * 0.2**2, 1 / 3):
        for a, b in zip(own, torchs, strict=True):
            a.grad = torch.randn_like(a)
            b.grad = a.grad.clone(memory_format=torch.preserve_format)
        ours.param_groups[0]["lr"].fill_(rate)
        theirs.param_groups[0]["lr"] = rate
        ours.step()
        theirs.step()
        assert [len(a) for a, b in zip(own, torchs, strict=True) if not torch.equal(a, b)] == []


@pytest.mark.parametrize("options", [{}, {"momentum": 0.9, "weight_decay": 1e-4, "nesterov": True}], ids=str)
def test_all_parameters_at_once_move_as_one_by_one(options: dict[str, Any]) -> None:
    """On a GPU, where rounding may differ in the last place."""
    torch.manual_seed(0)
    own, torchs = ([nn.Parameter(torch.arange(1.0, n + 1)) for n in (3, 17)] for _ in range(2))
    idle = nn.Parameter(torch.ones(2))
    ours, theirs = SGD([*own, idle], lr=0.1, **options), torch.optim.SGD(torchs, lr=0.1, **options)
    for _ in range(3):
        for a, b in zip(own, torchs, strict=True):
            a.grad = torch.randn_like(a)
            b.grad = a.grad.clone()
        with torch.no_grad():
            ours._step_together(ours.param_groups[0])
        theirs.step()
    for a, b in zip(own, torchs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
    assert torch.equal(idle, torch.ones(2))


def test_a_parameter_without_a_gradient_stays() -> None:
    parameter = nn.Parameter(torch.ones(3))
    SGD([parameter], lr=0.1, momentum=0.9, weight_decay=0.1).step()
    assert torch.equal(parameter, torch.ones(3))


@pytest.mark.parametrize(
    "options",
    [
        {"lr": -1.0},
        {"momentum": -0.1},
        {"weight_decay": -1.0},
        {"nesterov": True},
        {"momentum": 0.9, "delta": 0.1},
        {"momentum": 0.1, "delta": 0.2},
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="at least 0|momentum"):
        SGD([nn.Parameter(torch.ones(1))], **options)


def scheduled(name: str, parameter: nn.Parameter) -> ScheduledOptimizer:
    """The optimizer of that name over a parameter."""
    recipe = {"data": "digits", "student": "wrn_10_1", "method": "ce"}
    optimizer: dict[str, Any] = {"name": name, "lr": 0.1}
    spec = plan(recipe | {"protocol": {"name": "digits", "optimizer": optimizer}}, Registry()).cells[0].spec
    stage = next(iter(spec.method.stages.values()))
    return ScheduledOptimizer(stage.optimizer, stage.schedule, [parameter])


def trained(parameter: nn.Parameter, one: ScheduledOptimizer) -> torch.Tensor:
    for seed in range(2):
        parameter.grad = torch.randn(5, generator=torch.Generator().manual_seed(seed))
        one.set_rates(Moment())
        one.step([torch.tensor(0.1)])
    return parameter.detach().clone()


@pytest.mark.parametrize("name", ["sgd", "adam", "rmsprop"])
def test_forgotten_momentum_is_that_of_a_new_optimizer(name: str) -> None:
    parameter = nn.Parameter(torch.ones(5))
    used = scheduled(name, parameter)
    trained(parameter, used)
    kept = {k: v for k, v in used.optimizer.state[parameter].items() if isinstance(v, torch.Tensor)}
    used.reset_state()
    if name == "sgd":
        assert all(used.optimizer.state[parameter][name] is tensor for name, tensor in kept.items()) and kept
    # A recorded step holds the tensors of before: it must know where they are others.
    assert used.renewed == (name != "sgd")
    parameter.data.fill_(1.0)
    fresh = nn.Parameter(torch.ones(5))
    expected = trained(fresh, scheduled(name, fresh))
    assert torch.equal(trained(parameter, used), expected)


@pytest.mark.parametrize("name", ["sgd", "adam"])
def test_a_loaded_state_goes_on_as_before_and_leaves_the_rate_in_its_place(name: str) -> None:
    parameter = nn.Parameter(torch.ones(5))
    used = scheduled(name, parameter)
    # In full, though the rate on the device is rounded.
    assert used.rates(Moment()) == [0.1]
    trained(parameter, used)
    state, again = copy.deepcopy(used.optimizer.state_dict()), nn.Parameter(parameter.detach().clone())
    state["param_groups"][0].pop("delta", None)  # As an older version left it.
    loaded = scheduled(name, again)
    rate = loaded.optimizer.param_groups[0]["lr"]
    loaded.load_state(state)
    assert loaded.optimizer.param_groups[0]["lr"] is rate and loaded.renewed == 1
    assert torch.equal(trained(again, loaded), trained(parameter, used))


def test_a_state_without_what_a_step_reads_is_refused() -> None:
    parameter = nn.Parameter(torch.ones(5))
    used = scheduled("sgd", parameter)
    state = copy.deepcopy(used.optimizer.state_dict())
    del state["state"][0]["momentum_buffer"]
    with pytest.raises(ValueError, match="kept other values"):
        used.load_state(state)


@pytest.mark.parametrize(
    ("progress", "before", "expected"),
    # 0.7 - 0.4 is less than 0.3 in floating point.
    [(0.3, 0.2, True), (0.7 - 0.4, 0.2, True), (0.4, 0.3, False), (0.4, 0.7 - 0.4, False), (0.2, 0.1, False)],
)
def test_momentum_is_forgotten_once_where_its_share_is_reached(progress: float, before: float, expected: bool) -> None:
    one = scheduled("sgd", nn.Parameter(torch.ones(5)))
    one.schedule = constant(reset_momentum_at=["30%"])
    assert one.resets(progress, before) is expected


def test_gradients_of_terms_that_read_a_teacher_have_a_momentum_of_their_own() -> None:
    """DOT: two running sums, and a parameter that one kind reaches has the momentum between; weights decay once."""
    both, task, taught, idle = (nn.Parameter(torch.full((2,), float(n))) for n in range(1, 5))
    one = SGD([both, task, taught, idle], lr=0.1, momentum=0.9, weight_decay=0.5, delta=0.05)
    sums = dict.fromkeys(("both", "both taught", "task", "taught"), torch.zeros(2))
    expected = {name: p.detach().clone() for name, p in {"both": both, "task": task, "taught": taught}.items()}
    for step in range(1, 4):
        ours, theirs = torch.tensor([1.0, -2.0]) * step, torch.tensor([0.5, 3.0]) / step
        both.grad, task.grad = ours.clone(), ours.clone()
        one.step(distillation={both: theirs.clone(), taught: theirs.clone()})
        sums["both"] = 0.85 * sums["both"] + ours + 0.5 * expected["both"]
        sums["both taught"] = 0.95 * sums["both taught"] + theirs
        sums["task"] = 0.9 * sums["task"] + ours + 0.5 * expected["task"]
        sums["taught"] = 0.9 * sums["taught"] + theirs + 0.5 * expected["taught"]
        expected["both"] = expected["both"] - 0.1 * (sums["both"] + sums["both taught"])
        expected["task"] = expected["task"] - 0.1 * sums["task"]
        expected["taught"] = expected["taught"] - 0.1 * sums["taught"]
    for name, parameter in {"both": both, "task": task, "taught": taught}.items():
        torch.testing.assert_close(parameter.detach(), expected[name])
    assert torch.equal(idle, torch.full((2,), 4.0))


def test_the_step_tells_both_kinds_of_gradients_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = cell({"name": "dot", "gamma": 0.25, "alpha": 0.5}, steps=1)
    member, batches, teacher = member_of(spec)
    found: dict[str, Any] = {}

    def noted(self: SGD, closure: None = None, distillation: Any = None) -> None:
        found.update(others=[p.grad for p in member.student.model.parameters()], taught=dict(distillation))

    monkeypatch.setattr(SGD, "step", noted)
    train(member, batches, teacher, 1)
    again, batches, teacher = member_of(spec)
    again.prepare(1)
    batches.seek(0, again.timeline, ["data"])
    batches.feed(["data"])
    sets, taught = shared_part(batches, teacher, [again])
    for name, weight, seen in (("ce", 0.25, found["others"]), ("kd", 0.5, [*found["taught"].values()])):
        again.set_modes()
        losses = losses_of(again, again.stage.turns[0], sets, taught, again.stage.next_numbers())[1]
        gradients = torch.autograd.grad(weight * losses[name], [*again.student.model.parameters()])
        for one, other in zip(gradients, seen, strict=True):
            torch.testing.assert_close(one, other)


def test_what_cannot_go_with_gradients_apart_is_said() -> None:
    with pytest.raises(ValueError, match="delta 0.2 must lie between 0 and 1"):
        SGD([nn.Parameter(torch.ones(1))], momentum=0.9, delta=0.2)
    with pytest.raises(UserError, match="'clip' does not work with"):
        check_cell(cell({"name": "dot", "stages": {"classification": {"clip": 1.0}}}))
