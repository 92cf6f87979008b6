"""What a network does behind a hook point, on a value in place of its own there."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kdbench.engine.networks.build import build_extractor, build_model
from kdbench.engine.teachers.loading import fingerprint
from kdbench.errors import UserError
from kdbench.models.hooks import Extractor
from kdbench.models.tails import Tail
from kdbench.recipe.planning import plan
from kdbench.registry import Registry

SHAPE = (3, 32, 32)


def network(model: str) -> Extractor:
    spec = plan({"data": "cifar10", "student": model, "protocol": "crd", "method": "ce"}, Registry()).cells[0].spec
    built = build_model(spec.student, spec.data)
    with torch.no_grad():
        for number, parameter in enumerate(built.parameters()):
            # First values of zeros would hide what is behind them.
            parameter += 0.01 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number))
    return build_extractor(built.eval(), spec.student, spec.data)


@pytest.mark.parametrize(
    ("model", "point", "behind"),
    [
        ("wrn_10_1", "stem", "123"),
        ("wrn_10_1", "layer1", "23"),
        # Of a WRN the next block's, of a ResNet the layer's own.
        ("wrn_10_1", "layer1.preact", "23"),
        ("resnet20", "layer1.preact", "123"),
        ("resnet20", "layer3", ""),
        ("vgg8", "layer2", "34"),
        ("mobilenetv2_half", "layer2", "34"),
        ("shufflenet_v2", "layer1", "23"),
        # It overwrites what its hook points show, is kept as [N, H, W, C], cannot be traced as a whole.
        ("timm:resnet18", "layer1.preact", "1234"),
        ("timm:swin_tiny_patch4_window7_224", "layer1", "234"),
        ("timm:tf_efficientnetv2_b0", "layer2", "345"),
    ],
)
def test_from_a_networks_own_value_on_it_does_what_the_network_does(model: str, point: str, behind: str) -> None:
    extractor = network(model)
    extractor.model.train()
    before = fingerprint(extractor.model)
    tail = Tail(extractor, point, SHAPE)
    assert fingerprint(extractor.model) == before and all(m.training for m in extractor.model.modules())
    extractor.model.eval()
    assert tail.points == [f"layer{number}" for number in behind]
    images = torch.randn(3, *SHAPE, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        found = extractor(images, [point, *tail.points, "logits"])
        value = found[point].clone()
        made = [*tail.layers(value), tail.logits(value)]
    expected = [*(found[name] for name in tail.points), found["logits"]]
    assert all(map(torch.equal, made, expected)) and torch.equal(value, found[point])


def test_gradients_reach_the_value_through_frozen_modules() -> None:
    extractor = network("resnet20")
    extractor.model.requires_grad_(False)
    tail = Tail(extractor, "layer2", SHAPE)
    value = torch.randn(2, 32, 16, 16, requires_grad=True)
    (layer,) = tail.layers(value)
    (gradient,) = torch.autograd.grad(layer.sum(), value)
    assert gradient.abs().max() > 0 and tail.at_layer and not Tail(extractor, "stem", SHAPE).at_layer


def test_it_follows_the_modules_of_its_network() -> None:
    extractor = network("resnet20")
    tail = Tail(extractor, "layer3", SHAPE)
    value = torch.randn(2, 64, 8, 8)
    with torch.no_grad():
        before: Tensor = tail.logits(value)
        extractor.model.linear.bias += 1.0  # type: ignore[union-attr, operator]
        assert torch.allclose(tail.logits(value), before + 1, atol=1e-5)


@pytest.mark.parametrize(
    ("model", "point", "why"),
    [
        ("resnet20", "layer4", "no hook point 'layer4'"),
        # The number of images comes from the images themselves, where the class token is put before the patches.
        ("timm:deit_tiny_patch16_224", "layer1", "behind 'layer1' cannot be run alone: it needs more"),
    ],
)
def test_what_cannot_be_run_alone_is_told(model: str, point: str, why: str) -> None:
    with pytest.raises(UserError, match=why):
        Tail(network(model), point, SHAPE)
