"""Networks against the authors' own code: parameter counts, logits, and the public weights' names."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from kdbench.engine.targets import import_target
from kdbench.errors import UserError
from kdbench.models.external import small_image_resnet
from kdbench.models.mobilenetv1 import mobilenet_v1
from kdbench.models.mobilenetv2 import mobilenet_v2
from kdbench.models.resnet_cifar import PaddedShortcut, bss_resnet, crd_resnet, resnet
from kdbench.models.shufflenet import GroupedBlock, shuffled, shufflenet_v1, shufflenet_v2
from kdbench.models.vgg import vgg
from kdbench.models.wrn import wide_resnet
from kdbench.registry import Registry

Builder = Callable[..., nn.Module]

# What the authors' own code gives (bhheo/AB_distillation, bhheo/BSS_distillation, akamaster/pytorch_resnet_cifar10,
# HobbitLong/RepDistiller) with the weights of `fill` for the image `waves`, in float64: classes, parameters, logits.
REFERENCE: dict[str, tuple[Builder, int, int, list[float]]] = {
    "wrn_10_1": (lambda **k: wide_resnet(10, 1, **k), 10, 77_850, [0.38224561, 1.3918821, -1.4821953]),
    "wrn_16_2": (lambda **k: wide_resnet(16, 2, **k), 10, 691_674, [1.0000967, -2.2958061, 2.1967336]),
    "resnet20": (lambda **k: resnet(20, **k), 10, 269_722, [-0.16316658, 2.0833445, -1.5414203]),
    "resnet56": (lambda **k: resnet(56, **k), 10, 853_018, [-0.25559812, 11.187522, -8.7835683]),
    "bss_resnet8": (lambda **k: bss_resnet(8, **k), 10, 75_290, [-0.50707591, 0.97121797, -0.2400983]),
    "bss_resnet26": (lambda **k: bss_resnet(26, **k), 10, 366_938, [-0.21212369, 2.0125889, -1.3591158]),
    "crd_resnet20": (lambda **k: crd_resnet(20, **k), 100, 278_324, [-0.91958911, 2.5767603, -1.1527425]),
    "crd_resnet110": (lambda **k: crd_resnet(110, **k), 100, 1_736_564, [10.07028, 114.62408, -102.48772]),
    "resnet8x4": (lambda **k: crd_resnet(8, 4, **k), 100, 1_233_540, [3.3831259, 6.892247, -4.6130189]),
    "resnet32x4": (lambda **k: crd_resnet(32, 4, **k), 100, 7_433_860, [-16.777348, 1.6080997, 16.494902]),
    "wrn_40_1": (lambda **k: wide_resnet(40, 1, **k), 100, 569_780, [1.0014361, 1.3256872, -2.0440066]),
    "wrn_40_2": (lambda **k: wide_resnet(40, 2, **k), 100, 2_255_156, [1.6294195, -3.8316317, 3.6506833]),
    "shufflenet_v1": (shufflenet_v1, 100, 949_258, [-5.8399509, -89.475944, 16.089143]),
    "shufflenet_v2": (shufflenet_v2, 100, 1_355_528, [0.22724567, 6.0412639, 11.209563]),
    "vgg8": (lambda **k: vgg(8, **k), 100, 3_965_028, [1.4372208, -1.760716, 2.0282019]),
    "vgg13": (lambda **k: vgg(13, **k), 100, 9_462_180, [1.6478624, -1.8221402, 1.8649233]),
    # mdistiller's, its pooling of 7×7 pixels replaced by that of whatever there is, and for 1000 classes.
    "mobilenetv1": (mobilenet_v1, 1000, 4_231_976, [6260.6549784, 11656.693457, 15577.139546]),
    "mobilenetv2_half": (lambda **k: mobilenet_v2(6, 0.5, **k), 100, 812_836, [1.1152433, 2.2045754, -3.0060394]),
}
# As above, of networks whose modules are torchvision's.
LIBRARY = {
    "resnet18_32x32": (lambda **k: small_image_resnet(18, **k), 10, 11_173_962, [-8.6354502, 3.2271713, 2.2537782]),
    "resnet50_32x32": (lambda **k: small_image_resnet(50, **k), 100, 23_705_252, [-558.50334, 743.37409, 1680.7605]),
}
BUILDERS = {name: case[0] for name, case in REFERENCE.items()}
# One of each kind, the smallest.
KINDS = ["wrn_10_1", "resnet20", "bss_resnet8", "crd_resnet20", "resnet8x4", "vgg8", "mobilenetv1", "mobilenetv2_half"]
KINDS += ["shufflenet_v1", "shufflenet_v2"]


def count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def fill(model: nn.Module) -> None:
    """Values that depend on a tensor's number and size only, the same in any code that registers the same tensors."""
    with torch.no_grad():
        for number, (name, tensor) in enumerate(model.state_dict().items()):
            if not tensor.is_floating_point():
                continue
            wave = torch.sin(torch.arange(tensor.numel(), dtype=torch.float64) * 1.7 + number).reshape(tensor.shape)
            if tensor.dim() > 1:
                tensor.copy_(wave * math.sqrt(2 / tensor[0].numel()))
            elif name.endswith("running_var"):
                tensor.copy_(1 + 0.5 * wave)
            else:
                tensor.copy_(1 + 0.3 * wave if name.endswith("weight") else 0.1 * wave)


