"""Contrastive model inversion: its terms by hand, views, one batch, and a pool that grows while the student learns.

Generator, local views and all terms with their gradients were compared with the reference code too, outside this
project: in float64 they agree to rounding.
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from guarded import without
from PIL import Image
from tensors import rand
from test_deep_inversion import hooks_of, network
from tiny import CPU, images, killed, shortened, teacher_for, train
from torch import Tensor, nn
from torch.nn import functional as F

from kdbench.engine.data.batches import Batches
from kdbench.engine.inputs import SourceContext, SourceFiles, SourceStep
from kdbench.engine.member import Member
from kdbench.engine.teachers.loading import fingerprint
from kdbench.engine.teachers.teacher import Teacher
from kdbench.errors import UserError
from kdbench.files import sha256_of
from kdbench.losses import BatchNormInputs, BatchNormMeans, agreed_divergence, view_contrast
from kdbench.methods.cmi import inversion
from kdbench.methods.cmi.inversion import Contrast, ContrastiveInversion, InversionDraws, inversion_terms, invert
from kdbench.methods.cmi.source import InvertedImages
from kdbench.methods.cmi.views import parts
from kdbench.methods.data_free.generator import Generation, generator_terms
from kdbench.methods.deep_inversion.made import grid
from kdbench.recipe.planning import plan
from kdbench.recipe.specs import CellSpec
from kdbench.registry import Registry

REGISTRY = Registry()
RECIPE: dict[str, Any] = {"data": "digits", "teacher": "wrn_16_2_digits", "student": "wrn_10_1", "protocol": "digits"}
SMALL = ContrastiveInversion(iterations=3, latent=6, widths=(8, 8, 4), head=5, padding=1)
SHAPE = (1, 8, 8)


def cell(steps: int = 8, **options: Any) -> CellSpec:
    method = {"name": "cmi", "images": 12, "every": 3, "iterations": 2, "padding": 1, **options}
    return shortened(plan(RECIPE | {"method": method, "seeds": [0]}, REGISTRY).cells[0].spec, steps)


# --- terms


@pytest.mark.parametrize("present", [None, 3])
def test_contrast_of_views_against_loops(present: int | None) -> None:
    local, whole, t = rand(7, 4, seed=0), rand(7, 4, seed=1), 0.3
    each = []
    for n in range(7):
        near = [float(F.cosine_similarity(local[n], whole[m], dim=0)) / t for m in range(7)]
        each.append(math.log(sum(map(math.exp, near))) - near[n])
    expected = sum(each) / 7 if present is None else sum(each[:3]) / 3 + sum(each[3:]) / 4
    assert view_contrast(local, whole, present, t).item() == pytest.approx(expected, rel=1e-12)


def test_contrast_of_views_at_its_ends() -> None:
    same = torch.ones(6, 3)
    assert view_contrast(same, same).item() == pytest.approx(math.log(6), rel=1e-6)
    # The batch and what is remembered count once each.
    assert view_contrast(same, same, 2).item() == pytest.approx(2 * math.log(6), rel=1e-6)
    apart = 5 * torch.eye(6, dtype=torch.float64)
    assert view_contrast(apart, apart, None, 0.5).item() == pytest.approx(math.log(1 + 5 * math.exp(-2)), rel=1e-12)


def test_divergence_counts_where_both_choose_the_same_class() -> None:
    student = torch.tensor([[0.8, 0.2], [0.9, 0.1], [0.3, 0.7]], dtype=torch.float64)
    teacher = torch.tensor([[0.6, 0.4], [0.2, 0.8], [0.1, 0.9]], dtype=torch.float64)
    each = [sum(t * math.log(t / s) for s, t in zip(*(side[n].tolist() for side in (student, teacher)), strict=True))
            for n in (0, 2)]  # fmt: skip
    assert agreed_divergence(student.log() + 1, teacher.log() - 2).item() == pytest.approx(sum(each) / 3, rel=1e-12)


def test_views_are_compared_in_full_precision_under_autocast() -> None:
    local, whole = (rand(6, 4, seed=seed).float() for seed in (0, 1))
    expected = view_contrast(local, whole).item()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = view_contrast(local, whole)
    assert found.dtype == torch.float32 and found.item() == pytest.approx(expected, rel=1e-6)


def test_gradients_are_the_derivatives() -> None:
    x = [rand(4, 3, seed=0).requires_grad_(), rand(4, 3, seed=1).requires_grad_()]
    assert torch.autograd.gradcheck(agreed_divergence, x)
    assert torch.autograd.gradcheck(lambda a: view_contrast(a, x[1], 2), x[:1])
    (none,) = torch.autograd.grad(view_contrast(*x), x[1:], allow_unused=True)
    assert none is None, "a global view is what is looked for, not what learns"


def test_what_cannot_be_compared_is_refused() -> None:
    a = rand(4, 3, seed=0)
    for wrong in ((a, rand(3, 3, seed=0)), (a[0], a[0]), (a[:0], a[:0]), (a, a, 0), (a, a, 5), (a, a, 2, 0.0)):
        with pytest.raises(ValueError, match="view_contrast|temperature"):
            view_contrast(*wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="agreed_divergence"):
        agreed_divergence(a, a[:, :2])


def test_features_are_the_means_of_what_enters_batch_norms() -> None:
    model, x = network(), rand(5, 1, 8, 8, seed=0).float()
    expected = torch.cat([model[:at](x).mean(dim=(2, 3)) for at in (1, 4)], dim=1)  # type: ignore[index]
    with BatchNormMeans(model) as means:
        model(x)
        assert torch.allclose(means.features(), expected, atol=1e-6) and expected.shape == (5, 10)
        with pytest.raises(ValueError, match="did not run"):
            means.features()
    assert hooks_of(model) == 0


# --- views


def test_parts_are_resized_as_torch_does_it() -> None:
    x = rand(4, 2, 6, 8, seed=0)
    boxes = torch.tensor([[0, 0, 6, 8, 0], [1, 2, 3, 5, 0], [2, 3, 4, 1, 1], [5, 0, 1, 8, 1]])
    for image, part, (top, left, height, width, mirrored) in zip(x, parts(x, boxes), boxes.tolist(), strict=True):
        of = image[None, :, top : top + height, left : left + width]
        resized = F.interpolate(of, (6, 8), mode="bilinear", align_corners=True)
        assert torch.allclose(part, (resized.flip(3) if mirrored else resized)[0], atol=1e-12)


def test_views_are_drawn_by_address_and_cover_what_they_may() -> None:
    many = replace(SMALL, iterations=50, area=0.25)
    views = InversionDraws(0, "test", 1).views(many, 20, SHAPE)
    other, again = (InversionDraws(0, "test", batch).views(many, 20, SHAPE) for batch in (2, 1))
    assert torch.equal(views.boxes, again.boxes) and torch.equal(views.places, again.places)
    assert not torch.equal(views.boxes, other.boxes) and not torch.equal(views.places, other.places)
    top, left, height, width, mirrored = views.boxes.flatten(0, 1).unbind(1)
    assert top.min() == left.min() == 0 and (top + height).max() == (left + width).max() == 8
    # 8 × 8 / 4 pixels at least, up to the rounding of sides.
    assert 12 <= (height * width).min() < 20 and (height * width).max() > 50
    assert 0.4 < mirrored.mean() < 0.6 and views.places.unique().tolist() == list(range(18))
    upright = InversionDraws(0, "test", 1).views(replace(many, flip=False), 20, SHAPE)
    assert not upright.boxes[..., 4].any() and upright.places.unique().tolist() == list(range(9))


# --- a batch


class Plain:
    """A network as what inverts it wants it."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def normalizer(self, pixels: Tensor) -> Tensor:
        return (pixels - 0.3) / 0.4


