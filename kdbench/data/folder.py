"""Images in folders, `<folder>/{train,test}/<class>/*`, all of one size, decoded once and kept.

A data set of one's own needs a card only:

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

`images.moments(data.train_images)` measures mean and std.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from kdbench.data.images import ImageData, cached, canonical
from kdbench.errors import UserError

SUFFIXES = (".webp", ".png", ".bmp", ".jpg", ".jpeg")
SPLITS = ("train", "test")

_CHUNK = 256
_MODES = {3: "RGB", 1: "L"}
_READABLE = {"1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr"}


@dataclass(frozen=True)
class Listing:
    """What a folder holds, before any image is opened.

    Attributes:
        files: split -> class -> image files, both sorted by name.
        stamps: (path below the folder, bytes, modification time in ns) of every image file.
    """

    root: Path
    files: dict[str, dict[str, list[Path]]]
    stamps: list[tuple[str, int, int]]

    @property
    def classes(self) -> list[str]:
        return sorted({name for classes in self.files.values() for name in classes})

    @property
    def kinds(self) -> list[str]:
        """File types, without the dot."""
        return sorted({os.path.splitext(name)[1][1:].lower() for name, _, _ in self.stamps})


def load(roots: list[Path], download: bool, cache: Path, *, folder: str, channels: Literal[1, 3] = 3) -> ImageData:
    """An image folder of the user's. Labels follow the class names in alphabetical order.

    Args:
        roots: searched in order for a folder of this name; a root of this name counts itself.
        download: not used, there is nowhere to download from.
        cache: folder for the decoded images.
        folder: name below a root; also the data set's name.
        channels: 3 (everything is converted to RGB) or 1 (to grey).

    Raises:
        UserError: no such folder, a class missing in a split, images of different sizes, a damaged image.
    """
    places = [place for root in roots for place in (root / folder, *([root] if root.name == folder else []))]
    place = next((place for place in places if all((place / split).is_dir() for split in SPLITS)), None)
    if place is None:
        wanted = f"{folder}/{{train,test}}/<class>/*"
        raise UserError(f"there is no image folder '{folder}'", hint=not_found(roots, wanted))
    found = listing(place)
    return cached(lambda: read(found, folder, channels), cache, folder, found.stamps, f"{channels} channels")


def listing(root: Path) -> Listing:
    """List `root/{train,test}/<class>/*`. Hidden files and files that are no images are left out."""
    files = {split: class_folders(root / split) for split in SPLITS}
    found = [file for by_class in files.values() for images in by_class.values() for file in images]
    stats = [(file, file.stat()) for file in found]
    stamps = [(file.relative_to(root).as_posix(), stat.st_size, stat.st_mtime_ns) for file, stat in stats]
    return Listing(root, files, stamps)


def class_folders(split: Path) -> dict[str, list[Path]]:
    """Images of a folder by the names of its folders, which are classes; both sorted."""
    names = sorted(entry.name for entry in entries(split) if entry.is_dir())
    return {
        name: sorted(Path(entry.path) for entry in entries(split / name) if entry.name.lower().endswith(SUFFIXES))
        for name in names
    }


def read(found: Listing, name: str, channels: int, size: tuple[int, int] | None = None) -> ImageData:
    """Decode a listed folder; `size` is (height, width), by default that of the first image."""
    classes = found.classes
    for split in SPLITS:
        empty = [c for c in classes if not found.files[split].get(c)]
        if empty or not classes:
            raise UserError(
                f"no images of class {', '.join(map(repr, empty))}" if empty else "no class folders",
                where=str(found.root / split),
                hint=f"images end in {', '.join(SUFFIXES)}",
            )
    if size is None:
        size = _size(found.files["train"][classes[0]][0])
    parts = []
    for split in SPLITS:
        groups = [found.files[split][c] for c in classes]
        labels = torch.repeat_interleave(torch.arange(len(classes)), torch.tensor([len(g) for g in groups]))
        parts.append((decode([file for group in groups for file in group], channels, size), labels))
    return canonical(name, classes, parts[0], parts[1], f"image folder ({', '.join(found.kinds)})")


def decode(files: list[Path], channels: int, size: tuple[int, int]) -> Tensor:
    """Image files as bytes [N, channels, height, width], decoded by as many threads as the process has cores.

    Raises:
        UserError: a file that is no image, is cut short, or has another size; it is named.
    """
    height, width = size
    pixels = np.empty((len(files), height, width, channels), dtype=np.uint8)

    def read_one(i: int) -> None:
        pixels[i] = _pixels(files[i], channels, size)

    for_each(len(files), read_one)
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()


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


def not_found(roots: Iterable[Path], wanted: str) -> str:
    """The hint for data that no root has: what was looked for, where, and how to point kdbench to it."""
    tried = ", ".join(str(root) for root in roots) or "no folder is set"
    return (
        f"looked for {wanted}\n  in: {tried}\n"
        "  Say where the data are: recipe key `data.root`, option `--data DIR`, or the environment's KDBENCH_DATA."
    )


def entries(folder: Path) -> Iterator[os.DirEntry[str]]:
    """What is in a folder, without hidden files; nothing where there is no such folder."""
    try:
        with os.scandir(folder) as found:
            yield from (entry for entry in found if not entry.name.startswith("."))
    except FileNotFoundError:
        return
    except OSError as error:
        raise UserError(f"the folder cannot be read: {error.strerror}", where=str(folder)) from None


def _size(file: Path) -> tuple[int, int]:
    with opened(file) as image:
        return image.height, image.width


def _pixels(file: Path, channels: int, size: tuple[int, int]) -> np.ndarray:
    with opened(file) as image:
        if (image.height, image.width) != size:
            raise UserError(
                f"the image has {image.height}x{image.width} pixels instead of {size[0]}x{size[1]}",
                where=str(file),
                hint="all images of a data set have one size",
            )
        return np.asarray(converted(image, channels, file)).reshape(*size, channels)


def converted(image: Image.Image, channels: int, file: Path) -> Image.Image:
    """An image decoded to RGB (3 channels) or grey (1).

    Raises:
        UserError: pixels that do not fit into bytes, or a file that is cut short; it is named.
    """
    if image.mode not in _READABLE:
        raise UserError(
            f"the image has pixels of type '{image.mode}', which do not fit into bytes",
            where=str(file),
            hint="save it with 8 bits a channel",
        )
    try:
        image.load()
        return image if image.mode == _MODES[channels] else image.convert(_MODES[channels])
    except (OSError, SyntaxError, ValueError, EOFError) as error:
        raise damaged(file, error) from None


def opened(file: Path) -> Image.Image:
    """An image file, its header read. UserError for what is no image."""
    try:
        return Image.open(file)
    except (OSError, SyntaxError, ValueError, EOFError) as error:
        raise damaged(file, error) from None


def damaged(file: Path, error: Exception) -> UserError:
    """What is said of a file that cannot be decoded."""
    return UserError(f"the image is damaged or cut short ({error})", where=str(file), hint="copy or unpack it again")


def cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
