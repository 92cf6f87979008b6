"""Hook points: what they are called, where they are, and that no in-place operation ever corrupts what they give."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor, nn
from torch.nn import functional as F

from kdbench.errors import UserError
from kdbench.models.external import small_image_resnet, timm_model, torchvision_model
from kdbench.models.hooks import Extractor, places
from kdbench.models.mobilenetv1 import mobilenet_v1
from kdbench.models.mobilenetv2 import mobilenet_v2
from kdbench.models.places import Place
from kdbench.models.points import expand
from kdbench.models.resnet_cifar import bss_resnet, crd_resnet, resnet
from kdbench.models.shufflenet import shufflenet_v1, shufflenet_v2
from kdbench.models.vgg import vgg
from kdbench.models.wrn import wide_resnet

HOOKS = Path(__file__).parents[2] / "registry" / "hooks"
OWN: dict[str, tuple[str, Callable[[], nn.Module], int]] = {
    "wrn_10_1": ("wrn", lambda: wide_resnet(10, 1, classes=5), 3),
    "wrn_16_2": ("wrn", lambda: wide_resnet(16, 2, classes=5), 3),
    "resnet20": ("resnet_cifar", lambda: resnet(20, classes=5), 3),
    "bss_resnet8": ("resnet_cifar", lambda: bss_resnet(8, classes=5), 3),
    "resnet8x4": ("resnet_cifar", lambda: crd_resnet(8, 4, classes=5), 3),
    "vgg8": ("vgg", lambda: vgg(8, classes=5), 4),
    "vgg13": ("vgg", lambda: vgg(13, classes=5), 4),
    "mobilenetv1": ("mobilenetv1", lambda: mobilenet_v1(classes=5), 4),
    "mobilenetv2_half": ("mobilenetv2", lambda: mobilenet_v2(width=0.5, classes=5), 4),
    "shufflenet_v1": ("shufflenet", lambda: shufflenet_v1(classes=5), 3),
    "shufflenet_v2": ("shufflenet", lambda: shufflenet_v2(classes=5), 3),
    "resnet18_32x32": ("resnet_32x32", lambda: small_image_resnet(18, classes=5), 4),
}
IMAGE = (3, 32, 32)


def card(name: str) -> dict[str, str]:
    return yaml.safe_load((HOOKS / f"{name}.yaml").read_text())[name]["points"]


def own(name: str) -> Extractor:
    torch.manual_seed(0)
    hooks, build, _ = OWN[name]
    model = build()
    randomize(model)
    return Extractor(model, places(model, card(hooks), name, IMAGE), name)


def randomize(model: nn.Module) -> None:
    """Batch norms that do something in eval mode, too."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.5)
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)


def images(n: int = 4, size: int = 32) -> Tensor:
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(1))


