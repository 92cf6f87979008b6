"""ShuffleNets for small images, as in the CIFAR-100 tables that follow CRD (Tian, Krishnan, Isola, ICLR 2020).

There the stem is a 1×1 convolution of stride 1 without pooling after it. Zhang et al., CVPR 2018 (version 1), and Ma et
al., ECCV 2018 (version 2).
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kdbench.errors import UserError
from kdbench.models.arguments import check_sizes
from kdbench.models.mobilenetv1 import conv_bn_relu

_BLOCKS = (4, 8, 4)
_STEM = 24
_GROUPS = 3
_WIDTHS = (240, 480, 960)
# Channels of the three stages and of the last convolution of version 2, by its width. Table 5 of the paper.
_WIDTHS_V2 = {
    0.5: (48, 96, 192, 1024),
    1.0: (116, 232, 464, 1024),
    1.5: (176, 352, 704, 1024),
    2.0: (244, 488, 976, 2048),
}


def shuffled(x: Tensor, groups: int) -> Tensor:
    """Channels of the groups in turns: [N, C, H, W], the same shape."""
    n, channels, height, width = x.shape
    return x.reshape(n, groups, channels // groups, height, width).transpose(1, 2).reshape(x.shape)


class GroupedBlock(nn.Module):
    """Version 1: grouped 1×1 convolution, shuffle, 3×3 depthwise, grouped 1×1. The shortcut is added or, with stride 2,
    averaged and set beside it; ReLU (`last_relu`) follows.

    Args:
        outputs: channels of the block; with stride 2 the input's are among them.
        groups: of the first convolution; the last always has three.
    """

    def __init__(self, inputs: int, outputs: int, stride: int, groups: int) -> None:
        super().__init__()
        own = outputs - inputs if stride == 2 else outputs
        hidden = own // 4
        self.groups = groups
        self.conv1 = nn.Conv2d(inputs, hidden, 1, groups=groups, bias=False)
        self.bn1 = nn.BatchNorm2d(hidden)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(hidden, hidden, 3, stride=stride, padding=1, groups=hidden, bias=False)
        self.bn2 = nn.BatchNorm2d(hidden)
        self.relu2 = nn.ReLU()
        self.conv3 = nn.Conv2d(hidden, own, 1, groups=_GROUPS, bias=False)
        self.bn3 = nn.BatchNorm2d(own)
        self.pool = nn.AvgPool2d(3, stride=2, padding=1) if stride == 2 else None
        self.last_relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        branch = shuffled(self.relu1(self.bn1(self.conv1(x))), self.groups)
        branch = self.bn3(self.conv3(self.relu2(self.bn2(self.conv2(branch)))))
        return self.last_relu(branch + x if self.pool is None else torch.cat([branch, self.pool(x)], 1))


class SplitBlock(nn.Module):
    """Version 2: half of the channels stays, the other goes through 1×1, 3×3 depthwise and 1×1; ReLU (`last_relu`) and
    shuffle follow.

    The ReLU goes over both: the half that stays is the output of one already, so that nothing changes in it.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        half = channels // 2
        self.conv1 = nn.Conv2d(half, half, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(half)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(half, half, 3, padding=1, groups=half, bias=False)
        self.bn2 = nn.BatchNorm2d(half)
        self.conv3 = nn.Conv2d(half, half, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(half)
        self.last_relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        kept, branch = x.chunk(2, dim=1)
        branch = self.bn2(self.conv2(self.relu1(self.bn1(self.conv1(branch)))))
        return shuffled(self.last_relu(torch.cat([kept, self.bn3(self.conv3(branch))], 1)), 2)


class DownBlock(nn.Module):
    """Version 2 with stride 2: both halves are made from the whole input, then ReLU (`last_relu`) and shuffle."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        half = outputs // 2
        self.conv1 = nn.Conv2d(inputs, inputs, 3, stride=2, padding=1, groups=inputs, bias=False)
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv2 = nn.Conv2d(inputs, half, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(half)
        self.conv3 = nn.Conv2d(inputs, half, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(half)
        self.relu1 = nn.ReLU()
        self.conv4 = nn.Conv2d(half, half, 3, stride=2, padding=1, groups=half, bias=False)
        self.bn4 = nn.BatchNorm2d(half)
        self.conv5 = nn.Conv2d(half, half, 1, bias=False)
        self.bn5 = nn.BatchNorm2d(half)
        self.last_relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        left = self.bn2(self.conv2(self.bn1(self.conv1(x))))
        right = self.bn4(self.conv4(self.relu1(self.bn3(self.conv3(x)))))
        return shuffled(self.last_relu(torch.cat([left, self.bn5(self.conv5(right))], 1)), 2)


class ShuffleNet(nn.Module):
    """Images [N, channels, H, W] -> logits [N, classes].

    Args:
        layers: the three stages.
        outputs: channels after the last of them. features: of one more convolution after it, None for no such.
    """

    def __init__(self, layers: list[nn.Sequential], outputs: int, features: int | None, classes: int, channels: int):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, _STEM, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(_STEM)
        self.relu = nn.ReLU()
        self.layer1, self.layer2, self.layer3 = layers
        self.conv2 = conv_bn_relu(outputs, features, 1) if features else nn.Sequential()
        self.linear = nn.Linear(features or outputs, classes)

    def forward(self, images: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(images)))
        x = self.conv2(self.layer3(self.layer2(self.layer1(x))))
        return self.linear(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1))


def shufflenet_v1(*, classes: int, channels: int = 3, image_size: int = 32) -> nn.Module:
    """ShuffleNet of three groups: stages of 240, 480 and 960 channels. Weights begin as torch's default.

    Args:
        image_size: any; the maps have 1/2, 1/4 and 1/8 of it (rounded up).
    """
    check_sizes("ShuffleNet", classes=classes, channels=channels, image_size=image_size)
    layers, inputs = [], _STEM
    for outputs, blocks in zip(_WIDTHS, _BLOCKS, strict=True):
        # Too few channels come from the stem to group them.
        first = GroupedBlock(inputs, outputs, 2, 1 if inputs == _STEM else _GROUPS)
        layers.append(nn.Sequential(first, *(GroupedBlock(outputs, outputs, 1, _GROUPS) for _ in range(blocks - 1))))
        inputs = outputs
    return ShuffleNet(layers, inputs, None, classes, channels)


def shufflenet_v2(width: float = 1.0, *, classes: int, channels: int = 3, image_size: int = 32) -> nn.Module:
    """ShuffleNetV2: stages of 116, 232 and 464 channels at width 1. Weights begin as torch's default.

    Args:
        width: 0.5, 1, 1.5 or 2.
        image_size: any; the maps have 1/2, 1/4 and 1/8 of it (rounded up).

    Raises:
        UserError: there is no such width.
    """
    if width not in _WIDTHS_V2:
        raise UserError(f"there is no ShuffleNetV2 of width {width}", hint=f"widths: {', '.join(map(str, _WIDTHS_V2))}")
    check_sizes("ShuffleNetV2", classes=classes, channels=channels, image_size=image_size)
    *widths, features = _WIDTHS_V2[width]
    layers, inputs = [], _STEM
    for outputs, blocks in zip(widths, _BLOCKS, strict=True):
        layers.append(nn.Sequential(DownBlock(inputs, outputs), *(SplitBlock(outputs) for _ in range(blocks - 1))))
        inputs = outputs
    return ShuffleNet(layers, inputs, features, classes, channels)
