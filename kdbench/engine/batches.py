"""A cell's data on its device, and the batch of every step as a function of (seed, step)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from kdbench.data.augment import Augmentation
from kdbench.data.images import ImageData
from kdbench.data.pictures import Pictures
from kdbench.data.splits import subset, validation
from kdbench.data.streams import generator, permutation
from kdbench.errors import UserError
from kdbench.recipe.specs import CellSpec, DataSpec
from kdbench.recipe.timeline import Timeline, batches_per_epoch


@dataclass(frozen=True)
class Batch:
    """One input set of a step. Every method reads what it needs.

    images: [N, C, H, W] on the device: bytes after augmentation, or float32 pixel values on the scale of [0, 1] (made
    images may leave it); each network gets its own normalization of them. labels: int64 [N]; None where nobody may know
    them. index: int64 [N], position in the training set. view: int64 [N], which augmented view it is. mask: bool [N],
    which images count in a loss (None: all).
    """

    images: Tensor
    labels: Tensor | None
    index: Tensor | None = None
    view: Tensor | None = None
    mask: Tensor | None = None


# Images that are looked at at once outside of training.
SLICE = {"cpu": 250, "cuda": 2000}

# Input sets of a step by name: "data" is the data set's batch, "target" the target domain's, without labels.
Sets = dict[str, Batch]
TARGET = "target"
# Steps that are prepared at once, at most: as many rows of rates and weights lie on the device.
MOST_STEPS = 1024


class Part(Protocol):
    """A fixed set of N images with labels, int64 [N] on the device. Its length is told without a look at either.

    resident: whether its images lie on the device and stay where they are.
    """

    resident: ClassVar[bool]

    @property
    def labels(self) -> Tensor: ...

    def __len__(self) -> int: ...

    def slices(self, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Images, bytes [n, C, H, W] on the device, and their labels: `size` at a time, in order."""
        ...

    def every(self, stride: int) -> Part:
        """Every stride-th image."""
        ...