def attached(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


def naive(model: nn.Module, path: str, x: Tensor) -> Tensor:
    """What a plain forward hook keeps."""
    kept = []
    handle = model.get_submodule(path).register_forward_hook(lambda m, i, out: kept.append(out))
    model(x)
    handle.remove()
    return kept[-1]


# --- names

AVAILABLE = ["stem", *(f"layer{k}{tail}" for k in (10, 2, 1) for tail in ("", ".preact")), "pooled", "logits"]


def test_groups_are_in_the_order_of_layers() -> None:
    assert expand(["layers"], AVAILABLE) == ["layer1", "layer2", "layer10"]
    assert expand(["pooled", "layers.preact", "stem"], AVAILABLE) == [
        "pooled",
        "layer1.preact",
        "layer2.preact",
        "layer10.preact",
        "stem",
    ]


@pytest.mark.parametrize(
    ("names", "message", "hint"),
    [
        (["layer4"], "model 'net' has no hook point 'layer4'", "it has stem"),
        (["layres"], "has no hook point 'layres'", "it has stem"),
        (["pooled.preact"], "'pooled.preact': pooled does not end in a ReLU", "it has stem"),
    ],
)
def test_unknown_points_are_said(names: list[str], message: str, hint: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        expand(names, AVAILABLE, "net")
    assert hint in (error.value.hint or "")


@pytest.mark.parametrize("name", ["layers.preact", "layer1.preact"])
def test_a_layer_without_a_final_relu_is_said(name: str) -> None:
    with pytest.raises(UserError, match="no 'layer1.preact': layer1 does not end in a ReLU"):
        expand([name], ["layer1", "layer2", "layer2.preact", "logits"], "net")


def test_a_group_of_nothing_is_said() -> None:
    with pytest.raises(UserError, match="no hook points 'layers'"):
        expand(["layers"], ["pooled", "logits"])


def test_places_resolve_negative_indices_and_sides() -> None:
    model = resnet(20, classes=5)
    found = places(
        model, {"pooled": "input(linear)", "layer1.preact": "input(layer1.-1.relu2)", "layer1": "layer1"}, "net", IMAGE
    )
    assert list(found) == ["layer1", "layer1.preact", "pooled"]
    assert found["layer1.preact"] == Place("layer1.2.relu2", "input")


@pytest.mark.parametrize("path", ["blok1", "block1.-9", "block1.0.bn3", "input(fcc)", ""])
def test_an_unknown_module_is_said(path: str) -> None:
    with pytest.raises(UserError, match="hook point 'layer1': model 'net' has no module"):
        places(wide_resnet(10, 1, classes=5), {"layer1": path}, "net", IMAGE)


# --- the places of the cards


@pytest.mark.parametrize("name", OWN)
def test_cards_name_all_points(name: str) -> None:
    extractor = own(name)
    layers = [f"layer{k}{tail}" for k in range(1, OWN[name][2] + 1) for tail in ("", ".preact")]
    expected = ["stem", *layers, "pooled", "logits"]
    shapes = extractor.shapes(IMAGE)
    assert list(shapes) == expected
    assert shapes["logits"] == (5,)
    assert len(shapes["pooled"]) == 1
    assert own(name).shapes((3, 8, 8)).keys() == shapes.keys()


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (
            "wrn_16_2",
            {
                "stem": (16, 32, 32),
                "layer1.preact": (32, 32, 32),
                "layer2.preact": (64, 16, 16),
                "layer3.preact": (128, 8, 8),
                "layer3": (128, 8, 8),
                "pooled": (128,),
            },
        ),
        (
            "resnet8x4",
            {
                "stem": (32, 32, 32),
                "layer1": (64, 32, 32),
                "layer2": (128, 16, 16),
                "layer3": (256, 8, 8),
                "pooled": (256,),
            },
        ),
        (
            "vgg13",
            {
                "stem": (64, 32, 32),
                "layer1": (128, 16, 16),
                "layer2": (256, 8, 8),
                "layer3": (512, 4, 4),
                "layer4": (512, 4, 4),
                "pooled": (512,),
            },
        ),
        # Half of the AB authors' 144, 192, 576 (and 1280) channels, except for what is not a multiple.
        (
            "mobilenetv2_half",
            {
                "stem": (16, 16, 16),
                "layer1": (12, 16, 16),
                "layer1.preact": (72, 16, 16),
                "layer2.preact": (96, 8, 8),
                "layer3.preact": (288, 4, 4),
                "layer4.preact": (1280, 2, 2),
                "pooled": (1280,),
            },
        ),
        (
            "shufflenet_v1",
            {
                "stem": (24, 32, 32),
                "layer1": (240, 16, 16),
                "layer2.preact": (480, 8, 8),
                "layer3": (960, 4, 4),
                "pooled": (960,),
            },
        ),
        (
            "shufflenet_v2",
            {
                "stem": (24, 32, 32),
                "layer1.preact": (116, 16, 16),
                "layer2": (232, 8, 8),
                "layer3": (464, 4, 4),
                "pooled": (1024,),
            },
        ),
    ],
)
def test_shapes(name: str, expected: dict[str, tuple[int, ...]]) -> None:
    shapes = own(name).shapes(IMAGE)
    assert {point: shapes[point] for point in expected} == expected


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", ["resnet20", "bss_resnet8", "resnet8x4", "vgg8", "vgg13", "shufflenet_v1"])
def test_the_relu_of_a_preactivation_is_the_layer(name: str, training: bool) -> None:
    extractor = own(name)
    extractor.model.train(training)
    values = extractor(images(), list(extractor.places))
    for layer in expand(["layers"], values):
        preact = values[f"{layer}.preact"]
        assert preact.min() < 0
        assert torch.equal(F.relu(preact), values[layer])


