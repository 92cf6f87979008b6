"""Views of training that the processor makes, and mixed batches: torchvision's, and drawn by address."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from picture_files import photo, write_pictures
from PIL import Image
from scipy import stats
from shipped import REGISTRY
from tiny import CPU, images, member_of, sets_at, train
from torchvision.transforms import v2

from kdbench.data.decoding import as_bytes, as_image
from kdbench.data.transforms import (
    Addressed,
    Transforms,
    auto_augment,
    color_jitter,
    rand_augment,
    random_erasing,
    trivial_augment,
)
from kdbench.engine.data.batches import Batches
from kdbench.engine.data.datasets import load_data
from kdbench.engine.data.mixing import NUMBERS, Mixing, shares
from kdbench.engine.data.resident import ResidentDomain
from kdbench.engine.data.streamed import StreamedDomain, check_transforms
from kdbench.engine.evaluation import evaluate, scores
from kdbench.engine.finish import streams
from kdbench.engine.member import Member
from kdbench.engine.ranks import Ranks
from kdbench.engine.targets import import_target
from kdbench.errors import UserError
from kdbench.image_cards import Mix
from kdbench.recipe.planning import plan
from kdbench.recipe.specs import CellSpec, recorded
from kdbench.recipe.timeline import timeline
from kdbench.registry import Registry

CROP = {"padding": 4, "mode": "zero", "flip": True}
RAND = {"transforms": ["rand_augment", {"name": "random_erasing", "p": 0.5}]}
MIX = {"mix": {"mixup": 0.4, "cutmix": 1.0}}


def spec_of(registry: Registry = REGISTRY, augmentation: Any = None, method: str = "ce", **over: Any) -> CellSpec:
    protocol = {"name": "crd", "batch_size": 8, "augmentation": {**CROP, **(augmentation or {})}, **over}
    recipe = {"data": "cifar10", "student": "wrn_10_1", "method": method, "steps": 12, "protocol": protocol}
    return plan(recipe, registry).cells[0].spec


# --- transforms


@pytest.mark.parametrize("name", REGISTRY.keys("transforms"))
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_every_transform_is_a_function_of_its_seed_and_leaves_torchs_draws_alone(name: str, mode: str) -> None:
    options = {"color_jitter": {"brightness": 0.4, "contrast": 0.4, "saturation": 0.4}, "grayscale": {"p": 0.5}}
    built = import_target(REGISTRY.card("transforms", name).target)(**options.get(name, {}))
    made, image = Transforms([(name, built)]), photo(32, 32, 1).convert(mode)
    before = torch.get_rng_state()
    first = [as_bytes(made(image, seed)) for seed in range(12)]
    torch.manual_seed(7)
    again = [as_bytes(made(image, seed)) for seed in reversed(range(12))][::-1]
    assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))
    torch.set_rng_state(before)
    as_bytes(made(image, 1))
    assert torch.equal(torch.get_rng_state(), before)
    if mode == "RGB":
        assert len({one.numpy().tobytes() for one in first}) > 1, "it draws nothing"


class Blended(torch.nn.Module):
    """A user's transform: a picture with a share of itself turned, from a Beta distribution."""

    def forward(self, image: Image.Image) -> Image.Image:
        return Image.blend(image, image.rotate(90), torch.distributions.Beta(1.0, 1.0).sample().item())


NOISE = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.GaussianNoise(), v2.ToPILImage()]


@pytest.mark.parametrize("part", [v2.AugMix(), v2.Compose(NOISE), Blended()], ids=["augmix", "noise", "beta"])
def test_all_that_torch_draws_is_drawn_by_address(part: Any) -> None:
    made, image, before = Transforms([("own", part)]), photo(32, 32, 1), torch.get_rng_state()
    first, again, other = (as_bytes(made(image, seed)) for seed in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), before)


