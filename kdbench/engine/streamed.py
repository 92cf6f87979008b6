"""A data set of pictures that stay on disk: decoded ahead by threads.

Where a picture is cropped is addressed like every draw: by (seed, "resized_crop", step), a row of numbers for each
picture of the batch. So it does not matter which thread decodes what, and a resumed cell sees the same batches.

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
from torch import Tensor

from kdbench.data.decoding import NUMBERS, centre, crop_box, picture, resized_crop
from kdbench.data.pictures import Pictures
from kdbench.data.streams import uniform
from kdbench.engine.batch import Batch
from kdbench.engine.domain import Domain, place_of, split
from kdbench.engine.ranks import ALONE, Ranks
from kdbench.recipe.specs import CellSpec
from kdbench.recipe.timeline import Timeline

MOST_THREADS = 16
BATCHES_AHEAD = 3


@dataclass(frozen=True)
class Drawn:
    """What a batch is made of. All int64 [N]: positions in the training split, and views; and of each picture the
    numbers that its crop is made from (None: its centre)."""

    index: Tensor
    view: Tensor
    crops: Sequence[list[float] | None]


@dataclass(frozen=True)
class StreamedSplit:
    """Picture files with labels. Images come as their centres, bytes [N, channels, size, size] on the device."""

    files: Sequence[Path]
    labels: Tensor
    short_side: int
    size: int
    channels: int
    resident: ClassVar[bool] = False

    def __len__(self) -> int:
        return len(self.files)

    def slices(self, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        every = torch.arange(len(self.files))
        batches = (Drawn(index, index, [None] * len(index)) for index in (every.split(size) if len(every) else ()))
        for drawn, images in decoded(self, (), batches):
            yield images, self.labels[int(drawn.index[0]) : int(drawn.index[-1]) + 1]

    def every(self, stride: int) -> StreamedSplit:
        return replace(self, files=self.files[::stride], labels=self.labels[::stride])


class StreamedDomain(Domain):
    """Pictures that are decoded when they are needed.

    Orders, mirrors and padded crops are drawn as for resident data. With `resized_crop` in the protocol a part of each
    picture is cropped and resized; without, its centre is taken.
    """

    def __init__(
        self, spec: CellSpec, data: Pictures, device: torch.device, prefix: str = "", ranks: Ranks = ALONE
    ) -> None:
        train, held_out = split(spec.data, data.train_labels, spec.seed)

        def of(files: Sequence[Path], labels: Tensor) -> StreamedSplit:
            return StreamedSplit(files, labels.to(device), data.short_side, spec.data.image_size, spec.data.channels)

        self.pictures = of([data.train_files[i] for i in train.tolist()], data.train_labels[train])
        validation = of([data.train_files[i] for i in held_out.tolist()], data.train_labels[held_out])
        super().__init__(spec, device, prefix, self.pictures, validation, ranks)
        if spec.data.tested_on == "test":
            self.test = of(data.test_files, data.test_labels)
        self.area = tuple(spec.protocol.augmentation.resized_crop or ())
        self.anew()

    def anew(self) -> None:
        self._decoding: Iterator[tuple[Drawn, Tensor]] = iter(())
        self._next: int | None = None
        # Pictures, indices and views of the present batch, in tensors that stay for every size of batch.
        self._held: dict[int, tuple[Tensor, ...]] = {}
        self._present: tuple[Tensor, ...] = ()

    def _seek(self, step: int, timeline: Timeline) -> int:
        """Steps in order are decoded ahead; any other begins anew there."""
        if self._next != step:
            self._decoding = decoded(self.pictures, self.area, self._drawn(step, timeline))
        self._next = step
        return timeline.total - step

    def feed(self) -> None:
        """Take the pictures of the coming step, which were decoded meanwhile."""
        super().feed()
        assert self._next is not None
        self._next += 1
        drawn, images = next(self._decoding)
        new = (images, drawn.index.to(self.device), drawn.view.to(self.device))
        self._present = self._held.setdefault(len(images), new)
        if self._present is not new:
            for tensor, value in zip(self._present, new, strict=True):
                tensor.copy_(value)

    def batch(self) -> Batch:
        images, index, view = self._present
        return Batch(self.augmentation.view(images, view), self.train.labels[index], index, view)

    def _drawn(self, step: int, timeline: Timeline) -> Iterator[Drawn]:
        """What each batch from a step on is made of."""
        here: tuple[str, int] | None = None
        for number in range(step, timeline.total):
            stream, epoch, position = place_of(number, timeline)
            if here != (stream, epoch):
                here = (stream, epoch)
                order, views = self.draws(stream, epoch)
            part = slice(position * self.batch_size, (position + 1) * self.batch_size)
            crops: Sequence[list[float] | None] = [None] * len(order[part])
            if self.area:
                of_stream = epoch * timeline.batches_per_epoch + position
                name = f"{self.prefix}{stream}{self.views}resized_crop"
                crops = uniform(len(crops) * NUMBERS, self.seed, name, of_stream).reshape(-1, NUMBERS).tolist()
            share = self.ranks.share(len(crops))
            yield Drawn(order[part][share], views[part][share], crops[share])


def decoded(split: StreamedSplit, area: Sequence[float], batches: Iterable[Drawn]) -> Iterator[tuple[Drawn, Tensor]]:
    """Batches in their order, each with its pictures, bytes [N, channels, size, size] on the split's device.

    They are decoded ahead by as many threads as the cell has (decoding and resizing hold no lock of Python's); with one
    thread, when they are needed.
    """
    device = split.labels.device

    def decode(index: int, numbers: list[float] | None) -> Tensor:
        image = picture(split.files[index], split.channels)
        if numbers is None:
            return centre(image, split.short_side, split.size)
        return resized_crop(image, crop_box(numbers, image.height, image.width, area), split.size)

    def together(images: Iterable[Tensor]) -> Tensor:
        batch = torch.stack(list(images))
        return batch.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else batch

    threads = min(torch.get_num_threads(), MOST_THREADS)
    if threads == 1:
        for drawn in batches:
            yield drawn, together(map(decode, drawn.index.tolist(), drawn.crops))
        return
    with ThreadPoolExecutor(threads) as pool:
        waiting: deque[tuple[Drawn, list[Future[Tensor]]]] = deque()
        try:
            for drawn in batches:
                crops = zip(drawn.index.tolist(), drawn.crops, strict=True)
                waiting.append((drawn, [pool.submit(decode, index, numbers) for index, numbers in crops]))
                if len(waiting) > BATCHES_AHEAD:
                    first, images = waiting.popleft()
                    yield first, together(image.result() for image in images)
            for first, images in waiting:
                yield first, together(image.result() for image in images)
        finally:
            pool.shutdown(cancel_futures=True)
