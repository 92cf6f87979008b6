"""Networks of timm and torchvision: built by name, hook points found by looking at them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from test_hooks import randomize
from tiny import member_of, shortened, train
from torch import Tensor, nn
from torch.nn import functional as F

from kdbench.errors import UserError
from kdbench.models.external import small_image_resnet, timm_model, torchvision_model
from kdbench.models.hooks import Extractor, places
from kdbench.models.places import Place
from kdbench.models.points import expand
from kdbench.recipe.planning import plan
from kdbench.registry import Registry

SIZE = 64

# Per family: per-sample shapes of its layers for images of 64×64, by the family's published widths and strides; width
# of its pooled features; layers that end in a ReLU or ReLU6; whether there is a stem before the layers.
Family = tuple[list[tuple[int, ...]], int, list[int], bool]
RESNET18: Family = ([(64, 16, 16), (128, 8, 8), (256, 4, 4), (512, 2, 2)], 512, [1, 2, 3, 4], True)
VGG11: Family = ([(64, 64, 64), (128, 32, 32), (256, 16, 16), (512, 8, 8), (512, 4, 4)], 4096, [1, 2, 3, 4, 5], False)
TINY_SWIN: Family = ([(96, 16, 16), (192, 8, 8), (384, 4, 4), (768, 2, 2)], 768, [], False)
MOBILENETV2 = [(16, 32, 32), (24, 16, 16), (32, 8, 8), (96, 4, 4), (320, 2, 2)]
EFFICIENTNET = [(16, 32, 32), (24, 16, 16), (40, 8, 8), (112, 4, 4), (320, 2, 2)]
DENSENET = [(256, 16, 16), (512, 8, 8), (1024, 4, 4), (1024, 2, 2)]

FAMILIES: dict[str, Family] = {
    "timm:resnet18": RESNET18,
    "timm:vgg11_bn": VGG11,
    "timm:regnety_002": ([(24, 16, 16), (56, 8, 8), (152, 4, 4), (368, 2, 2)], 368, [1, 2, 3, 4], True),
    "timm:convnext_atto": ([(40, 16, 16), (80, 8, 8), (160, 4, 4), (320, 2, 2)], 320, [], False),
    "timm:efficientnet_b0": (EFFICIENTNET, 1280, [], False),
    "timm:tf_efficientnetv2_b0": ([(16, 32, 32), (32, 16, 16), (48, 8, 8), (112, 4, 4), (192, 2, 2)], 1280, [], False),
    "timm:mobilenetv2_100": (MOBILENETV2, 1280, [], False),
    "timm:mobilenetv3_small_100": ([(16, 16, 16), (24, 8, 8), (48, 4, 4), (576, 2, 2)], 1024, [], True),
    "timm:vit_tiny_patch16_224": ([(17, 192)] * 12, 192, [], False),
    "timm:swin_tiny_patch4_window7_224": TINY_SWIN,
    "timm:densenet121": (DENSENET, 1024, [4], True),
    "timm:maxvit_tiny_tf_224": ([(64, 16, 16), (128, 8, 8), (256, 4, 4), (512, 2, 2)], 512, [], True),
    "timm:repvgg_a0": ([(48, 16, 16), (96, 8, 8), (192, 4, 4), (1280, 2, 2)], 1280, [1, 2, 3, 4], True),
    "torchvision:resnet18": RESNET18,
    "torchvision:vgg11_bn": VGG11,
    "torchvision:mobilenet_v2": ([*MOBILENETV2[:4], (1280, 2, 2)], 1280, [5], False),
    "torchvision:convnext_tiny": ([(96, 16, 16), (192, 8, 8), (384, 4, 4), (768, 2, 2)], 768, [], False),
    "torchvision:densenet121": (DENSENET, 1024, [], True),
    "torchvision:efficientnet_b0": ([*EFFICIENTNET[:4], (1280, 2, 2)], 1280, [], False),
    "torchvision:vit_b_16": ([(17, 768)] * 12, 768, [], False),
    "torchvision:swin_t": TINY_SWIN,
    "torchvision:shufflenet_v2_x0_5": ([(48, 8, 8), (96, 4, 4), (1024, 2, 2)], 1024, [3], True),
}
# Large enough to take seconds.
HEAVY = {
    "timm:vgg11_bn",
    "torchvision:vgg11_bn",
    "torchvision:vit_b_16",
    "timm:maxvit_tiny_tf_224",
    "torchvision:convnext_tiny",
    "torchvision:swin_t",
    "timm:swin_tiny_patch4_window7_224",
}
ALL = [pytest.param(name, marks=pytest.mark.slow) if name in HEAVY else name for name in FAMILIES]


def build(name: str, size: int = SIZE, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    options = {"classes": 5, "image_size": size} | options
    if name == "resnet18_32x32":
        return small_image_resnet(18, **options)
    library, _, rest = name.partition(":")
    return {"timm": timm_model, "torchvision": torchvision_model}[library](rest, **options)


def derived(name: str, size: int = SIZE) -> Extractor:
    model = build(name, size)
    randomize(model)
    return Extractor(model, places(model, "derived", name, (3, size, size), lambda side: build(name, side)), name)


def images(n: int = 2, size: int = SIZE) -> Tensor:
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", ALL)
def test_derived_points(name: str) -> None:
    layers, pooled, with_relu, stem = FAMILIES[name]
    extractor = derived(name)
    state = torch.get_rng_state()
    shapes = extractor.shapes((3, SIZE, SIZE))
    assert torch.equal(torch.get_rng_state(), state)
    assert [shapes[layer] for layer in expand(["layers"], shapes)] == layers
    assert [point for point in shapes if point.endswith(".preact")] == [f"layer{k}.preact" for k in with_relu]
    assert shapes["pooled"] == (pooled,)
    assert shapes["logits"] == (5,)
    assert ("stem" in shapes) == stem

    for training in (False, True):
        extractor.model.train(training)
        plain = copy.deepcopy(extractor.model)
        torch.manual_seed(7)
        expected = plain(images())
        torch.manual_seed(7)
        values = extractor(images(), list(shapes))
        assert torch.equal(values["logits"], expected)
        for number in with_relu:
            preact, layer = values[f"layer{number}.preact"], values[f"layer{number}"]
            assert preact.min() < 0
            top = 6.0 if name == "torchvision:mobilenet_v2" else float("inf")
            torch.testing.assert_close(preact.clamp(0, top), layer, rtol=0, atol=0)


# With how many tokens before the patches in the layers, and whether a norm of all patches follows these.
SMALL_ONE = {"depth": 2, "embed_dim": 24, "num_heads": 2}
TRANSFORMERS: dict[str, tuple[dict[str, Any], int, bool]] = {
    "vit_tiny_patch16_224": (SMALL_ONE, 1, True),
    "vit_tiny_r_s16_p8_224": (SMALL_ONE, 1, True),
    "vit_small_patch14_reg4_dinov2": (SMALL_ONE | {"patch_size": 16}, 5, True),
    "vit_relpos_small_patch16_224": (SMALL_ONE, 0, False),
    "deit_tiny_patch16_224": (SMALL_ONE, 1, True),
    "deit_tiny_distilled_patch16_224": (SMALL_ONE, 2, True),
    "deit3_small_patch16_224": (SMALL_ONE, 1, True),
    "beit_base_patch16_224": (SMALL_ONE, 1, False),
    "eva02_tiny_patch14_224": (SMALL_ONE | {"patch_size": 16}, 1, False),
    # The class token comes after the layers, which is where the norm sees it.
    "cait_xxs24_224": (SMALL_ONE, 0, True),
}


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_patches_of_a_transformer_are_the_maps_that_timm_makes_of_its_tokens(name: str) -> None:
    options, before, normalized = TRANSFORMERS[name]
    torch.manual_seed(0)
    model: Any = timm_model(name, options, classes=5, image_size=SIZE).eval()
    for norm in [module for module in model.modules() if isinstance(module, nn.LayerNorm)]:
        nn.init.normal_(norm.weight)
    extractor = Extractor(model, places(model, "derived", name, (3, SIZE, SIZE)), name)
    shapes = extractor.shapes((3, SIZE, SIZE))
    points = [*expand(["layers.patches"], shapes), "last.patches"]
    assert points == ["layer1.patches", "layer2.patches", "last.patches"]
    side = shapes["layer1.patches"][1]
    assert {shapes[point] for point in points} == {(24, side, side)} and shapes["layer1"] == (before + side**2, 24)
    values = extractor(images(), points)
    plain, normed = (
        model.forward_intermediates(images(), norm=norm, output_fmt="NCHW", intermediates_only=True)
        for norm in (False, True)
    )
    for point, expected in zip(points, [*plain, normed[-1]], strict=True):
        assert torch.equal(values[point], expected), point
    assert torch.equal(values["last.patches"], values["layer2.patches"]) != normalized


def test_patches_of_an_image_that_is_no_square() -> None:
    model: Any = timm_model("xcit_nano_12_p16_224", SMALL_ONE | {"num_heads": 4}, classes=5, image_size=SIZE).eval()
    shape = (3, 64, 32)
    extractor = Extractor(model, places(model, "derived", "xcit", shape), "xcit")
    assert extractor.shapes(shape)["layer2.patches"] == (24, 4, 2)
    shown = torch.randn(2, *shape, generator=torch.Generator().manual_seed(1))
    (first, _) = model.forward_intermediates(shown, output_fmt="NCHW", intermediates_only=True)
    assert torch.equal(extractor(shown, ["layer1.patches"])["layer1.patches"], first)


@pytest.mark.slow
def test_patches_of_torchvisions_transformer() -> None:
    extractor = derived("torchvision:vit_b_16")
    extractor.model.eval()
    values = extractor(images(), ["layer12", "layer12.patches", "last.patches"])
    maps = values["layer12"][:, 1:].transpose(1, 2).unflatten(2, (4, 4))
    assert torch.equal(values["layer12.patches"], maps)
    after = extractor.model.encoder.ln(values["layer12"])[:, 1:]  # type: ignore[operator, union-attr]
    assert torch.equal(values["last.patches"].flatten(2).transpose(1, 2), after)


@pytest.mark.parametrize("name", ["timm:resnet18", "timm:levit_128s", "timm:hiera_tiny_224"])
def test_networks_that_keep_no_token_for_each_patch_have_none(name: str) -> None:
    """LeViT and Hiera have fewer in later layers, and Hiera orders them by its attention's windows."""
    found = derived(name, 32 if name == "timm:resnet18" else 224).places
    assert not [point for point in found if "patches" in point]
    for asked in ("layer1.patches", "last.patches", "layers.patches"):
        with pytest.raises(UserError, match="patches': its layers do not keep a token for each patch") as error:
            expand([asked], [*found], name)
        assert "timm:deit_tiny_patch16_224" in (error.value.hint or "")


