"""VGG networks for small images, with batch norm. Simonyan and Zisserman, ICLR 2015.

One linear classifier on globally pooled features, as in the CIFAR-100 tables that follow CRD (Tian, Krishnan, Isola,
ICLR 2020).
"""

from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kdbench.errors import UserError
from kdbench.models.arguments import check_sizes

# Convolutions in each of the five blocks, by depth.
_BLOCKS = {8: (1, 1, 1, 1, 1), 11: (1, 1, 2, 2, 2), 13: (2, 2, 2, 2, 2), 16: (2, 2, 3, 3, 3), 19: (2, 2, 4, 4, 4)}
_WIDTHS = (64, 128, 256, 512, 512)


class VGG(nn.Module):
    """Images [N, channels, H, W] -> logits [N, classes].

    Max pooling follows the first three blocks, and the fourth if `last_pooling`.
    """

    def __init__(self, blocks: tuple[int, ...], classes: int, channels: int, last_pooling: bool) -> None:
        super().__init__()
        for index, (inputs, outputs) in enumerate(pairwise((channels, *_WIDTHS))):
            self.add_module(f"block{index}", _block(inputs, outputs, blocks[index]))
        self.pools = 4 if last_pooling else 3
        self.classifier = nn.Linear(_WIDTHS[-1], classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                nn.init.constant_(module.get_parameter("bias"), 0.0)
        nn.init.normal_(self.classifier.weight, std=0.01)
        nn.init.zeros_(self.classifier.bias)

    def forward(self, images: Tensor) -> Tensor:
        x = images
        for index in range(len(_WIDTHS)):
            x = self.get_submodule(f"block{index}")(x)
            if index < self.pools:
                x = F.max_pool2d(x, 2)
        return self.classifier(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1))


def vgg(depth: int, *, classes: int, channels: int = 3, image_size: int = 32) -> nn.Module:
    """VGG-depth with batch norm and one linear layer at the end.

    Convolutions begin as N(0, √(2 / fan-out)), the classifier as N(0, 0.01), biases as 0.

    Args:
        depth: 8, 11, 13, 16 or 19.
        image_size: at least 8; from 64 on there is a pooling after the fourth block too.

    Raises:
        UserError: there is no such depth, or the images are too small.
    """
    if depth not in _BLOCKS:
        raise UserError(f"there is no VGG-{depth}", hint=f"depths: {', '.join(map(str, _BLOCKS))}")
    check_sizes("a VGG", classes=classes, channels=channels, image_size=image_size, smallest=8)
    return VGG(_BLOCKS[depth], classes, channels, last_pooling=image_size >= 64)


def _block(inputs: int, outputs: int, convolutions: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for _ in range(convolutions):
        layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU()]
        inputs = outputs
    return nn.Sequential(*layers)