def student_like(model: nn.Module) -> tuple[nn.Module, Any]:
    """A network not far from another one, and what it says of pixels."""
    other = network()
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    other.requires_grad_()
    return other, lambda pixels: other(Plain(model).normalizer(pixels))


def made(
    settings: ContrastiveInversion, contrast: Contrast | None = None, batch: int = 1, n: int = 12, **more: Any
) -> Any:
    teacher = network()
    labels = torch.arange(n) % 3
    student = more.pop("student", student_like(teacher)[1])
    place = InversionDraws(0, "test", batch)
    return invert(Plain(teacher), student, labels, SHAPE, settings, place, contrast, **more)  # type: ignore[arg-type]


def contrast_for(settings: ContrastiveInversion = SMALL) -> Contrast:
    return Contrast(10, settings, 0, CPU)


def test_the_loss_is_the_weighted_sum_of_terms_that_are_those_of_the_views() -> None:
    teacher, head = network(), contrast_for().head
    _, student = student_like(teacher)
    chosen = replace(SMALL, feature=0.3, cross_entropy=0.7, adversarial=0.2, contrast=0.9, contrast_temperature=0.4)
    whole, local, memory = rand(6, *SHAPE, seed=0).float(), rand(6, *SHAPE, seed=1).float(), rand(4, 20, seed=2).float()
    labels = torch.arange(6) % 3
    terms, features = inversion_terms([whole, local], labels, Plain(teacher), student, chosen, head, memory)  # type: ignore[arg-type]
    look = Plain(teacher).normalizer
    found = []
    for view in (local, whole):
        with BatchNormInputs(teacher) as norms, BatchNormMeans(teacher) as means:
            logits = teacher(look(view))
            distance = norms.distance()
            found.append(means.features())
    assert torch.equal(features, torch.cat(found, dim=1))
    remembered = memory[:, :10], memory[:, 10:]
    compared = [head(torch.cat(both)) for both in zip(found, remembered, strict=True)]
    expected = {
        "feature": distance,
        "cross_entropy": F.cross_entropy(logits, labels),
        "adversarial": -agreed_divergence(student(whole), logits),
        "contrast": view_contrast(*compared, 6, 0.4),
    }
    assert terms["adversarial"] < 0
    expected["loss"] = sum(getattr(chosen, name) * value for name, value in expected.items())  # type: ignore[assignment]
    assert terms.keys() == expected.keys()
    for name, value in expected.items():
        assert terms[name].item() == pytest.approx(value.item(), rel=1e-5), name


