"""MobileNetV2 for small images. Sandler et al., CVPR 2018."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kdbench.errors import UserError
from kdbench.models.arguments import check_sizes
from kdbench.models.mobilenetv1 import conv_bn_relu

# Channels, blocks and stride of each stage. The stride of the second is 1 here, 2 in the paper.
_STAGES = ((16, 1, 1), (24, 2, 1), (32, 3, 2), (64, 4, 2), (96, 3, 1), (160, 3, 2), (320, 1, 1))


class InvertedResidual(nn.Module):
    """1×1 expansion, 3×3 depthwise, 1×1 linear projection, plus the input where the shape stays.

    The output is linear: no ReLU follows the projection.
    """

    def __init__(self, inputs: int, outputs: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = inputs * expansion
        self.conv = nn.Sequential(
            *conv_bn_relu(inputs, hidden, 1),
            *conv_bn_relu(hidden, hidden, 3, stride, groups=hidden),
            nn.Conv2d(hidden, outputs, 1, bias=False),
            nn.BatchNorm2d(outputs),
        )
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x) if self.residual else self.conv(x)


class MobileNetV2(nn.Module):
    """Images [N, channels, H, W] -> logits [N, classes]. Use `mobilenet_v2`."""

    def __init__(self, expansion: int, width: float, classes: int, channels: int) -> None:
        super().__init__()
        inputs = int(32 * width)
        self.conv1 = conv_bn_relu(channels, inputs, 3, stride=2)
        self.blocks = nn.ModuleList()
        for index, (base, repeats, first_stride) in enumerate(_STAGES):
            outputs = int(base * width)
            stage = nn.Sequential()
            for n in range(repeats):
                stage.append(InvertedResidual(inputs, outputs, 1 if n else first_stride, expansion if index else 1))
                inputs = outputs
            self.blocks.append(stage)
        features = max(1280, int(1280 * width))
        self.conv2 = conv_bn_relu(inputs, features, 1)
        self.classifier = nn.Linear(features, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        nn.init.normal_(self.classifier.weight, std=0.01)
        nn.init.zeros_(self.classifier.bias)

    def forward(self, images: Tensor) -> Tensor:
        x = self.conv1(images)
        for stage in self.blocks:
            x = stage(x)
        return self.classifier(torch.flatten(F.adaptive_avg_pool2d(self.conv2(x), 1), 1))


def mobilenet_v2(
    expansion: int = 6, width: float = 1.0, *, classes: int, channels: int = 3, image_size: int = 32
) -> nn.Module:
    """MobileNetV2 as in the CIFAR-100 tables that follow CRD (Tian, Krishnan, Isola, ICLR 2020): stride 16 in all,
    plain ReLU, channels rounded down, no dropout.

    Convolutions begin as N(0, √(2 / (k² · out channels))), the classifier as N(0, 0.01) with bias 0.

    Args:
        expansion: factor on the channels inside a block (not in the first).
        width: factor on the channels of all stages. The last convolution keeps at least 1280.
        image_size: at least 8; up to 16 the last maps are a single pixel.

    Raises:
        UserError: an option is out of range, or the images are too small.
    """
    check_sizes("MobileNetV2", classes=classes, channels=channels, image_size=image_size, smallest=8)
    if expansion < 1 or int(16 * width) < 1:
        hint = "the expansion is at least 1, the width at least 1/16"
        raise UserError(f"MobileNetV2 cannot have expansion {expansion} and width {width}", hint=hint)
    return MobileNetV2(expansion, width, classes, channels)
