"""Data sets of random images: speed does not depend on what they show."""

import torch

from kdbench.data.images import ImageData
from kdbench.recipe.model_specs import DataSpec

# Images of the training set.
IMAGES = 10_240


def made_up(spec: DataSpec, test: int = 64) -> ImageData:
    """Random bytes in the shape of a data set, with so many test images."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (IMAGES, *spec.image_shape), dtype=torch.uint8, generator=generator)
    labels = torch.arange(IMAGES) % spec.classes
    names = tuple(str(i) for i in range(spec.classes))
    return ImageData(spec.name, names, images, labels, images[:test], labels[:test], "made up", "made up")
