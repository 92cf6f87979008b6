"""Two views of images, through which gradients go: a global one, nearly the whole image, and a local one, a part of it
brought to the image's size.

Parts are taken by products with matrices: their gradient, unlike that of torch's resampling on a GPU, is the same each
time.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kdbench.data.augment import Augmentation


@dataclass(frozen=True)
class Views:
    """The views of all iterations of a batch.

    Attributes:
        crop: of global views. places: which of its views, int64 [iterations, N].
        boxes: of local views: top, left, height, width, and mirrored (1) or not, float32 [iterations, N, 5].
    """

    crop: Augmentation
    places: Tensor
    boxes: Tensor

    def to(self, device: torch.device) -> Views:
        return Views(self.crop, self.places.to(device), self.boxes.to(device))

    def whole(self, images: Tensor, iteration: int) -> Tensor:
        """Global views of images [N, C, H, W]."""
        return self.crop.view(images, self.places[iteration])

    def local(self, images: Tensor, iteration: int) -> Tensor:
        """Local views of the same images, of their size."""
        return parts(images, self.boxes[iteration])


def parts(images: Tensor, boxes: Tensor) -> Tensor:
    """A part of each image, brought to the image's size: bilinear, with corners aligned.

    Args:
        images: [N, C, H, W].
        boxes: top, left, height, width in pixels, and mirrored left to right (1) or not (0), [N, 5].
    """
    top, left, height, width, mirrored = boxes.to(images.dtype).unbind(dim=1)
    rows, columns = _taking(top, height, images.shape[2]), _taking(left, width, images.shape[3])
    columns = torch.where(mirrored.bool().view(-1, 1, 1), columns.flip(1), columns)
    return rows.unsqueeze(1) @ images @ columns.transpose(1, 2).unsqueeze(1)


def _taking(first: Tensor, length: Tensor, size: int) -> Tensor:
    """Weights of the places of a side, [N, size, size], of which each place of a part that fills it is made."""
    steps = torch.linspace(0, 1, size, dtype=first.dtype, device=first.device)
    at = first.unsqueeze(1) + steps * (length.unsqueeze(1) - 1)
    places = torch.arange(size, dtype=first.dtype, device=first.device)
    return (1 - (at.unsqueeze(2) - places).abs()).clamp_min(0)
