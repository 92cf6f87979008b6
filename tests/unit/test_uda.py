"""MMD, KL either way, the schedules and the alternating step of joint adaptation and distillation, against formulas."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
from shipped import REGISTRY
from test_domains import cell
from tiny import member_of, step
from torch import Tensor
from torch.nn import functional as F

from kdbench.engine.networks.build import build_schedule
from kdbench.losses import kd, kl_divergence, mmd
from kdbench.recipe.method_specs import TermSpec
from kdbench.recipe.planning import plan
from kdbench.schedules import Moment


def features(n: int, d: int, seed: int, shift: float = 0.0) -> Tensor:
    return torch.randn(n, d, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) + shift


def loops(x: np.ndarray, y: np.ndarray, kernels: int = 5, factor: float = 2.0) -> float:
    """The estimator written out, pair by pair."""
    z = [*x, *y]
    squared = [[sum((p - q) ** 2 for p, q in zip(a, b, strict=True)) for b in z] for a in z]
    width = sum(map(sum, squared)) / (len(z) * (len(z) - 1))

    def kernel(i: int, j: int) -> float:
        # As in the code: the mean divided by 4 for five kernels, then doubled for each.
        lowest = width / factor ** (kernels // 2)
        return sum(math.exp(-squared[i][j] / (lowest * factor**k)) for k in range(kernels))

    n, m = len(x), len(y)
    xx = sum(kernel(i, j) for i in range(n) for j in range(n)) / n**2
    yy = sum(kernel(n + i, n + j) for i in range(m) for j in range(m)) / m**2
    xy = sum(kernel(i, n + j) for i in range(n) for j in range(m)) / (n * m)
    return xx + yy - 2 * xy


@pytest.mark.parametrize(
    ("n", "m", "kernels", "factor"), [(6, 6, 5, 2.0), (5, 8, 5, 2.0), (4, 3, 1, 2.0), (4, 4, 4, 3.0)]
)
def test_mmd_is_its_double_loop(n: int, m: int, kernels: int, factor: float) -> None:
    x, y = features(n, 3, 1), features(m, 3, 2, shift=0.7)
    expected = loops(x.numpy(), y.numpy(), kernels, factor)
    assert mmd(x, y, kernels, factor).item() == pytest.approx(expected, rel=1e-12)
    assert mmd(x, y, kernels, factor, reduction="mean").item() == pytest.approx(expected / kernels, rel=1e-12)


def test_mmd_of_two_points_in_closed_form() -> None:
    """One point against one at any distance: σ̄ is their squared distance, and k = Σ exp(-2^(2 - i))."""
    expected = 2 * 5 - 2 * sum(math.exp(-(2.0 ** (2 - i))) for i in range(5))
    for distance in (1e-3, 1.0, 1e3):
        x, y = torch.zeros(1, 2), torch.tensor([[0.0, distance]])
        assert mmd(x, y).item() == pytest.approx(expected, rel=1e-5)


def test_mmd_of_equal_samples_is_zero_and_of_apart_ones_is_not() -> None:
    x = features(16, 8, 3)
    assert mmd(x, x).item() == pytest.approx(0, abs=1e-12)
    assert mmd(x, x[torch.randperm(16)]).item() == pytest.approx(0, abs=1e-12)
    assert mmd(torch.ones(4, 2), torch.ones(3, 2)).item() == 0
    near, far = (mmd(x, features(16, 8, 4, shift)).item() for shift in (0.0, 2.0))
    assert 0 < near < far < 10


def test_mmd_gradient_leaves_the_bandwidth_alone() -> None:
    """Against finite differences of the loops with the bandwidth held: through it, the gradient would be another."""
    x, y = features(4, 3, 5).requires_grad_(), features(5, 3, 6, shift=1.0)
    mmd(x, y).backward()  # type: ignore[no-untyped-call]
    both = torch.cat([x.detach(), y])
    width = (both[:, None] - both[None]).square().sum().item() / (9 * 8)

    def held(a: Tensor) -> Tensor:
        def k(p: Tensor, q: Tensor) -> Tensor:
            return sum(torch.exp(-(torch.cdist(p, q) ** 2) / (width / 4 * 2**i)).mean() for i in range(5))  # type: ignore[return-value]

        return k(a, a) + k(y, y) - 2 * k(a, y)

    for place in ((0, 0), (2, 1), (3, 2)):
        up, down = x.detach().clone(), x.detach().clone()
        up[place] += 1e-5
        down[place] -= 1e-5
        assert x.grad is not None
        assert x.grad[place].item() == pytest.approx((held(up) - held(down)).item() / 2e-5, rel=1e-4, abs=1e-9)


def test_mmd_takes_maps_half_precision_and_refuses_what_does_not_fit() -> None:
    x, y = features(4, 8, 7).float(), features(4, 8, 8).float()
    assert mmd(x.view(4, 2, 2, 2), y.view(4, 2, 2, 2)).item() == pytest.approx(mmd(x, y).item())
    assert mmd(x.bfloat16(), y.bfloat16()).dtype == torch.float32
    for a, b, options in (
        (x, y[:, :4], {}),
        (x[:0], y, {}),
        (x, y, {"kernels": 0}),
        (x, y, {"reduction": "total"}),
        (x, y, {"factor": 0.0}),
    ):
        with pytest.raises(ValueError, match="mmd|kernels|reduction|factor"):
            mmd(a, b, **options)  # type: ignore[arg-type]


def test_kl_of_two_classes_by_hand_in_both_directions() -> None:
    """p_t = (0.8, 0.2), p_s = (0.5, 0.5) at T = 2, so logits are twice the log-odds."""
    teacher = torch.tensor([[2 * math.log(4.0), 0.0]], dtype=torch.float64)
    student = torch.zeros(1, 2, dtype=torch.float64)
    forward = 0.8 * math.log(1.6) + 0.2 * math.log(0.4)
    reversed_ = 0.5 * math.log(0.5 / 0.8) + 0.5 * math.log(0.5 / 0.2)
    for direction, expected in (("forward", forward), ("reversed", reversed_)):
        found = kl_divergence(student, teacher, 2.0, scale=False, kl_direction=direction)  # type: ignore[arg-type]
        assert found.item() == pytest.approx(expected, rel=1e-12)
        found = kl_divergence(student, teacher, 2.0, kl_direction=direction)  # type: ignore[arg-type]
        assert found.item() == pytest.approx(4 * expected, rel=1e-12)
    assert forward != pytest.approx(reversed_, rel=0.05)


def test_kl_forward_is_kd_and_lets_gradients_into_the_teacher() -> None:
    student, teacher = features(6, 5, 1).requires_grad_(), features(6, 5, 2).requires_grad_()
    value = kl_divergence(student, teacher, 3.0)
    assert value.item() == pytest.approx(kd(student, teacher, 3.0).item(), rel=1e-12)
    value.backward()  # type: ignore[no-untyped-call]
    p, q = (F.softmax(t.detach() / 3, dim=1) for t in (teacher, student))
    assert torch.allclose(student.grad, 3 * (q - p) / 6)  # type: ignore[arg-type]
    gap = (p / q).log()
    assert torch.allclose(teacher.grad, 3 * p * (gap - (p * gap).sum(1, keepdim=True)) / 6)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="kl_direction"):
        kl_divergence(student, teacher, kl_direction="backward")  # type: ignore[arg-type]


def terms(method: str) -> dict[str, TermSpec]:
    return plan(
        {
            "data": "mnist_8",
            "target": "digits",
            "teacher": "wrn_16_2_mnist_8",
            "student": "wrn_10_1",
            "protocol": "digits",
            "method": method,
        },
        REGISTRY,
    ).cells[0].spec.method.stages["adaptation"].losses  # fmt: skip


@pytest.mark.parametrize(("method", "per_epoch"), [("uda_kd", False), ("uda_kd_official", True)])
def test_weights_of_the_joint_loss(method: str, per_epoch: bool) -> None:
    """(1 - β) · 1, (1 - β) · γ, β · 1, β · α, β · (1 - α), at a place in the run and in its epoch."""
    member, _, _ = member_of(cell(method, steps=40))
    run, epoch = 0.37, 0.06
    beta = 0.1 * 9**run
    gamma = 2 / (1 + math.exp(-10 * (epoch if per_epoch else run))) - 1
    expected = {
        "teacher_ce": 1 - beta,
        "teacher_mmd": (1 - beta) * gamma,
        "target_kd": beta,
        "kd": 0.3 * beta,
        "ce": 0.7 * beta,
    }
    found = {name: term.weight_at(Moment(run, epoch)) for name, term in member.stage.terms.items()}
    assert found == pytest.approx(expected, rel=1e-12)


def test_the_codes_profile_reverses_kl_and_lets_the_teacher_learn_from_it() -> None:
    ours, code = terms("uda_kd"), terms("uda_kd_official")
    for name in ("target_kd", "kd"):
        assert (ours[name].detach, ours[name].loss.options.get("kl_direction", "forward")) == (True, "forward")
        assert (code[name].detach, code[name].loss.options["kl_direction"]) == (False, "reversed")
        assert code[name].loss.options["temperature"] == 20
    schedule = code["teacher_mmd"].weight_schedule
    assert isinstance(schedule, list) and build_schedule(schedule[1]).clock == "epoch"


def by_hand(method: str, alternating: bool) -> tuple[Any, Any]:
    """The second step (γ > 0) of a cell, its own and the same in plain PyTorch: both networks after it."""
    options = {"name": method, "alternating": alternating}
    member, batches, teacher = member_of(cell(options, steps=8, protocol={"name": "digits"}))
    assert teacher is not None and member.modules.own_teacher is not None
    step(member, batches, teacher)
    nets = {"student": copy.deepcopy(member.student), "teacher": copy.deepcopy(member.modules.own_teacher.network)}
    optimizers = {}
    for (name, net), own in zip(nets.items(), member.stage.optimizers, strict=True):
        same = {key: value for key, value in own.optimizer.defaults.items() if key != "delta"}
        optimizer = torch.optim.SGD(net.model.parameters(), **{**same, "lr": own.base_rates[0]})
        kept = copy.deepcopy(own.optimizer.state_dict())["state"]
        optimizer.load_state_dict(optimizer.state_dict() | {"state": kept})
        for group in optimizer.param_groups:
            group["lr"] = 0.001 * (1 + 10 * 1 / 8) ** -0.75 if name == "teacher" else own.base_rates[0]
        optimizers[name] = optimizer
    batches.seek(1, member.timeline, ["data", "target"])
    sets = batches.sets(["data", "target"])
    official = method.endswith("official")

    def look(name: str, domain: str) -> Tensor | Any:
        normalizer = teacher.network.normalizer if name == "teacher" else member.student.normalizer
        return nets[name](normalizer(sets[domain].images), ["logits", "pooled"])

    def kl(s: Tensor, t: Tensor) -> Tensor:
        t = t if official else t.detach()
        ls, lt = F.log_softmax(s / 20, 1), F.log_softmax(t / 20, 1)
        value = (ls.exp() * (ls - lt)).sum(1).mean() if official else (lt.exp() * (lt - ls)).sum(1).mean()
        return 400 * value

    beta, gamma = (
        0.1 * 9 ** (1 / 8),
        2 / (1 + math.exp(-10 * (1 / member.timeline.batches_per_epoch if official else 1 / 8))) - 1,
    )
    labels = sets["data"].labels

    def adaptation(t: Any, u: Any) -> Tensor:
        return (1 - beta) * (F.cross_entropy(t["logits"], labels) + gamma * mmd(t["pooled"], u["pooled"]))

    def distillation(t: Any, u: Any) -> Tensor:
        # Batch norms remember the order of batches: that of the losses on the card.
        v, s = look("student", "target"), look("student", "data")
        source = 0.3 * kl(s["logits"], t["logits"]) + 0.7 * F.cross_entropy(s["logits"], labels)
        return beta * (kl(v["logits"], u["logits"]) + source)

    def train(loss: Tensor, *names: str) -> None:
        for optimizer in optimizers.values():
            optimizer.zero_grad()
        loss.backward()
        for name in names:
            optimizers[name].step()

    t, u = look("teacher", "data"), look("teacher", "target")
    if alternating:
        train(adaptation(t, u), "teacher")
        u, t = look("teacher", "target"), look("teacher", "data")
        train(distillation(t, u), "student", *(["teacher"] if official else []))
    else:
        train(adaptation(t, u) + distillation(t, u), "student", "teacher")
    step(member, batches, teacher)
    mine = {"student": member.student.model.state_dict(), "teacher": member.modules.own_teacher.model.state_dict()}
    return mine, {name: net.model.state_dict() for name, net in nets.items()}


@pytest.mark.parametrize("alternating", [True, False])
@pytest.mark.parametrize("method", ["uda_kd", "uda_kd_official"])
def test_a_step_is_the_one_written_out(method: str, alternating: bool) -> None:
    mine, expected = by_hand(method, alternating)
    for network, values in expected.items():
        for key, value in values.items():
            assert torch.allclose(mine[network][key].double(), value.double(), rtol=1e-4, atol=1e-6), (network, key)


def test_together_and_in_turns_are_different_steps() -> None:
    turns, _ = by_hand("uda_kd", True)
    together, _ = by_hand("uda_kd", False)
    assert torch.equal(turns["teacher"]["fc.weight"], together["teacher"]["fc.weight"])
    assert not torch.allclose(turns["student"]["fc.weight"], together["student"]["fc.weight"], rtol=1e-6, atol=0)
