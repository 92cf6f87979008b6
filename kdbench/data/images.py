"""A data set in memory: images as bytes, in an order that does not depend on how it was stored."""

import hashlib
import json
import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from kdbench.data.checks import check_alike, check_classes, check_images, check_labels, check_taught
from kdbench.data.splits import validation
from kdbench.errors import UserError
from kdbench.files import atomic, sha256_of_data
from kdbench.reading import of_form, parsed

logger = logging.getLogger("kdbench")

_LAYOUT = "1"
_TENSORS = ("train_images", "train_labels", "test_images", "test_labels")


@dataclass(frozen=True, eq=False)
class ImageData:
    """A data set, each split sorted by (label, pixel bytes), so that an index means the same image everywhere.

    Attributes:
        classes: names, in the order of the labels.
        train_images, test_images: uint8 [N, C, H, W].
        train_labels, test_labels: int64 [N], 0 … len(classes) - 1.
        fingerprint: SHA-256 (hex) of the canonical bytes, see `fingerprint`.
        origin: where it was read from, for the record.
    """

    name: str
    classes: tuple[str, ...]
    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    fingerprint: str
    origin: str


def canonical(
    name: str, classes: Iterable[str], train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor], origin: str
) -> ImageData:
    """Sort both splits (images uint8 [N, C, H, W], labels [N]) into canonical order and take the fingerprint.

    Raises:
        UserError: images or labels that are something else.
    """
    classes = tuple(classes)
    for split, (images, labels) in (("training", train), ("test", test)):
        check_images(name, split, images)
        check_labels(name, split, labels, len(images), len(classes))
    check_taught(name, classes, train[1], test[1])
    parts = (*_sorted(*train), *_sorted(*test))
    return ImageData(name, classes, *parts, fingerprint(*parts), origin)


def with_fixed_split(
    name: str, classes: Iterable[str], images: Tensor, labels: Tensor, test: int, origin: str, size: int | None = None
) -> ImageData:
    """A set that comes in one piece, with a stratified split: `splits.validation(size=test, seed=0)` of all images in
    canonical order.

    Args:
        images: uint8 [N, C, H, W]. labels: int64 [N].
        test: images of the test split.
        size: pixels to which height and width are brought after that; None: as they are.
    """
    images, labels = _sorted(images, labels)
    train, held_out = validation(labels, size=test, seed=0)
    images = images if size is None else resized(images, size)
    return canonical(name, classes, (images[train], labels[train]), (images[held_out], labels[held_out]), origin)


def fingerprint(train_images: Tensor, train_labels: Tensor, test_images: Tensor, test_labels: Tensor) -> str:
    """SHA-256 (hex) over, for train then test: shape as text, labels (int64, little-endian), image bytes."""
    total = hashlib.sha256()
    for images, labels in ((train_images, train_labels), (test_images, test_labels)):
        total.update(f"{tuple(images.shape)}\n".encode())
        total.update(labels.contiguous().numpy().astype("<i8", copy=False).data)
        total.update(images.contiguous().numpy().data)
    return total.hexdigest()


def check(data: ImageData) -> None:
    """Look at what a function of the user's own made, which may not be as `ImageData` says. Tensors that are of a class
    of their own are left alone: it may be one that nobody may read.

    Raises:
        UserError: it is not.
    """
    check_classes(data.name, data.classes)
    splits = {"training": (data.train_images, data.train_labels), "test": (data.test_images, data.test_labels)}
    for split, (images, labels) in splits.items():
        check_images(data.name, split, images)
        if not isinstance(labels, Tensor) or type(labels) is Tensor:
            check_labels(data.name, split, labels, len(images), len(data.classes))
        if labels.dtype != torch.int64:
            hint = "'kdbench.data.images.canonical' makes a data set of labels of any whole numbers"
            what = f"the data set '{data.name}': its {split} labels are {labels.dtype}, not torch.int64"
            raise UserError(what, hint=hint)
    check_alike(data.name, data.train_images, data.test_images)


def fingerprint_of_images(data: ImageData) -> str:
    """The fingerprint that a data set must have; its own where that cannot be told."""
    parts = (data.train_images, data.train_labels, data.test_images, data.test_labels)
    return fingerprint(*parts) if all(type(one) is Tensor for one in parts) else data.fingerprint


