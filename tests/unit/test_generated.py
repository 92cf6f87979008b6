"""Images of a generator that learns beside the student (DAFL, ZSKT, DFAD, DFQ): what it is trained by, its steps
against a plain loop, and what the student sees.

The generators were compared with those of the four reference codes too, outside this project: with the same weights and
noise they agree bit for bit.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tensors import rand
from tiny import CPU, killed, member_of, shortened, teacher_for, train
from torch import Tensor, nn
from torch.autograd import gradcheck
from torch.nn import functional as F

from kdbench.engine.inputs import SourceContext, SourceStep
from kdbench.engine.member import Member
from kdbench.engine.networks.network import Network
from kdbench.engine.teachers.loading import fingerprint
from kdbench.engine.teachers.teacher import Teacher
from kdbench.errors import UserError
from kdbench.losses import activation_strength, class_balance, mean_absolute, one_hot
from kdbench.methods.data_free.generator import Generation, Generator, generator_terms
from kdbench.methods.data_free.source import GeneratedImages
from kdbench.recipe.planning import plan
from kdbench.recipe.specs import CellSpec
from kdbench.registry import Registry

REGISTRY = Registry()
RECIPE: dict[str, Any] = {"data": "digits", "teacher": "wrn_16_2_digits", "student": "wrn_10_1", "protocol": "digits"}
METHODS = ["dafl", "dafl_datafree", "zskt", "zskt_datafree", "dfad", "dfq"]


def cell(method: str, steps: int = 12, **more: Any) -> CellSpec:
    return shortened(plan(RECIPE | more | {"method": method, "seeds": [0]}, REGISTRY).cells[0].spec, steps)


def source_of(member: Member) -> GeneratedImages:
    source = member.sources["distillation"]
    assert isinstance(source, GeneratedImages)
    return source


# --- terms


def test_terms_by_hand() -> None:
    p = [[0.7, 0.2, 0.1], [0.3, 0.6, 0.1]]
    logits = torch.tensor(p, dtype=torch.float64).log() + 3.0
    assert one_hot(logits).item() == pytest.approx(-(math.log(0.7) + math.log(0.6)) / 2, rel=1e-12)
    mean = (0.5, 0.4, 0.1)
    entropy = -sum(m * math.log(m) for m in mean)
    assert class_balance(logits, math.e).item() == pytest.approx(-entropy, rel=1e-12)
    assert class_balance(logits).item() == pytest.approx(-entropy / math.log(10), rel=1e-12)
    assert activation_strength(torch.tensor([[1.0, -3.0], [0.0, 2.0]])).item() == -1.5
    assert mean_absolute(torch.tensor([[1.0, -3.0]]), torch.tensor([[2.0, 1.0]])).item() == 2.5


def test_ends_of_their_ranges() -> None:
    """A network that is sure of one class each, and one that knows nothing; a class that never comes adds nothing."""
    sure = 1000.0 * torch.eye(4)
    assert one_hot(sure).item() == 0 and class_balance(sure, 4.0).item() == pytest.approx(-1)
    same = torch.zeros(5, 4)
    assert one_hot(same).item() == pytest.approx(math.log(4)) and class_balance(same, 4.0).item() == pytest.approx(-1)
    one = sure[:1].expand(3, 4).clone().requires_grad_()
    assert class_balance(one).item() == 0
    assert torch.autograd.grad(class_balance(one), one)[0].isfinite().all()


def test_gradients_are_the_derivatives() -> None:
    logits = rand(4, 3, seed=1).requires_grad_()
    for loss in (one_hot, class_balance, activation_strength):
        assert gradcheck(loss, [logits])
    teacher = rand(4, 3, seed=2).requires_grad_()
    assert gradcheck(lambda student: mean_absolute(student, teacher.detach()), [logits])
    assert torch.autograd.grad(mean_absolute(logits, teacher), teacher, allow_unused=True) == (None,)


@pytest.mark.parametrize("loss", [one_hot, class_balance])
def test_what_is_no_batch_of_logits_is_refused(loss: Any) -> None:
    for wrong in (torch.zeros(3), torch.zeros(0, 3), torch.zeros(2, 3, 4)):
        with pytest.raises(ValueError, match=r"needs logits \[N, K\]"):
            loss(wrong)
    with pytest.raises(ValueError, match="base"):
        class_balance(torch.zeros(2, 3), 1.0)


# --- the generator


@pytest.mark.parametrize("output", ["sigmoid", "tanh", "linear"])
@pytest.mark.parametrize("training", [True, False])
def test_a_generator_step_by_step(output: Any, training: bool) -> None:
    settings = Generation(latent=5, widths=(6, 4, 3), output=output, eps=0.8, one_hot=1.0)
    torch.manual_seed(0)
    model = Generator(settings, (2, 8, 12)).double().train(training)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -1, 1)  # type: ignore[arg-type]
            nn.init.uniform_(module.running_var, 0.5, 2)  # type: ignore[arg-type]
    state = copy.deepcopy(model.state_dict())
    noise = rand(7, 5, seed=3)

    def norm(x: Tensor, name: str, eps: float) -> Tensor:
        mean, var = state[f"{name}.running_mean"], state[f"{name}.running_var"]
        if training:
            mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3), correction=0)
        scale, shift = state.get(f"{name}.weight", torch.ones(())), state.get(f"{name}.bias", torch.zeros(()))
        shaped = [v.double().expand(x.shape[1]).view(-1, 1, 1) for v in (mean, var, scale, shift)]
        return (x - shaped[0]) / (shaped[1] + eps).sqrt() * shaped[2] + shaped[3]

    x = (noise @ state["linear.weight"].T + state["linear.bias"]).view(7, 6, 2, 3)
    x = norm(x, "body.0", 1e-5).repeat_interleave(2, 2).repeat_interleave(2, 3)
    x = F.leaky_relu(norm(F.conv2d(x, state["body.2.weight"], padding=1), "body.3", 0.8), 0.2)
    x = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
    x = F.leaky_relu(norm(F.conv2d(x, state["body.6.weight"], padding=1), "body.7", 0.8), 0.2)
    x = F.conv2d(x, state["body.9.weight"], state["body.9.bias"], padding=1)
    ends = {"sigmoid": x.sigmoid, "tanh": lambda: norm(x.tanh(), "end.1", 1e-5), "linear": lambda: norm(x, "end", 1e-5)}
    assert torch.allclose(model(noise), ends[output](), rtol=1e-10, atol=1e-12)


def test_all_terms_against_their_formulas() -> None:
    """Of a real teacher and student, with two of the classes unknown to the teacher."""
    spec = cell("dfq")
    member, _, teacher = member_of(spec)
    assert teacher is not None
    network, student = teacher.network, member.student
    student.model.eval()
    pixels = torch.rand(6, 1, 8, 8).requires_grad_()
    known = [0, 1, 2, 3, 5, 6, 7, 9]
    weights = {"adversarial": 1.5, "one_hot": 0.5, "activation": 0.3, "balance": 2.0, "feature": 0.1}
    for divergence in ("kl", "kl_elements", "l1"):
        settings = Generation(**weights, divergence=divergence, base=7.0)  # type: ignore[arg-type]
        found = generator_terms(pixels, network, student.logits, settings, known)
        values = network(network.normalizer(pixels), ["logits", "pooled"])
        taught, own = values["logits"][:, known], student.logits(pixels)[:, known]
        p, q = taught.softmax(1), own.softmax(1)
        kl = (p * (p / q).log()).sum(1).mean()
        apart = {"kl": kl, "kl_elements": kl / 8, "l1": (own - taught).abs().mean()}[divergence]
        assert found["adversarial"].item() == pytest.approx(-apart.item(), rel=1e-4)
        assert found["one_hot"].item() == pytest.approx(-p.max(1).values.log().mean().item(), rel=1e-4)
        assert found["activation"].item() == pytest.approx(-values["pooled"].abs().mean().item(), rel=1e-5)
        mean = p.mean(0)
        assert found["balance"].item() == pytest.approx((mean * mean.log()).sum().item() / math.log(7), rel=1e-4)
        total = sum(weights[name] * found[name].item() for name in weights)
        assert found["loss"].item() == pytest.approx(total, rel=1e-5)
    assert found.keys() == {*weights, "loss"}
    assert generator_terms(pixels, network, student.logits, Generation(one_hot=1.0)).keys() == {"one_hot", "loss"}


# --- its steps


def by_hand(method: str, source: GeneratedImages, teacher: Teacher, student: Network) -> nn.Module:
    """The generator after its first round, by a plain step."""
    chosen, model, normalizer = source.settings, source.generator.train(), teacher.network.normalizer
    optimizer = torch.optim.Adam(model.parameters(), chosen.lr, chosen.betas)
    made = model(source._noise("images" if method == "zskt" else "own", 0, 1)[0])
    values = teacher.network(made, ["logits", "pooled"])
    taught = values["logits"]
    student.model.train(method != "dafl")
    own = student.logits(made * normalizer.std.view(-1, 1, 1) + normalizer.mean.view(-1, 1, 1))
    p = taught.softmax(1)
    if method == "dafl":
        mean = p.mean(0)
        sure, strong = F.cross_entropy(taught, taught.argmax(1)), values["pooled"].abs().mean()
        loss = 0.05 * sure - 0.01 * strong + 5 * (mean * mean.log10()).sum()
    elif method == "zskt":
        loss = -F.kl_div(own.log_softmax(1), p, reduction="none").mean()
    else:
        loss = -(own - taught).abs().mean()
    loss.backward()
    if method == "zskt":
        nn.utils.clip_grad_norm_(model.parameters(), 5.0)
    optimizer.step()
    return model


@pytest.mark.parametrize("method", ["dafl", "zskt", "dfad"])
def test_a_round_is_a_plain_step_of_the_generator(method: str) -> None:
    member, _, teacher = member_of(cell(method))
    assert teacher is not None
    source = source_of(member)
    every = source.settings.every
    expected = by_hand(method, copy.deepcopy(source), teacher, copy.deepcopy(member.student))
    late = every if source.settings.student_first else 0
    for at in range(late + 1):
        assert source.rounds == 0
        # A cosine has not begun to fall where nothing is done.
        now = SourceStep(at, 0.0, member.student, 0, 100)
        assert source.ready(now, lambda text: None, lambda: False)
        if at < late:
            source.sets(now)
    assert source.rounds == 1

    def flat(model: nn.Module, of: Callable[[nn.Parameter], Any]) -> Tensor:
        return torch.cat([of(parameter).flatten() for parameter in model.parameters()]).detach()

    pairs = [[flat(model, of) for model in (source.generator, expected)] for of in (lambda p: p.grad, lambda p: p)]
    assert (pairs[0][0] - pairs[0][1]).norm() < 1e-4 * pairs[0][1].norm()
    # Adam moves a weight by about its rate whatever the gradient: of those near 0 rounding decides.
    assert (pairs[1][0] - pairs[1][1]).abs().mean() < 0.02 * source.settings.lr


@pytest.mark.parametrize("method", METHODS)
def test_the_networks_stay_as_they_are_while_the_generator_learns(method: str) -> None:
    member, _, teacher = member_of(cell(method))
    assert teacher is not None
    before, taught = fingerprint(member.student.model), fingerprint(teacher.network.model)
    source = source_of(member)
    after = SourceStep(source.settings.every, 0.2, member.student, 0, 60)
    source.ready(after, lambda text: None, lambda: False)
    assert fingerprint(teacher.network.model) == taught
    assert all(p.grad is None for network in (member.student, teacher.network) for p in network.model.parameters())
    # In train mode its running statistics follow, and nothing else.
    assert (fingerprint(member.student.model) == before) == (source.settings.student_mode == "eval")
    for norm in (m for m in member.student.model.modules() if isinstance(m, nn.BatchNorm2d)):
        norm.reset_running_stats()
    fresh = copy.deepcopy(member_of(cell(method))[0].student.model)
    assert fingerprint(member.student.model) == fingerprint(fresh)


def test_a_stop_comes_before_a_round() -> None:
    member, _, _ = member_of(cell("dfq"))
    source = source_of(member)
    before = fingerprint(source.generator)
    now = SourceStep(0, 0.0, member.student, 0, 20)
    assert not source.ready(now, lambda text: None, lambda: True)
    assert source.rounds == 0 and fingerprint(source.generator) == before


def test_its_optimizer_has_the_betas_and_the_largest_norm_of_its_settings() -> None:
    spec = cell("zskt")
    teacher = teacher_for(spec)
    context = SourceContext(spec, "distillation", CPU, teacher.network)
    source = GeneratedImages(context, one_hot=1.0, clip=1e-3, betas=(0.3, 0.7))
    source.ready(SourceStep(0, 0.0, teacher.network), lambda text: None, lambda: False)
    norm = torch.cat([p.grad.flatten() for p in source.parameters if p.grad is not None]).norm()
    assert norm.item() == pytest.approx(1e-3, rel=1e-3)
    assert source.optimizer.param_groups[0]["betas"] == (0.3, 0.7)


def test_a_student_whose_batch_norms_wait_for_other_processes_is_refused() -> None:
    member, _, _ = member_of(cell("zskt"))
    member.student.model.bn = nn.SyncBatchNorm(2)  # type: ignore[assignment]
    now = SourceStep(0, 0.0, member.student, 0, 20)
    with pytest.raises(UserError, match="on one process alone"):
        source_of(member).ready(now, lambda text: None, lambda: False)


def test_rates_of_a_cosine() -> None:
    falling = Generation(one_hot=1.0, lr=0.5, decay="cosine")
    assert [falling.rate(p) for p in (0.0, 0.5, 1.0)] == pytest.approx([0.5, 0.25, 0.0])
    assert replace(falling, decay="none").rate(0.7) == 0.5


# --- what the student sees


def seen(member: Member, steps: int) -> list[Tensor]:
    source, found = source_of(member), []
    for at in range(steps):
        now = SourceStep(at, 0.0, member.student, 0, 100)
        source.ready(now, lambda text: None, lambda: False)
        batch = source.sets(now)["data"]
        assert batch.labels is None and batch.index is None and batch.images.shape == (8, 1, 8, 8)
        assert not batch.images.requires_grad
        found.append(batch.images)
    return found


def test_noise_is_new_in_every_step_or_that_of_the_round() -> None:
    new = seen(member_of(cell("dfad"))[0], 10)
    assert all(not torch.equal(a, b) for i, a in enumerate(new) for b in new[:i])
    kept = seen(member_of(cell("zskt"))[0], 20)
    assert all(torch.allclose(image, kept[0], atol=1e-5) for image in kept[:10])
    assert all(torch.allclose(image, kept[10], atol=1e-5) for image in kept[10:])
    assert not torch.allclose(kept[0], kept[10], atol=1e-2)


def test_the_steps_of_a_round_need_no_host() -> None:
    """One look at what is due, and all its steps: as many as a stretch has, each with noise of its own."""
    member, _, _ = member_of(cell("dfad"))
    source, now = source_of(member), SourceStep(7, 0.1, member.student, 0, 100)
    source.ready(now, lambda text: None, lambda: False)
    assert source.stretch(now) == 3
    made = [source.sets(now)["data"].images for _ in range(3)]
    assert all(torch.equal(a, b) for a, b in zip(made, seen(member_of(cell("dfad"))[0], 10)[7:], strict=True))


def test_pixels_are_where_the_output_says() -> None:
    low, high = torch.stack(seen(member_of(cell("dfq"))[0], 3)).aminmax()
    assert low >= 0 and high <= 1
    member, _, teacher = member_of(cell("dafl"))
    assert teacher is not None
    for pixels in seen(member, 3):
        values = teacher.network.normalizer(pixels)
        assert values.mean().item() == pytest.approx(0, abs=1e-4) and values.std().item() == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize("method", ["dafl", "zskt", "dfad", "dfq"])
def test_a_resumed_cell_ends_bit_for_bit(method: str, tmp_path: Path) -> None:
    """Stopped in the middle of a round."""
    spec = cell(method, steps=14)
    first, batches, teacher = member_of(spec)
    train(first, batches, teacher, 14)
    second = killed(lambda: member_of(spec, teacher=teacher)[0], batches, teacher, tmp_path, at=8)
    assert fingerprint(second.student.model) == fingerprint(first.student.model)
    ends = [source_of(member) for member in (second, first)]
    assert fingerprint(ends[0].generator) == fingerprint(ends[1].generator)
    assert ends[0].record() == ends[1].record()
    assert ends[0].record()["rounds"] == (14 if method == "dafl" else 2)


# --- what is refused


def test_what_cannot_be_generated_is_told() -> None:
    for settings, why in [
        ({}, "learn nothing: give one of adversarial, one_hot"),
        ({"one_hot": 1.0, "every": 0}, "'every' cannot be 0"),
        ({"one_hot": -1.0}, "'one_hot' cannot be -1.0"),
        ({"one_hot": 1.0, "lr": 0.0}, "'lr' cannot be 0.0"),
        ({"one_hot": 1.0, "base": 1.0}, "'base' cannot be 1.0"),
        ({"one_hot": 1.0, "widths": (8, 8)}, "three numbers of channels"),
        ({"one_hot": 1.0, "betas": (0.5,)}, "two betas"),
        ({"one_hot": 1.0, "betas": (0.5, 1.5)}, "both lie in"),
    ]:
        with pytest.raises(ValueError, match=why):
            Generation(**settings)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="10×8 cannot be generated: both sides are multiples of 4, .* image_size: 8"):
        Generator(Generation(one_hot=1.0), (1, 10, 8))


def test_a_cell_without_a_teacher_or_its_batch_norms_is_refused() -> None:
    spec = cell("dfq")
    with pytest.raises(UserError, match="learns from a teacher"):
        GeneratedImages(SourceContext(spec, "distillation", CPU, None), one_hot=1.0)
    teacher = teacher_for(spec)
    context = SourceContext(spec, "distillation", CPU, teacher.network)
    teacher.network.model.bn = nn.Identity()  # type: ignore[assignment]
    for name, module in list(teacher.network.model.named_modules()):
        if isinstance(module, nn.BatchNorm2d):
            teacher.network.model.set_submodule(name, nn.Identity())
    with pytest.raises(UserError, match="'feature': the network has no batch norm"):
        GeneratedImages(context, feature=1.0)
    del teacher.network.extractor.places["pooled"]  # type: ignore[attr-defined]
    with pytest.raises(UserError, match="pooled"):
        GeneratedImages(context, activation=1.0)


def test_two_stages_draw_for_themselves_and_two_rounds_never_the_same() -> None:
    spec = cell("dfq")
    teacher = teacher_for(spec)
    one, other = (
        GeneratedImages(SourceContext(spec, stage, CPU, teacher.network), one_hot=1.0) for stage in ("one", "two")
    )
    assert fingerprint(one.generator) != fingerprint(other.generator)
    drawn = [
        source._noise(stream, number, 1) for source in (one, other) for stream in ("images", "own") for number in (0, 1)
    ]
    assert all(not torch.equal(a, b) for i, a in enumerate(drawn) for b in drawn[:i])
    many = one._noise("images", 5, 40).flatten()
    assert many.mean().item() == pytest.approx(0, abs=0.01) and many.std().item() == pytest.approx(1, abs=0.01)
    assert (many.abs() < 1).float().mean().item() == pytest.approx(0.6827, abs=0.01)


def test_what_a_generator_takes() -> None:
    """By hand: products of its layers for an image of 8×8, and rounds of a stage of 23 steps."""
    spec = cell("zskt")
    source = source_of(member_of(spec)[0])
    flops = 2 * (100 * 128 * 4 + 9 * (128 * 128 * 16 + 128 * 64 * 64 + 64 * 1 * 64))
    cost = source.cost(23)
    assert cost.teacher == cost.student == 3 * 8
    assert cost.operations == flops * (3 * 3 * 8 + 23 * 8)
    assert source_of(member_of(cell("dafl"))[0]).cost(23).student == 0
    # Weights in four copies, the noise of ten steps, and what a backward pass needs: inputs of layers, and a little.
    weights, noise = 16 * sum(p.numel() for p in source.parameters), 4 * 10 * 8 * 100
    inputs = 4 * 8 * (2 * 128 * 4 + 128 * 16 * 3 + 128 * 64 + 64 * 64 * 3)
    assert weights + noise + inputs < cost.held < weights + noise + 2 * inputs
