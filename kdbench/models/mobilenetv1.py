"""MobileNet, version 1. Howard et al., arXiv 1704.04861."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kdbench.models.arguments import check_sizes

# Channels and stride of each depthwise separable convolution, by stage: a stage's maps have one resolution at its end.
_STAGES = (((64, 1), (128, 2), (128, 1)), ((256, 2), (256, 1)), ((512, 2), *[(512, 1)] * 5), ((1024, 2), (1024, 1)))


class MobileNetV1(nn.Module):
    """Images [N, channels, H, W] -> logits [N, classes]. Use `mobilenet_v1`."""

    def __init__(self, classes: int, channels: int) -> None:
        super().__init__()
        inputs = 32
        self.stem = conv_bn_relu(channels, inputs, 3, stride=2)
        self.stages = nn.ModuleList()
        for blocks in _STAGES:
            stage = nn.Sequential()
            for outputs, stride in blocks:
                depthwise = conv_bn_relu(inputs, inputs, 3, stride, groups=inputs)
                stage.append(nn.Sequential(*depthwise, *conv_bn_relu(inputs, outputs, 1)))
                inputs = outputs
            self.stages.append(stage)
        self.classifier = nn.Linear(inputs, classes)

    def forward(self, images: Tensor) -> Tensor:
        x = self.stem(images)
        for stage in self.stages:
            x = stage(x)
        logits: Tensor = self.classifier(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1))
        return logits


def mobilenet_v1(*, classes: int, channels: int = 3, image_size: int = 224) -> nn.Module:
    """MobileNetV1 of full width, as the tables that distil a ResNet-50 into it on ImageNet have it (mdistiller): 13
    depthwise separable convolutions with batch norm and ReLU, stride 32 in all. Initial values are torch's own.

    Args:
        image_size: up to 32 the last maps are a single pixel.
    """
    check_sizes("MobileNetV1", classes=classes, channels=channels, image_size=image_size)
    return MobileNetV1(classes, channels)


def conv_bn_relu(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    convolution = nn.Conv2d(inputs, outputs, kernel, stride=stride, padding=kernel // 2, groups=groups, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(outputs), nn.ReLU())
