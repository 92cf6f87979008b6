"""Data that nobody may read: whatever would use a guarded value raises, in this process and in a worker's.

As `guarded:digits` on a data card this is a data set whose training part may not be read.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kdbench.data.digits import load
from kdbench.data.images import ImageData

# What tells nothing of the values.
ABOUT = {
    Tensor.shape.__get__,  # type: ignore[attr-defined]
    Tensor.ndim.__get__,  # type: ignore[attr-defined]
    Tensor.dtype.__get__,  # type: ignore[attr-defined]
    Tensor.device.__get__,  # type: ignore[attr-defined]
    Tensor.size,
    Tensor.dim,
    Tensor.numel,
    Tensor.__len__,
}


class Guarded(Tensor):
    """A tensor some of whose rows nobody may read. Its shape may be asked for, and rows may be picked out: a selection
    without a forbidden row is a plain tensor."""

    forbidden: Tensor

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        plain = [value.as_subclass(Tensor) if isinstance(value, cls) else value for value in args]
        if func in ABOUT:
            return func(*plain, **(kwargs or {}))
        of = args[0]
        if func is Tensor.__getitem__ and isinstance(of, cls) and not isinstance(args[1], cls):
            return guarded(plain[0][args[1]], of.forbidden[args[1]])
        # Which rows are of some classes is what decides about what may be read.
        if func is torch.isin and isinstance(of, cls) and not bool(of.forbidden.all()):
            return func(*plain, **(kwargs or {}))
        raise AssertionError(f"a guarded value was read ({getattr(func, '__name__', func)})")


def guarded(values: Tensor, forbidden: Tensor | None = None) -> Tensor:
    """`values`, of which rows must not be read: those with True in `forbidden`, by default all."""
    forbidden = torch.ones(len(values), dtype=torch.bool) if forbidden is None else forbidden
    if not bool(forbidden.any()):
        return values
    found = values.as_subclass(Guarded)
    found.forbidden = forbidden
    return found


def without(data: ImageData, classes: list[int] | None = None) -> ImageData:
    """A data set whose training images and their labels must not be read (the validation part is taken from these too),
    or only those of some classes."""
    forbidden = None if classes is None else torch.isin(data.train_labels, torch.tensor(classes))
    parts = {name: guarded(getattr(data, name), forbidden) for name in ("train_images", "train_labels")}
    return replace(data, **parts)


def digits(roots: list[Path], download: bool, cache: Path) -> ImageData:
    """The digits, of which only the test part may be read."""
    return without(load(roots, download, cache))