@pytest.mark.parametrize("name", REFERENCE | LIBRARY)
def test_logits_are_those_of_the_authors_code(name: str) -> None:
    build, classes, parameters, expected = (REFERENCE | LIBRARY)[name]
    model = build(classes=classes).double().eval()
    fill(model)
    waves = torch.sin(torch.arange(2 * 3 * 32 * 32, dtype=torch.float64) * 0.37).reshape(2, 3, 32, 32)
    with torch.no_grad():
        logits = model(waves)
    assert count(model) == parameters
    assert logits.shape == (2, classes)
    assert logits[1, :3].tolist() == pytest.approx(expected, rel=1e-6)


def test_padded_shortcuts_by_hand() -> None:
    x = torch.arange(2 * 3 * 3, dtype=torch.float32).reshape(1, 2, 3, 3)
    around = PaddedShortcut(stride=2, before=1, after=1)(x)
    assert around.shape == (1, 4, 2, 2)
    assert around[0, 1].tolist() == [[0, 2], [6, 8]]
    assert around[0, 2].tolist() == [[9, 11], [15, 17]]
    assert not around[0, [0, 3]].any()
    assert not PaddedShortcut(stride=2, before=0, after=2)(x)[0, 2:].any()


def test_shuffled_by_hand() -> None:
    x = torch.arange(6.0).reshape(1, 6, 1, 1)
    assert shuffled(x, 2).flatten().tolist() == [0, 3, 1, 4, 2, 5]
    assert torch.equal(shuffled(shuffled(x, 2), 3), x)


def test_a_block_that_shrinks_keeps_its_input_beside_its_own_channels() -> None:
    block = GroupedBlock(24, 240, 2, 1).eval()
    nn.init.zeros_(block.bn3.weight)
    x = torch.rand(1, 24, 4, 4)
    out = block(x)
    assert out.shape == (1, 240, 2, 2)
    assert not out[:, :216].any()
    assert torch.equal(out[:, 216:], nn.functional.avg_pool2d(x, 3, 2, 1))


@pytest.mark.parametrize(("width", "millions"), [(0.5, 1.4), (1.0, 2.3), (1.5, 3.5), (2.0, 7.4)])
def test_shufflenet_v2_parameters(width: float, millions: float) -> None:
    """Ma et al., ECCV 2018, table 8, for 1000 classes, with the stem's 3×3 in place of 1×1."""
    with torch.device("meta"):
        model = shufflenet_v2(width, classes=1000)
    assert (count(model) + 24 * 3 * 8) / 1e6 == pytest.approx(millions, abs=0.06)


def shortcut_of(model: nn.Module) -> nn.Module:
    return model.get_submodule("layer2.0.shortcut")


def test_networks_of_one_name_differ_in_their_shortcuts() -> None:
    x = torch.rand(1, 16, 4, 4) + 1
    filled = [
        (shortcut_of(build(20, classes=10))(x).abs().sum((0, 2, 3)) > 0).nonzero().flatten().tolist()
        for build in (resnet, bss_resnet)
    ]
    assert filled == [list(range(8, 24)), list(range(16))]
    assert count(shortcut_of(crd_resnet(20, classes=10))) == 16 * 32 + 2 * 32


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize(("channels", "size"), [(1, 8), (3, 32)])
def test_small_images_train(name: str, channels: int, size: int) -> None:
    model = BUILDERS[name](classes=7, channels=channels, image_size=size)
    logits = model(torch.randn(3, channels, size, size))
    logits.square().sum().backward()
    assert logits.shape == (3, 7)
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())


@pytest.mark.parametrize(
    ("build", "options", "message"),
    [
        (vgg, {"depth": 8, "image_size": 7}, "at least 8×8"),
        (mobilenet_v2, {"image_size": 4}, "at least 8×8"),
        (vgg, {"depth": 9}, "no VGG-9"),
        (wide_resnet, {"depth": 17, "width": 2}, "6n \\+ 4"),
        (wide_resnet, {"depth": 4, "width": 2}, "6n \\+ 4"),
        (wide_resnet, {"depth": 16, "width": 0}, "at least 1"),
        (resnet, {"depth": 21}, "6n \\+ 2"),
        (resnet, {"depth": 20, "channels": 0}, "'channels'"),
        (crd_resnet, {"depth": 8, "width": 0}, "at least 1"),
        (mobilenet_v2, {"width": 0.01}, "width 0.01"),
        (shufflenet_v2, {"width": 0.7}, "no ShuffleNetV2 of width 0.7"),
        (small_image_resnet, {"depth": 20}, "no residual network of depth 20"),
        (small_image_resnet, {"depth": 18, "channels": 0}, "'channels'"),
    ],
)
def test_impossible_arguments_are_said(build: Builder, options: dict[str, int], message: str) -> None:
    with pytest.raises(UserError, match=message):
        build(classes=10, **options)


