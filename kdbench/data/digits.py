"""Handwritten digits, 8x8, one channel: the 1,797 images that scikit-learn ships. Nothing is downloaded."""

import importlib.metadata
from pathlib import Path

import torch

from kdbench.data.images import ImageData, with_fixed_split
from kdbench.errors import UserError

_TEST = 599  # one third of 1,797


def load(roots: list[Path], download: bool, cache: Path) -> ImageData:
    """The digits as bytes [N, 1, 8, 8] with a fixed stratified split: 1,198 for training, 599 for testing.

    Grey levels 0 … 16 become the bytes round(level · 255 / 16), from which round(byte · 16 / 255) gives them back.
    The split is `splits.validation(size=599, seed=0)` of all images in canonical order: the same on every machine,
    whatever the order in scikit-learn. The arguments that other data sets need are not used.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        what = "the digits come with scikit-learn, which is not installed"
        raise UserError(what, hint="pip install scikit-learn") from None
    raw = load_digits()
    levels = torch.from_numpy(raw.images).unsqueeze(1)
    images = (levels * (255 / 16)).round().to(torch.uint8)
    labels = torch.from_numpy(raw.target).to(torch.int64)
    origin = f"scikit-learn {importlib.metadata.version('scikit-learn')}"
    return with_fixed_split("digits", map(str, raw.target_names), images, labels, _TEST, origin)
