"""Mixup and CutMix of batches, as torchvision has them: every image with the one before it in the batch.

How a batch is mixed is drawn by address, for a whole epoch at once, and lies on the device for the coming steps.
"""

import numpy as np
import torch
from scipy.special import betaincinv
from torch import Tensor

from kdbench.engine.data.batch import StepTable
from kdbench.image_cards import Mix

# Uniform numbers that a batch's mixing is made from: whether, which of both, how much, and where.
NUMBERS = 5


class Mixing:
    """The mixing of the coming steps.

    Args:
        size: pixels of the images' sides. classes: of the labels.
        device: of the batches.
    """

    def __init__(self, mix: Mix, size: int, classes: int, device: torch.device) -> None:
        self.mix, self.size, self.classes = mix, size, classes
        # Of each step: shares of an image's own pixels outside the rectangle, and of its own label; and the rectangle.
        self.table = StepTable(6, device)

    def seek(self, numbers: np.ndarray) -> None:
        """Take the uniform numbers [steps, NUMBERS] of the coming steps."""
        self.table.fill(torch.from_numpy(shares(self.mix, numbers, self.size)))

    def advance(self) -> None:
        """Go on to the next step."""
        self.table.advance()

    def mixed(self, images: Tensor, labels: Tensor, others: Tensor, other_labels: Tensor) -> tuple[Tensor, Tensor]:
        """A batch mixed with the images before its own.

        Args:
            images, others: bytes [N, C, H, W]. labels, other_labels: int64 [N].

        Returns:
            pixel values float32 [N, C, H, W] on the scale of [0, 1], and shares of the classes float32 [N, K].
        """
        pixels, label, left, top, right, bottom = self.table.row()
        places = torch.arange(self.size, device=images.device)
        rows, columns = (places >= top) & (places < bottom), (places >= left) & (places < right)
        own = torch.where(rows.unsqueeze(1) & columns, torch.zeros_like(pixels), pixels)
        values, other_values = images.float().div_(255), others.float().div_(255)
        targets, other_targets = (self._targets(one) for one in (labels, other_labels))
        return values * own + other_values * (1 - own), targets * label + other_targets * (1 - label)

    def _targets(self, labels: Tensor) -> Tensor:
        nothing = torch.zeros(len(labels), self.classes, device=labels.device)
        return nothing.scatter_(1, labels.unsqueeze(1), 1.0)


def shares(mix: Mix, numbers: np.ndarray, size: int) -> np.ndarray:
    """What uniform numbers [steps, NUMBERS] make of each step: float32 [steps, 6], as `Mixing.table` has them."""
    whether, which, how_much, x, y = numbers.T
    both = mix.mixup is not None and mix.cutmix is not None
    cut = which < 0.5 if both else np.full(len(numbers), mix.cutmix is not None)
    # The quantile of a Beta distribution at a uniform number is distributed by it.
    alpha = np.where(cut, mix.cutmix or 1.0, mix.mixup or 1.0)
    own = betaincinv(alpha, alpha, how_much)
    half = (0.5 * np.sqrt(1 - own) * size).astype(int)
    centres = [(place * size).astype(int) for place in (x, y)]
    left, top = (np.maximum(centre - half, 0) for centre in centres)
    right, bottom = (np.minimum(centre + half, size) for centre in centres)
    outside = 1 - (right - left) * (bottom - top) / size**2
    rows = np.stack([np.where(cut, 1, own), np.where(cut, outside, own), left, top, right, bottom], axis=1)
    rows[~cut, 2:] = 0
    rows[whether >= mix.probability] = (1, 1, 0, 0, 0, 0)
    return rows.astype(np.float32)
