"""Be your own teacher (BYOT).

Zhang, Song, Gao, Chen, Bao, Ma: Be Your Own Teacher: Improve the Performance of Convolutional Neural Networks via Self
Distillation. ICCV 2019, arXiv 1905.08094.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kdbench.losses.checks import Shape, full, positive, share


class BeYourOwnTeacher(nn.Module):
    r"""Exits at the layers before the last, taught by the labels and by the network's own final layers.

    $$
    L = \sum_i \left[ (1 - \alpha)\, \mathrm{CE}(z_i, y)
    - \frac{\alpha}{N} \sum_{n,k} p_{nk} \log p_{ink} + \beta \left\| A_i f_i - f \right\|_F \right]
    $$

    p are softened outputs of the end, f its pooled feature, both without gradient; p_i, z_i and f_i those of exit i. An
    exit is a 1×1 convolution to a narrower map, a strided convolution that brings it to the last layer's size, a 1×1
    convolution to f's width, each with batch norm and ReLU, pooling, and a classifier. A_i is a linear layer. The last
    exit before the end has no third part.

    Args:
        student_shapes: Maps (C, H, W) of the layers, the pooled feature (D,), and the logits (K,), in this order.
        alpha: α, from 0 to 1.
        beta: β.
        temperature: Of p and p_i, above 0. No factor T².
        label_smoothing: ε, in [0, 1], of CE.

    Raises:
        ValueError: The shapes are others, T is not positive, or α or ε outside of [0, 1].
    """

    def __init__(
        self,
        student_shapes: Sequence[Shape],
        *,
        alpha: float = 0.3,
        beta: float = 0.03,
        temperature: float = 3.0,
        label_smoothing: float = 0.0,
    ) -> None:
        super().__init__()
        *maps, pooled, logits = student_shapes
        if len(maps) < 2 or {len(one) for one in maps} != {3} or len(pooled) != 1 or len(logits) != 1:
            raise ValueError(f"it takes two maps or more, the pooled feature and logits, not {student_shapes}")
        positive(temperature)
        share(alpha, "alpha")
        share(label_smoothing, "label_smoothing")
        self.alpha, self.beta, self.temperature, self.label_smoothing = alpha, beta, temperature, label_smoothing
        before, (_, height, width) = maps[:-1], maps[-1]
        self.exits = nn.ModuleList(_exit(one, (height, width), pooled[0]) for one in before)
        self.classifiers = nn.ModuleList(nn.Linear(pooled[0], logits[0]) for _ in before)
        self.adapters = nn.ModuleList(nn.Linear(pooled[0], pooled[0]) for _ in before[:-1])

    def forward(self, student: Sequence[Tensor], labels: Tensor) -> Tensor:
        """The loss of features [N, ...] of the shapes that it was built with; labels are class indices [N]. Scalar."""
        *maps, _, pooled, logits = student
        soft = F.softmax(full(logits.detach()) / self.temperature, dim=1)
        total = torch.zeros((), device=logits.device)
        for i, (feature, leave, classify) in enumerate(zip(maps, self.exits, self.classifiers, strict=True)):
            own = leave(full(feature))
            answers = full(classify(own))
            total = total + (1 - self.alpha) * F.cross_entropy(answers, labels, label_smoothing=self.label_smoothing)
            total = total + self.alpha * F.cross_entropy(answers / self.temperature, soft)
            if i < len(self.adapters):
                apart = full(self.adapters[i](own)) - full(pooled.detach())
                total = total + self.beta * torch.linalg.vector_norm(apart)
        return total


def _exit(shape: Shape, size: tuple[int, int], width: int) -> nn.Sequential:
    channels, height, _ = shape
    stride = max(1, height // size[0])
    middle = max(1, channels // 4)
    layers = (
        nn.Conv2d(channels, middle, 1, bias=False),
        nn.Conv2d(middle, middle, stride, stride=stride, bias=False),
        nn.Conv2d(middle, width, 1, bias=False),
    )
    parts = [part for layer in layers for part in (layer, nn.BatchNorm2d(layer.out_channels), nn.ReLU())]
    return nn.Sequential(*parts, nn.AdaptiveAvgPool2d(1), nn.Flatten())
