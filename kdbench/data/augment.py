"""Crop, mirror and normalization of whole batches, distributed exactly as torchvision's per-image transforms.

`RandomCrop(size, padding=p)` picks one of (2p + 1)² places uniformly, `RandomHorizontalFlip` mirrors with probability
one half, independently. Together an image has (2p + 1)² · 2 equally likely views (162 for p = 4), and a view id names
one: id = (dy · (2p + 1) + dx) · 2 + flip.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from kdbench.errors import UserError


@dataclass(frozen=True)
class Augmentation:
    """Random crop after padding, and random mirror.

    Args:
        padding: pixels on every side; 0 for no crop.
        mode: what the padding shows: "zero" (bytes 0, before normalization), or "reflect" (the mirrored image without
            repeating its edge).
        flip: whether images are mirrored left to right, with probability one half.
    """

    padding: int = 0
    mode: Literal["zero", "reflect"] = "zero"
    flip: bool = False

    @property
    def places(self) -> int:
        """Crop offsets per axis, 2 · padding + 1."""
        return 2 * self.padding + 1

    @property
    def views(self) -> int:
        """Number of different views of an image, all equally likely."""
        return self.places**2 * (2 if self.flip else 1)

    def draw(self, generator: torch.Generator, n: int) -> Tensor:
        """n independent uniform view ids, int64 [n]. The generator is a CPU one: every device sees the same views."""
        return torch.randint(self.views, (n,), generator=generator)

    def parts(self, view_id: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What views are: offsets dy and dx of the crop in the padded image, 0 … 2 · padding, and mirrored (1) or not.

        All int64 [N], on the device of `view_id`.
        """
        place, flip = (view_id // 2, view_id % 2) if self.flip else (view_id, torch.zeros_like(view_id))
        return place // self.places, place % self.places, flip

    def view(self, images: Tensor, view_id: Tensor) -> Tensor:
        """Crop and mirror a batch.

        Args:
            images: [N, C, H, W], bytes or floating point, on any device. They are not changed.
            view_id: one per image, int64 [N] in 0 … views - 1, on any device.

        Returns:
            [N, C, H, W] of the images' type and device, contiguous.

        Raises:
            UserError: reflect padding that is not smaller than the image.
        """
        if self.views == 1:
            return images.contiguous()
        n, c, h, w = images.shape
        p, device = self.padding, images.device
        dy, dx, flip = (part.unsqueeze(1) for part in self.parts(view_id.to(device, non_blocking=True)))
        rows, columns = torch.arange(h, device=device), torch.arange(w, device=device)
        rows = rows + dy
        columns = torch.where(flip.bool(), w - 1 - columns, columns) + dx
        if self.mode == "reflect" and p:
            if p >= min(h, w):
                hint = "it must be smaller than the image; use 'zero' or less padding"
                raise UserError(f"reflect padding {p} does not fit images of {h}x{w} pixels", hint=hint)
            rows, columns = _reflected(rows - p, h), _reflected(columns - p, w)
        elif p:
            images, w = F.pad(images, (p, p, p, p)), w + 2 * p
        pixels = (rows.unsqueeze(2) * w + columns.unsqueeze(1)).flatten(1)
        taken = images.flatten(2).gather(2, pixels.unsqueeze(1).expand(n, c, pixels.shape[1]))
        return taken.view(n, c, h, columns.shape[1])


def _reflected(position: Tensor, size: int) -> Tensor:
    """Position in an image for one in its reflect-padded form: -1 -> 1, size -> size - 2."""
    return size - 1 - (size - 1 - position.abs()).abs()


def normalize(images: Tensor, mean: Sequence[float] | Tensor, std: Sequence[float] | Tensor) -> Tensor:
    """Bytes to normalized float32, by torchvision's ToTensor and Normalize, operation by operation (bits agree).

    Args:
        images: uint8 [N, C, H, W]; or floating pixel values, on the scale of [0, 1], that gradients may go through.
        mean, std: per channel, of pixel values in [0, 1]. Tensors on the images' device save a transfer per call.

    Returns:
        float32 [N, C, H, W]: (images / 255 - mean) / std, of pixel values (images - mean) / std.

    Raises:
        ValueError: images of another number of channels, which would be broadcast.
    """
    if len(mean) != images.shape[1]:
        raise ValueError(f"images of {images.shape[1]} channels, and {len(mean)} means to normalize them with")
    centre, spread = (torch.as_tensor(v, dtype=torch.float32, device=images.device).view(-1, 1, 1) for v in (mean, std))
    if images.is_floating_point():
        return (images - centre) / spread
    return images.to(torch.float32).div_(255).sub_(centre).div_(spread)
