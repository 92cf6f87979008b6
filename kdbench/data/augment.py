"""Crop, mirror and normalization of whole batches, distributed exactly as torchvision's per-image transforms.

`RandomCrop(size, padding=p)` picks one of (2p + 1)² places uniformly, `RandomHorizontalFlip` mirrors with probability
one half, independently. Together an image has (2p + 1)² · 2 equally likely views (162 for p = 4), and a view id names
one: id = (dy · (2p + 1) + dx) · 2 + flip.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from kdbench.errors import UserError


class Draws(NamedTuple):
    """What was drawn for each image: offsets of the crop in the padded image, 0 … 2 · padding, and mirrored (1) or not.

    All int64 [N], on the CPU when they come from `Augmentation.draw`.
    """

    dy: Tensor
    dx: Tensor
    flip: Tensor


@dataclass(frozen=True)
class Augmentation:
    """Random crop after padding, and random mirror.

    Args:
        padding: pixels on every side; 0 for no crop.
        mode: what the padding shows: "zero" (bytes 0, before normalization), "reflect" (the mirrored image without
            repeating its edge), or "none", which goes with padding 0 only.
        flip: whether images are mirrored left to right, with probability one half.
    """

    padding: int = 0
    mode: Literal["zero", "reflect", "none"] = "zero"
    flip: bool = False

    def __post_init__(self) -> None:
        if self.padding < 0:
            raise UserError(f"padding cannot be {self.padding}", hint="it is a number of pixels, 0 for none")
        if self.mode not in ("zero", "reflect", "none"):
            raise UserError(f"unknown padding mode '{self.mode}'", hint="known: zero, reflect, none")
        if self.mode == "none" and self.padding:
            raise UserError(f"padding mode 'none' with padding {self.padding}", hint="use 'zero' or 'reflect'")

    @property
    def places(self) -> int:
        """Crop offsets per axis, 2 · padding + 1."""
        return 2 * self.padding + 1

    @property
    def views(self) -> int:
        """Number of different views of an image, all equally likely."""
        return self.places**2 * (2 if self.flip else 1)

    def draw(self, generator: torch.Generator, n: int) -> Draws:
        """n independent uniform draws. The generator is a CPU one, so that every device sees the same views."""
        return self.draws(torch.randint(self.views, (n,), generator=generator))

    def view_id(self, draws: Draws) -> Tensor:
        """The views that draws stand for, int64 [N] in 0 … views - 1."""
        place = draws.dy * self.places + draws.dx
        return place * 2 + draws.flip if self.flip else place

    def draws(self, view_id: Tensor) -> Draws:
        """The draws of views (inverse of `view_id`), on the device of `view_id`."""
        place, flip = (view_id // 2, view_id % 2) if self.flip else (view_id, torch.zeros_like(view_id))
        return Draws(place // self.places, place % self.places, flip)

    def view(self, images: Tensor, view_id: Tensor | int) -> Tensor:
        """Given views of images; one id for all images, or int64 [N]. Shapes as in `apply`."""
        if isinstance(view_id, int):
            if not 0 <= view_id < self.views:
                raise UserError(f"there is no view {view_id}", hint=f"views are 0 … {self.views - 1}")
            view_id = torch.full((len(images),), view_id)
        return self.apply(images, self.draws(view_id))

    def apply(self, images: Tensor, draws: Draws) -> Tensor:
        """Crop and mirror a batch.

        Args:
            images: [N, C, H, W], bytes or floating point, on any device. They are not changed.
            draws: one per image, on any device.

        Returns:
            [N, C, H, W] of the images' type and device, contiguous.

        Raises:
            UserError: reflect padding that is not smaller than the image.
        """
        if self.views == 1:
            return images.contiguous()
        n, c, h, w = images.shape
        p, device = self.padding, images.device
        dy, dx, flip = torch.stack(tuple(draws)).to(device, non_blocking=True).unsqueeze(2)
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