def test_shufflenet_v2_shuffles_after_the_relu() -> None:
    values = own("shufflenet_v2")(images(), ["layer2", "layer2.preact"])
    half = values["layer2"].shape[1] // 2
    preact = values["layer2.preact"]
    assert preact[:, half:].min() < 0
    assert preact[:, :half].min() >= 0
    assert torch.equal(F.relu(preact[:, :half]), values["layer2"][:, ::2])
    assert torch.equal(F.relu(preact[:, half:]), values["layer2"][:, 1::2])


@pytest.mark.parametrize("name", ["wrn_10_1", "wrn_16_2"])
def test_wrn_preactivations_are_the_next_batch_norm(name: str) -> None:
    extractor = own(name)
    extractor.model.eval()
    values = extractor(images(), list(extractor.places))
    for layer, path in (("layer1", "block2.0.bn1"), ("layer2", "block3.0.bn1"), ("layer3", "bn1")):
        bn = extractor.model.get_submodule(path)
        mean, var, weight, bias = (v[:, None, None] for v in (bn.running_mean, bn.running_var, bn.weight, bn.bias))
        by_hand = (values[layer] - mean) / (var + bn.eps).sqrt() * weight + bias
        torch.testing.assert_close(values[f"{layer}.preact"], by_hand)
        assert values[f"{layer}.preact"].min() < 0
    torch.testing.assert_close(values["pooled"], values["layer3.preact"].clamp(min=0).mean((2, 3)))


# --- in-place operations


def timm_resnet18() -> nn.Module:
    torch.manual_seed(0)
    model = timm_model("resnet18", classes=5)
    randomize(model)
    return model


def norm(y: Tensor, bn: nn.Module, training: bool) -> Tensor:
    mean, var = bn.running_mean.clone(), bn.running_var.clone()
    return F.batch_norm(y, mean, var, bn.weight, bn.bias, training, 0.1, bn.eps)


def block_by_hand(block: nn.Module, x: Tensor, training: bool, path: str) -> dict[str, Tensor]:
    """A basic block of timm or torchvision from torch's functions alone. Running statistics stay."""
    y = F.relu(norm(F.conv2d(x, block.conv1.weight, None, block.conv1.stride, 1), block.bn1, training))
    y = norm(F.conv2d(y, block.conv2.weight, None, 1, 1), block.bn2, training)
    shortcut = x
    if block.downsample is not None:
        conv, bn = block.downsample[0], block.downsample[1]
        shortcut = norm(F.conv2d(x, conv.weight, None, conv.stride), bn, training)
    return {f"{path}.bn2": y, f"{path}.sum": y + shortcut, f"{path}.out": F.relu(y + shortcut)}


def resnet18_by_hand(model: nn.Module, x: Tensor, training: bool) -> dict[str, Tensor]:
    x = F.max_pool2d(F.relu(norm(F.conv2d(x, model.conv1.weight, None, 2, 3), model.bn1, training)), 3, 2, 1)
    found: dict[str, Tensor] = {}
    for layer in ("layer1", "layer2", "layer3", "layer4"):
        for number in ("0", "1"):
            path = f"{layer}.{number}"
            found |= block_by_hand(model.get_submodule(path), x, training, path)
            x = found[f"{path}.out"]
    return found


