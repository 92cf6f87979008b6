"""The strong view of an image that MLKD's authors take: two operations of any strength, then a rectangle cut out."""

from collections.abc import Callable
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageEnhance, ImageOps

from kdbench.data.transforms import Transform


def _enhanced(kind: type) -> Callable[[Image.Image, float], Image.Image]:
    return lambda image, value: kind(image).enhance(value)


def _moved(matrix: Callable[[float, Image.Image], tuple[float, ...]]) -> Callable[[Image.Image, float], Image.Image]:
    return lambda image, value: image.transform(image.size, Image.Transform.AFFINE, matrix(value, image))


# Operation, and its weakest and strongest value.
OPERATIONS: dict[str, tuple[Callable[[Image.Image, float], Image.Image], float, float]] = {
    "auto_contrast": (lambda image, _: ImageOps.autocontrast(image), 0.0, 1.0),
    "brightness": (_enhanced(ImageEnhance.Brightness), 0.05, 0.95),
    "color": (_enhanced(ImageEnhance.Color), 0.05, 0.95),
    "contrast": (_enhanced(ImageEnhance.Contrast), 0.05, 0.95),
    "equalize": (lambda image, _: ImageOps.equalize(image), 0.0, 1.0),
    "identity": (lambda image, _: image, 0.0, 1.0),
    "posterize": (lambda image, value: ImageOps.posterize(image, int(value)), 4.0, 8.0),
    "rotate": (lambda image, value: image.rotate(value), -30.0, 30.0),
    "sharpness": (_enhanced(ImageEnhance.Sharpness), 0.05, 0.95),
    "shear_x": (_moved(lambda value, image: (1, value, 0, 0, 1, 0)), -0.3, 0.3),
    "shear_y": (_moved(lambda value, image: (1, 0, 0, value, 1, 0)), -0.3, 0.3),
    # Every pixel above the threshold, which need not be whole.
    "solarize": (lambda image, value: ImageOps.solarize(image, value), 0.0, 256.0),  # type: ignore[arg-type]
    "translate_x": (_moved(lambda value, image: (1, 0, value * image.width, 0, 1, 0)), -0.3, 0.3),
    "translate_y": (_moved(lambda value, image: (1, 0, 0, 0, 1, value * image.height)), -0.3, 0.3),
}
# What is cut out becomes this colour.
_COLOUR: dict[str, Any] = {"RGB": (125, 123, 114), "L": 121}


def strong_view(*, operations: int = 2, cutout: float = 0.5) -> Transform:
    """So many operations, drawn with replacement, each of a strength drawn evenly; then a square is cut out whose side
    is drawn evenly up to this share of the image's.

    Args:
        cutout: in [0, 1].
    """

    def changed(image: Image.Image) -> Image.Image:
        for _ in range(operations):
            operation, low, high = [*OPERATIONS.values()][int(torch.randint(len(OPERATIONS), ()))]
            image = operation(image, low + (high - low) * float(torch.rand(())))
        side, across, down = torch.rand(3).tolist()
        side *= cutout * image.width
        left, top = (int(max(0.0, at - side / 2)) for at in (across * image.width, down * image.height))
        image = image.copy()
        corner = (min(image.width, left + side), min(image.height, top + side))
        ImageDraw.Draw(image).rectangle((left, top, *corner), _COLOUR[image.mode])
        return image

    return changed
