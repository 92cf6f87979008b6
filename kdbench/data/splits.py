"""Seeded, stratified subsets and validation splits, as index tensors.

Each class's images are ordered by one random word per image (`streams.words`, stream "subset" or "validation") and the
first ones are taken, so that with one seed a smaller `per_class` subset lies inside a larger one. How many each class
gives is decided by largest remainder in exact arithmetic: 0.29 means 29/100, not the binary number next to it.
"""

import math
from fractions import Fraction

import numpy as np
import torch
from torch import Tensor

from kdbench.data.streams import words
from kdbench.errors import UserError, counted


def subset(labels: Tensor, *, fraction: float | None = None, per_class: int | None = None, seed: int) -> Tensor:
    """A stratified part of a data set.

    Args:
        labels: int64 [N], in canonical order.
        fraction: share of the images in (0, 1]. round(fraction · N) images in all (halves up, at least one per class),
            in the classes' proportions by largest remainder.
        per_class: number of images of every class, instead of a fraction.
        seed: of the choice.

    Returns:
        Sorted int64 indices on the CPU.

    Raises:
        UserError: both or none of fraction and per_class, or a value out of range.
    """
    present, sizes = _classes(labels)
    if fraction is not None and per_class is None:
        counts = _apportion(sizes, max(_share(fraction, "fraction", upper=1, n=len(labels)), len(sizes)))
    elif per_class is not None and fraction is None:
        if isinstance(per_class, bool) or not isinstance(per_class, int) or per_class < 1:
            raise UserError(f"'per_class' cannot be {per_class!r}", hint="it is a number of images, at least 1")
        if per_class > sizes.min():
            small = int(sizes.argmin())
            raise UserError(
                f"'per_class' is {per_class}, but class {int(present[small])} has "
                f"{counted(int(sizes[small]), 'training image')}",
                hint=f"at most {int(sizes.min())} are possible here",
            )
        counts = np.full(len(sizes), per_class)
    else:
        raise UserError("a subset needs either 'fraction' or 'per_class', exactly one of them")
    return _take(labels, present, counts, seed, "subset")


def validation(labels: Tensor, *, size: int | float, seed: int) -> tuple[Tensor, Tensor]:
    """A stratified split into training and validation images.

    Args:
        labels: int64 [N], in canonical order.
        size: number of validation images (int), or their share of all images in (0, 1) (float; rounded, halves up).
            Every class gives at least one image and keeps at least one.
        seed: of the choice.

    Returns:
        (training indices, validation indices): sorted int64 on the CPU, disjoint, together 0 … N - 1.

    Raises:
        UserError: a size that is out of range or leaves a class without training or validation images.
    """
    present, sizes = _classes(labels)
    if isinstance(size, float):
        total = _share(size, "size", upper=None, n=len(labels))
    elif isinstance(size, int) and not isinstance(size, bool) and size > 0:
        total = size
    else:
        hint = "it is a number of images, or a share between 0 and 1"
        raise UserError(f"the size of a validation split cannot be {size!r}", hint=hint)
    lowest, highest = len(sizes), int((sizes - 1).sum())
    if sizes.min() < 2:
        raise UserError(f"class {int(present[sizes.argmin()])} has one image, too few for a validation split")
    if not lowest <= total <= highest:
        what = f"a validation split of {total} of {counted(len(labels), 'image')} leaves a class without images"
        raise UserError(what, hint=f"between {lowest} and {highest} images are possible here")
    chosen = _take(labels, present, _apportion(sizes, total, keep=1), seed, "validation")
    rest = torch.ones(len(labels), dtype=torch.bool)
    rest[chosen] = False
    return rest.nonzero().flatten(), chosen


def _classes(labels: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Labels that occur, ascending, and how often each does."""
    if len(labels) == 0:
        raise UserError("there are no images to split")
    return np.unique(labels.cpu().numpy(), return_counts=True)


def _share(value: float, name: str, upper: int | None, n: int) -> int:
    """round(value · n), halves up, of a share in (0, 1) or, with `upper` = 1, in (0, 1]."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not (0 < value < 1 or value == upper):
        raise UserError(
            f"'{name}' cannot be {value!r}", hint=f"a share lies above 0 and {'is at most' if upper else 'below'} 1"
        )
    return math.floor(Fraction(str(value)) * n + Fraction(1, 2))


def _apportion(sizes: np.ndarray, total: int, keep: int = 0) -> np.ndarray:
    """Divide `total` among classes of these sizes by largest remainder (ties: the lower class first).

    Every class gives at least one and keeps at least `keep`; the sum is exact. Needs
    len(sizes) <= total <= sum(sizes - keep).
    """
    n = int(sizes.sum())
    quotas = [Fraction(int(size) * total, n) for size in sizes]
    counts = [min(max(math.floor(q), 1), int(size) - keep) for q, size in zip(quotas, sizes, strict=True)]
    while (missing := total - sum(counts)) != 0:
        step = 1 if missing > 0 else -1
        free = [c for c, k in enumerate(counts) if (k < sizes[c] - keep if step > 0 else k > 1)]
        furthest = max(free, key=lambda c: (step * (quotas[c] - counts[c]), -c))
        counts[furthest] += step
    return np.array(counts)


def _take(labels: Tensor, present: np.ndarray, counts: np.ndarray, seed: int, stream: str) -> Tensor:
    """The first counts[c] images of every class c in random order, as sorted indices."""
    of = labels.cpu().numpy()
    order = np.argsort(words(len(of), seed, stream), kind="stable")
    chosen = [order[of[order] == label][:count] for label, count in zip(present, counts, strict=True)]
    return torch.from_numpy(np.sort(np.concatenate(chosen)))
