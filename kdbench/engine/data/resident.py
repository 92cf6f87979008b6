"""A data set whose images lie on the device."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor

from kdbench.data.images import ImageData
from kdbench.engine.data.batch import MOST_STEPS, Batch, Epoch, at_once
from kdbench.engine.data.domain import Domain, place_of, split
from kdbench.engine.ranks import Ranks
from kdbench.recipe.specs import CellSpec
from kdbench.recipe.timeline import Timeline

# Images in the epochs that are drawn at once, at most, where one has fewer.
MOST_IMAGES = 65_536


class ResidentSplit:
    """A split whose images, bytes [N, C, H, W], lie on the device, with their labels."""

    resident: ClassVar[bool] = True

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.images, self.labels = images, labels

    def __len__(self) -> int:
        return len(self.labels)

    def slices(self) -> Iterator[tuple[Tensor, Tensor]]:
        size = at_once(self.labels.device, self.images.shape[-1])
        for start in range(0, len(self.labels), size):
            yield self.images[start : start + size], self.labels[start : start + size]

    def every(self, stride: int) -> ResidentSplit:
        return ResidentSplit(self.images[::stride], self.labels[::stride])


class TrainingPart(ResidentSplit):
    """The same, taken when it is first asked for: stages whose images are all made never touch real ones or labels."""

    def __init__(self, data: ImageData, index: Tensor, device: torch.device) -> None:
        self.data, self.index, self.device = data, index, device

    def __len__(self) -> int:
        return len(self.index)

    @cached_property
    def images(self) -> Tensor:  # type: ignore[override]
        return self.data.train_images[self.index].to(self.device)

    @cached_property
    def labels(self) -> Tensor:  # type: ignore[override]
        return self.data.train_labels[self.index].to(self.device)


class ResidentDomain(Domain):
    """A data set on the device.

    Attributes:
        positions: int64 [N], places of the training split's images in the whole training set.
    """

    def __init__(self, spec: CellSpec, data: ImageData, device: torch.device, prefix: str, ranks: Ranks) -> None:
        train, held_out = split(spec.data, data.train_labels, spec.seed)
        self.pictures, held_out_part = (TrainingPart(data, index, device) for index in (train, held_out))
        super().__init__(spec, device, prefix, self.pictures, held_out_part, ranks)
        self.positions = train.to(device)
        # Of each epoch, without what is dropped at its end.
        self.used = min(len(train), self.each * self.batch_size)
        self.epochs = max(1, min(MOST_IMAGES // self.used, MOST_STEPS // self.each))
        self.anew()

    def anew(self) -> None:
        super().anew()
        self.epoch = Epoch(self.device, self.epochs * self.used)
        # Stream of the epochs that lie on the device, and their numbers.
        self._drawn: tuple[str, range] = ("", range(0))

    def _seek(self, step: int, timeline: Timeline) -> int:
        stream, epoch, position = place_of(step, timeline)
        if self._drawn[0] != stream or epoch not in self._drawn[1]:
            # In a small data set epochs are short: several of them save the host much work between steps.
            steps_left = (timeline.extra if step < timeline.extra else timeline.total) - step
            count = max(1, min(self.epochs, -(-(position + steps_left) // self.each)))
            self._drawn = (stream, range(epoch, epoch + count))
            draws = [self.draws(stream, one) for one in self._drawn[1]]
            order, views = (torch.cat([drawn[: self.used] for drawn in kind]) for kind in zip(*draws, strict=True))
            self.epoch.begin(order, views)
        before = epoch - self._drawn[1].start
        size = min(self.batch_size, self.used - position * self.batch_size)
        self.epoch.seek(before * self.used + position * self.batch_size, size, self.ranks.share(size))
        return (len(self._drawn[1]) - before) * self.each - position

    def feed(self) -> None:
        super().feed()
        self.epoch.resize(self.size, self.ranks.share(self.size))

    def batch(self) -> Batch:
        index, view = self.epoch.batch()
        images, labels = self._views(index, view)
        if self.mixing is not None:
            images, labels = self.mixing.mixed(images, labels, *self._views(*self.epoch.batch(before=1)))
        return Batch(images, labels, index, view)

    def _views(self, index: Tensor, view: Tensor) -> tuple[Tensor, Tensor]:
        return self.augmentation.view(self.pictures.images[index], view), self.train.labels[index]

    def advance(self) -> None:
        super().advance()
        self.epoch.advance()