@pytest.mark.parametrize(
    "name",
    [
        "timm:resnet18",
        "timm:densenet121",
        "timm:mobilenetv2_100",
        "torchvision:resnet18",
        "torchvision:mobilenet_v2",
        "torchvision:shufflenet_v2_x0_5",
    ],
)
@pytest.mark.parametrize("training", [False, True])
def test_values_of_every_module_are_those_of_its_moment(name: str, training: bool) -> None:
    """Every module of the network as a hook point, against hooks that copy everything at once."""
    model = build(name, 32).train(training)
    randomize(model)
    watched = copy.deepcopy(model)
    kept: dict[str, Tensor] = {}
    overwritten: dict[str, Tensor] = {}
    for path, module in watched.named_modules():
        if path:

            def keep(m: nn.Module, i: Any, out: Tensor, path: str = path) -> None:
                kept[path], overwritten[path] = out.clone(), out

            module.register_forward_hook(keep)
    torch.manual_seed(7)
    watched(images(4, 32))
    torch.manual_seed(7)
    values = Extractor(model, {path: Place(path, "output") for path in kept}, name)(images(4, 32), [*kept, "logits"])
    assert any(not torch.equal(kept[path], overwritten[path]) for path in kept)
    for path in kept:
        assert torch.equal(values[path], kept[path]), path