def test_the_trap_exists() -> None:
    """timm's resnet18 adds the shortcut to what bn2 gave and takes the ReLU of it, in place."""
    assert naive(timm_resnet18(), "layer2.0.bn2", images()).min() == 0.0


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("build", [timm_resnet18, lambda: torchvision_model("resnet18", classes=5)])
def test_values_and_gradients_before_in_place_operations(build: Callable[[], nn.Module], training: bool) -> None:
    model = build()
    randomize(model)
    model.train(training)
    points = {
        "a": Place("layer2.0.bn2", "output"),
        "b": Place("layer1.1.bn2", "output"),
        "c": Place("layer3.1.act2" if hasattr(model, "act1") else "layer3.1.relu", "input"),
    }
    names = {"a": "layer2.0.bn2", "b": "layer1.1.bn2", "c": "layer3.1.sum"}
    by_hand = resnet18_by_hand(model, images(), training)
    values = Extractor(model, points, "net")(images(), ["a", "b", "c"])
    weights = [p for p in model.parameters() if p.requires_grad]
    for point, name in names.items():
        assert values[point].min() < 0
        torch.testing.assert_close(values[point], by_hand[name])
        ours, expected = (
            torch.autograd.grad(v.sigmoid().sum(), weights, retain_graph=True, allow_unused=True)
            for v in (values[point], by_hand[name])
        )
        assert [g is None for g in ours] == [g is None for g in expected]
        assert sum(g is not None for g in ours) >= 9
        for a, b in zip(ours, expected, strict=True):
            if a is not None:
                torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


class InPlace(nn.Module):
    """Every way to overwrite a tensor that a hook may hold."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.first, self.head = nn.Linear(4, 4), nn.Linear(4, 2)
        self.relu = nn.ReLU(inplace=True)
        self.dropout = nn.Dropout(0.5, inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x.flatten(1)[:, :4])
        if self.how == "relu":
            x = self.relu(x)
        elif self.how == "functional":
            x = F.relu(x, inplace=True)
        elif self.how == "view":
            x[:, 1:].mul_(3)
        elif self.how == "alias":
            x.view(-1, 2, 2).add_(1)
        elif self.how == "detached":
            x.detach().zero_()
        elif self.how == "dropout":
            x = self.dropout(x)
        elif self.how == "late":
            y = self.head(x.clone())
            x.zero_()
            return y
        return self.head(x)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("how", ["nothing", "relu", "functional", "view", "alias", "detached", "dropout", "late"])
def test_ways_to_overwrite(how: str, gradients: bool, training: bool) -> None:
    torch.manual_seed(0)
    model = InPlace(how).train(training)
    x = torch.randn(6, 1, 2, 2)
    expected = F.linear(x.flatten(1), model.first.weight, model.first.bias)
    with torch.set_grad_enabled(gradients):
        got = Extractor(model, {"a": Place("first", "output")}, "net")(x, ["a", "logits"])["a"]
    torch.testing.assert_close(got, expected)
    if gradients:
        ours, theirs = (torch.autograd.grad(v.square().sum(), model.first.weight)[0] for v in (got, expected))
        torch.testing.assert_close(ours, theirs)


def test_only_overwritten_points_are_copied() -> None:
    model = timm_resnet18().eval()
    points = {"a": Place("layer2.0.bn2", "output"), "b": Place("layer2", "output")}
    held: list[Tensor] = []
    model.layer2.register_forward_hook(lambda m, i, out: held.append(out))
    model.layer2[0].bn2.register_forward_hook(lambda m, i, out: held.append(out))
    with torch.no_grad():
        values = Extractor(model, points, "net")(images(), ["a", "b", "logits"])
    assert values["b"] is held[-1]
    assert values["a"] is not held[-2]


def test_inference_mode() -> None:
    model = timm_resnet18().eval()
    extractor = Extractor(model, {"a": Place("layer2.0.bn2", "output"), "b": Place("layer2", "output")}, "net")
    with torch.inference_mode():
        values = extractor(images(), ["a", "b"])
    torch.testing.assert_close(values["a"], resnet18_by_hand(model, images(), False)["layer2.0.bn2"])


# --- extraction leaves the network alone


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", OWN)
def test_logits_are_identical_with_and_without(name: str, training: bool) -> None:
    extractor = own(name)
    plain = copy.deepcopy(extractor.model).train(training)
    extractor.model.train(training)
    expected = plain(images())
    values = extractor(images(), [*extractor.places, "logits"])
    assert torch.equal(values["logits"], expected)
    assert list(values) == [*extractor.places, "logits"]
    for (path, ours), theirs in zip(extractor.model.state_dict().items(), plain.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs), path
    assert attached(extractor.model) == 0


@pytest.mark.parametrize("name", ["wrn_10_1", "vgg8", "mobilenetv2_half"])
def test_dry_forwards_leave_no_trace(name: str) -> None:
    extractor = own(name)
    for number, module in enumerate(extractor.model.modules()):
        module.training = number % 3 == 0
    modes = [module.training for module in extractor.model.modules()]
    before = {
        path: (value, value.clone(), value._version)
        for path, value in extractor.model.state_dict(keep_vars=True).items()
    }
    state = torch.get_rng_state()
    extractor.shapes(IMAGE)
    extractor._study(images())
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in extractor.model.modules()] == modes
    for path, value in extractor.model.state_dict(keep_vars=True).items():
        same, content, version = before[path]
        assert value is same and torch.equal(value, content) and value._version == version, path
    assert all(p.grad is None for p in extractor.model.parameters())


def test_dropout_draws_the_same_with_and_without() -> None:
    model = InPlace("dropout").train()
    extractor = Extractor(model, {"a": Place("first", "output")}, "net")
    torch.manual_seed(3)
    expected = model(torch.ones(6, 1, 2, 2))
    torch.manual_seed(3)
    assert torch.equal(extractor(torch.ones(6, 1, 2, 2), ["a", "logits"])["logits"], expected)


def test_the_forward_ends_at_the_last_point() -> None:
    extractor = own("wrn_10_1")
    extractor.model.train()
    counts = []
    extractor.model.get_submodule("block3.0.conv1").register_forward_hook(lambda *_: counts.append("block3"))
    extractor.model.get_submodule("block2.0.conv1").register_forward_hook(lambda *_: counts.append("block2"))
    extractor(images(), ["layer1"])
    counts.clear()
    alone = extractor(images(), ["layer2", "stem"])
    assert counts == ["block2"]
    counts.clear()
    together = extractor(images(), ["stem", "layer2", "logits"])
    assert counts == ["block2", "block3"]
    assert list(alone) == ["layer2", "stem"]
    assert torch.equal(alone["layer2"], together["layer2"])
    seen = extractor.model.get_submodule("bn1").num_batches_tracked
    assert seen == 1


def test_nothing_asked_for_runs_nothing() -> None:
    def fail(*_: Any) -> None:
        raise AssertionError

    extractor = own("wrn_10_1")
    extractor.model.register_forward_pre_hook(fail)
    assert extractor(images(), []) == {}


class Repeats(nn.Module):
    """A ReLU that runs three times, of which a catch-all would swallow an ordinary exception."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
        self.relu, self.after = nn.ReLU(inplace=True), nn.Linear(4, 2)
        self.ran_after = 0

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1)
        with suppress(Exception):
            for layer in self.layers:
                x = self.relu(layer(x))
        self.ran_after += 1
        return self.after(x)