@dataclass(frozen=True)
class ResidentPart:
    """A part whose images, bytes [N, C, H, W], lie on the device."""

    images: Tensor
    labels: Tensor
    resident: ClassVar[bool] = True

    def __len__(self) -> int:
        return len(self.labels)

    def slices(self, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        for start in range(0, len(self.labels), size):
            yield self.images[start : start + size], self.labels[start : start + size]

    def every(self, stride: int) -> ResidentPart:
        return ResidentPart(self.images[::stride], self.labels[::stride])


@dataclass(frozen=True)
class _LaterPart:
    """A part whose images and labels, as of a ResidentPart, are taken when they are first asked for."""

    size: int
    take: Callable[[], Tensor]
    take_labels: Callable[[], Tensor]
    resident: ClassVar[bool] = True

    def __len__(self) -> int:
        return self.size

    @cached_property
    def labels(self) -> Tensor:
        return self.take_labels()

    @cached_property
    def whole(self) -> ResidentPart:
        return ResidentPart(self.take(), self.labels)

    def slices(self, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        return self.whole.slices(size)

    def every(self, stride: int) -> Part:
        return self.whole.every(stride)


class Epoch:
    """One pass over a set of images: its order and views on the device, and where its next batch begins.

    Everything that a step needs lies in tensors that stay the same objects from pass to pass, so a recorded step finds
    the next pass in them.
    """

    def __init__(self, device: torch.device) -> None:
        nothing = torch.empty(0, dtype=torch.int64, device=device)
        self.order, self.views, self.rows = nothing, nothing, nothing
        self._rows_of: dict[int, Tensor] = {}
        self.first = torch.zeros((), dtype=torch.int64, device=device)

    def begin(self, order: Tensor, views: Tensor) -> None:
        """Take the order and the views of a new pass, int64 [images] each."""
        if self.order.shape == order.shape:
            self.order.copy_(order)
            self.views.copy_(views)
        else:
            self.order, self.views = (drawn.to(self.first.device) for drawn in (order, views))

    def seek(self, first: int, size: int) -> None:
        """Let the next batch begin at an image of the pass, with so many images."""
        self.first.fill_(first)
        if size not in self._rows_of:
            self._rows_of[size] = torch.arange(size, device=self.first.device)
        self.rows = self._rows_of[size]

    def batch(self) -> tuple[Tensor, Tensor]:
        """Positions in the training set and views of the next batch, int64 [size] each."""
        rows = self.first + self.rows
        return self.order[rows], self.views[rows]

    def advance(self) -> None:
        """Go on to the batch after that."""
        self.first.add_(len(self.rows))


class Batches:
    """Training, validation and test parts of one (data, protocol, seed), resident on a device.

    `kdbench.engine.streamed.StreamedBatches` has the same interface for data that stay on disk.

    Draws are addressed: an epoch's order by (seed, "order", epoch), its augmentation by (seed, "augmentation", epoch).
    Steps of a budget on top of the protocol's use streams of their own, so that the others stay paired between methods.

    Before a stretch of steps, `seek` puts what they need on the device. Then, step by step, `feed` does the host's part
    (nothing here), `sets` gives the input sets and `advance` goes on.

    Attributes:
        target: the target domain's images, with orders and views of their own; its epochs go round beside the source's.
        test: the test part that counts: of the target domain, where there is one. source_test: then the source's.

    Args:
        target: the target domain, where the cell has one. The labels of its training images are not read.
        prefix: of the streams that are drawn from.
    """

    target: Batches | None = None
    source_test: Part | None = None

    def __init__(
        self,
        spec: CellSpec,
        data: ImageData,
        device: torch.device,
        target: ImageData | Pictures | None = None,
        prefix: str = "",
    ) -> None:
        train, held_out = split(spec.data, data.train_labels, spec.seed)
        # Places of the training part's images in the whole training set.
        self.positions = train.to(device)
        # Taken when they are first asked for: stages whose images are all made never touch real ones or their labels.
        self._take = lambda: data.train_images[train].to(device)
        self.train: Part = _LaterPart(len(train), lambda: self.images, lambda: data.train_labels[train].to(device))
        self.validation: Part = _LaterPart(
            len(held_out),
            lambda: data.train_images[held_out].to(device),
            lambda: data.train_labels[held_out].to(device),
        )
        self.test: Part = ResidentPart(data.test_images.to(device), data.test_labels.to(device))
        self._set_up(spec, device, prefix)
        self._add_target(spec, target)

    def _set_up(self, spec: CellSpec, device: torch.device, prefix: str) -> None:
        """What resident and streamed data have in common."""
        self.protocol, self.seed, self.device, self.prefix = spec.protocol, spec.seed, device, prefix
        self.image_shape = (spec.data.channels, spec.data.image_size, spec.data.image_size)
        chosen = spec.protocol.augmentation
        self.augmentation = Augmentation(chosen.padding, chosen.mode, chosen.flip)
        self.epoch = Epoch(device)
        # Stream and number of the epoch that lies on the device.
        self._drawn: tuple[str, int] | None = None

    def _add_target(self, spec: CellSpec, data: ImageData | Pictures | None) -> None:
        """Take the target domain's images, and test on its test part."""
        from kdbench.engine.streamed import batches_of, part_for_testing

        if spec.target is None:
            return
        if data is None:
            raise ValueError("this cell has a target domain, whose data were not given")
        cell = spec.model_copy(update={"data": spec.target, "target": None})
        self.target = batches_of(cell, unlabelled(data), self.device, prefix=f"{TARGET}/")
        self.source_test, self.test = self.test, part_for_testing(spec.target, data, self.device)

    @property
    def batch_size(self) -> int:
        return self.protocol.batch_size

    @cached_property
    def images(self) -> Tensor:
        """The training part's images, bytes [N, C, H, W] on the device."""
        return self._take()

    def seek(self, step: int, timeline: Timeline, names: Iterable[str] = ("data",)) -> int:
        """Put what the input sets of a step need on the device.

        Returns:
            for how many steps it holds: until the epoch ends, or a smaller batch comes.
        """
        lengths = [MOST_STEPS]
        for name in names:
            domain = self._of(name)
            each = batches_per_epoch(len(domain.train), self.batch_size, self.protocol.last_batch)
            lengths.append(domain._seek(step, replace(timeline, batches_per_epoch=each)))
        return min(lengths)

    def _seek(self, step: int, timeline: Timeline) -> int:
        stream, epoch, position = place_of(step, timeline)
        self._draw(f"{self.prefix}{stream}", epoch)
        first, images = position * self.batch_size, len(self.train)
        size = min(self.batch_size, images - first)
        self.epoch.seek(first, size)
        whole = min(timeline.batches_per_epoch, images // self.batch_size)
        return max(whole - position, 1)

    def _draw(self, stream: str, epoch: int) -> None:
        """Have the order and the views of an epoch on the device."""
        if self._drawn != (stream, epoch):
            n = len(self.train)
            draws = self.augmentation.draw(generator(self.seed, f"{stream}augmentation", epoch), n)
            self.epoch.begin(permutation(n, self.seed, f"{stream}order", epoch), self.augmentation.view_id(draws))
            self._drawn = (stream, epoch)

    def sizes(self, names: Iterable[str]) -> tuple[int, ...]:
        """Images in the present batch of each of these input sets."""
        return tuple(self._of(name)._size for name in names)

    @property
    def _size(self) -> int:
        return len(self.epoch.rows)

    def feed(self, names: Iterable[str]) -> None:
        """The host's part of the coming step."""
        for name in names:
            self._of(name)._feed()

    def _feed(self) -> None:
        """Nothing for data that lie on the device."""

    def _of(self, name: str) -> Batches:
        """The domain that an input set comes from."""
        if name != TARGET:
            return self
        assert self.target is not None
        return self.target

    def sets(self, names: Iterable[str]) -> Sets:
        """The input sets of the present step that are asked for. Of the target domain images alone: even their
        positions would tell classes, by their order."""
        return {name: Batch(self._of(name).batch().images, None) if name == TARGET else self.batch() for name in names}

    def batch(self) -> Batch:
        """The data set's batch of the present step."""
        index, view = self.epoch.batch()
        return Batch(self.augmentation.view(self.images[index], view), self.train.labels[index], index, view)

    def advance(self, names: Iterable[str]) -> None:
        """Go on to the next step."""
        for name in names:
            self._of(name)._advance()

    def _advance(self) -> None:
        self.epoch.advance()

    def at(self, step: int, timeline: Timeline) -> Batch:
        """The data set's batch of any step. The steps before and after it have to be sought again."""
        self.seek(step, timeline)
        self.feed(["data"])
        return self.batch()


def place_of(step: int, timeline: Timeline) -> tuple[str, int, int]:
    """Prefix of the streams that a step draws from, its epoch, and its position in the epoch."""
    stream, number = ("extra/", step) if step < timeline.extra else ("", step - timeline.extra)
    return stream, *divmod(number, timeline.batches_per_epoch)


def unlabelled(data: ImageData | Pictures) -> ImageData | Pictures:
    """The training part of a data set without its labels (zeros stand in their place), and no test part."""
    if isinstance(data, Pictures):
        none = torch.zeros(len(data.train_files), dtype=torch.int64)
        return replace(data, train_labels=none, test_files=(), test_labels=none[:0])
    none = torch.zeros(len(data.train_images), dtype=torch.int64)
    return replace(data, train_labels=none, test_images=data.test_images[:0], test_labels=none[:0])


def split(spec: DataSpec, labels: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Indices of the labelled training part and of the validation part: seeded, stratified, disjoint."""
    split_seed = spec.split_seed if spec.split_seed is not None else seed
    train, held_out = torch.arange(len(labels)), torch.empty(0, dtype=torch.int64)
    if spec.validation:
        train, held_out = validation(labels, size=spec.validation, seed=split_seed)
    if spec.only_classes is not None:
        train = train[torch.isin(labels[train], torch.tensor(spec.only_classes))]
    if spec.fraction is not None or spec.per_class is not None:
        chosen = subset(labels[train], fraction=spec.fraction, per_class=spec.per_class, seed=split_seed)
        train = train[chosen]
    return train, held_out


def load_data(spec: DataSpec, roots: list[Path], download: bool, cache: Path) -> ImageData | Pictures:
    """The data set of a spec, checked against its card."""
    from kdbench.engine.build import resolve

    data: ImageData | Pictures = resolve(spec.target)(roots=roots, download=download, cache=cache, **spec.options)
    if isinstance(data, Pictures) != spec.streamed:
        raise UserError(
            f"the data set '{spec.name}' is {'not ' if spec.streamed else ''}read from disk while training, its card "
            f"says {'it is' if spec.streamed else 'nothing of it'}",
            hint="correct 'streamed' in the card",
        )
    found = [len(data.classes), len(data.train_labels), len(data.test_labels)]
    said = [spec.classes, spec.train, spec.test]
    if isinstance(data, ImageData):
        found += data.train_images.shape[1:]
        said += (spec.channels, spec.image_size, spec.image_size)
    if found != said:
        raise UserError(
            f"the data set '{spec.name}' is not what its card says: {found} against {said} "
            "(classes, training images, test images, channels, height, width)",
            hint="correct the card, or the files",
        )
    return data
