"""Batches of pictures that stay on disk, behind the interface of `Batches`: decoded ahead by threads.

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

from kdbench.data.augment import Augmentation
from kdbench.data.decoding import NUMBERS, centre, crop_box, picture, resized_crop
from kdbench.data.images import ImageData
from kdbench.data.pictures import Pictures
from kdbench.data.streams import generator, permutation, uniform
from kdbench.engine.batches import Batch, Batches, Part, ResidentPart, place_of, split
from kdbench.recipe.specs import CellSpec, DataSpec
from kdbench.recipe.timeline import Timeline

MOST_THREADS = 16
BATCHES_AHEAD = 3

# Index of a picture, and the numbers that its crop is made from (None: its centre).
Address = tuple[int, list[float] | None]


@dataclass(frozen=True)
class StreamedPart:
    """A fixed set of pictures with labels. Images come as their centres, bytes [N, 3, size, size] on the device."""

    files: Sequence[Path]
    labels: Tensor
    short_side: int
    size: int
    resident: ClassVar[bool] = False

    def __len__(self) -> int:
        return len(self.files)

    def slices(self, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        addresses: list[Address] = [(i, None) for i in range(len(self.files))]
        parts = [addresses[start : start + size] for start in range(0, len(addresses), size)]
        start = 0
        for images in _decoded(self, (), parts, self.labels.device):
            yield images, self.labels[start : start + len(images)]
            start += len(images)

    def every(self, stride: int) -> StreamedPart:
        """Every stride-th picture."""
        return StreamedPart(self.files[::stride], self.labels[::stride], self.short_side, self.size)


class StreamedBatches(Batches):
    """Training, validation and test parts of one (data, protocol, seed) that are decoded when they are needed.

    Orders, mirrors and padded crops are drawn as for resident data. With `resized_crop` in the protocol a part of each
    picture is cropped and resized; without, its centre is taken.
    """

    def __init__(
        self,
        spec: CellSpec,
        data: Pictures,
        device: torch.device,
        target: ImageData | Pictures | None = None,
        prefix: str = "",
    ) -> None:
        train, held_out = split(spec.data, data.train_labels, spec.seed)
        size = spec.data.image_size

        def part(files: Sequence[Path], labels: Tensor) -> StreamedPart:
            return StreamedPart(files, labels.to(device), data.short_side, size)

        self.pictures = part([data.train_files[i] for i in train.tolist()], data.train_labels[train])
        self.train: Part = self.pictures
        self.validation: Part = part([data.train_files[i] for i in held_out.tolist()], data.train_labels[held_out])
        self.test: Part = part(data.test_files, data.test_labels)
        self._set_up(spec, device, prefix)
        area = tuple(spec.protocol.augmentation.resized_crop or ())
        self.drawing = _Drawing(spec.seed, len(train), self.batch_size, self.augmentation, area, prefix)
        self._decoding: Iterator[Tensor] = iter(())
        self._next: int | None = None
        # Indices and views of the batches that are being decoded, the next one first.
        self._ahead: deque[tuple[Tensor, Tensor]] = deque()
        # Pictures, indices and views of the present batch, in tensors that stay for every size of batch.
        self._held: dict[int, tuple[Tensor, ...]] = {}
        self._present: tuple[Tensor, ...] = ()
        self._add_target(spec, target)

    def _seek(self, step: int, timeline: Timeline) -> int:
        """Steps in order are decoded ahead; any other begins anew there."""
        if self._next != step:
            self._ahead = deque()
            parts = self.drawing.addresses(step, timeline, self._ahead)
            self._decoding = _decoded(self.pictures, self.drawing.area, parts, self.device)
        self._next, self._timeline = step, timeline
        position = place_of(step, timeline)[2]
        return max(min(timeline.batches_per_epoch, len(self.train) // self.batch_size) - position, 1)

    @property
    def _size(self) -> int:
        assert self._next is not None
        first = place_of(self._next, self._timeline)[2] * self.batch_size
        return min(self.batch_size, len(self.train) - first)

    def _feed(self) -> None:
        """Take the pictures of the coming step, which were decoded meanwhile."""
        assert self._next is not None
        self._next += 1
        images = next(self._decoding)
        self._hold(images, *(drawn.to(self.device) for drawn in self._ahead.popleft()))

    def _hold(self, *present: Tensor) -> None:
        """Keep a batch in the same tensors as the one before, where it has their shapes."""
        self._present = self._held.setdefault(len(present[0]), present)
        if self._present is not present:
            for tensor, new in zip(self._present, present, strict=True):
                tensor.copy_(new)

    def batch(self) -> Batch:
        images, index, view = self._present
        return Batch(self.augmentation.view(images, view), self.train.labels[index], index, view)

    def at(self, step: int, timeline: Timeline) -> Batch:
        # The next batch will lie in the same tensors, and who asks for any step may keep what it gets.
        batch = super().at(step, timeline)
        assert batch.index is not None and batch.view is not None
        return replace(batch, images=batch.images.clone(), index=batch.index.clone(), view=batch.view.clone())

    def _advance(self) -> None:
        """Nothing: feeding goes on."""


@dataclass(frozen=True)
class _Drawing:
    """What decides about the batches. Apart from them: what decodes ahead must not keep its owner alive."""

    seed: int
    images: int
    batch_size: int
    augmentation: Augmentation
    area: tuple[float, ...]
    prefix: str = ""

    def addresses(self, step: int, timeline: Timeline, ahead: deque[tuple[Tensor, Tensor]]) -> Iterator[list[Address]]:
        """What each batch from a step on is made of; its indices and views are appended to `ahead`."""
        drawn: tuple[str, int] | None = None
        for number in range(step, timeline.total):
            stream, epoch, position = place_of(number, timeline)
            stream = self.prefix + stream
            if drawn != (stream, epoch):
                drawn = (stream, epoch)
                order = permutation(self.images, self.seed, f"{stream}order", epoch)
                source = generator(self.seed, f"{stream}augmentation", epoch)
                views = self.augmentation.view_id(self.augmentation.draw(source, self.images))
            part = slice(position * self.batch_size, (position + 1) * self.batch_size)
            index, view = order[part], views[part]
            ahead.append((index, view))
            rows: Sequence[list[float] | None] = [None] * len(index)
            if self.area:
                of_stream = epoch * timeline.batches_per_epoch + position
                numbers = uniform(len(index) * NUMBERS, self.seed, f"{stream}resized_crop", of_stream)
                rows = numbers.reshape(-1, NUMBERS).tolist()
            yield list(zip(index.tolist(), rows, strict=True))


def batches_of(
    spec: CellSpec,
    data: ImageData | Pictures,
    device: torch.device,
    target: ImageData | Pictures | None = None,
    prefix: str = "",
) -> Batches:
    """The batch source that suits the data."""
    if isinstance(data, Pictures):
        return StreamedBatches(spec, data, device, target, prefix)
    return Batches(spec, data, device, target, prefix)


def part_for_testing(spec: DataSpec, data: ImageData | Pictures, device: torch.device) -> Part:
    """The test part alone, without a split of the training set."""
    labels = data.test_labels.to(device)
    if isinstance(data, Pictures):
        return StreamedPart(data.test_files, labels, data.short_side, spec.image_size)
    return ResidentPart(data.test_images.to(device), labels)


def _decoded(
    part: StreamedPart, area: Sequence[float], parts: Iterable[list[Address]], device: torch.device
) -> Iterator[Tensor]:
    """Batches of pictures in the order of their addresses, bytes [N, 3, size, size] on the device.

    They are decoded ahead by as many threads as the cell has (decoding and resizing hold no lock of Python's); with one
    thread, when they are needed.
    """

    def decode(address: Address) -> Tensor:
        index, numbers = address
        image = picture(part.files[index])
        if numbers is None:
            return centre(image, part.short_side, part.size)
        return resized_crop(image, crop_box(numbers, image.height, image.width, area), part.size)

    def together(images: Iterable[Tensor]) -> Tensor:
        batch = torch.stack(list(images))
        return batch.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else batch

    threads = min(torch.get_num_threads(), MOST_THREADS)
    if threads == 1:
        for addresses in parts:
            yield together(map(decode, addresses))
        return
    with ThreadPoolExecutor(threads) as pool:
        waiting: deque[list[Future[Tensor]]] = deque()
        try:
            for addresses in parts:
                waiting.append([pool.submit(decode, address) for address in addresses])
                if len(waiting) > BATCHES_AHEAD:
                    yield together(image.result() for image in waiting.popleft())
            while waiting:
                yield together(image.result() for image in waiting.popleft())
        finally:
            pool.shutdown(cancel_futures=True)
