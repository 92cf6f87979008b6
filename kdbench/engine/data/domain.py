"""One data set's training and validation split, and the training batch of every step as a function of (seed, step)."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from kdbench.data.augment import Augmentation
from kdbench.data.splits import subset, validation
from kdbench.data.streams import generator, permutation, uniform
from kdbench.engine.data.batch import MOST_STEPS, SECOND, Batch, Split
from kdbench.engine.data.mixing import NUMBERS, Mixing
from kdbench.engine.ranks import Ranks
from kdbench.errors import UserError, counted
from kdbench.recipe.model_specs import DataSpec
from kdbench.recipe.specs import CellSpec, ProtocolSpec
from kdbench.recipe.timeline import Timeline, batches_per_epoch, training_images


class Domain(ABC):
    """One of a cell's data sets: the only one, the source, or the target.

    Draws are addressed: an epoch's order by (seed, "order", epoch), its augmentation by (seed, "augmentation", epoch).
    Steps of a budget on top of the protocol's use streams of their own, so that the others stay paired between methods.

    Before a stretch of steps, `seek` puts what they need on the device. Then, step by step, `feed` does the host's
    part, `batch` gives the batch and `advance` goes on.

    Attributes:
        prefix: of the streams that are drawn from. views: the same of those of augmentation, after it.
        mixing: of Mixup and CutMix, where there is such.
        size: images in the batch that was fed, on all ranks.
    """

    train: Split
    validation: Split
    views = ""

    def __init__(
        self, spec: CellSpec, device: torch.device, prefix: str, train: Split, held_out: Split, ranks: Ranks
    ) -> None:
        self.train, self.validation = train, held_out
        self.seed, self.device, self.prefix, self.ranks = spec.seed, device, prefix, ranks
        self.spec, self.batch_size = spec, spec.protocol.batch_size
        self.augmentation = augmentation_of(spec.protocol)
        self.mixing: Mixing | None = None
        self.size = 0
        # Batches in an epoch, and where the next one is among them.
        self.each = batches_per_epoch(len(self.train), self.batch_size, spec.protocol.last_batch)
        self._position = 0

    def second(self) -> Domain:
        """The same batches in other views, which are drawn from streams of their own."""
        found = copy.copy(self)
        found.views = f"{SECOND}/"
        found.anew()
        return found

    def anew(self) -> None:
        """Begin with nothing drawn, in tensors of one's own."""
        if (mix := self.spec.protocol.augmentation.mix) is not None:
            self.mixing = Mixing(mix, self.spec.data.image_size, self.spec.data.classes, self.device)

    def seek(self, step: int, timeline: Timeline) -> int:
        """Put what the steps from one on need on the device.

        Returns:
            for how many steps it holds.
        """
        timeline = replace(timeline, batches_per_epoch=self.each)
        self._position = place_of(step, timeline)[2]
        if self.mixing is not None:
            self.mixing.seek(self._mixed(step, timeline))
        return min(MOST_STEPS, self._seek(step, timeline))

    def _mixed(self, step: int, timeline: Timeline) -> np.ndarray:
        """The uniform numbers [steps, NUMBERS] that the mixing of the steps from one on is made from."""
        found: list[np.ndarray] = []
        while len(found) < MOST_STEPS and step < timeline.total:
            stream, epoch, position = place_of(step, timeline)
            stop = min(step + self.each - position, timeline.extra if step < timeline.extra else timeline.total)
            drawn = uniform(self.each * NUMBERS, self.seed, f"{self.prefix}{stream}{self.views}mix", epoch)
            found.extend(drawn.reshape(-1, NUMBERS)[position : position + stop - step])
            step = stop
        return np.stack(found[:MOST_STEPS])

    @abstractmethod
    def _seek(self, step: int, timeline: Timeline) -> int: ...

    def feed(self) -> None:
        """The host's part of the coming step."""
        self.size = min(self.batch_size, len(self.train) - self._position * self.batch_size)
        self._position = (self._position + 1) % self.each

    @abstractmethod
    def batch(self) -> Batch:
        """The batch of the present step."""

    def advance(self) -> None:
        """Go on to the next step."""
        if self.mixing is not None:
            self.mixing.advance()

    def draws(self, stream: str, epoch: int) -> tuple[Tensor, Tensor]:
        """Order and views of an epoch, int64 [images] each, on the CPU.

        Args:
            stream: prefix of its streams, as `place_of` gives it.
        """
        stream, n = f"{self.prefix}{stream}", len(self.train)
        views = self.augmentation.draw(generator(self.seed, f"{stream}{self.views}augmentation", epoch), n)
        return permutation(n, self.seed, f"{stream}order", epoch), views


def augmentation_of(protocol: ProtocolSpec) -> Augmentation:
    """The views of a protocol's images."""
    chosen = protocol.augmentation
    return Augmentation(chosen.padding, chosen.mode, chosen.flip)


def place_of(step: int, timeline: Timeline) -> tuple[str, int, int]:
    """Prefix of the streams that a step draws from, its epoch, and its position in the epoch."""
    stream, number = ("extra/", step) if step < timeline.extra else ("", step - timeline.extra)
    return stream, *divmod(number, timeline.batches_per_epoch)


def split(spec: DataSpec, labels: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Indices of the labelled training split and of the validation split: seeded, stratified, disjoint.

    Raises:
        UserError: fewer images can be chosen than were asked for, as of a class without any.
    """
    split_seed = spec.split_seed if spec.split_seed is not None else seed
    train, held_out = torch.arange(len(labels)), torch.empty(0, dtype=torch.int64)
    if spec.validation:
        train, held_out = validation(labels, size=spec.validation, seed=split_seed)
    if spec.only_classes is not None:
        train = train[torch.isin(labels[train], torch.tensor(spec.only_classes))]
    if spec.fraction is not None or spec.per_class is not None:
        chosen = subset(labels[train], fraction=spec.fraction, per_class=spec.per_class, seed=split_seed)
        train = train[chosen]
        # Budget and record count by what was asked for.
        if (asked := training_images(spec.model_copy(update={"train": len(labels)}))) != len(train):
            empty = sorted({*(spec.only_classes or range(spec.classes))} - {*labels.unique().tolist()})
            what = f"of '{spec.name}', {counted(asked, 'training image')} asked for, and {len(train)} can be chosen"
            without = "classes without training images: " + ", ".join(map(str, empty[:3]))
            raise UserError(f"{what}; {without}", hint="leave these out of the data set, or choose more of its images")
    return train, held_out