@pytest.mark.parametrize("name", ["timm:resnet18", "torchvision:resnet18"])
def test_points_are_the_same_at_every_size(name: str) -> None:
    """At 8×8 the last stages all have one pixel; they stay apart."""
    assert derived(name, 8).places == derived(name, 64).places
    assert derived(name, 8).shapes((3, 8, 8))["layer4"] == (512, 1, 1)


@pytest.mark.parametrize("name", ["timm:resnet18", "torchvision:mobilenet_v2"])
def test_derived_features_train_the_network(name: str) -> None:
    extractor = derived(name, 32)
    point = expand(["layers"], extractor.places)[2]
    extractor(images(4, 32), [point])[point].square().sum().backward()
    with_gradient = {path for path, p in extractor.model.named_parameters() if p.grad is not None}
    assert any("conv1" in path or "features.0" in path for path in with_gradient)
    assert not any(path.startswith(("fc", "classifier", "layer4", "features.18")) for path in with_gradient)


@pytest.mark.parametrize(
    "name", ["timm:mobilenetv2_100", "torchvision:resnet18", "torchvision:squeezenet1_1", "resnet18_32x32"]
)
def test_images_of_one_channel(name: str) -> None:
    model = build(name, 32, channels=1)
    assert model(torch.randn(2, 1, 32, 32)).shape == (2, 5)


def test_a_replaced_first_convolution_keeps_its_scale() -> None:
    first = build("torchvision:resnet18", 32, channels=1).conv1
    assert first.weight.shape == (64, 1, 7, 7)
    assert first.bias is None and first.stride == (2, 2) and first.padding == (3, 3)
    # torchvision: N(0, √(2 / fan-out)).
    assert first.weight.std().item() == pytest.approx((2 / (64 * 49)) ** 0.5, rel=0.05)


