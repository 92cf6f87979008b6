"""Images in folders, all of one size, decoded once and kept.

A data set of one's own needs a card only, which `kdbench data FOLDER` writes:

    my_shapes:
      target: "kdbench.data.folder:load"
      args: {folder: my_shapes}        # found in the data folders: <data folder>/my_shapes/{train,test}/<class>/*.png
      title: My shapes
      classes: 3
      channels: 3
      image_size: 32
      train: 3000
      test: 600
      normalization: {mean: [0.5, 0.5, 0.5], std: [0.25, 0.25, 0.25]}
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from kdbench.data.images import ImageData, cached, canonical, with_fixed_split
from kdbench.data.listing import Listing, find_folder, held_out, listing, opened, pixels
from kdbench.files import cores

_CHUNK = 256


def load(roots: list[Path], download: bool, cache: Path, *, folder: str, channels: Literal[1, 3] = 3) -> ImageData:
    """An image folder of the user's (`kdbench.data.listing` says how it may lie). Labels follow the class names in
    alphabetical order. Of a folder in one piece a stratified fifth is held out for testing.

    Args:
        roots: searched in order for a folder of this name; a root of this name counts itself.
        download: not used, there is nowhere to download from.
        cache: folder for the decoded images.
        folder: name below a root; also the data set's name.
        channels: 3 (everything is converted to RGB) or 1 (to grey).

    Raises:
        UserError: no such folder, a class missing in a split, images of different sizes, a damaged image.
    """
    found = listing(find_folder(roots, folder), in_one=True)
    return cached(lambda: read(found, folder, channels), cache, folder, found.stamps, f"{channels} channels")


def read(found: Listing, name: str, channels: int, size: tuple[int, int] | None = None) -> ImageData:
    """Decode a listed folder; `size` is (height, width), by default that of the first image."""
    classes = found.complete().classes
    if size is None:
        with opened(next(iter(found.files.values()))[classes[0]][0]) as first:
            size = first.height, first.width
    parts = []
    for by_class in found.files.values():
        groups = [by_class[c] for c in classes]
        labels = torch.repeat_interleave(torch.arange(len(classes)), torch.tensor([len(g) for g in groups]))
        parts.append((decode([file for group in groups for file in group], channels, size), labels))
    origin = f"image folder ({', '.join(found.kinds)})"
    if len(parts) == 1:
        images, labels = parts[0]
        return with_fixed_split(
            name, classes, images, labels, held_out(len(labels), len(classes)), f"{origin}, in one piece"
        )
    return canonical(name, classes, parts[0], parts[1], origin)


def decode(files: list[Path], channels: int, size: tuple[int, int]) -> Tensor:
    """Image files as bytes [N, channels, height, width], decoded by as many threads as the process has cores.

    Raises:
        UserError: a file that is no image, is cut short, or has another size; it is named.
    """
    height, width = size
    found = np.empty((len(files), height, width, channels), dtype=np.uint8)

    def read_one(i: int) -> None:
        found[i] = pixels(files[i], channels, size)

    for_each(len(files), read_one)
    return torch.from_numpy(found).permute(0, 3, 1, 2).contiguous()


def for_each(n: int, action: Callable[[int], None]) -> None:
    """Call `action(0)` … `action(n - 1)` in as many threads as the process has cores. What one raises ends all."""

    def part(start: int) -> None:
        for i in range(start, min(start + _CHUNK, n)):
            action(i)

    with ThreadPoolExecutor(cores()) as pool:
        tasks = [pool.submit(part, start) for start in range(0, n, _CHUNK)]
        try:
            for task in tasks:
                task.result()
        finally:
            pool.shutdown(cancel_futures=True)
