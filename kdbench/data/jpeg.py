"""CIFAR-10 as JPEG leaves it at a low quality: another domain of the same images, made here."""

import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from kdbench.data import cifar
from kdbench.data.folder import for_each
from kdbench.data.images import ImageData, cached, canonical


def cifar10(
    roots: list[Path],
    download: bool,
    cache: Path,
    *,
    quality: int,
    mirrors: tuple[str, ...] = (),
    fingerprint: str | None = None,
) -> ImageData:
    """CIFAR-10 with every image encoded and decoded once, kept in the cache. Other arguments and errors: `cifar.load`.

    Args:
        quality: of JPEG, 1 to 95, with 4:2:0 subsampling. The data set is called cifar10_jpeg.
        fingerprint: of the images before that.
    """
    if not 1 <= quality <= 95:
        raise ValueError(f"a JPEG quality lies between 1 and 95, not {quality}")
    clean = cifar.cifar10(roots, download, cache, mirrors=mirrors, fingerprint=fingerprint)

    def build() -> ImageData:
        train, test = (
            (compressed(images, quality), labels)
            for images, labels in ((clean.train_images, clean.train_labels), (clean.test_images, clean.test_labels))
        )
        return canonical("cifar10_jpeg", clean.classes, train, test, "")

    # What is cached is a function of the images and the quality, wherever the images were read.
    data = cached(build, cache, "cifar10_jpeg", [(clean.fingerprint, 0, 0)], f"quality {quality}, 4:2:0")
    return replace(data, origin=f"{clean.origin}, after JPEG of quality {quality}")


def compressed(images: Tensor, quality: int) -> Tensor:
    """Bytes [N, 3, H, W] after JPEG, by Pillow's library: the same bytes for the same version of it."""
    pixels = images.permute(0, 2, 3, 1).contiguous().numpy()
    result = np.empty_like(pixels)

    def compress(i: int) -> None:
        file = io.BytesIO()
        Image.fromarray(pixels[i]).save(file, "JPEG", quality=quality, subsampling="4:2:0")
        result[i] = np.asarray(Image.open(file))

    for_each(len(pixels), compress)
    return torch.from_numpy(result).permute(0, 3, 1, 2).contiguous()
