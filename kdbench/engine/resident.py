"""A data set whose images lie on the device."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor

from kdbench.data.images import ImageData
from kdbench.engine.batch import Batch, Epoch, Split
from kdbench.engine.domain import Domain, place_of, split
from kdbench.engine.ranks import ALONE, Ranks
from kdbench.recipe.specs import CellSpec
from kdbench.recipe.timeline import Timeline


@dataclass(frozen=True)
class ResidentSplit:
    """A split whose images, bytes [N, C, H, W], lie on the device."""

    images: Tensor
    labels: Tensor
    resident: ClassVar[bool] = True

    def __len__(self) -> int:
        return len(self.labels)

    def slices(self, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        for start in range(0, len(self.labels), size):
            yield self.images[start : start + size], self.labels[start : start + size]

    def every(self, stride: int) -> ResidentSplit:
        return ResidentSplit(self.images[::stride], self.labels[::stride])


@dataclass(frozen=True)
class LaterSplit:
    """The same, of which images and labels are taken when they are first asked for: stages whose images are all made
    never touch real ones or their labels."""

    size: int
    take_images: Callable[[], Tensor]
    take_labels: Callable[[], Tensor]
    resident: ClassVar[bool] = True

    def __len__(self) -> int:
        return self.size

    @cached_property
    def images(self) -> Tensor:
        return self.take_images()

    @cached_property
    def labels(self) -> Tensor:
        return self.take_labels()

    def slices(self, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        return ResidentSplit(self.images, self.labels).slices(size)

    def every(self, stride: int) -> Split:
        return ResidentSplit(self.images, self.labels).every(stride)


class ResidentDomain(Domain):
    """A data set on the device.

    Attributes:
        positions: int64 [N], places of the training split's images in the whole training set.
    """

    def __init__(
        self, spec: CellSpec, data: ImageData, device: torch.device, prefix: str = "", ranks: Ranks = ALONE
    ) -> None:
        super().__init__(spec, device, prefix, ranks)

        def later(index: Tensor) -> LaterSplit:
            return LaterSplit(
                len(index), lambda: data.train_images[index].to(device), lambda: data.train_labels[index].to(device)
            )

        train, held_out = split(spec.data, data.train_labels, spec.seed)
        self.positions = train.to(device)
        self.pictures = later(train)
        self.train, self.validation = self.pictures, later(held_out)
        self.test = ResidentSplit(data.test_images.to(device), data.test_labels.to(device))
        self.epoch = Epoch(device)
        # Stream and number of the epoch that lies on the device.
        self._drawn: tuple[str, int] | None = None

    def _seek(self, step: int, timeline: Timeline) -> None:
        stream, epoch, position = place_of(step, timeline)
        if self._drawn != (stream, epoch):
            self.epoch.begin(*self.draws(stream, epoch))
            self._drawn = (stream, epoch)
        self.epoch.seek(position * self.batch_size, self.size, self.ranks.share(self.size))

    def batch(self) -> Batch:
        index, view = self.epoch.batch()
        images = self.augmentation.view(self.pictures.images[index], view)
        return Batch(images, self.train.labels[index], index, view)

    def advance(self) -> None:
        self.epoch.advance()