DRAWS = {
    "rand": lambda x: torch.rand(9),
    "randn": lambda x: torch.randn(9),
    "randint": lambda x: torch.randint(100, (9,)),
    "randperm": lambda x: torch.randperm(9),
    "like": lambda x: torch.rand_like(x) + torch.randn_like(x) + torch.randint_like(x, 9),
    "bernoulli": torch.bernoulli,
    "multinomial": lambda x: torch.multinomial(x, 5),
    "normal": lambda x: torch.normal(x, 1.0),
    "poisson": lambda x: torch.poisson(100 * x),
    "binomial": lambda x: torch.binomial(100 * torch.ones(9), x),
    "gamma": lambda x: torch.distributions.Gamma(x, 1.0).sample(),
    "dirichlet": lambda x: torch.distributions.Dirichlet(x).sample(),
    **{
        f"{name}_": lambda x, name=name: getattr(x.clone(), f"{name}_")()
        for name in ("uniform", "normal", "random", "exponential", "cauchy", "log_normal", "bernoulli")
    },
    "geometric_": lambda x: x.clone().geometric_(0.1),
}


@pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS)
def test_every_function_of_torch_that_draws_does_so_by_address(draw: Any) -> None:
    before = torch.get_rng_state()
    found = []
    for seed in (3, 3, 4):
        with Addressed(seed):
            found.append(draw(torch.full((9,), 0.5)))
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    "draw", ["random.random()", "numpy.random.rand()", "torch.nn.functional.dropout(torch.ones(1), 0.5).item() / 2"]
)
def test_a_transform_that_draws_elsewhere_is_refused(
    draw: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a resumed cell would see other pictures, and so would every method of a comparison."""
    module = f"drawing_{len(draw)}"
    (tmp_path / f"{module}.py").write_text(
        "import random, numpy, torch\nfrom PIL import Image\n\n\ndef made():\n"
        f"    return lambda image: Image.blend(image, image.rotate(90), {draw})\n"
    )
    (tmp_path / "card.yaml").write_text(f"transforms:\n  own:\n    target: '{module}:made'\n")
    monkeypatch.syspath_prepend(tmp_path)
    spec = spec_of(Registry([tmp_path]), {"transforms": ["own"]})
    with pytest.raises(UserError, match="'own' makes two different pictures of one"):
        check_transforms(spec.protocol.augmentation, spec.data)


def test_transforms_are_torchvisions() -> None:
    image, bilinear = photo(40, 40, 3), v2.InterpolationMode.BILINEAR
    erasing = v2.RandomErasing(1.0, (0.1, 0.2), (2.0, 3.0), [124, 116, 104])
    for ours, theirs in (
        (rand_augment(magnitude=12), v2.RandAugment(2, 12, interpolation=bilinear)),
        (trivial_augment(), v2.TrivialAugmentWide(interpolation=bilinear)),
        (auto_augment(policy="cifar10"), v2.AutoAugment(v2.AutoAugmentPolicy.CIFAR10, bilinear)),
        (color_jitter(brightness=0.4, hue=0.1), v2.ColorJitter(brightness=0.4, hue=0.1)),
        (color_jitter(contrast=0.4, saturation=0.1), v2.ColorJitter(contrast=0.4, saturation=0.1)),
        (
            random_erasing(p=1.0, scale=(0.1, 0.2), ratio=(2.0, 3.0)),
            v2.Compose([v2.PILToTensor(), erasing, v2.ToPILImage()]),
        ),
    ):
        for seed in range(5):
            torch.manual_seed(seed & 0xFFFFFFFF)
            expected = theirs(image)
            assert torch.equal(as_bytes(Transforms([("x", ours)])(image, seed)), as_bytes(expected)), (ours, seed)


def test_erasing_leaves_the_mean_pixel() -> None:
    erased = as_bytes(Transforms([("x", random_erasing(p=1.0, scale=(0.2, 0.2)))])(photo(64, 64, 1), 3))
    grey = (erased == torch.tensor([124, 116, 104], dtype=torch.uint8).view(3, 1, 1)).all(dim=0)
    assert 0.15 < grey.float().mean() < 0.25
    # Of one channel, the mean of the three.
    alone = as_bytes(Transforms([("x", random_erasing(p=1.0, scale=(0.2, 0.2)))])(photo(64, 64, 1).convert("L"), 3))
    assert 0.15 < (alone == 114).float().mean() < 0.3


@pytest.mark.parametrize("transform", [v2.CenterCrop(8), v2.Grayscale()])
def test_a_transform_that_changes_size_or_mode_is_named(transform: Any) -> None:
    with pytest.raises(UserError, match="the transform 'own' makes"):
        Transforms([("own", transform)])(photo(32, 32, 1), 0)


def test_draws_of_threads_do_not_meet() -> None:
    with Addressed(1):
        inner = torch.rand(3)
    torch.manual_seed(1)
    assert torch.equal(inner, torch.rand(3))


# --- resident and streamed batches


def test_transformed_images_in_memory_are_made_ahead_and_others_stay_on_the_device() -> None:
    data = images(spec_of().data, per_class=3)
    assert isinstance(Batches(spec_of(), data, CPU).source, ResidentDomain)
    spec = spec_of(augmentation=RAND)
    batches, line = Batches(spec, data, CPU), timeline(spec, 30)
    assert isinstance(batches.source, StreamedDomain)
    plain = Batches(spec_of(), data, CPU)
    changed = 0
    for step in range(5):
        ours, theirs = batches.at(step, line), plain.at(step, line)
        assert torch.equal(ours.index, theirs.index) and torch.equal(ours.view, theirs.view)
        changed += int((ours.images != theirs.images).flatten(1).any(dim=1).sum())
    assert changed > 20


@pytest.mark.parametrize("augmentation", [RAND, MIX, RAND | MIX, {"padding": 0, "resized_crop": [0.3, 1.0]} | MIX])
def test_a_batch_is_a_function_of_seed_and_step(augmentation: Any) -> None:
    spec = spec_of(augmentation=augmentation)
    data, line = images(spec.data, per_class=3), timeline(spec, 30)
    in_order = Batches(spec, data, CPU)
    expected = [in_order.at(step, line) for step in range(line.total)]
    fresh = Batches(spec, data, CPU)
    torch.set_num_threads(2)
    try:
        for step in (9, 3, 4, 11, 0):
            again = fresh.at(step, line)
            for name in ("images", "labels", "index", "view"):
                assert torch.equal(getattr(again, name), getattr(expected[step], name)), (step, name)
    finally:
        torch.set_num_threads(1)
    assert not torch.equal(expected[0].images, expected[4].images)
    # A step after another without seeking anew, as within a stretch.
    names = ["data"]
    fresh.seek(0, line, names)
    for step in range(6):
        if step == 4:
            fresh.seek(step, line, names)
        fresh.feed(names)
        batch = fresh.sets(names)["data"]
        fresh.advance(names)
        assert torch.equal(batch.images, expected[step].images), step


@pytest.mark.parametrize(
    "augmentation", [MIX, {"transforms": [{"name": "random_erasing", "p": 1.0}]}, {"resized_crop": [0.3, 0.9]}]
)
def test_every_step_of_every_stream_makes_something_else_of_the_same_picture(augmentation: Any) -> None:
    """Steps of two epochs and those beyond the budget; the second set, the target's, and another seed's."""
    spec = spec_of(augmentation={"padding": 0, "flip": False} | augmentation)
    data = images(spec.data, per_class=3)
    data = replace(data, train_images=data.train_images[:1].expand_as(data.train_images))
    kind, line, found = ResidentDomain if "mix" in augmentation else StreamedDomain, timeline(spec, 30), []
    source = kind(spec, data, CPU, "", Ranks())
    target = kind(spec, data, CPU, "target/", Ranks())
    other = kind(spec.model_copy(update={"seed": 1}), data, CPU, "", Ranks())
    for domain in (source, source.second(), target, other):
        for step in range(9):
            domain.seek(step, replace(line, extra=4))
            domain.feed()
            made = domain.batch().images if domain.mixing is None else torch.stack(domain.mixing.table.row())
            found.append(made.numpy().tobytes())
    assert len({*found}) == len(found)


@pytest.mark.parametrize("augmentation", [MIX, RAND | MIX])
def test_shares_of_ranks_are_the_batch_of_one_process(augmentation: Any) -> None:
    spec = spec_of(augmentation=augmentation)
    data, line = images(spec.data, per_class=3), timeline(spec, 30)
    whole, *parts = (Batches(spec, data, CPU, None, ranks) for ranks in (Ranks(), Ranks(0, 2), Ranks(1, 2)))
    for step in (0, 3, 5):
        one, *halves = (batches.at(step, line) for batches in (whole, *parts))
        for name in ("images", "labels", "index", "view"):
            assert torch.equal(torch.cat([getattr(half, name) for half in halves]), getattr(one, name)), (step, name)


def test_the_second_view_may_be_augmented_otherwise() -> None:
    spec = spec_of(second={**CROP, **RAND})
    assert "second/transforms" not in streams(spec)
    data, line = images(spec.data, per_class=3), timeline(spec, 30)
    batches = Batches(spec, data, CPU)
    sets = sets_at(batches, 2, line, ["data", "second"])
    assert torch.equal(sets["data"].index, sets["second"].index)
    assert isinstance(batches.source, ResidentDomain) and isinstance(batches.second, StreamedDomain)
    assert not torch.equal(sets["data"].images, sets["second"].images)
    alike = sets_at(Batches(spec_of(), data, CPU), 2, line, ["data", "second"])
    assert torch.equal(alike["data"].images, sets["data"].images) and torch.equal(
        alike["second"].view, sets["second"].view
    )


def test_streamed_pictures_of_one_channel_are_transformed_and_mixed(tmp_path: Path) -> None:
    write_pictures(tmp_path / "data" / "grey")
    (tmp_path / "cards").mkdir()
    (tmp_path / "cards" / "cards.yaml").write_text(
        'datasets: {grey: {target: "kdbench.data.pictures:load", streamed: true, args: {folder: grey, short_side: 28}, '
        "title: Grey, classes: 3, channels: 1, image_size: 24, train: 15, test: 6, "
        "normalization: {mean: [0.5], std: [0.25]}}}"
    )
    protocol = {"name": "crd", "batch_size": 4, "augmentation": {"padding": 0, "resized_crop": [0.2, 1]} | RAND | MIX}
    recipe = {"data": "grey", "student": "wrn_10_1", "method": "ce", "steps": 6, "protocol": protocol}
    spec = plan(recipe, Registry([tmp_path / "cards"])).cells[0].spec
    data = load_data(spec.data, [tmp_path / "data"], False, tmp_path / "cache")
    batches = Batches(spec, data, CPU)
    assert batches.at(0, timeline(spec, 15)).images.shape == (4, 1, 24, 24)
    member = Member(spec, batches, None, CPU)
    train(member, batches, None, 5)
    member.check_finite()


# --- mixing


@pytest.mark.parametrize("mix", [Mix(mixup=0.4), Mix(cutmix=1.0)])
def test_mixing_is_torchvisions(mix: Mix) -> None:
    numbers = np.random.default_rng(0).random((9, NUMBERS))
    mixing = Mixing(mix, 16, 5, CPU)
    mixing.seek(numbers)
    pictures = torch.randint(0, 256, (6, 3, 16, 16), dtype=torch.uint8)
    labels = torch.tensor([0, 1, 2, 3, 4, 0])
    theirs = v2.MixUp(alpha=1.0, num_classes=5) if mix.mixup else v2.CutMix(alpha=1.0, num_classes=5)
    for row in shares(mix, numbers, 16):
        ours = mixing.mixed(pictures, labels, pictures.roll(1, 0), labels.roll(1))
        mixing.advance()
        pixels, own, *box = row.tolist()
        left, top, right, bottom = map(int, box)
        given = {"lam": pixels, "box": (left, top, right, bottom), "lam_adjusted": own}
        theirs.make_params = lambda flat, given=given: given  # type: ignore[method-assign, misc]
        expected = theirs(pictures.float() / 255, labels)
        assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(ours, expected, strict=True))
        assert torch.allclose(ours[1].sum(dim=1), torch.ones(6))


def test_shares_are_distributed_as_torchvisions() -> None:
    n = 4000
    numbers = np.random.default_rng(1).random((n, NUMBERS))
    torch.manual_seed(0)
    image = torch.zeros(2, 3, 16, 16)
    cut = v2.CutMix(alpha=1.0, num_classes=2)
    theirs = np.array([(p["lam_adjusted"], *p["box"]) for p in (cut.make_params([image]) for _ in range(n))])
    ours = shares(Mix(cutmix=1.0), numbers, 16)[:, 1:]
    for column in range(5):
        assert stats.ks_2samp(ours[:, column], theirs[:, column], method="asymp").pvalue > 1e-3, column
    mixup = shares(Mix(mixup=0.2), numbers, 16)[:, 0]
    assert stats.kstest(mixup, stats.beta(0.2, 0.2).cdf).pvalue > 1e-3
    both = shares(Mix(mixup=0.2, cutmix=1.0, probability=0.5), numbers, 16)
    untouched = (both[:, 1] == 1) & (both[:, 0] == 1)
    assert abs(untouched.mean() - 0.5) < 0.05 and abs((both[:, 4] > 0).mean() - 0.25) < 0.05


def test_labels_of_mixed_images_are_shares_of_classes_for_losses_that_take_them() -> None:
    spec = spec_of(augmentation=MIX)
    member, batches, teacher = member_of(spec, images(spec.data, per_class=3))
    batch = batches.at(0, member.timeline)
    assert batch.labels is not None and batch.labels.shape == (8, 10) and batch.images.dtype == torch.float32
    # Each image is mixed with the one before it, the first with the last.
    own = batches.train.labels[batch.index]  # type: ignore[index]
    both = torch.eye(10)[own] + torch.eye(10)[own.roll(1)]
    assert torch.equal(batch.labels > 0, both > 0) and (both == 1).any()
    train(member, batches, teacher, 6)
    member.check_finite()
    for method, said in (("dkd", "'dkd' needs one class for each image"), ("bss", "batch source")):
        with pytest.raises(UserError, match=said) as error:
            plan(
                {"data": "cifar10", "student": "wrn_10_1", "teacher": "wrn_22_4_cifar10", "method": method, "steps": 9}
                | {"protocol": {"name": "crd", "augmentation": CROP | MIX}},
                REGISTRY,
                weights_must_exist=False,
            )
        assert error.value.hint and "mix" in error.value.hint


def test_identities_and_records_of_protocols_without_any_of_it_say_nothing_of_it() -> None:
    plain = spec_of()
    assert not {"second", "ema"} & recorded(plain.protocol).keys()
    assert not {"transforms", "mix"} & recorded(plain.protocol.augmentation).keys()
    others = [spec_of(augmentation=RAND), spec_of(augmentation=MIX), spec_of(second=CROP | MIX), spec_of(ema=0.99)]
    assert len({one.identity() for one in (plain, *others)}) == 5


def test_pictures_and_bytes_are_each_others_inverse() -> None:
    for channels in (1, 3):
        image = torch.randint(0, 256, (channels, 5, 7), dtype=torch.uint8)
        assert torch.equal(as_bytes(as_image(image)), image)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"transforms": ["rand_augmen"]}, "unknown transform 'rand_augmen'"),
        ({"transforms": [{"name": "rand_augment", "magnitud": 3}]}, "unknown key 'magnitud'"),
        ({"mix": {}}, "mixup"),
        ({"mix": {"mixup": 0.2, "probability": 0.0}}, "probability"),
    ],
)
def test_wrong_keys_are_told(wrong: Any, said: str) -> None:
    with pytest.raises(UserError, match=said):
        spec_of(augmentation=wrong)


@pytest.mark.parametrize("crop", [{}, {"padding": 0, "resized_crop": [0.3, 1.0]}])
def test_transforms_come_after_crop_and_mirror(crop: dict[str, Any]) -> None:
    """A transform that does nothing leaves what the device makes otherwise, bit for bit."""
    spec = spec_of(augmentation=crop | {"transforms": [{"name": "grayscale", "p": 0.0}]})
    data, line = images(spec.data, per_class=3), timeline(spec, 30)
    ours, plain = Batches(spec, data, CPU), Batches(spec_of(augmentation=crop), data, CPU)
    assert all(torch.equal(ours.at(step, line).images, plain.at(step, line).images) for step in range(4))


# --- the average of a student's weights


def test_the_average_is_tested_and_kept_and_goes_on_from_a_checkpoint() -> None:
    spec = spec_of(ema=0.75)
    data = images(spec.data, per_class=3)
    member, batches, _ = member_of(spec, data)
    assert member.answers.model is not member.student.model and not member.answers.model.training
    expected = {name: value.clone() for name, value in member.student.model.state_dict().items()}
    for _ in range(5):
        train(member, batches, None, 1)
        for name, value in member.student.model.state_dict().items():
            exact = value.is_floating_point()
            expected[name] = 0.75 * expected[name] + 0.25 * value if exact else value.clone()
    found = member.answers.model.state_dict()
    assert all(torch.allclose(found[name], value, atol=1e-5) for name, value in expected.items())
    assert not torch.allclose(found["fc.weight"], member.student.model.state_dict()["fc.weight"], atol=1e-4)
    tested = evaluate(member)["test"]
    assert tested == scores(member.answers, batches.test).plain() != scores(member.student, batches.test).plain()
    resumed, again, _ = member_of(spec, data)
    resumed.load_state(copy.deepcopy(member.state()))
    for one, of in ((member, batches), (resumed, again)):
        train(one, of, None, 4)
    kept, theirs = member.answers.model.state_dict(), resumed.answers.model.state_dict()
    assert all(torch.equal(value, theirs[name]) for name, value in kept.items())


def test_metrics_are_of_the_average_too() -> None:
    """What a record says of agreement belongs to the network whose accuracy it states."""
    recipe = {"data": "cifar10", "student": "wrn_10_1", "teacher": "wrn_22_4_cifar10", "method": "ab", "steps": 12}
    protocol = {"name": "ab_official", "batch_size": 8, "ema": 0.75}
    spec = plan(recipe | {"protocol": protocol}, REGISTRY, weights_must_exist=False).cells[0].spec
    member, batches, teacher = member_of(spec, images(spec.data, per_class=3))
    train(member, batches, teacher, 6)
    found = evaluate(member)["metrics"]
    average = {name: value.clone() for name, value in member.answers.model.state_dict().items()}
    member.student.model.load_state_dict(average)
    assert evaluate(member)["metrics"] == found, "they changed with the weights that do not answer"


def test_what_an_average_cannot_follow_is_refused() -> None:
    with pytest.raises(UserError, match="a route keeps the weights themselves") as error:
        plan(
            {"data": "cifar10", "student": "wrn_10_1", "method": "ce", "steps": 12, "route": 2}
            | {"protocol": {"name": "crd", "ema": 0.9}},
            REGISTRY,
        )
    assert "protocol.ema=null" in (error.value.hint or "")


def test_label_smoothing_of_a_protocol_reaches_every_cross_entropy_that_says_nothing_of_it() -> None:
    recipe = {"data": "cifar10", "student": "wrn_10_1", "teacher": "wrn_22_4_cifar10", "method": "kd", "steps": 9}

    def options(**over: Any) -> dict[str, Any]:
        given = recipe | {"protocol": {"name": "crd", "label_smoothing": 0.1}} | over
        (stage,) = plan(given, REGISTRY, weights_must_exist=False).cells[0].spec.method.stages.values()
        return {name: term.loss.options.get("label_smoothing") for name, term in stage.losses.items()}

    assert options() == {"ce": 0.1, "kd": None}
    own = {"name": "kd", "stages": {"classification": {"losses": {"ce": {"label_smoothing": 0.0}}}}}
    assert options(method=own)["ce"] == 0.0
    assert options(method="byot", teacher=None) == {"ce": 0.1, "exits": 0.1}
    *_, sskd = (
        plan(
            recipe | {"protocol": {"name": "crd", "label_smoothing": 0.1}, "method": "sskd"},
            REGISTRY,
            weights_must_exist=False,
        )
        .cells[0]
        .spec.method.stages.values()
    )
    assert sskd.losses["ce"].loss.options["label_smoothing"] == 0.1
