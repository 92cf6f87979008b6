"""Residual networks for small images: three stages of basic blocks. He et al., CVPR 2016, section 4.2.

Three networks go by the same name in the literature. They differ where the number of channels changes: the paper's
shortcut without parameters, the one that pads the new channels at the end only, and a 1×1 convolution.
"""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kdbench.errors import UserError
from kdbench.models.arguments import blocks_per_stage, check_sizes

# (input channels, output channels, stride) -> the module of a shortcut that changes shape
Shortcut = Callable[[int, int, int], nn.Module]


class PaddedShortcut(nn.Module):
    """Every stride-th pixel, with channels of zeros around: [N, C, H, W] -> [N, before + C + after, …]."""

    def __init__(self, stride: int, before: int, after: int) -> None:
        super().__init__()
        self.stride, self.before, self.after = stride, before, after

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.before, self.after))


class BasicBlock(nn.Module):
    """Two 3×3 convolutions with batch norm, plus the shortcut, then ReLU (`relu2`, whose input is the sum)."""

    def __init__(self, inputs: int, outputs: int, stride: int, shortcut: Shortcut) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        same = inputs == outputs and stride == 1
        self.shortcut = nn.Identity() if same else shortcut(inputs, outputs, stride)
        self.relu2 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        branch = self.bn2(self.conv2(self.relu1(self.bn1(self.conv1(x)))))
        return self.relu2(branch + self.shortcut(x))


class CifarResNet(nn.Module):
    """Images [N, channels, H, W] -> logits [N, classes].

    Args:
        depth: 6n + 2 layers, n blocks in each stage.
        widths: channels of the stem and of the three stages.
        init: how convolutions begin: a factor 2 over the fan-in, as the classifier then does too, or over the fan-out,
            beside which the classifier begins as torch's default.

    Raises:
        UserError: there is no such depth.
    """

    def __init__(
        self,
        depth: int,
        widths: tuple[int, int, int, int],
        classes: int,
        channels: int,
        shortcut: Shortcut,
        init: Literal["fan_in", "fan_out"] = "fan_out",
    ) -> None:
        super().__init__()
        blocks = blocks_per_stage("a ResNet", depth, outside=2)
        self.conv1 = nn.Conv2d(channels, widths[0], 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.relu = nn.ReLU()
        self.layer1 = _stage(widths[0], widths[1], blocks, 1, shortcut)
        self.layer2 = _stage(widths[1], widths[2], blocks, 2, shortcut)
        self.layer3 = _stage(widths[2], widths[3], blocks, 2, shortcut)
        self.linear = nn.Linear(widths[3], classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d) or (init == "fan_in" and isinstance(module, nn.Linear)):
                nn.init.kaiming_normal_(module.weight, mode=init, nonlinearity="relu")

    def forward(self, images: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(images)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1))


def resnet(depth: int, *, classes: int, channels: int = 3, image_size: int = 32) -> nn.Module:
    """ResNet-depth with the shortcut without parameters ("option A"): new channels are zeros, half on either side.

    State dicts of GitHub akamaster/pytorch_resnet_cifar10 fit as they are, after removing the prefix `module.`.
    Weights begin as N(0, √(2 / fan-in)), as there.

    Args:
        depth: 6n + 2 layers: 20, 32, 44, 56, 110, …
        image_size: any; the maps have 1, 1/2 and 1/4 of it (rounded up).
    """
    check_sizes("a ResNet", classes=classes, channels=channels, image_size=image_size)
    return CifarResNet(depth, (16, 16, 32, 64), classes, channels, _padded_on_both_sides, "fan_in")


def bss_resnet(depth: int, *, classes: int, channels: int = 3, image_size: int = 32) -> nn.Module:
    """ResNet-depth of the BSS authors (Heo et al., AAAI 2019): new channels of a shortcut are zeros, all at the end.

    State dicts of GitHub bhheo/BSS_distillation fit as they are. Convolutions begin as N(0, √(2 / fan-out)), as there.

    Args:
        depth: 6n + 2 layers: 8, 14, 20, 26, …
        image_size: any; the maps have 1, 1/2 and 1/4 of it (rounded up).
    """
    check_sizes("a ResNet", classes=classes, channels=channels, image_size=image_size)
    return CifarResNet(depth, (16, 16, 32, 64), classes, channels, _padded_at_the_end)


def crd_resnet(depth: int, width: int = 1, *, classes: int, channels: int = 3, image_size: int = 32) -> nn.Module:
    """ResNet-depth of the CIFAR-100 tables that follow CRD (Tian, Krishnan, Isola, ICLR 2020): 1×1 convolutions with
    batch norm as shortcuts where the shape changes. With `width` 4 the ResNet-8×4 and ResNet-32×4.

    Convolutions begin as N(0, √(2 / fan-out)), as there.

    Args:
        depth: 6n + 2 layers.
        width: factor on the stages' 16, 32 and 64 channels; the stem has 16, or 32 where the width is above 1.
        image_size: any; the maps have 1, 1/2 and 1/4 of it (rounded up).
    """
    check_sizes("a ResNet", classes=classes, channels=channels, image_size=image_size)
    if width < 1:
        raise UserError(f"a ResNet has a width of at least 1, not {width}")
    widths = (16 if width == 1 else 32, 16 * width, 32 * width, 64 * width)
    return CifarResNet(depth, widths, classes, channels, _projected)


def _stage(inputs: int, outputs: int, blocks: int, stride: int, shortcut: Shortcut) -> nn.Sequential:
    first = BasicBlock(inputs, outputs, stride, shortcut)
    return nn.Sequential(first, *(BasicBlock(outputs, outputs, 1, shortcut) for _ in range(blocks - 1)))


def _padded_on_both_sides(inputs: int, outputs: int, stride: int) -> nn.Module:
    before = (outputs - inputs) // 2
    return PaddedShortcut(stride, before, outputs - inputs - before)


def _padded_at_the_end(inputs: int, outputs: int, stride: int) -> nn.Module:
    return PaddedShortcut(stride, 0, outputs - inputs)


def _projected(inputs: int, outputs: int, stride: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False), nn.BatchNorm2d(outputs))
