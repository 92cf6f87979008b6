"""Filters that are switched off could be cut out: nothing changes, they stay off, and what is left is counted right."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_deep_inversion import QUICK, cell, member_in, pooled, prepared
from tiny import killed, teacher_for, train
from torch import Tensor, nn

from kdbench.engine.checks.cells import check_cell
from kdbench.engine.finish import size_of
from kdbench.engine.networks.build import build_model
from kdbench.engine.networks.weights import start_from
from kdbench.engine.teachers.loading import fingerprint
from kdbench.errors import UserError
from kdbench.methods.pruning.filters import filters, importance, least_important, size_without, switch_off
from kdbench.methods.pruning.operation import TaylorPruning

SHAPE = (1, 8, 8)


def chain(a: int = 5, b: int = 4) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, a, 3, padding=1, bias=False),
        nn.BatchNorm2d(a),
        nn.ReLU(),
        nn.Conv2d(a, b, 3, stride=2, padding=1),
        nn.BatchNorm2d(b),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(b, 3),
    )


def trained_chain(a: int = 5, b: int = 4, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    model = chain(a, b)
    for norm in (model[1], model[4]):
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
    for _ in range(5):
        model(torch.randn(8, *SHAPE))
    return model.eval()


def cut(model: nn.Sequential, first: Tensor, second: Tensor) -> nn.Sequential:
    """The chain without these filters, built anew."""
    small = chain(int(first.sum()), int(second.sum()))
    state = model.state_dict()
    for norm, mask in (("1", first), ("4", second)):
        for name in ("weight", "bias", "running_mean", "running_var"):
            state[f"{norm}.{name}"] = state[f"{norm}.{name}"][mask]
    state["0.weight"] = state["0.weight"][first]
    state["3.weight"], state["3.bias"] = state["3.weight"][second][:, first], state["3.bias"][second]
    state["8.weight"] = state["8.weight"][:, second]
    small.load_state_dict(state)
    return small.eval()


def test_switched_off_is_cut_out() -> None:
    model = trained_chain()
    first, second = torch.tensor([True, False, True, True, False]), torch.tensor([True, True, False, True])
    small = cut(model, first, second)
    x = torch.randn(6, *SHAPE)
    assert not torch.allclose(model(x), small(x), atol=1e-3)
    kept = {"1": first, "4": second}
    switch_off(model, kept)
    assert torch.allclose(model(x), small(x), atol=1e-6)
    assert size_without(model, SHAPE, kept)["parameters"] == sum(p.numel() for p in small.parameters())


@pytest.mark.parametrize("name", ["wrn_16_2", "resnet8x4", "resnet20"])
def test_all_filters_count_as_the_whole_network_does(name: str) -> None:
    spec = cell("kd", student=name)
    model = build_model(spec.student, spec.data)
    kept = {
        norm: torch.ones_like(model.get_parameter(f"{norm}.weight"), dtype=torch.bool) for norm in filters(model, SHAPE)
    }
    assert size_without(model, SHAPE, kept) == size_of(model, spec.data)


def test_filters_of_a_wide_resnet_are_those_inside_its_blocks() -> None:
    """Its other batch norms take sums, or (the stem's, if the first block is no wider) what a shortcut takes too."""
    for name, stem in (("wrn_16_2", ["block1.0.bn1"]), ("wrn_16_1", [])):
        spec = cell("kd", student=name)
        found = filters(build_model(spec.student, spec.data), SHAPE)
        assert [norm for norm in found if not norm.endswith("bn2")] == stem
        found = {norm: conv for norm, conv in found.items() if norm not in stem}
        assert len(found) == 6 and all(conv.endswith("conv1") for conv in found.values())


def test_what_is_left_of_a_residual_network_by_hand() -> None:
    """One block of a ResNet: a filter of its first convolution takes a channel of its second with it, one of its second
    takes none, since the shortcut goes on."""
    spec = cell("kd", student="resnet20")
    model = build_model(spec.student, spec.data)
    found = filters(model, SHAPE)
    whole = {norm: torch.ones_like(model.get_parameter(f"{norm}.weight"), dtype=torch.bool) for norm in found}
    before = size_without(model, SHAPE, whole)
    norm = next(n for n in found if n.endswith("bn1") and "." in n)
    for own, also in ((norm, 16 * 9), (norm.replace("bn1", "bn2"), 0)):
        kept = {n: mask.clone() for n, mask in whole.items()}
        kept[own][3] = False
        after = size_without(model, SHAPE, kept)
        assert before["parameters"] - after["parameters"] == 16 * 9 + also + 2
        assert before["flops"] - after["flops"] == 2 * 64 * (16 * 9 + also)


def test_grouped_convolutions_count_whole() -> None:
    """Of a filter before one, its own nine weights and its batch norm's two numbers are left out."""
    model = chain(4, 4)
    model[3] = nn.Conv2d(4, 4, 3, stride=2, padding=1, groups=4)
    whole, without = (
        size_without(model, SHAPE, {"1": torch.tensor([first, True, True, True])}) for first in (True, False)
    )
    assert whole["parameters"] - without["parameters"] == 9 + 2
    assert whole["flops"] - without["flops"] == 2 * 64 * 9


def test_importance_is_the_squared_first_order_change() -> None:
    model = trained_chain().double()
    x = torch.randn(6, *SHAPE, dtype=torch.float64)

    def loss() -> Tensor:
        return model(x).square().mean()

    loss().backward()
    found = importance(model[1])
    for channel in range(5):
        # The derivative along (γ, β) of the channel: scaling both by 1 - ε.
        at = loss().item()
        with torch.no_grad():
            for parameter in (model[1].weight, model[1].bias):
                parameter[channel] *= 1 - 1e-6
        change = (loss().item() - at) / 1e-6
        with torch.no_grad():
            for parameter in (model[1].weight, model[1].bias):
                parameter[channel] /= 1 - 1e-6
        assert found[channel].item() == pytest.approx(change**2, rel=1e-3)


def test_the_least_important_go_and_every_layer_keeps_one() -> None:
    kept = {"a": torch.ones(3, dtype=torch.bool), "b": torch.ones(3, dtype=torch.bool)}
    scores = {"a": torch.tensor([0.1, 0.2, 0.3]), "b": torch.tensor([9.0, 0.25, 8.0])}
    half = least_important(scores, kept, 0.5)
    assert half["a"].tolist() == [False, False, True] and half["b"].tolist() == [True, False, True]
    most = least_important(scores, half, 0.9)
    assert [int(mask.sum()) for mask in most.values()] == [1, 1] and most["b"].tolist() == [True, False, False]


def test_the_share_is_reached_in_rounds_by_importance_over_all_batches() -> None:
    """Against gates of ones behind the batch norms, whose derivative is a channel's first-order change."""
    student, teacher = trained_chain(40, 24).train(), trained_chain(9, 8, seed=1)
    with torch.no_grad():
        for network in (student, teacher):
            network[8].weight.mul_(10)
    batches = [torch.randn(6, *SHAPE) * scale for scale in (0.5, 1.0, 3.0)]
    gates = {norm: torch.ones(len(student.get_submodule(norm).weight)) for norm in ("1", "4")}  # type: ignore[arg-type]
    copy = deepcopy(student)
    for removed in (16, 32):
        scores = {norm: torch.zeros_like(gate) for norm, gate in gates.items()}
        for images in batches:
            asked = {norm: gate.clone().requires_grad_() for norm, gate in gates.items()}
            value = images
            for name, layer in copy.named_children():
                value = layer(value) * (asked[name].view(1, -1, 1, 1) if name in asked else 1)
            p, q = ((one / 3).softmax(1) for one in (teacher(images).detach(), value))
            (p * (p / q).log()).sum(1).mean().backward()
            for norm, gate in asked.items():
                scores[norm] += gate.grad.square()  # type: ignore[union-attr]
        ranked = sorted((scores[n][c].item() if g[c] else 0.0, n, c) for n, g in gates.items() for c in range(len(g)))
        for _, norm, channel in ranked[:removed]:
            gates[norm][channel] = 0.0
    operation = TaylorPruning(share=0.5, batches=3, rounds=2, temperature=3.0)
    networks = [SimpleNamespace(model=model, logits=model) for model in (student, teacher)]
    context: Any = SimpleNamespace(
        student=networks[0], teacher=networks[1], image_shape=SHAPE, stage="a",
        batch=lambda number: SimpleNamespace(images=batches[number]),
    )  # fmt: skip
    operation.perform(context)
    assert all(torch.equal(operation.kept[norm], gate.bool()) and gate.any() for norm, gate in gates.items())


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam])
def test_what_is_off_stays_off(optimizer: Any) -> None:
    model = trained_chain().train()
    # Behind a ReLU nothing that is off has a gradient anyway; in a residual sum it has.
    model[2] = nn.Identity()
    kept = {"1": torch.tensor([True, False, True, True, False])}
    switch_off(model, kept)
    more = {"momentum": 0.9} if optimizer is torch.optim.SGD else {}
    steps = optimizer(model.parameters(), lr=0.1, weight_decay=0.01, **more)
    before = model[1].weight.detach().clone()
    for _ in range(5):
        steps.zero_grad()
        model(torch.randn(8, *SHAPE)).square().mean().backward()
        steps.step()
    for parameter in (model[1].weight, model[1].bias):
        assert (parameter[~kept["1"]] == 0).all() and (parameter[kept["1"]] != 0).all()
    assert not torch.equal(model[1].weight, before)


