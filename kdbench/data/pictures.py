"""Data sets of pictures that stay on disk: larger than memory, each picture of a size of its own.

A data set of one's own needs a card only, which `kdbench data FOLDER` writes:

    my_pictures:
      target: "kdbench.data.pictures:load"
      streamed: true
      args: {folder: my_pictures}      # <data folder>/my_pictures/{train,test}/<class>/*.jpg
      title: My pictures
      classes: 3
      channels: 3
      image_size: 224
      train: 3000
      test: 600
      normalization: {mean: [0.485, 0.456, 0.406], std: [0.229, 0.224, 0.225]}
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from kdbench.data import imagenet
from kdbench.data.checks import check_classes, check_labels, check_taught
from kdbench.data.images import ImageData
from kdbench.data.listing import find, find_folder, held_out, in_folders, listing, not_found
from kdbench.data.sent import read_listing
from kdbench.data.splits import validation
from kdbench.data.sums import sums_of
from kdbench.errors import UserError
from kdbench.files import write_json


@dataclass(frozen=True, eq=False)
class Pictures:
    """Files with labels, each split sorted by (label, sha256 of the file), so that an index means the same picture
    everywhere, whatever the files are called.

    Attributes:
        classes: names, in the order of the labels.
        short_side: pixels to which a picture's shorter side is brought before its centre is tested.
        train_labels, test_labels: int64 [N], 0 … len(classes) - 1.
        fingerprint: SHA-256 (hex) over, for train then test: the number of files, and each one's label and sha256.
        origin: where it was read from, for the record.
    """

    name: str
    classes: tuple[str, ...]
    short_side: int
    train_files: tuple[Path, ...]
    train_labels: Tensor
    test_files: tuple[Path, ...]
    test_labels: Tensor
    fingerprint: str
    origin: str

    def __post_init__(self) -> None:
        """Raises UserError for labels that are not as said above."""
        check_classes(self.name, self.classes)
        check_labels(self.name, "training", self.train_labels, len(self.train_files), len(self.classes))
        check_labels(self.name, "test", self.test_labels, len(self.test_files), len(self.classes))
        check_taught(self.name, self.classes, self.train_labels, self.test_labels)

    @classmethod
    def of(cls, name: str, classes: Iterable[str], short_side: int, train: Rows, test: Rows, origin: str) -> Pictures:
        """The data set of pictures that are in canonical order."""
        total = hashlib.sha256()
        parts: list[tuple[tuple[Path, ...], Tensor]] = []
        for rows in (train, test):
            total.update(f"{len(rows)}\n".encode())
            for _, label, digest in rows:
                total.update(f"{label} {digest}\n".encode())
            labels = torch.tensor([label for _, label, _ in rows], dtype=torch.int64)
            parts.append((tuple(Path(file) for file, *_ in rows), labels))
        return cls(name, tuple(classes), short_side, *parts[0], *parts[1], total.hexdigest(), origin)


# A data set in memory, or of pictures that stay on disk.
AnyData = ImageData | Pictures
# (file, label) of every picture of a split; and with the file's sha256.
Labelled = Sequence[tuple[Path, int]]
Rows = Sequence[tuple[Path | str, int, str]]


def load(
    roots: list[Path],
    download: bool,
    cache: Path,
    *,
    folder: str,
    short_side: int = 256,
    official: Literal["imagenet", "imagenet_subset"] | None = None,
) -> Pictures:
    """Pictures in folders of their classes (`kdbench.data.listing` says how they may lie). Of a folder in one piece a
    stratified fifth is held out for testing.

    Args:
        roots: searched in order for a folder of this name; a root of this name counts itself.
        download: not used, there is nowhere to download from.
        cache: folder for the files' sums: the first time every file is read once, which can take minutes.
        folder: name below a root; also the data set's name.
        short_side: pixels to which the shorter side of a test picture is brought.
        official: which classes these must be: the 1,000 of ImageNet-1k, or some of them. Then the validation pictures
            may also lie in one folder, with what the devkit says of them (`kdbench.data.imagenet`).

    Raises:
        UserError: no such folder, no pictures, or a class that is missing in a split.
    """
    if official is not None:
        classes, train, test = imagenet.splits(find_folder(roots, folder), official == "imagenet_subset")
        return gather(folder, classes, train, test, cache, short_side, "picture folder")
    return from_folders(find_folder(roots, folder), folder, cache, short_side, in_one=True)


def from_folders(root: Path, name: str, cache: Path, short_side: int, in_one: bool = False) -> Pictures:
    """The pictures of a folder, as `listing` takes it."""
    found = listing(root, in_one).complete()
    train, *others = [
        [(file, label) for label, c in enumerate(found.classes) for file in by_class[c]]
        for by_class in found.files.values()
    ]
    if others:
        return gather(name, found.classes, train, others[0], cache, short_side, "picture folder")
    # Split in an order that does not depend on names.
    sums = sums_of([file for file, _ in train], cache, name)
    ordered = sorted(train, key=lambda one: (one[1], sums[one[0]], str(one[0])))
    labels = torch.tensor([label for _, label in ordered])
    parts = validation(labels, size=held_out(len(ordered), len(found.classes)), seed=0)
    train, test = ([ordered[i] for i in part.tolist()] for part in parts)
    return gather(name, found.classes, train, test, cache, short_side, "picture folder, in one piece")


def gather(
    name: str, classes: Iterable[str], train: Labelled, test: Labelled, cache: Path, short_side: int, origin: str
) -> Pictures:
    """A data set of listed files, in canonical order, with its fingerprint.

    Raises:
        UserError: a file that is not there.
    """
    sums = sums_of([file for split in (train, test) for file, _ in split], cache, name)

    def rows(split: Labelled) -> Rows:
        ordered = sorted((label, sums[file], str(file)) for file, label in split)
        return [(file, label, digest) for label, digest, file in ordered]

    return Pictures.of(name, classes, short_side, rows(train), rows(test), origin)


def fingerprint_of_files(data: Pictures, cache: Path) -> str:
    """The fingerprint that a data set must have."""
    train, test = _rows(data, cache)
    return Pictures.of(data.name, data.classes, data.short_side, train, test, data.origin).fingerprint


def _rows(data: Pictures, cache: Path) -> tuple[list[tuple[Path, int, str]], ...]:
    """The rows of both splits of a data set, in their order."""
    sums = sums_of([*data.train_files, *data.test_files], cache, data.name)
    parts = ((data.train_files, data.train_labels), (data.test_files, data.test_labels))
    return tuple(
        [(file, label, sums[file]) for file, label in zip(files, labels.tolist(), strict=True)]
        for files, labels in parts
    )


def save_listing(file: Path, data: Pictures, cache: Path) -> None:
    """Write the listing of a data set (`kdbench.data.sent`)."""
    about = {"name": data.name, "classes": list(data.classes), "short_side": data.short_side, "origin": data.origin}
    train, test = ([(str(one.resolve()), *more) for one, *more in rows] for rows in _rows(data, cache))
    write_json(file, about | {"train": train, "test": test})


def load_listing(file: Path) -> Pictures:
    """The data set of a listing whose pictures are all there."""
    found = read_listing(file)
    return Pictures.of(found.name, found.classes, found.short_side, found.train, found.test, found.origin)


def official_or_folders(
    roots: Iterable[Path], names: tuple[str, ...], official: Callable[[Path], bool], absent: str, wanted: str
) -> tuple[Path, bool]:
    """The folder of a data set in its official form, else as `{train,test}/<class>/*`; and whether it is the first.

    Args:
        names: of the folder. official: whether a folder has the official form.
        absent, wanted: what is said, and what is looked for, where there is neither.
    """
    for holds in (official, in_folders):
        if (place := find(roots, names, holds)) is not None:
            return place, holds is official
    raise UserError(absent, hint=not_found(roots, wanted))
