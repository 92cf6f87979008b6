"""HND and GHND: a bottleneck in place of a network's first layers, for split computing.

Matsubara, Baidya, Callegaro, Levorato, Singh: Distilled Split Deep Neural Networks for Edge-Assisted Real-Time Systems.
HotEdgeVideo 2019. Matsubara, Callegaro, Baidya, Levorato, Singh: Head Network Distillation. IEEE Access 8, 2020.
Matsubara, Levorato: Neural Compression and Filtering for Edge-assisted Real-time Object Detection in Challenged
Networks. ICPR 2020, arXiv 2007.15818.
"""

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from kdbench.losses.checks import Shape, at_least_one, full, same_shape, two_maps


class Bottleneck(nn.Module):
    """From an early map of a network to one of its later layers, through few channels.

    Encoder: batch norm, ReLU and a 2×2 convolution to the bottleneck, whose stride is the ratio of the two sizes.
    Decoder: four 2×2 convolutions with batch norm and ReLU before each, then average pooling. All without bias, weights
    N(0, 2 / (4 · output channels)). The bottleneck is one pixel higher and wider than the later layer.

    Args:
        student_shape: (C, H, W), the early map.
        teacher_shape: (C', H', W'), the later layer, with H / H' = W / W' a whole number.
        student_tail: What the network does behind the later layer: the frozen rest of the student.
        width: Channels of the bottleneck.

    Attributes:
        sent: Shape of the bottleneck for one image: what would be sent from one device to another.

    Raises:
        ValueError: Either is no map, the sizes have no such ratio, or there is no channel.
    """

    def __init__(self, student_shape: Shape, teacher_shape: Shape, student_tail: Any, *, width: int = 12) -> None:
        super().__init__()
        at_least_one(width, "width")
        two_maps(student_shape, teacher_shape)
        (inputs, *before), (outputs, *size) = student_shape, teacher_shape
        stride = before[0] // size[0]
        if stride < 1 or before != [stride * side for side in size]:
            raise ValueError(
                f"the map {student_shape} is not a whole number of times as high and wide as {teacher_shape}"
            )
        self.tail = student_tail
        self.sent = (width, size[0] + 1, size[1] + 1)
        self.encoder = nn.Sequential(*_before(inputs), _convolution(inputs, width, stride=stride, padding=1))
        self.decoder = nn.Sequential(
            *_before(width),
            _convolution(width, outputs, padding=1),
            *_before(outputs),
            _convolution(outputs, outputs, padding=1),
            *_before(outputs),
            _convolution(outputs, outputs),
            *_before(outputs),
            _convolution(outputs, outputs),
            nn.AvgPool2d(2, stride=1),
        )

    def forward(self, student: Tensor) -> Tensor:
        """Maps [N, C, H, W] to [N, C', H', W']."""
        decoded: Tensor = self.decoder(self.encoder(student))
        return decoded

    def record(self) -> dict[str, Any]:
        """What the bottleneck gives for one image, and how many parameters bring it there and back."""
        encoder, decoder = (sum(p.numel() for p in part.parameters()) for part in (self.encoder, self.decoder))
        sent = {"values of an image": math.prod(self.sent), "map": " × ".join(map(str, self.sent))}
        return sent | {"encoder parameters": encoder, "decoder parameters": decoder}


class BottleneckHead(nn.Module):
    """In place of the student's own layers: its early map to logits, through the bottleneck and the frozen rest.

    Args:
        bottleneck: Trained by `hnd` or `ghnd`.
    """

    def __init__(self, bottleneck: nn.Module) -> None:
        super().__init__()
        self.bottleneck = bottleneck

    def forward(self, student: Tensor) -> Tensor:
        """Logits [N, K]."""
        tail: Any = self.bottleneck.tail
        logits: Tensor = tail.logits(self.bottleneck(student))
        return logits


def hnd(student: Tensor, teacher: Tensor) -> Tensor:
    r"""Summed squared error between what the bottleneck gives and the layer that it replaces.

    $$
    L = \sum (F_S - F_T)^2
    $$

    The sum is over images and elements, so it grows with the batch; use an optimizer that does not mind, such as Adam.

    Args:
        student: F_S, the bottleneck's output, [N, ...].
        teacher: F_T, of the same shape.

    Returns:
        Scalar, at least 0.

    Raises:
        ValueError: The shapes do not match.
    """
    same_shape(student, teacher, "hnd")
    return (full(student) - full(teacher.detach())).square().sum()


def ghnd(student: Sequence[Tensor], teacher: Sequence[Tensor], bottleneck: nn.Module) -> Tensor:
    r"""The sum of `hnd` at the layer that the bottleneck replaces and at all layers behind it.

    $$
    L = \sum_l \sum (F_S^l - F_T^l)^2
    $$

    Args:
        student: The bottleneck's output, alone.
        teacher: Layers, of which the last ones count: that which the bottleneck replaces, and those behind it.
        bottleneck: A `Bottleneck`, of which the student's further layers are asked.

    Returns:
        Scalar, at least 0.

    Raises:
        ValueError: There are fewer layers of the teacher, the bottleneck does not end where a layer does, or the shapes
            do not match.
    """
    tail: Any = bottleneck.tail
    if not tail.at_layer:
        raise ValueError("ghnd needs a bottleneck that takes the place of a whole layer, such as layer1")
    if len(student) != 1 or len(teacher) <= len(tail.points):
        raise ValueError(
            f"ghnd needs the bottleneck's output alone and {1 + len(tail.points)} layers of the teacher, not "
            f"{len(student)} and {len(teacher)}"
        )
    own = [student[0], *tail.layers(student[0])]
    taught = teacher[-len(own) :]
    errors = [hnd(one, other) for one, other in zip(own, taught, strict=True)]
    total = errors[0]
    for error in errors[1:]:
        total = total + error
    return total


def _before(channels: int) -> list[nn.Module]:
    return [nn.BatchNorm2d(channels), nn.ReLU()]


def _convolution(inputs: int, outputs: int, stride: int = 1, padding: int = 0) -> nn.Conv2d:
    layer = nn.Conv2d(inputs, outputs, 2, stride, padding, bias=False)
    nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
    return layer