# --- methods


PRUNED = {"share": 0.4, "pruning_batches": 2, "rounds": 2}


@pytest.mark.parametrize("method", ["prune_data_free", "prune_real", "prune_none"])
def test_a_pruned_student_resumes_bit_for_bit_with_its_filters_off(method: str, tmp_path: Path) -> None:
    own = PRUNED | ({} if method == "prune_real" else QUICK)
    spec = cell({"name": method, **own}, steps=5, student="wrn_16_2")
    teacher = teacher_for(spec)
    guarded = method != "prune_real"
    if guarded:
        prepared(spec, teacher, tmp_path)
    before = fingerprint(teacher.network.model)
    whole, batches = member_in(spec, teacher, tmp_path, guarded)
    assert fingerprint(whole.student.model) == before, "it begins as its teacher"
    train(whole, batches, teacher, 5)
    record = whole.operations["finetuning"].record()
    assert record["share_removed"] == pytest.approx(0.4, abs=0.01)
    assert record["after"]["parameters"] < record["before"]["parameters"]
    assert record["after"]["flops"] < record["before"]["flops"]

    def off() -> int:
        norms = (whole.student.model.get_submodule(name) for name in record["by_layer"])
        return sum(int(((n.weight == 0) & (n.bias == 0)).sum()) for n in norms)  # type: ignore[operator,arg-type]

    assert off() == record["removed"] > 0 and fingerprint(teacher.network.model) == before
    for kill in (1, 3):
        folder = tmp_path / f"killed{kill}"
        folder.mkdir()
        if guarded:
            (folder / "shared").symlink_to(tmp_path / "shared")
        second = killed(
            lambda folder=folder: member_in(spec, teacher, folder, guarded)[0], batches, teacher, folder, kill
        )
        assert fingerprint(second.student.model) == fingerprint(whole.student.model), f"killed at step {kill}"
        assert second.operations["finetuning"].record() == record


