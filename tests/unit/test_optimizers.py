"""SGD by rates that lie on the device is torch's, bit for bit, and forgets its momentum in place."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from kdbench.engine.optimizers import SGD, ScheduledOptimizer
from kdbench.recipe.planning import plan
from kdbench.registry import Registry

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


@pytest.mark.parametrize("options", [{"lr": -1.0}, {"momentum": -0.1}, {"weight_decay": -1.0}, {"nesterov": True}])
def test_options_that_make_no_sense_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="at least 0|momentum"):
        SGD([nn.Parameter(torch.ones(1))], **options)


@pytest.mark.parametrize("name", ["sgd", "adam", "rmsprop"])
def test_forgotten_momentum_is_that_of_a_new_optimizer(name: str) -> None:
    recipe = {"data": "digits", "student": "wrn_10_1", "method": "ce"}
    optimizer: dict[str, Any] = {"name": name, "lr": 0.1}
    spec = plan(recipe | {"protocol": {"name": "digits", "optimizer": optimizer}}, Registry()).cells[0].spec
    stage = next(iter(spec.method.stages.values()))

    def trained(parameter: nn.Parameter, one: ScheduledOptimizer) -> torch.Tensor:
        for seed in range(2):
            parameter.grad = torch.randn(5, generator=torch.Generator().manual_seed(seed))
            one.set_rates(0.0)
            one.step([torch.tensor(0.1)])
        return parameter.detach()

    parameter = nn.Parameter(torch.ones(5))
    used = ScheduledOptimizer(stage.optimizer, stage.schedule, [parameter])
    trained(parameter, used)
    kept = {k: v for k, v in used.optimizer.state[parameter].items() if isinstance(v, torch.Tensor)}
    used.reset_state()
    if name == "sgd":
        assert all(used.optimizer.state[parameter][name] is tensor for name, tensor in kept.items()) and kept
    parameter.data.fill_(1.0)
    fresh = nn.Parameter(torch.ones(5))
    expected = trained(fresh, ScheduledOptimizer(stage.optimizer, stage.schedule, [fresh]))
    assert torch.equal(trained(parameter, used), expected)