def test_terms_without_weight_cost_nothing() -> None:
    def never(pixels: Tensor) -> Tensor:
        raise AssertionError

    alone = replace(SMALL, adversarial=0.0, contrast=0.0)
    found = made(alone, student=never)
    assert found.terms.keys() == {"feature", "cross_entropy", "loss"} and not found.more


def test_images_are_fitted_and_networks_stay_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    losses: list[dict[str, float]] = []
    terms_of = inversion.inversion_terms

    def noted(*given: Any) -> Any:
        terms, features = terms_of(*given)
        losses.append({name: value.item() for name, value in terms.items()})
        return terms, features

    monkeypatch.setattr(inversion, "inversion_terms", noted)
    teacher, (student, look) = network(), student_like(network())
    before = fingerprint(teacher), fingerprint(student)
    contrast = contrast_for()
    first_head = fingerprint(contrast.head)
    settings = replace(SMALL, iterations=60, lr=0.02)
    place = InversionDraws(0, "test", 1)
    torch.manual_seed(5)
    drawn = torch.rand(1)
    torch.manual_seed(5)
    result: Any = invert(Plain(teacher), look, torch.arange(12) % 3, SHAPE, settings, place, contrast)  # type: ignore[arg-type]
    assert torch.equal(torch.rand(1), drawn), "draws from nobody else's numbers"
    assert (fingerprint(teacher), fingerprint(student)) == before
    assert all(p.grad is None for p in [*teacher.parameters(), *student.parameters()]) and hooks_of(teacher) == 0
    assert result.images.shape == (12, *SHAPE) and 0 <= result.images.min() < result.images.max() <= 1
    # The best iterate, which at such a rate is not the last one.
    best = min(losses, key=lambda terms: terms["loss"])
    assert len(losses) == 60 and losses[-1] != best and result.terms == pytest.approx(best, rel=1e-6)
    assert best["loss"] < losses[0]["loss"] - 0.3 and best["feature"] < 0.7 * losses[0]["feature"]
    assert fingerprint(contrast.head) != first_head and len(contrast.bank) == 0
    assert result.more["features"].dtype == torch.float16 and result.more["features"].shape == (12, 20)


def test_a_batch_is_a_function_of_its_address_the_head_and_the_bank() -> None:
    a = made(SMALL, contrast_for())
    torch.manual_seed(7)
    assert torch.equal(a.images, made(SMALL, contrast_for()).images)
    assert not torch.equal(a.images, made(SMALL, contrast_for(), batch=2).images)
    full = contrast_for()
    full.remember(rand(9, 20, seed=0))
    assert not torch.equal(a.images, made(SMALL, full).images)