def test_without_fine_tuning_nothing_but_the_filters_changes(tmp_path: Path) -> None:
    spec = cell({"name": "prune_none", **PRUNED, **QUICK}, steps=3, student="wrn_16_2")
    teacher, member, batches = pooled(spec, tmp_path)
    train(member, batches, teacher, 3)
    own = member.student.model.state_dict()
    changed = {name for name, value in teacher.network.model.state_dict().items() if not torch.equal(value, own[name])}
    of_norms = {
        f"{norm}.{part}" for norm in member.operations["finetuning"].record()["by_layer"] for part in ("weight", "bias")
    }
    assert changed and changed <= of_norms


def test_a_student_begins_with_a_smaller_classifier_widened() -> None:
    torch.manual_seed(0)
    old, new = chain(), chain()
    new[8] = nn.Linear(4, 5)
    rest = new[8].weight[3:].clone(), new[8].bias[3:].clone()
    start_from(new, old.state_dict(), "new", "old")
    assert torch.equal(new[8].weight[:3], old[8].weight) and torch.equal(new[8].weight[3:], rest[0])
    assert torch.equal(new[8].bias[:3], old[8].bias) and torch.equal(new[8].bias[3:], rest[1])
    assert torch.equal(new[0].weight, old[0].weight)
    with pytest.raises(UserError, match="differ at '0.weight'"):
        start_from(chain(4), old.state_dict(), "new", "old")
    with pytest.raises(UserError, match="differ at '9.bias'"):
        start_from(nn.Sequential(*chain(), nn.Linear(3, 3)), old.state_dict(), "new", "old")


def test_what_cannot_be_pruned_is_told(tmp_path: Path) -> None:
    spec = cell({"name": "prune_real", "share": 1.5}, student="wrn_16_2")
    teacher = teacher_for(spec)
    with pytest.raises(UserError, match=r"a share of 1\.5"):
        member_in(spec, teacher, tmp_path)
    spec = cell("prune_real", student="wrn_10_1")
    with pytest.raises(UserError, match="cannot begin with the weights"):
        member_in(spec, teacher, tmp_path)
    with pytest.raises(UserError, match="cannot begin with the weights"):
        check_cell(spec)
