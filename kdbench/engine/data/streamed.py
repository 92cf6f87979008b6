"""Images that the processor prepares ahead of the steps, by threads: pictures that stay on disk, and images in memory
that are cropped and resized, or transformed one by one.

What is drawn for a picture is addressed like every draw: by (seed, "resized_crop" or "transforms", step), a row of
numbers for each picture of the batch. So it does not matter which thread decodes what, and a resumed cell sees the same
batches.

Threads, not a DataLoader's processes: a worker has threads of its own, beside which forked processes hang.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import torch
from PIL import Image
from torch import Tensor

from kdbench.data.augment import Augmentation
from kdbench.data.decoding import NUMBERS, as_bytes, as_image, crop_box, decoded_crop, mirrored, picture, resized_crop
from kdbench.data.images import ImageData
from kdbench.data.listing import centred
from kdbench.data.pictures import AnyData, Pictures
from kdbench.data.streams import uniform, words
from kdbench.data.transforms import Transform, Transforms
from kdbench.engine.data.batch import Batch, Split, at_once
from kdbench.engine.data.domain import Domain, place_of, split
from kdbench.engine.data.resident import ResidentSplit
from kdbench.engine.ranks import Ranks
from kdbench.engine.targets import code_of, import_target
from kdbench.errors import UserError
from kdbench.recipe.model_specs import DataSpec
from kdbench.recipe.specs import AugmentationSpec, CellSpec
from kdbench.recipe.timeline import Timeline

MOST_THREADS = 16
BATCHES_AHEAD = 3
# Seeds with which a transform is tried before it trains.
SEEDS_TRIED = 8


@dataclass(frozen=True)
class Drawn:
    """What a batch is made of. All int64 [N]: positions in the training split, and views; and of each picture the
    numbers that its crop is made from (None: its centre), and the seed of its transforms."""

    index: Tensor
    view: Tensor
    crops: Sequence[list[float] | None]
    seeds: Sequence[int] = ()


@dataclass(frozen=True)
class Making:
    """What is made of a picture on the processor: a random crop of a share of its area, else its centre; and where
    there are transforms, these, after the crop and mirror that the device makes otherwise.

    Attributes:
        decoder: of the protocol's augmentation.
    """

    area: Sequence[float] = ()
    decoder: str | None = None
    transforms: Transforms | None = None
    augmentation: Augmentation = Augmentation()


@dataclass(frozen=True)
class StreamedSplit:
    """Pictures with labels: files, or images in memory, bytes [N, channels, size, size]. They come as their centres,
    bytes [N, channels, size, size] on the device."""

    pictures: Sequence[Path] | Tensor
    labels: Tensor
    short_side: int
    size: int
    channels: int
    resident: ClassVar[bool] = False

    def __len__(self) -> int:
        return len(self.pictures)

    def slices(self) -> Iterator[tuple[Tensor, Tensor]]:
        size = at_once(self.labels.device, self.size)
        every = torch.arange(len(self.pictures))
        batches = (Drawn(index, index, [None] * len(index)) for index in (every.split(size) if len(every) else ()))
        for drawn, images in decoded(self, Making(), batches):
            yield images, self.labels[int(drawn.index[0]) : int(drawn.index[-1]) + 1]

    def every(self, stride: int) -> StreamedSplit:
        return replace(self, pictures=self.pictures[::stride], labels=self.labels[::stride])

    def picture(self, index: int) -> Image.Image:
        """A picture, decoded."""
        if isinstance(self.pictures, Tensor):
            return as_image(self.pictures[index])
        return picture(self.pictures[index], self.channels)


class StreamedDomain(Domain):
    """Pictures that are made ready when they are needed.

    Orders, mirrors and padded crops are drawn as for resident data. With `resized_crop` in the protocol a part of each
    picture is cropped and resized; without, its centre is taken.
    """

    def __init__(self, spec: CellSpec, data: AnyData, device: torch.device, prefix: str, ranks: Ranks) -> None:
        train, held_out = split(spec.data, data.train_labels, spec.seed)
        size, channels = spec.data.image_size, spec.data.channels

        def of(index: Tensor) -> StreamedSplit:
            labels = data.train_labels[index].to(device)
            if isinstance(data, ImageData):
                return StreamedSplit(data.train_images[index], labels, size, size, channels)
            return StreamedSplit([data.train_files[i] for i in index.tolist()], labels, data.short_side, size, channels)

        self.pictures = of(train)
        super().__init__(spec, device, prefix, self.pictures, of(held_out), ranks)
        chosen = spec.protocol.augmentation
        self.making = Making(tuple(chosen.resized_crop or ()), chosen.decoder, transforms_of(chosen), self.augmentation)
        # Before a share of the batch comes the picture with which its first one is mixed.
        self.before = 1 if chosen.mix is not None and ranks.size > 1 else 0
        self.anew()

    def anew(self) -> None:
        super().anew()
        self._decoding: Iterator[tuple[Drawn, Tensor]] = iter(())
        # The step of the next batch that is decoded ahead, and the one before which there are no more.
        self._ahead = (-1, -1)
        # Pictures, indices and views of the present batch, in tensors that stay for every size of batch.
        self._held: dict[int, tuple[Tensor, ...]] = {}
        self._present: tuple[Tensor, ...] = ()

    def _seek(self, step: int, timeline: Timeline) -> int:
        """Steps in order are decoded ahead, to the end of the cell that asks; any other begins anew there."""
        if self._ahead != (step, timeline.total):
            self._decoding = decoded(self.pictures, self.making, self._drawn(step, timeline))
        self._ahead = step, timeline.total
        return timeline.total - step

    def feed(self) -> None:
        """Take the pictures of the coming step, which were decoded meanwhile."""
        super().feed()
        step, end = self._ahead
        self._ahead = step + 1, end
        drawn, images = next(self._decoding)
        new = (images, *(on(self.device, one) for one in (drawn.index, drawn.view)))
        self._present = self._held.setdefault(len(images), new)
        if self._present is not new:
            for tensor, value in zip(self._present, new, strict=True):
                tensor.copy_(value)

    def batch(self) -> Batch:
        images, index, view = self._present
        if self.making.transforms is None:
            images = self.augmentation.view(images, view)
        labels, own = self.train.labels[index], slice(self.before, None)
        if self.mixing is None:
            return Batch(images, labels, index, view)
        others, other_labels = images.roll(1, 0)[own], labels.roll(1)[own]
        images, labels = self.mixing.mixed(images[own], labels[own], others, other_labels)
        return Batch(images, labels, index[own], view[own])

    def _drawn(self, step: int, timeline: Timeline) -> Iterator[Drawn]:
        """What each batch from a step on is made of."""
        here: tuple[str, int] | None = None
        for number in range(step, timeline.total):
            stream, epoch, position = place_of(number, timeline)
            if here != (stream, epoch):
                here = (stream, epoch)
                order, views = self.draws(stream, epoch)
            part = slice(position * self.batch_size, (position + 1) * self.batch_size)
            n, of_stream = len(order[part]), epoch * timeline.batches_per_epoch + position
            name = f"{self.prefix}{stream}{self.views}"
            share = self.ranks.share(n)
            first, last = (share.start - self.before, share.stop) if self.ranks.size > 1 else (0, n)
            rows = [row % n for row in range(first, last)]
            crops: Sequence[list[float] | None] = [None] * len(rows)
            if self.making.area:
                numbers = uniform(n * NUMBERS, self.seed, f"{name}resized_crop", of_stream).reshape(n, NUMBERS)
                crops = numbers[rows].tolist()
            seeds: Sequence[int] = ()
            if self.making.transforms is not None:
                seeds = words(n, self.seed, f"{name}transforms", of_stream)[rows].tolist()
            yield Drawn(order[part][rows], views[part][rows], crops, seeds)


def transforms_of(chosen: AugmentationSpec) -> Transforms | None:
    """The transforms of an augmentation, None where it has none.

    Raises:
        UserError: one cannot be made of its options.
    """
    parts: list[tuple[str, Transform]] = []
    for one in chosen.transforms or ():
        with code_of(f"the transform '{one.name}' cannot be made by '{one.target}'", one.target):
            part = import_target(one.target)(**one.options)
        if not callable(part):
            what = f"the transform '{one.name}': '{one.target}' gives {type(part).__name__}"
            raise UserError(what, hint="the card's function takes options, and returns what is called with a picture")
        parts.append((one.name, part))
    return Transforms(parts) if parts else None


def check_transforms(chosen: AugmentationSpec, data: DataSpec) -> None:
    """Have the transforms of an augmentation change one picture of noise, with a few seeds twice each.

    Raises:
        UserError: they cannot, or one draws elsewhere: a resumed cell, and another method, would see other pictures.
    """
    if (transforms := transforms_of(chosen)) is not None:
        noise = torch.randint(0, 256, data.image_shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
        try:
            image = as_image(noise)
        except TypeError:
            raise UserError(f"transforms take pictures of 1 or 3 channels, '{data.name}' has {data.channels}") from None
        for name, part in transforms.parts:
            alone = Transforms([(name, part)])
            for seed in range(SEEDS_TRIED):
                first, again = (as_bytes(alone(image.copy(), seed)) for _ in range(2))
                if not torch.equal(first, again):
                    what = f"the transform '{name}' makes two different pictures of one, with the same draws of torch"
                    hint = "let it draw with torch's functions (torch.rand, torch.randint, Tensor.uniform_) alone"
                    raise UserError(what, hint=hint)
        transforms(image, 0)


def on(device: torch.device, made: Tensor) -> Tensor:
    """What the processor made, on a device, which has not to have done all that came before it."""
    return made.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else made


def decoded(split: StreamedSplit, making: Making, batches: Iterable[Drawn]) -> Iterator[tuple[Drawn, Tensor]]:
    """Batches in their order, each with its pictures, bytes [N, channels, size, size] on the split's device.

    They are decoded ahead by as many threads as the cell has (decoding and resizing hold no lock of Python's); with one
    thread, when they are needed.
    """
    device = split.labels.device

    def cropped(index: int, numbers: list[float] | None) -> Image.Image | Tensor:
        """A picture as the device takes it, before it is mirrored."""
        if numbers is not None and making.decoder is not None and not isinstance(split.pictures, Tensor):
            return decoded_crop(split.pictures[index], numbers, making.area, split.size, split.channels)
        image = split.picture(index)
        if numbers is None:
            return centred(image, split.short_side, split.size)
        return resized_crop(image, crop_box(numbers, image.height, image.width, making.area), split.size)

    def decode(drawn: Drawn, at: int) -> Tensor:
        made = cropped(int(drawn.index[at]), drawn.crops[at])
        if making.transforms is None:
            return made if isinstance(made, Tensor) else as_bytes(made)
        if making.augmentation.padding:
            made = as_bytes(made) if isinstance(made, Image.Image) else made
            made = making.augmentation.view(made.unsqueeze(0), drawn.view[at : at + 1])[0]
            flipped = False
        else:
            flipped = bool(making.augmentation.parts(drawn.view[at])[2])
        image = as_image(made) if isinstance(made, Tensor) else made
        return as_bytes(making.transforms(mirrored(image) if flipped else image, drawn.seeds[at]))

    def together(images: Iterable[Tensor]) -> Tensor:
        return on(device, torch.stack(list(images)))

    threads = min(torch.get_num_threads(), MOST_THREADS)
    if threads == 1:
        for drawn in batches:
            yield drawn, together(decode(drawn, at) for at in range(len(drawn.index)))
        return
    with ThreadPoolExecutor(threads) as pool:
        waiting: deque[tuple[Drawn, list[Future[Tensor]]]] = deque()
        try:
            for drawn in batches:
                waiting.append((drawn, [pool.submit(decode, drawn, at) for at in range(len(drawn.index))]))
                if len(waiting) > BATCHES_AHEAD:
                    first, images = waiting.popleft()
                    yield first, together(image.result() for image in images)
            for first, images in waiting:
                yield first, together(image.result() for image in images)
        finally:
            pool.shutdown(cancel_futures=True)


def split_for_testing(spec: DataSpec, data: AnyData, device: torch.device) -> Split:
    """The test split alone, without a split of the training set."""
    labels = data.test_labels.to(device)
    if isinstance(data, Pictures):
        return StreamedSplit(data.test_files, labels, data.short_side, spec.image_size, spec.channels)
    return ResidentSplit(data.test_images.to(device), labels)