def test_a_generator_begins_as_its_authors_let_it() -> None:
    large = replace(SMALL, latent=64, widths=(64, 64, 32))
    fresh = InversionDraws(0, "test", 1).generator(large, SHAPE)
    for module in fresh.modules():
        if isinstance(module, nn.Linear | nn.Conv2d | nn.BatchNorm2d):
            weights = module.weight.detach() - (1.0 if isinstance(module, nn.BatchNorm2d) else 0.0)
            assert 0.012 < weights.std() < 0.028 and weights.mean().abs() < 0.01
            assert module.bias is None or not module.bias.any()
    other = InversionDraws(0, "test", 2).generator(large, SHAPE)
    assert not torch.equal(fresh.linear.weight, other.linear.weight)


def test_the_bank_holds_the_latest_and_gives_some_of_them() -> None:
    contrast = contrast_for(replace(SMALL, bank=10))
    rows = (torch.arange(16) / 16).view(16, 1).expand(16, 20)
    for batch in rows.split(4):
        contrast.remember(batch)
    assert contrast.bank[:, 0].tolist() == [n / 16 for n in range(6, 16)]
    place = InversionDraws(0, "test", 1)
    assert torch.equal(place.remembered(contrast.bank, 10, 0, 5), contrast.bank)
    some = [place.remembered(contrast.bank, 4, iteration, 5)[:, 0].tolist() for iteration in (0, 1, 0)]
    assert len(set(some[0])) == 4 and set(some[0]) <= set(contrast.bank[:, 0].tolist())
    assert some[0] == some[2] != some[1]


# --- training on them


def member_in(spec: CellSpec, teacher: Teacher, folder: Path) -> tuple[Member, Batches]:
    """A cell that may read no real training image."""
    batches = Batches(spec, without(images(spec.data, per_class=4)), CPU)
    return Member(spec, batches, teacher, CPU, files=SourceFiles("abc", folder)), batches


def source_of(member: Member) -> InvertedImages:
    source = member.sources["distillation"]
    assert isinstance(source, InvertedImages)
    return source


def outcome(member: Member, folder: Path) -> Any:
    contrast = source_of(member).contrast
    assert contrast is not None
    files = {file.name: sha256_of(file) for file in folder.glob("**/*.safetensors")}
    return fingerprint(member.student.model), fingerprint(contrast.head), contrast.bank.tolist(), files


def test_batches_are_added_before_the_first_step_and_every_so_many_and_a_resumed_cell_has_them(tmp_path: Path) -> None:
    spec = cell(steps=8, negatives=14)
    teacher = teacher_for(spec)
    whole, batches = member_in(spec, teacher, tmp_path / "whole")
    sizes = []
    for _ in range(8):
        train(whole, batches, teacher, 1)
        sizes.append(source_of(whole).memory())
    assert sizes == [12, 12, 12, 24, 24, 24, 36, 36]
    expected = outcome(whole, tmp_path / "whole")
    assert len(expected[-1]) == 3 and len(expected[2]) == 36 and whole.finished
    record = source_of(whole).record()
    assert record["images"] == 36 and record["seconds"] > 0 and record["terms"]["contrast"] > 0
    rows = torch.cat([source_of(whole).own.read(number)[0][:8] for number in (1, 2, 3)])  # type: ignore[union-attr]
    with Image.open(tmp_path / "whole" / "synthesized" / "distillation" / "grid.png") as shown:
        assert shown.tobytes() == grid(rows).tobytes()

    # Between the checkpoint and the kill it went on, so files of a later batch are there.
    for kill in (2, 3, 5):
        folder = tmp_path / f"killed{kill}"
        second = killed(lambda folder=folder: member_in(spec, teacher, folder)[0], batches, teacher, folder, kill, 2)
        assert outcome(second, folder) == expected, f"killed at step {kill}"


def test_a_batch_that_was_stopped_leaves_no_trace(tmp_path: Path) -> None:
    spec = cell(steps=4, iterations=5)
    teacher = teacher_for(spec)
    members = [member_in(spec, teacher, tmp_path / name)[0] for name in ("whole", "stopped")]
    batches = member_in(spec, teacher, tmp_path / "whole")[1]
    for member in members:
        train(member, batches, teacher, 3)
    whole, stopped = members
    before, calls = outcome(stopped, tmp_path / "stopped"), iter(range(100))
    assert not stopped.ready(lambda text: None, lambda: next(calls) >= 3)
    assert next(calls) == 4 and outcome(stopped, tmp_path / "stopped") == before
    for member in members:
        train(member, batches, teacher, 1)
    assert outcome(stopped, tmp_path / "stopped") == outcome(whole, tmp_path / "whole")