def test_a_stem_for_small_images_keeps_every_pixel() -> None:
    first = build("resnet18_32x32", 32).conv1
    assert first.weight.shape == (64, 3, 3, 3)
    assert first.bias is None and first.stride == (1, 1) and first.padding == (1, 1)
    # torchvision: N(0, √(2 / fan-out)).
    assert first.weight.std().item() == pytest.approx((2 / (64 * 9)) ** 0.5, rel=0.05)


def test_transformers_are_built_for_the_size() -> None:
    assert build("timm:vit_tiny_patch16_224", 32)(images(2, 32)).shape == (2, 5)


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("timm:deit_tiny_distilled_patch16_224", 32),
        ("timm:levit_128s", 224),
        ("torchvision:googlenet", 64),
        ("timm:resnet18.a1_in1k", 32),
    ],
)
def test_networks_with_two_heads_or_a_tag_in_their_name_train(name: str, size: int) -> None:
    """Those that give more than logits while they train, in public reports of distillation that broke on them."""
    recipe = {"data": "digits", "student": name, "protocol": "digits", "method": "ce", "steps": 2}
    spec = shortened(plan(recipe, Registry()).cells[0].spec, steps=2, batch=4, per_class=1)
    spec = spec.model_copy(update={"data": spec.data.model_copy(update={"image_size": size, "channels": 3})})
    normalization = spec.protocol.normalization.model_copy(update={"mean": [0.5] * 3, "std": [0.25] * 3})
    spec = spec.model_copy(update={"protocol": spec.protocol.model_copy(update={"normalization": normalization})})
    member, batches, teacher = member_of(spec)
    before = copy.deepcopy(member.student.model.state_dict())
    train(member, batches, teacher, 2)
    member.check_finite()
    changed = {key for key, value in member.student.model.state_dict().items() if not torch.equal(value, before[key])}
    assert {key for key, _ in member.student.model.named_parameters()} <= changed
    logits = member.student.model.eval()(images(2, size))
    assert logits.shape == (2, 10) and logits.isfinite().all()


@pytest.mark.parametrize(
    ("library", "name", "message", "hint"),
    [
        (timm_model, "resnet81", "timm has no model 'resnet81'", "resnet18"),
        (timm_model, "hf-hub:timm/resnet18", "timm has no model", ""),
        (torchvision_model, "resnet81", "torchvision has no classification model 'resnet81'", "resnet18"),
        (torchvision_model, "fcn_resnet50", "torchvision has no classification model", "resnet50"),
    ],
)
def test_unknown_names_are_said(library: Any, name: str, message: str, hint: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        library(name, classes=5)
    assert hint in (error.value.hint or "")


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("torchvision:vit_b_16", 40),
        ("torchvision:squeezenet1_1", 8),
        ("timm:convnext_atto", 8),
        ("torchvision:inception_v3", 32),
    ],
)
def test_images_too_small_are_said(name: str, size: int) -> None:
    with pytest.raises(UserError, match=rf"'{name}' cannot .*3×{size}×{size}"):
        derived(name, size).shapes((3, size, size))


def test_a_network_without_stages_has_what_can_be_found() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 5))
    found = places(model, "derived", "net", (3, 2, 2))
    assert {point: str(place) for point, place in found.items()} == {"pooled": "input(1)"}
    for point in ("layers", "layer1"):
        with pytest.raises(
            UserError, match=rf"'net' has no hook points? '{point}'\n.*pooled.*no layers.*hooks: {{layer1:"
        ):
            expand([point], [*found, "logits"], "net")


class Small(nn.Module):
    """Any network of the user's own, with a constant that is no buffer and lies on one device only."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.ones(1, 8, 1, 1)
        self.body = nn.Sequential(
            nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU6(), nn.Conv2d(8, 16, 3, 2, 1), nn.ReLU(), nn.MaxPool2d(2)
        )
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        if self.scale.device != x.device:
            raise RuntimeError("two devices")
        return self.head(self.body(x).mean((2, 3)))


def test_networks_that_run_on_real_tensors_only() -> None:
    found = places(Small(), "derived", "small", (3, 32, 32))
    assert found == {
        "layer1": Place("body.1", "output"),
        "layer1.preact": Place("body.1", "input"),
        "layer2": Place("body.3", "output"),
        "layer2.preact": Place("body.3", "input"),
        "pooled": Place("head", "input"),
    }
    values = Extractor(Small().eval(), found, "small")(images(), list(found))
    assert torch.equal(F.relu6(values["layer1.preact"]), values["layer1"])
