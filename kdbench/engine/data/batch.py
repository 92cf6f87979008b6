"""A batch, the splits of a data set that it comes from, and one pass over them: the types that the engine shares."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """One input set of a step. Every method reads what it needs.

    images: [N, C, H, W] on the device: bytes after augmentation, or float32 pixel values on the scale of [0, 1] (made
    images may leave it); each network gets its own normalization of them. labels: int64 [N], or float32 [N, K], shares
    of the classes where images are mixed; None where nobody may know them. index: int64 [N], position in the training
    split. view: int64 [N], which augmented view it is. mask: bool [N], which images count in a loss (None: all).
    """

    images: Tensor
    labels: Tensor | None
    index: Tensor | None = None
    view: Tensor | None = None
    mask: Tensor | None = None


# Input sets of a step by name: "data" is the data set's batch, "second" its images in other views, "target" the target
# domain's batch, without labels.
Sets = dict[str, Batch]
TARGET = "target"
# The batch's images again, in views of their own.
SECOND = "second"
# Images of up to 32 pixels a side that are looked at at once outside of training.
SLICE = {"cpu": 250, "cuda": 2000}
# Steps that are prepared at once, at most: the rows of a `StepTable`.
MOST_STEPS = 1024


def at_once(device: torch.device, side: int) -> int:
    """How many images of so many pixels a side are looked at at once outside of training: fewer of larger ones."""
    most = SLICE[device.type]
    return max(most // 8, min(most, most * 32**2 // side**2))


class Split(Protocol):
    """A training, validation or test split: N images with labels, int64 [N] on the device. Its length is told without a
    look at either.

    Attributes:
        resident: whether the images lie on the device.
    """

    resident: ClassVar[bool]

    @property
    def labels(self) -> Tensor: ...

    def __len__(self) -> int: ...

    def slices(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Images, bytes [n, C, H, W] on the device, and their labels: `at_once` at a time, in order."""
        ...

    def every(self, stride: int) -> Split:
        """Every stride-th image."""
        ...


def at_most(images: int, part: Split) -> Split:
    """At most so many images of a part, evenly spaced."""
    return part.every(max(1, -(-len(part.labels) // images)))


class StepTable:
    """Numbers of the coming steps on the device, a row for each step."""

    def __init__(self, columns: int, device: torch.device) -> None:
        self.rows = torch.zeros(MOST_STEPS, columns, device=device)
        self.at = torch.zeros(1, dtype=torch.int64, device=device)

    def fill(self, rows: Tensor) -> None:
        """Take the rows of the coming steps, float32 [steps, columns]."""
        self.rows[: len(rows)].copy_(rows)
        self.at.zero_()

    def row(self) -> tuple[Tensor, ...]:
        """The numbers of the present step, scalars."""
        return self.rows.index_select(0, self.at).squeeze(0).unbind()

    def advance(self) -> None:
        """Go on to the next step."""
        self.at.add_(1)


class Epoch:
    """One pass over a set of images, or several: their order and views on the device, and where the next batch begins.

    Everything that a step needs lies in tensors that stay the same objects from pass to pass, so a recorded step finds
    the next pass in them.

    Args:
        room: images of all passes that may lie there at once. Where more come, there are new tensors.
    """

    def __init__(self, device: torch.device, room: int = 0) -> None:
        self.order, self.views = (torch.zeros(room, dtype=torch.int64, device=device) for _ in range(2))
        self.rows = torch.empty(0, dtype=torch.int64, device=device)
        self._rows_of: dict[int, Tensor] = {}
        self.size = 0
        self.first = torch.zeros((), dtype=torch.int64, device=device)

    def begin(self, order: Tensor, views: Tensor) -> None:
        """Take the order and the views of what comes next, int64 [images] each."""
        if len(order) <= len(self.order):
            self.order[: len(order)].copy_(order)
            self.views[: len(views)].copy_(views)
        else:
            self.order, self.views = (drawn.to(self.first.device) for drawn in (order, views))

    def seek(self, first: int, size: int, share: slice = slice(None)) -> None:
        """Let the next batch begin at an image, with so many images, of which a share is taken."""
        self.first.fill_(first)
        self.resize(size, share)

    def resize(self, size: int, share: slice = slice(None)) -> None:
        """Let the next batch have so many images, of which a share is taken."""
        if size not in self._rows_of:
            self._rows_of[size] = torch.arange(size, device=self.first.device)[share]
        self.rows, self.size = self._rows_of[size], size

    def batch(self, before: int = 0) -> tuple[Tensor, Tensor]:
        """Positions in the training split and views of the next batch, int64 [size] each.

        Args:
            before: so many places before each image's own in the batch; before its first image comes its last.
        """
        rows = self.first + ((self.rows - before) % self.size if before else self.rows)
        return self.order[rows], self.views[rows]

    def advance(self) -> None:
        """Go on to the batch after that."""
        self.first.add_(self.size)
