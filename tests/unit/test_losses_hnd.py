"""HND and GHND against closed forms, and what their bottleneck is made of.

Values and gradients were compared with the authors' ResNet-152 and torchdistill's losses too, outside this project.
"""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tensors import rand
from torch import Tensor, nn

from kdbench import losses


def tail(at_layer: bool = True) -> Any:
    """Two layers behind the bottleneck: twice the map, and the square of its mean."""
    return SimpleNamespace(
        at_layer=at_layer,
        points=["layer3", "layer4"],
        layers=lambda value: [2 * value, value.mean((2, 3)) ** 2],
        logits=lambda value: value.mean((2, 3)),
    )


def bottleneck(**options: Any) -> losses.Bottleneck:
    torch.manual_seed(0)
    return losses.Bottleneck((3, 8, 6), (5, 4, 3), tail(), **options).double()


class TestBottleneck:
    def test_shapes_and_parameters_of_the_authors_resnet(self) -> None:
        """ResNet-152 at layer2: 2×2 convolutions 64 → 12 → 512 four times, two numbers for each norm's channel."""
        module = losses.Bottleneck((64, 56, 56), (512, 28, 28), tail())
        encoder, decoder = 4 * 64 * 12 + 2 * 64, 4 * (12 * 512 + 3 * 512**2) + 2 * (12 + 3 * 512)
        assert module.record() == {
            "values of an image": 12 * 29 * 29,
            "map": "12 × 29 × 29",
            "encoder parameters": encoder,
            "decoder parameters": decoder,
        }
        for layer in module.modules():
            if isinstance(layer, nn.Conv2d):
                assert layer.weight.std().item() == pytest.approx(math.sqrt(2 / (4 * layer.out_channels)), rel=0.05)

    @pytest.mark.parametrize("ratio", [1, 2, 4])
    def test_maps_have_the_size_of_what_they_replace(self, ratio: int) -> None:
        module = losses.Bottleneck((3, 4 * ratio, 3 * ratio), (5, 4, 3), tail(), width=2)
        maps = torch.randn(2, 3, 4 * ratio, 3 * ratio)
        assert module.encoder(maps).shape == (2, *module.sent) == (2, 2, 5, 4)
        found = module(maps)
        assert found.shape == (2, 5, 4, 3) and found.min() < 0, "a WRN's layers have negative values"

    def test_what_does_not_fit(self) -> None:
        for shapes in (((3, 8, 8), (5,)), ((7, 4), (5, 4, 4))):
            with pytest.raises(ValueError, match="it takes maps"):
                losses.Bottleneck(*shapes, tail())
        for before, behind in (((8, 8), (3, 3)), ((8, 8), (4, 2)), ((4, 4), (8, 8))):
            with pytest.raises(ValueError, match="not a whole number of times"):
                losses.Bottleneck((3, *before), (5, *behind), tail())
        with pytest.raises(ValueError, match="width must be at least 1"):
            losses.Bottleneck((3, 8, 8), (5, 4, 4), tail(), width=0)


def test_hnd_is_the_sum_of_squares() -> None:
    student, teacher = rand(2, 3, 2, 2, seed=1).requires_grad_(), rand(2, 3, 2, 2, seed=2).requires_grad_()
    found = losses.hnd(student, teacher)
    pairs = zip(student.flatten().tolist(), teacher.flatten().tolist(), strict=True)
    expected = math.fsum((s - t) ** 2 for s, t in pairs)
    assert found.item() == pytest.approx(expected, rel=1e-12)
    found.backward()
    assert torch.allclose(student.grad, 2 * (student - teacher)) and teacher.grad is None  # type: ignore[arg-type]


class TestGeneralized:
    TAUGHT = (rand(2, 9, seed=3), rand(2, 5, 4, 3, seed=4), rand(2, 5, 4, 3, seed=5), rand(2, 5, seed=6))

    def test_sums_the_layer_and_those_behind_it(self) -> None:
        """Of more layers of the teacher the last ones count: the first is before the bottleneck's end."""
        value = rand(2, 5, 4, 3, seed=1).requires_grad_()
        own = (value, 2 * value, value.mean((2, 3)) ** 2)
        expected = sum(float((s - t).detach().square().sum()) for s, t in zip(own, self.TAUGHT[1:], strict=True))
        for taught in (self.TAUGHT, self.TAUGHT[1:]):
            found = losses.ghnd([value], taught, bottleneck())
            assert found.item() == pytest.approx(expected, rel=1e-12)
        (gradient,) = torch.autograd.grad(found, value)
        (by_hand,) = torch.autograd.grad(
            sum(((s - t).square().sum() for s, t in zip(own, self.TAUGHT[1:], strict=True)), torch.zeros(())), value
        )
        assert torch.allclose(gradient, by_hand)

    def test_what_does_not_fit(self) -> None:
        value, module = rand(2, 5, 4, 3, seed=1), bottleneck()
        for student, teacher in (([value, value], self.TAUGHT), ([value], self.TAUGHT[2:])):
            with pytest.raises(ValueError, match="the bottleneck's output alone and 3 layers"):
                losses.ghnd(student, teacher, module)
        with pytest.raises(ValueError, match="equal shapes"):
            losses.ghnd([value], self.TAUGHT[:3], module)
        module.tail = tail(at_layer=False)
        with pytest.raises(ValueError, match="takes the place of a whole layer"):
            losses.ghnd([value], self.TAUGHT, module)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_sums_are_taken_in_full_precision(self, dtype: torch.dtype) -> None:
        value, *taught = (one.to(dtype) for one in (rand(2, 5, 4, 3, seed=1), *self.TAUGHT))
        found = losses.ghnd([value], taught, bottleneck())
        own: list[Tensor] = [value, *tail().layers(value)]
        expected = sum(float((s.float() - t.float()).square().sum()) for s, t in zip(own, taught[1:], strict=True))
        assert found.dtype == torch.float32 and found.item() == pytest.approx(expected, rel=1e-6)


def test_the_head_answers_through_the_bottleneck_and_the_rest() -> None:
    module = bottleneck().eval()
    maps = rand(2, 3, 8, 6, seed=1)
    head = losses.BottleneckHead(module)
    assert torch.equal(head(maps), module.decoder(module.encoder(maps)).mean((2, 3)))
    assert {*head.parameters()} == {*module.parameters()}
