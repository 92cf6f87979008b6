"""Which axis of a map is which: found by running the network, brought to [N, C, H, W], or refused."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import timm
import torch
from test_hooks import naive
from timm.models.mambaout import MambaOut
from timm.models.swin_transformer import SwinTransformer as TimmSwin
from timm.models.swin_transformer_v2 import SwinTransformerV2 as TimmSwin2
from timm.models.volo import VOLO
from torch import Tensor, nn
from torchvision.models import swin_transformer as tv

from kdbench.engine.surroundings import Surroundings
from kdbench.engine.terms import build_terms
from kdbench.errors import UserError
from kdbench.losses import attention_transfer
from kdbench.models.graph import traced
from kdbench.models.hooks import Extractor, places
from kdbench.models.places import Unordered
from kdbench.recipe.planning import plan
from kdbench.registry import Registry

SIZE = 32
IMAGE = (3, SIZE, SIZE)


class Last(nn.Module):
    """Maps [N, H, W, C] between two convolutions, of 8 × 8 pixels and 8 channels for images of 32 × 32.

    `fixed`: with a position's own number at every pixel, so that only images of `image_size` can be taken.
    """

    def __init__(self, image_size: int = SIZE, fixed: bool = False) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 8, 4, 4)
        self.norm = nn.LayerNorm(8)
        self.body = nn.Linear(8, 8)
        self.head = nn.Linear(8, 5)
        self.position = nn.Parameter(torch.randn(image_size // 4, image_size // 4, 8)) if fixed else 0.0

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(self.norm(self.patches(x).permute(0, 2, 3, 1) + self.position))
        return self.head(x.mean((1, 2)))


class Transposed(nn.Module):
    """Width before height: [N, C, W, H]."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.body, self.head = nn.Conv2d(3, 8, 4, 4), nn.Identity(), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(self.patches(x).mT).mean((2, 3)))


