"""What every data set must be, whoever made it: a wrong one trains without complaint."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kdbench.errors import UserError, counted, listed

# Whole numbers in which labels may come.
_WHOLE = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def check_classes(name: str, classes: Sequence[Any]) -> None:
    """Raises UserError for classes without names, and for less than two."""
    if bad := [one for one in classes if not isinstance(one, str)]:
        raise UserError(f"the data set '{name}': the class {bad[0]!r} is no text", hint="classes are names, as '3'")
    if len(classes) < 2:
        what = f"the data set '{name}' has {counted(len(classes), 'class')}"
        raise UserError(what, hint="give two at least: with one, every network is always right")


def check_images(name: str, split: str, images: Any) -> None:
    """Raises UserError for images that are not bytes [N, channels, height, width]."""
    what = f"the data set '{name}': its {split} images are"
    if not isinstance(images, Tensor):
        raise UserError(f"{what} of type {type(images).__name__}, not a tensor", hint="torch.from_numpy(…) makes one")
    if images.dtype != torch.uint8:
        hint = "pixels are bytes, 0 to 255, that the card's normalization scales: of values in [0, 1] they are "
        hint += "'(images * 255).round().to(torch.uint8)', of such in [0, 255] 'images.round().to(torch.uint8)'"
        raise UserError(f"{what} {_kind(images)}, not uint8", hint=hint)
    if images.ndim != 4 or 0 in images.shape[1:]:
        hint = "'images.unsqueeze(1)' gives them one channel" if images.ndim == 3 else "give each image the same size"
        raise UserError(f"{what} of shape {[*images.shape]}, not [N, channels, height, width]", hint=hint)


def check_labels(name: str, split: str, labels: Any, images: int, classes: int) -> None:
    """Raises UserError for labels that are not one whole number of [0, classes) for each image."""
    what = f"the data set '{name}': its {split} labels are"
    if not isinstance(labels, Tensor):
        raise UserError(f"{what} of type {type(labels).__name__}, not a tensor", hint="torch.tensor(…) makes one")
    if labels.dtype not in _WHOLE:
        hint = "a label is the number of its class: 'labels.to(torch.int64)', of shares of classes 'labels.argmax(1)'"
        raise UserError(f"{what} {_kind(labels)}, not whole numbers", hint=hint)
    if labels.shape != (images,):
        raise UserError(
            f"{what} of shape {[*labels.shape]} for {counted(images, 'image')}", hint="each image has one label"
        )
    if len(labels) and (int(labels.min()) < 0 or int(labels.max()) >= classes):
        hint = "the first class is 0; the function gives the names of all classes, in the order of the labels"
        raise UserError(f"{what} {int(labels.min())} to {int(labels.max())}, of {counted(classes, 'class')}", hint=hint)


def check_taught(name: str, classes: Sequence[str], train: Tensor, test: Tensor) -> None:
    """Raises UserError for labels of test images that no training image has. Without any, something else is told."""
    if len(train) and (untaught := sorted({*test.unique().tolist()} - {*train.unique().tolist()})):
        names = listed([repr(classes[label]) for label in untaught], 3)
        what = f"the data set '{name}' has test images of classes that have no training images: {names}"
        raise UserError(what, hint="no student could name these; is a class's label the same in both parts?")


def check_alike(name: str, train: Tensor, test: Tensor) -> None:
    """Raises UserError for training and test images of different shapes."""
    if train.shape[1:] != test.shape[1:]:
        what = f"the data set '{name}': training images are {_size(train)}, test images {_size(test)}"
        raise UserError(what, hint="bring both to the same channels and size")


def _kind(values: Tensor) -> str:
    return str(values.dtype).removeprefix("torch.")


def _size(images: Tensor) -> str:
    return "×".join(map(str, images.shape[1:]))