def test_the_nearest_depths_are_named() -> None:
    with pytest.raises(UserError) as error:
        wide_resnet(17, 2, classes=10)
    assert error.value.hint == "the nearest are 16 and 22"


@pytest.mark.parametrize("name", KINDS)
def test_nothing_is_overwritten(name: str) -> None:
    """No in-place operation: whatever a module gave is unchanged at the end of the forward."""
    model = BUILDERS[name](classes=4)
    given: list[tuple[str, Tensor, int]] = []
    for path, module in model.named_modules():
        module.register_forward_hook(lambda m, i, out, path=path: given.append((path, out, out._version)))
    model(torch.randn(2, 3, 32, 32))
    assert len(given) > 10
    assert [path for path, out, version in given if out._version != version] == []


@pytest.mark.parametrize(
    "name, classifier",
    [("wrn_16_2", None), ("bss_resnet26", None), ("resnet8x4", None), ("vgg8", 0.01), ("mobilenetv2_half", 0.01)],
)
def test_initial_deviations(name: str, classifier: float | None) -> None:
    torch.manual_seed(0)
    model = BUILDERS[name](classes=100)
    for path, module in model.named_modules():
        if isinstance(module, nn.Conv2d) and module.weight.numel() > 5000:
            expected = math.sqrt(2 / (module.kernel_size[0] ** 2 * module.out_channels))
            assert module.weight.std().item() == pytest.approx(expected, rel=0.05), path
        if isinstance(module, nn.Linear) and classifier:
            assert module.weight.std().item() == pytest.approx(classifier, rel=0.05)
            assert not module.bias.any()


def test_initial_deviations_of_option_a() -> None:
    torch.manual_seed(0)
    model = resnet(20, classes=100)
    assert model.get_submodule("layer2.0.conv1").weight.std().item() == pytest.approx(math.sqrt(2 / (9 * 16)), rel=0.05)
    assert model.get_submodule("linear").weight.std().item() == pytest.approx(math.sqrt(2 / 64), rel=0.05)


@pytest.mark.parametrize(
    ("file", "depth"),
    [
        ("resnet20-12fca82f.th", 20),
        ("resnet32-d509ac18.th", 32),
        ("resnet44-014dd654.th", 44),
        ("resnet56-4bfd9763.th", 56),
    ],
)
def test_public_weights_have_our_names(teacher_folder: Path, file: str, depth: int) -> None:
    state = torch.load(teacher_folder / file, map_location="cpu", weights_only=True)["state_dict"]
    state = {name.removeprefix("module."): value for name, value in state.items()}
    ours = resnet(depth, classes=10).state_dict()
    counters = {name for name in ours if name.endswith("num_batches_tracked")}
    assert {name: tuple(value.shape) for name, value in state.items()} == {
        name: tuple(value.shape) for name, value in ours.items() if name not in counters
    }
    resnet(depth, classes=10).load_state_dict(state)


def test_public_bss_weights_have_our_names(teacher_folder: Path) -> None:
    from safetensors.torch import load_file

    bss_resnet(26, classes=10).load_state_dict(load_file(teacher_folder / "bss_resnet26_cifar10.safetensors"))


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("wrn_22_4", 4_298_970),
        ("resnet110", 1_727_962),
        ("bss_resnet14", 172_506),
        ("crd_resnet20", 272_474),
        ("vgg13", 9_416_010),
        ("mobilenetv1", 4_231_976 - 990 * 1025),
        ("mobilenetv2_half", 697_546),
        ("shufflenet_v1", 862_768),
        ("shufflenet_v2", 1_263_278),
    ],
)
def test_cards_build_what_their_names_say(name: str, parameters: int) -> None:
    """For 10 classes: the counts above less 90 classes' rows of the classifier."""
    registry = Registry()
    card = registry.card("models", name)
    options = card.args | registry.fields("models", name)
    with torch.device("meta"):
        model = import_target(card.target)(**options, classes=10, channels=3, image_size=32)
    assert count(model) == parameters


def test_every_hooks_card_is_used() -> None:
    registry = Registry()
    used = {registry.trees["models"][key].data["hooks"] for key in registry.keys("models")}
    assert used - {"derived"} == set(registry.keys("hooks"))


@pytest.mark.parametrize(("size", "side"), [(8, 1), (32, 4), (64, 4)])
def test_vgg_pools_once_more_from_64_pixels_on(size: int, side: int) -> None:
    model, sides = vgg(8, classes=4, image_size=size), []
    model.get_submodule("block4").register_forward_hook(lambda m, i, out: sides.append(out.shape[-2:]))
    model.eval()(torch.randn(1, 3, size, size))
    assert sides == [(side, side)]