def test_a_step_sees_images_with_the_labels_that_they_were_made_for(tmp_path: Path) -> None:
    spec = cell()
    teacher = teacher_for(spec)
    member, _ = member_in(spec, teacher, tmp_path)
    source = source_of(member)

    def now(step: int, ahead: bool = False) -> SourceStep:
        return SourceStep(step, 0.0, member.student, 0, 8, ahead=ahead)

    # Whoever looks ahead of the first images sees noise, and leaves nothing.
    assert source.sets(now(0, ahead=True))["data"].images.shape == (8, *SHAPE) and source.memory() == 0
    assert source.ready(now(0), print, lambda: False)
    batch = source.sets(now(0))["data"]
    assert batch.labels is not None and not member.student.model.training
    pool, labels = source.images
    for image, label in zip(batch.images, batch.labels, strict=True):
        at = (pool.float() == image).flatten(1).all(1).nonzero().flatten().tolist()
        assert len(at) == 1 and labels[at[0]] == label
    assert set(labels.tolist()) <= set(range(10)) and len(set(labels.tolist())) > 3


def test_what_it_takes_is_counted() -> None:
    spec = cell()
    place = SourceContext(spec, "distillation", CPU, teacher_for(spec).network)

    def cost(**options: Any) -> Any:
        return InvertedImages(place, images=10, every=3, iterations=7, **options).cost(8)

    both, alone = cost(), cost(contrast=0.0, adversarial=0.0)
    # Three batches, the two views of each image to the teacher, one to the student.
    assert (both.teacher, both.student, both.at_once) == (3 * 10 * 7 * 2, 3 * 10 * 7, 20)
    assert (alone.teacher, alone.student, alone.at_once) == (3 * 10 * 7, 0, 10)
    assert alone.operations == both.operations > 3 * 3 * 10 * 7 * 2 * 9 * 128 * 128 * 16
    assert cost(bank=10).held < both.held - 2 * 2 * 20 * 100 and alone.held < cost(bank=0).held


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"images": 1}, "batches of 1 image every 3 steps"),
        ({"every": -1}, "'every' at least 0"),
        ({"iterations": 0}, "'iterations' cannot be 0"),
        ({"lr": 0.0}, "'lr' cannot be 0.0"),
        ({"contrast": -1.0}, "'contrast' cannot be -1.0"),
        ({"contrast_temperature": 0.0}, "'contrast_temperature' cannot be 0.0"),
        ({"area": 0.0}, "'area' cannot be 0.0"),
        ({"widths": (8, 8)}, "three numbers of channels"),
        ({"betas": (0.5,)}, "two betas"),
        (dict.fromkeys(("feature", "cross_entropy", "adversarial", "contrast"), 0.0), "all its weights are 0"),
    ],
)
def test_impossible_options_are_told(options: dict[str, Any], why: str) -> None:
    spec = cell()
    place = SourceContext(spec, "distillation", CPU, teacher_for(spec).network)
    with pytest.raises(UserError, match=why):
        InvertedImages(place, **{"images": 12, "every": 3} | options)


def test_a_cell_without_a_teacher_or_its_batch_norms_is_refused() -> None:
    spec = cell()
    with pytest.raises(UserError, match="this cell has none"):
        InvertedImages(SourceContext(spec, "distillation", CPU, None))
    teacher = teacher_for(spec).network
    for name, module in [*teacher.model.named_modules()]:
        if isinstance(module, nn.BatchNorm2d):
            teacher.model.set_submodule(name, nn.Identity())
    for without_one in ({"feature": 0.0}, {"contrast": 0.0}):
        with pytest.raises(UserError, match="no batch norm with running statistics"):
            InvertedImages(SourceContext(spec, "distillation", CPU, teacher), **without_one)
    InvertedImages(SourceContext(spec, "distillation", CPU, teacher), feature=0.0, contrast=0.0)


def test_dry_runs_of_a_network_are_not_watched() -> None:
    """What is measured when a network runs for the first time is what is measured later."""
    x = torch.rand(4, *SHAPE)

    def twice(look: Any) -> list[float]:
        teacher = teacher_for(cell()).network
        return [look(teacher)["feature"].item() for _ in range(2)]

    wanted = Generation(feature=1.0)
    for first, second in (
        twice(lambda teacher: generator_terms(x, teacher, teacher.logits, wanted)),
        twice(lambda teacher: inversion_terms([x], torch.zeros(4).long(), teacher, teacher.logits, SMALL)[0]),
    ):
        assert first == second
