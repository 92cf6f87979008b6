"""Several networks as one, whose logits are the mean of theirs."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class Part(nn.Module):
    """One of the networks, behind the normalization of its own images.

    Args:
        mean, std: of each channel of pixel values in [0, 1].
    """

    mean: Tensor
    std: Tensor

    def __init__(self, network: nn.Module, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.network = network
        for name, values in (("mean", mean), ("std", std)):
            self.register_buffer(name, torch.tensor(values, dtype=torch.float32).view(-1, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.network((images - self.mean) / self.std)
        return logits


class Several(nn.Module):
    """Networks side by side. Forward takes pixel values on the scale of [0, 1], [N, C, H, W], and gives the mean of
    their logits, [N, classes]."""

    def __init__(self, parts: Sequence[Part]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)

    def forward(self, images: Tensor) -> Tensor:
        return torch.stack([part(images) for part in self.parts]).mean(dim=0)