@pytest.mark.parametrize("side", ["input", "output"])
@pytest.mark.parametrize("stops", [False, True])
def test_of_several_calls_the_last_counts(side: Any, stops: bool) -> None:
    torch.manual_seed(0)
    model = Repeats()
    x = torch.randn(5, 1, 2, 2)
    y = x.flatten(1)
    for layer in model.layers:
        before = F.linear(y, layer.weight, layer.bias)
        y = before.clamp(min=0)
    extractor = Extractor(model, {"a": Place("relu", side), "b": Place("layers.0", "output")}, "net")
    extractor(x, ["a"])
    model.ran_after = 0
    values = extractor(x, ["a"] if stops else ["a", "logits"])
    torch.testing.assert_close(values["a"], before if side == "input" else y)
    assert model.ran_after == (0 if stops else 1)


class Varying(nn.Module):
    """Runs a module more often in train mode than in eval mode, or by what the images say."""

    def __init__(self) -> None:
        super().__init__()
        self.step, self.head = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1)
        for _ in range(3 if self.training else 1):
            x = self.step(x)
        return self.head(x)


@pytest.mark.parametrize("training", [False, True])
def test_calls_that_depend_on_the_mode(training: bool) -> None:
    model = Varying().train(training)
    x = torch.randn(5, 1, 2, 2)
    expected = x.flatten(1)
    for _ in range(3 if training else 1):
        expected = model.step(expected)
    torch.testing.assert_close(Extractor(model, {"a": Place("step", "output")}, "net")(x, ["a"])["a"], expected)