def resized(images: Tensor, size: int) -> Tensor:
    """Bytes [N, C, H, W] as bytes [N, C, size, size], each image resized as a whole.

    By Pillow's antialiased bilinear filter, which computes in whole numbers: the same bytes on every machine.
    """
    if images.shape[2:] == (size, size):
        return images
    result = torch.empty(*images.shape[:2], size, size, dtype=torch.uint8)
    for n, image in enumerate(images):
        for c, channel in enumerate(image):
            small = Image.fromarray(channel.numpy()).resize((size, size), Image.Resampling.BILINEAR)
            result[n, c] = torch.from_numpy(np.asarray(small).copy())
    return result


def cached(
    build: Callable[[], ImageData], cache: Path, name: str, listing: Iterable[tuple[str, int, int]], variant: str
) -> ImageData:
    """What `build` returns, kept in `<cache>/<name>-<digest>.safetensors` and mapped into memory the next time.

    Args:
        listing: (name, bytes, modification time in ns) of every source file: any change of it builds anew.
        variant: whatever else the result depends on.

    A file that cannot be read, or whose content does not have its fingerprint, is built anew. A cache that cannot be
    written is a warning: it only saves time.
    """
    digest = sha256_of_data([_LAYOUT, variant, sorted(listing)])
    path = cache / f"{name}-{digest[:32]}.safetensors"
    data = load_images(path, name)
    if data is None:
        data = build()
        try:
            save_images(path, data)
        except (OSError, SafetensorError) as error:
            logger.warning("%s: the decoded images could not be kept for the next run (%s)", path, error)
    return data


def checked(data: ImageData, expected: str | None) -> ImageData:
    """Compare the fingerprint with a card's. A difference goes into `origin` and is warned of once per process."""
    if expected is None or data.fingerprint == expected:
        return data
    if (data.name, data.fingerprint) not in _warned:
        _warned.add((data.name, data.fingerprint))
        logger.warning(
            "%s from %s is not the published data set: its fingerprint is %s…, expected %s… (a lossy copy, or "
            "changed images). Results are recorded as such.",
            data.name,
            data.origin,
            data.fingerprint[:12],
            expected[:12],
        )
    return replace(data, origin=f"{data.origin}; not the published images (expected fingerprint {expected[:12]}…)")


_warned: set[tuple[str, str]] = set()


def _sorted(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    pixels, of = images.contiguous().numpy(), labels.numpy()
    order: list[int] = []
    for label in np.unique(of):
        members = np.flatnonzero(of == label)
        keys = [image.tobytes() for image in pixels[members]]
        order.extend(members[sorted(range(len(keys)), key=keys.__getitem__)])
    index = np.array(order, dtype=np.int64)
    return torch.from_numpy(pixels[index]), torch.from_numpy(of[index].astype(np.int64))


def load_images(path: Path, name: str) -> ImageData | None:
    """What `save_images` wrote; None where there is nothing, or something damaged, which is warned of."""
    try:
        with safe_open(path, framework="pt") as file:
            about = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in _TENSORS}
        data = ImageData(
            name,
            tuple(of_form(list[str], parsed(about["classes"], str(path)), str(path))),
            **tensors,
            fingerprint=about["fingerprint"],
            origin=about["origin"],
        )
        bytes_and_labels = [(torch.uint8, 4), (torch.int64, 1)] * 2
        if [(part.dtype, part.ndim) for part in tensors.values()] != bytes_and_labels:
            raise UserError("these are not images")
        if fingerprint(*tensors.values()) == data.fingerprint:
            return data
    except FileNotFoundError:
        return None
    except (OSError, SafetensorError, KeyError, UserError):
        pass
    logger.warning("%s is damaged; the images are decoded again", path)
    return None


def save_images(path: Path, data: ImageData) -> None:
    """Write whole or not at all: a reader never sees a part, a full disk leaves nothing behind."""
    about = {"classes": json.dumps(data.classes), "fingerprint": data.fingerprint, "origin": data.origin}
    with atomic(path) as temporary:
        save_file({key: getattr(data, key).contiguous() for key in _TENSORS}, temporary, metadata=about)
