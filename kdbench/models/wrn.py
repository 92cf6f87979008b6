"""Wide residual networks, in the pre-activation form. Zagoruyko and Komodakis, BMVC 2016."""

import torch
from torch import Tensor, nn

from kdbench.errors import UserError
from kdbench.models.arguments import blocks_per_stage, check_sizes


class PreactivationBlock(nn.Module):
    """Batch norm, ReLU, 3×3 convolution, twice, plus the shortcut: [N, C, H, W] -> [N, C', H/stride, W/stride].

    Where the channels change, the shortcut is a 1×1 convolution of the activated input; else it is the input itself,
    before batch norm and ReLU. He et al., ECCV 2016, figure 4e.
    """

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.relu1 = nn.ReLU()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.relu2 = nn.ReLU()
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.shortcut = nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False) if inputs != outputs else None

    def forward(self, x: Tensor) -> Tensor:
        activated = self.relu1(self.bn1(x))
        branch = self.conv2(self.relu2(self.bn2(self.conv1(activated))))
        return branch + (x if self.shortcut is None else self.shortcut(activated))


class WideResNet(nn.Module):
    """Images [N, channels, H, W] -> logits [N, classes]. Use `wide_resnet`."""

    def __init__(self, blocks: int, width: int, classes: int, channels: int) -> None:
        super().__init__()
        widths = [16 * width, 32 * width, 64 * width]
        self.conv1 = nn.Conv2d(channels, 16, 3, padding=1, bias=False)
        self.block1 = _stage(16, widths[0], blocks, stride=1)
        self.block2 = _stage(widths[0], widths[1], blocks, stride=2)
        self.block3 = _stage(widths[1], widths[2], blocks, stride=2)
        self.bn1 = nn.BatchNorm2d(widths[2])
        self.relu = nn.ReLU()
        self.fc = nn.Linear(widths[2], classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        nn.init.zeros_(self.fc.bias)

    def forward(self, images: Tensor) -> Tensor:
        x = self.block3(self.block2(self.block1(self.conv1(images))))
        return self.fc(torch.flatten(nn.functional.adaptive_avg_pool2d(self.relu(self.bn1(x)), 1), 1))


def wide_resnet(depth: int, width: int, *, classes: int, channels: int = 3, image_size: int = 32) -> nn.Module:
    """WRN-depth-width as in the papers on distillation: 3×3 blocks in pairs, no dropout.

    Convolutions begin as N(0, √(2 / (k² · out channels))), as in the code of AB (Heo et al., AAAI 2019). The classifier
    begins as torch's default, with bias 0.

    Args:
        depth: 6n + 4 layers, n blocks in each of three stages: 10, 16, 22, 28, 40, …
        width: factor on the 16, 32 and 64 channels of the stages.
        image_size: any; the maps have 1, 1/2 and 1/4 of it (rounded up).

    Raises:
        UserError: there is no such depth or width.
    """
    check_sizes("a WRN", classes=classes, channels=channels, image_size=image_size)
    if width < 1:
        raise UserError(f"a WRN has a width of at least 1, not {width}")
    return WideResNet(blocks_per_stage("a WRN", depth, outside=4), width, classes, channels)


def _stage(inputs: int, outputs: int, blocks: int, stride: int) -> nn.Sequential:
    first = PreactivationBlock(inputs, outputs, stride)
    return nn.Sequential(first, *(PreactivationBlock(outputs, outputs, 1) for _ in range(blocks - 1)))