def tiny(name: str, size: int = SIZE) -> nn.Module:
    """Networks of libraries' own classes, with few and narrow layers."""
    torch.manual_seed(0)
    torchvision_size = {"patch_size": [4, 4], "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 2]}
    timm_size = {"img_size": size, "patch_size": 4, "embed_dim": 8, "depths": (1, 1), "num_heads": (2, 2)}
    kinds: dict[str, Callable[[], nn.Module]] = {
        "torchvision swin": lambda: tv.SwinTransformer(**torchvision_size, window_size=[4, 4], num_classes=5),
        "torchvision swin v2": lambda: tv.SwinTransformer(
            **torchvision_size,
            window_size=[4, 4],
            num_classes=5,
            block=tv.SwinTransformerBlockV2,
            downsample_layer=tv.PatchMergingV2,
        ),
        # Their first stages give maps of 8 × 8 pixels and 8 channels: shapes tell nothing.
        "timm swin": lambda: TimmSwin(**timm_size, window_size=4, num_classes=5),
        "timm swin v2": lambda: TimmSwin2(**timm_size, window_size=4, num_classes=5),
        "timm mambaout": lambda: MambaOut(depths=(1, 1, 1, 1), dims=(8, 16, 24, 32), num_classes=5),
        "timm volo": lambda: VOLO(
            layers=(1, 1, 1, 1), img_size=size, num_classes=5, embed_dims=(8, 16, 16, 16), num_heads=(2, 2, 2, 2)
        ),
        "timm resnet": lambda: timm.create_model("test_resnet", num_classes=5),
        "timm convnext": lambda: timm.create_model("test_convnext", num_classes=5),
    }
    return kinds[name]().eval()


# Per network: channels of its layers, by the widths that it was built with.
CHANNELS = {
    "torchvision swin": [16, 32],
    "torchvision swin v2": [16, 32],
    "timm swin": [8, 16],
    "timm swin v2": [8, 16],
    "timm mambaout": [8, 16, 24, 32],
    "timm volo": [8, 16, 16, 16],
    "timm resnet": [32, 48, 48, 96],
    "timm convnext": [24, 32, 48, 64],
}
CHANNELS_FIRST = {"timm resnet", "timm convnext"}


def derived(name: str, larger: Callable[[int], nn.Module] | None) -> Extractor:
    model = tiny(name)
    return Extractor(model, places(model, "derived", name, IMAGE, larger), name)


def own(model: nn.Module, hooks: dict[str, str], larger: Callable[[int], nn.Module] | None = None) -> Extractor:
    return Extractor(model.eval(), places(model, hooks, "net", IMAGE, larger), "net")


@pytest.mark.parametrize("name", CHANNELS)
def test_maps_of_libraries_networks_come_channels_first(name: str) -> None:
    extractor = derived(name, lambda size: tiny(name, size))
    shapes = extractor.shapes(IMAGE)
    layers = [point for point in shapes if point.startswith("layer") and "." not in point]
    channels = [shapes[layer][0] for layer in layers]
    info = getattr(extractor.model, "feature_info", None)
    assert channels == (CHANNELS[name] if info is None else [entry["num_chs"] for entry in info][-len(channels) :])
    images = torch.randn(2, *IMAGE)
    with torch.no_grad():
        values = extractor(images, layers)
    for layer in layers:
        whole = naive(extractor.model, extractor.places[layer].path, images)
        expected = whole if name in CHANNELS_FIRST else whole.permute(0, 3, 1, 2)
        assert torch.equal(values[layer], expected) and tuple(expected.shape[1:]) == shapes[layer]


@pytest.mark.parametrize("name", ["timm swin", "timm swin v2"])
def test_an_order_that_a_network_of_one_size_declares_is_taken(name: str) -> None:
    extractor = derived(name, None)
    images = torch.randn(2, *IMAGE)
    with torch.no_grad():
        value = extractor(images, ["layer1"])["layer1"]
    assert torch.equal(value, naive(extractor.model, "layers.0", images).permute(0, 3, 1, 2))


@pytest.mark.parametrize("fixed", [False, True])
def test_a_map_whose_shape_tells_nothing(fixed: bool) -> None:
    """8 × 8 pixels and 8 channels, behind modules that say nothing of axes."""
    model = Last(fixed=fixed)
    extractor = own(
        model, {"layer1": "body", "layer2": "input(norm)", "stem": "patches"}, lambda size: Last(size, fixed)
    )
    images = torch.randn(2, *IMAGE)
    values = extractor(images, ["layer1", "layer2", "stem"])
    assert torch.equal(values["layer1"], naive(model, "body", images).permute(0, 3, 1, 2))
    before = model.patches(images) + (model.position.permute(2, 0, 1) if fixed else 0.0)
    assert torch.equal(values["layer2"], before)
    assert torch.equal(values["stem"], model.patches(images))
    graph = traced(extractor, ["layer1", "layer2", "stem"], training=False, image_shape=IMAGE)
    for point, value in zip(graph.points, graph.module(images), strict=True):
        assert torch.equal(value, values[point])
    teacher = torch.rand(2, 4, 8, 8)
    by_hand = attention_transfer(naive(model, "body", images).movedim(3, 1), teacher)
    assert torch.equal(attention_transfer(values["layer1"], teacher), by_hand)


def test_width_before_height_is_turned() -> None:
    model = Transposed()
    images = torch.randn(2, *IMAGE)
    assert torch.equal(own(model, {"layer1": "body"})(images, ["layer1"])["layer1"], model.patches(images))


def unknown(hook: str = "body") -> Extractor:
    """A network that takes one size, and that nobody can build for another."""
    return own(Last(fixed=True), {"layer1": hook, "stem": "patches"})


def test_a_map_of_which_nothing_tells_the_channels_is_refused_when_it_is_read() -> None:
    extractor = unknown()
    shapes = extractor.shapes(IMAGE)
    assert shapes["stem"] == (8, 8, 8) and not isinstance(shapes["stem"], Unordered)
    assert set(extractor(torch.randn(2, *IMAGE), ["stem", "logits"])) == {"stem", "logits"}
    with pytest.raises(UserError, match=r"'layer1' \(body\) of model 'net'.*\[N, 8, 8, 8\]") as error:
        extractor(torch.randn(2, *IMAGE), ["layer1"])
    assert "layer1: channels_last(body)" in (error.value.hint or "")


@pytest.mark.parametrize("network", ["student", "teacher"])
def test_losses_and_connectors_refuse_it_on_both_sides(network: str) -> None:
    recipe = {
        "data": "digits",
        "teacher": "wrn_16_2_digits",
        "student": "wrn_10_1",
        "protocol": "digits",
        "compare": {"method": ["at", "hint", "ab"]},
    }
    map_of_unknown_order = unknown().shapes(IMAGE)["layer1"]
    for cell in plan(recipe, Registry()).cells:
        points = [f"layer{k}{tail}" for k in (1, 2, 3) for tail in ("", ".preact")]
        known = dict.fromkeys(points, (8, 8, 8)) | {"logits": (10,)}
        strange = dict.fromkeys(points, map_of_unknown_order) | {"logits": (10,)}
        sides = {"student": known, "teacher": known} | {network: strange}
        with pytest.raises(UserError, match="nothing tells which axis is the channels'"):
            build_terms(Surroundings(cell.spec, unknown(), unknown(), sides))


def test_the_order_can_be_stated() -> None:
    extractor = unknown("channels_last(body)")
    images = torch.randn(2, *IMAGE)
    value = extractor(images, ["layer1"])["layer1"]
    assert torch.equal(value, naive(extractor.model, "body", images).permute(0, 3, 1, 2))
    stated = unknown("channels_first(input(body))")
    assert torch.equal(stated(images, ["layer1"])["layer1"], naive(stated.model, "norm", images))


def test_a_stated_order_that_is_not_the_networks_is_said() -> None:
    with pytest.raises(UserError, match=r"'layer1' \(body\) of model 'net' is not 'channels_first'"):
        own(Last(), {"layer1": "channels_first(body)"})
    with pytest.raises(UserError, match="'pooled'.* gives .*, no map"):
        own(Last(), {"pooled": "channels_last(input(head))"})


def test_what_does_not_begin_with_the_images_is_said() -> None:
    """An attention's windows: four of each image."""
    with pytest.raises(UserError, match=r"gives \[8, 16, 8\] for 2 images: its first axis is not the images'"):
        own(tiny("timm swin"), {"layer1": "layers.0.blocks.0.attn"}).shapes(IMAGE)
