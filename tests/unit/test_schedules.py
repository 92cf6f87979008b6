"""Schedules against PyTorch's schedulers of the same name, and by hand where PyTorch has none."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler as of_torch

from kdbench.schedules import (
    Moment,
    Schedule,
    constant,
    cosine,
    exponential,
    inverse_power,
    late_cosine,
    linear,
    multistep,
    piecewise,
    product,
    share,
    sigmoid_ramp,
    warmup,
)

STEPS = 200


def rates(scheduler: Callable[[torch.optim.SGD], of_torch.LRScheduler]) -> list[float]:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule, found = scheduler(optimizer), []
    for _ in range(STEPS):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return found


def ours(schedule: Schedule) -> list[float]:
    return [schedule.at(step / STEPS) for step in range(STEPS)]


def cosine_after_warmup(optimizer: torch.optim.SGD) -> of_torch.LRScheduler:
    rise = of_torch.LambdaLR(optimizer, lambda step: step / 50)
    fall = of_torch.CosineAnnealingLR(optimizer, STEPS - 50, eta_min=0.1)
    return of_torch.SequentialLR(optimizer, [rise, fall], [50])


@pytest.mark.parametrize(
    ("schedule", "reference"),
    [
        (cosine(), lambda o: of_torch.CosineAnnealingLR(o, STEPS)),
        (cosine(end=0.2), lambda o: of_torch.CosineAnnealingLR(o, STEPS, eta_min=0.2)),
        (cosine(end=0.1, warmup="25%"), cosine_after_warmup),
        (multistep(at=["30%", "57%", "80%"]), lambda o: of_torch.MultiStepLR(o, [60, 114, 160])),
        (multistep(at=["80%", "30.5%"], gamma=0.5), lambda o: of_torch.MultiStepLR(o, [61, 160], gamma=0.5)),
        (linear(start=0.25, until="40%", end=0.75), lambda o: of_torch.LinearLR(o, 0.25, 0.75, 80)),
        (linear(), lambda o: of_torch.PolynomialLR(o, STEPS)),
        (exponential(start=1.0, end=0.01), lambda o: of_torch.ExponentialLR(o, 0.01 ** (1 / STEPS))),
        (constant(), lambda o: of_torch.ConstantLR(o, factor=1.0)),
    ],
)
def test_a_schedule_is_that_of_pytorch(schedule: Schedule, reference: Any) -> None:
    assert ours(schedule) == pytest.approx(rates(reference), rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("steps", [3, 7, 10, 49, 390, 64000])
def test_a_drop_falls_on_the_first_step_that_has_reached_its_share(steps: int) -> None:
    """Whatever share a recipe writes: compared with whole numbers, which do not round."""
    for percent in range(101):
        schedule = multistep(at=[f"{percent}%"], gamma=0.0)
        first = -(-percent * steps // 100)
        around = [step for step in (first - 1, first) if 0 <= step < steps]
        assert [schedule.at(step / steps) for step in around] == [float(step < first) for step in around]


def test_a_share_that_floating_point_rounds_up_delays_nothing() -> None:
    """57.1 / 100 is more than 571 / 1000."""
    assert share("57.1%") > 571 / 1000
    for schedule in (multistep(at=["57.1%"], gamma=0.5), piecewise(at=["57.1%"], factors=[1.0, 0.5])):
        assert [schedule.at(step / 1000) for step in (570, 571)] == [1.0, 0.5]


def test_levels_are_the_line_at_the_ends_of_the_parts() -> None:
    """Three epochs of 49 steps: the value of the epoch's number, which a step's quotient must not round away."""
    schedule = linear(start=1.0, end=0.0, levels=3)
    found = [schedule.at(step / 147) for step in range(147)]
    assert found == pytest.approx([2 / 3] * 49 + [1 / 3] * 49 + [0.0] * 49, abs=1e-12)
    # 1 / 49 * 49 is less than 1 in floating point.
    assert linear(start=1.0, end=0.0, levels=49).at(1 / 49) == pytest.approx(47 / 49)


def test_a_late_cosine_begins_after_its_share() -> None:
    """Epochs 1 to 8, of which the first five keep the value: cos((epoch - 5) / 3 π) from there, once an epoch."""
    expected = [1.0] * 5 + [0.5 * (1 + math.cos((epoch - 5) / 3 * math.pi)) for epoch in (6, 7, 8)]
    levels, smooth = late_cosine(after="62.5%", levels=8), late_cosine(after="62.5%")
    assert [levels.at(step / 56) for step in range(56)] == pytest.approx([v for v in expected for _ in range(7)])
    assert [smooth.at(epoch / 8) for epoch in range(1, 9)] == pytest.approx(expected, abs=1e-12)
    assert late_cosine(after="50%", end=0.2).at(1.0) == pytest.approx(0.2)
    assert [late_cosine(after="0%").at(p) for p in (0.0, 0.3, 1.0)] == [cosine().at(p) for p in (0.0, 0.3, 1.0)]
    assert late_cosine(after="100%").at(1.0) == 1.0


def test_factors_of_parts_change_at_their_shares() -> None:
    schedule = piecewise(at=["30%", "60%"], factors=[0.1, 1.0, 0.5])
    assert [schedule.at(step / 10) for step in range(10)] == [0.1] * 3 + [1.0] * 3 + [0.5] * 4
    assert piecewise(at=[], factors=[0.3]).at(0.7) == 0.3


def test_a_warm_up_counts_epochs_from_one_or_from_none() -> None:
    now = (0.0, 0.5, 1.0, 2.9999999999, 4.0, 9.0)
    assert [warmup(epochs=4).at(0.0, epochs=e) for e in now] == [0.25, 0.25, 0.5, 1.0, 1.0, 1.0]
    assert [warmup(epochs=4, first=0).at(0.0, epochs=e) for e in now] == [0.0, 0.0, 0.25, 0.75, 1.0, 1.0]


def test_schedules_are_their_formulas() -> None:
    g = math.log(0.9 / 0.1) / 400
    beta, rest = exponential(start=0.1, end=0.9), exponential(start=0.1, end=0.9, complement=True)
    for epoch in (1, 2, 100, 400):
        progress = (epoch - 1) / 400
        assert beta.factor(progress) == pytest.approx(0.1 * math.exp(g * (epoch - 1)), rel=1e-12)
        assert rest.factor(progress) == pytest.approx(1 - beta.factor(progress), rel=1e-12)
    assert beta.factor(399 / 400) == pytest.approx(0.895, abs=5e-4)
    rate = inverse_power()
    assert [rate.factor(p) for p in (0, 0.5, 1)] == pytest.approx([1, 6**-0.75, 11**-0.75])
    run, epoch_ = sigmoid_ramp(), sigmoid_ramp(per="epoch")
    assert run.at(0.0, 0.5) == 0 and run.at(0.1, 0.5) == pytest.approx(math.tanh(0.5))
    assert epoch_.at(0.5, 0.0) == 0 and epoch_.at(0.5, 0.1) == pytest.approx(math.tanh(0.5))
    with pytest.raises(ValueError, match="per"):
        sigmoid_ramp(per="run")  # type: ignore[arg-type]


def test_several_schedules_multiply() -> None:
    both = product([exponential(start=0.1, end=0.9, complement=True), sigmoid_ramp()])
    assert both(Moment(0.0, 0.7)) == 0
    assert both(Moment(0.2, 0.7)) == pytest.approx((1 - 0.1 * 9**0.2) * (2 / (1 + math.exp(-2)) - 1), rel=1e-12)
    assert product([])(Moment(0.3, 0.1)) == 1


def test_momentum_is_forgotten_where_a_schedule_says() -> None:
    assert multistep(at=["60%", "30%"], reset_momentum=True).resets == (0.3, 0.6)
    assert multistep(at=["30%"]).resets == ()
    assert constant(reset_momentum_at=["50%"]).resets == (0.5,)
    assert constant().resets == ()


@pytest.mark.parametrize(
    ("build", "said"),
    [
        (lambda: share("101%"), "between 0% and 100%"),
        (lambda: share("-1%"), "between 0% and 100%"),
        (lambda: share("0.3"), "written like '30%'"),
        (lambda: share(30), "written like '30%'"),  # type: ignore[arg-type]
        (lambda: share("half%"), "written like '30%'"),
        (lambda: linear(levels=0), "levels must be at least 1"),
        (lambda: late_cosine(after="50%", levels=0), "levels must be at least 1"),
        (lambda: piecewise(at=["30%"], factors=[1.0]), "one factor more"),
        (lambda: piecewise(at=["60%", "30%"], factors=[1.0, 2.0, 3.0]), "rising shares"),
        (lambda: warmup(epochs=0), "more than 0 epochs"),
        (lambda: warmup(epochs=4, first=2), "counted from 0 or 1"),
        (lambda: exponential(start=0.0, end=1.0), "positive start and end"),
        (lambda: exponential(start=1.0, end=0.0), "positive start and end"),
        (lambda: inverse_power(scale=-0.1), "at least 0"),
    ],
)
def test_a_schedule_that_cannot_be_is_refused(build: Callable[[], Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        build()


def test_the_ends_of_the_allowed_are_allowed() -> None:
    assert (share("0%"), share(" 100% ")) == (0.0, 1.0)
    assert linear(levels=1).at(0.0) == 0.0
    assert inverse_power(scale=0.0).at(0.7) == 1.0
    assert linear(until="0%").at(0.0) == 0.0
