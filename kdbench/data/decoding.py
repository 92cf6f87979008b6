"""A picture of any size as bytes of one size: a random crop for training, the centre for testing.

Pixel for pixel what torchvision's transforms make of a PIL image; where to crop is a function of given uniform numbers,
so that a draw has an address.
"""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from kdbench.data.listing import converted, opened

# Tries for a random crop that fits, and the numbers that one picture's crop is made from.
TRIES = 10
NUMBERS = 2 * TRIES + 2
RATIO = (3 / 4, 4 / 3)

Box = tuple[int, int, int, int]


def picture(file: Path, channels: int = 3) -> Image.Image:
    """A file as RGB, or grey. UserError for what is no picture, is cut short, or has more than 8 bits a channel."""
    with opened(file) as image:
        return converted(image, channels, file)


def crop_box(numbers: Sequence[float], height: int, width: int, area: Sequence[float]) -> Box:
    """Where torchvision's RandomResizedCrop would crop: (top, left, height, width).

    Args:
        numbers: `NUMBERS` independent uniform numbers in [0, 1): for each try a share of the area and a ratio of the
            sides, then the place.
        area: lowest and highest share of the picture's area; drawn uniformly, the ratio of width to height
            log-uniformly between 3/4 and 4/3. Where no try fits, the largest centred crop with such a ratio is taken.
    """
    low, high = math.log(RATIO[0]), math.log(RATIO[1])
    for i in range(TRIES):
        pixels = height * width * (area[0] + (area[1] - area[0]) * numbers[2 * i])
        ratio = math.exp(low + (high - low) * numbers[2 * i + 1])
        w, h = round(math.sqrt(pixels * ratio)), round(math.sqrt(pixels / ratio))
        if 0 < w <= width and 0 < h <= height:
            return int(numbers[-2] * (height - h + 1)), int(numbers[-1] * (width - w + 1)), h, w
    w, h = width, height
    if width / height < RATIO[0]:
        h = round(width / RATIO[0])
    elif width / height > RATIO[1]:
        w = round(height * RATIO[1])
    return (height - h) // 2, (width - w) // 2, h, w


def resized_crop(image: Image.Image, box: Box, size: int) -> Image.Image:
    """A crop brought to size × size, bilinear with antialiasing."""
    top, left, height, width = box
    part = image.crop((left, top, left + width, top + height))
    return part.resize((size, size), Image.Resampling.BILINEAR)


def decoded_crop(file: Path, numbers: Sequence[float], area: Sequence[float], size: int, channels: int) -> Tensor:
    """A random crop of a file, brought to size × size, by torchvision's decoder and PyTorch's resizing.

    The same place as `resized_crop`, and almost the same pixels: most bytes agree, others differ by 1. What torchvision
    does not decode to bytes of these channels (TIFF, BMP, animations, grey WebP), Pillow does, which tells of damage.

    Args:
        numbers, area: of `crop_box`.

    Returns:
        uint8 [channels, size, size].

    Raises:
        UserError: a file that cannot be decoded.
    """
    from torchvision.io import ImageReadMode, decode_image

    try:
        image = decode_image(str(file), ImageReadMode.RGB if channels == 3 else ImageReadMode.GRAY)
    except Exception:  # noqa: BLE001 - another kind of file, or a damaged one, which can fail in any way
        image = None
    if image is None or image.dtype != torch.uint8 or image.ndim != 3 or len(image) != channels:
        image = as_bytes(picture(file, channels))
    top, left, height, width = crop_box(numbers, image.shape[1], image.shape[2], area)
    part = image[:, top : top + height, left : left + width].unsqueeze(0)
    return F.interpolate(part, (size, size), mode="bilinear", antialias=True)[0]


def mirrored(image: Image.Image) -> Image.Image:
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)


def as_bytes(image: Image.Image) -> Tensor:
    """A picture as uint8 [channels, height, width]."""
    array = np.asarray(image)
    return torch.from_numpy(np.array(array[None] if array.ndim == 2 else array.transpose(2, 0, 1), order="C"))


def as_image(image: Tensor) -> Image.Image:
    """The inverse: RGB for three channels, grey for one."""
    array = image.numpy()
    return Image.fromarray(array[0] if len(array) == 1 else np.ascontiguousarray(array.transpose(1, 2, 0)))