def test_hooks_go_when_the_network_fails() -> None:
    extractor = own("wrn_10_1")
    extractor(images(), ["layer1"])
    with pytest.raises(RuntimeError):
        extractor(torch.randn(2, 7, 32, 32), ["layer1"])
    assert attached(extractor.model) == 0
    assert torch.isfinite(extractor(images(), ["layer1"])["layer1"]).all()


def test_runs_inside_runs_do_not_disturb_each_other() -> None:
    """A hook of one run starts another run of the same network, on other images."""
    model = own("wrn_10_1").model.eval()
    points = {"a": Place("block1", "output"), "b": Place("block3", "output")}
    outer, inner = Extractor(model, points, "outer"), Extractor(model, points, "inner")
    expected = outer(images(), ["a", "b", "logits"])
    other = inner(images() * 2, ["a", "b"])
    found = []

    def nest(*_: Any) -> None:
        handle.remove()
        found.append(inner(images() * 2, ["a"]) | inner(images() * 2, ["b"]))
        found.append(outer(images() * 2, ["a", "b"]))

    handle = model.block2.register_forward_hook(nest)
    values = outer(images(), ["a", "b", "logits"])
    for point, value in expected.items():
        assert torch.equal(values[point], value), point
    for nested in found:
        for point, value in other.items():
            assert torch.equal(nested[point], value), point
    assert attached(model) == 0


def test_a_copy_of_an_extractor_is_independent() -> None:
    first = own("resnet20")
    first.model.eval()
    expected = first(images(), ["layer1"])["layer1"]
    second = copy.deepcopy(first)
    for parameter in second.model.parameters():
        nn.init.zeros_(parameter)
    assert not second(images(), ["layer1"])["layer1"].any()
    assert torch.equal(first(images(), ["layer1"])["layer1"], expected)


# --- errors


class Odd(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.pair = Pair()
        self.never, self.head = nn.Linear(2, 2), nn.Linear(4, 2)
        self.nan = nn.Linear(4, 4)
        nn.init.constant_(self.nan.bias, float("nan"))

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1)
        self.nan(x)
        return self.head(self.pair(x)[0])


class Pair(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, x


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("pair", r"'layer1' \(pair\) of model 'odd' gives a tuple, not a tensor"),
        ("never", r"'layer1' \(never\) of model 'odd' is not reached"),
        ("nan", r"'layer1' \(nan\) of model 'odd' gives values that are not finite"),
    ],
)
def test_bad_captures_name_model_and_place(path: str, message: str) -> None:
    model = Odd()
    extractor = Extractor(model, {"layer1": Place(path, "output")}, "odd")
    with pytest.raises(UserError, match=message):
        extractor.shapes((1, 2, 2))
    if path != "nan":
        with pytest.raises(UserError, match=message):
            extractor(torch.ones(2, 1, 2, 2), ["layer1"])
    assert attached(model) == 0


def test_images_that_do_not_fit_are_said() -> None:
    with pytest.raises(UserError, match="model 'wrn_10_1' cannot take images of 4×32×32"):
        own("wrn_10_1").shapes((4, 32, 32))


def test_logits_that_are_none_are_said() -> None:
    model = nn.Sequential(Pair())
    with pytest.raises(UserError, match="returns a tuple, not logits"):
        Extractor(model, {}, "net").shapes((1, 2, 2))
    head = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
    nn.init.constant_(head[1].weight, float("inf"))
    with pytest.raises(UserError, match="logits that are not finite"):
        Extractor(head, {}, "net").shapes((1, 2, 2))


def test_a_point_that_the_model_lacks_is_said() -> None:
    with pytest.raises(UserError, match="model 'vgg8' has no hook point 'layer5'") as error:
        own("vgg8")(images(), ["layer5"])
    assert error.value.hint and "layer4.preact, pooled, logits" in error.value.hint
