"""A cell's data on its device: the input sets of every step, and the splits on which it is tested."""

from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import cached_property

import torch
from torch import Tensor

from kdbench.data.pictures import AnyData, Pictures
from kdbench.engine.data.batch import MOST_STEPS, SECOND, TARGET, Batch, Sets, Split
from kdbench.engine.data.domain import Domain
from kdbench.engine.data.resident import ResidentDomain
from kdbench.engine.data.streamed import StreamedDomain, split_for_testing
from kdbench.engine.ranks import ALONE, Ranks
from kdbench.recipe.specs import CellSpec
from kdbench.recipe.timeline import Timeline


class Batches:
    """The data of one (data, target, protocol, seed), which all cells of a cohort share.

    Attributes:
        source: the data set, labelled.
        target: the target domain, where the cell has one, with orders and views of its own; its epochs go round beside
            the source's.
        second: the source's batches in other views, for whoever reads them.
        test: the test split that counts: of the target domain, where there is one. source_test: then the source's.

    Args:
        target: the target domain's data, where the cell has one. The labels of its training images are not read.
        ranks: that share every batch out.
    """

    def __init__(
        self, spec: CellSpec, data: AnyData, device: torch.device, target: AnyData | None = None, ranks: Ranks = ALONE
    ) -> None:
        self.device, self.batch_size, self.ranks = device, spec.protocol.batch_size, ranks
        self.image_shape = spec.data.image_shape
        self.source = _domain(spec, data, device, ranks)
        self._for_second: Callable[[], Domain] = lambda: self.source
        if (other := spec.protocol.second) is not None:
            seen = spec.model_copy(update={"protocol": spec.protocol.model_copy(update={"augmentation": other})})
            self._for_second = lambda: _domain(seen, data, device, ranks)
        self.train, self.validation = self.source.train, self.source.validation
        # Tested on the test set, unless the cell is tested on images held out of its training set.
        counts = spec.data.tested_on == "test"
        self.test = split_for_testing(spec.data, data, device) if counts else self.validation
        self.target: Domain | None = None
        self.source_test: Split | None = None
        if spec.target is not None:
            if target is None:
                raise ValueError("this cell has a target domain, whose data were not given")
            cell = spec.model_copy(update={"data": spec.target, "target": None})
            self.target = _domain(cell, _unlabelled(target), device, ranks, f"{TARGET}/")
            self.source_test, self.test = self.test, split_for_testing(spec.target, target, device)

    @cached_property
    def second(self) -> Domain:
        return self._for_second().second()

    @property
    def positions(self) -> Tensor:
        """int64 [N], places of the training split's images in the whole training set, of data on the device."""
        assert isinstance(self.source, ResidentDomain)
        return self.source.positions

    def seek(self, step: int, timeline: Timeline, names: Iterable[str] = ("data",)) -> int:
        """Put what the input sets of a step need on the device.

        Returns:
            for how many steps it holds.
        """
        return min([MOST_STEPS, *(self._of(name).seek(step, timeline) for name in names)])

    def sizes(self, names: Iterable[str]) -> tuple[int, ...]:
        """Images in the batch of each of these input sets that was fed, on all ranks."""
        return tuple(self._of(name).size for name in names)

    def feed(self, names: Iterable[str]) -> None:
        """The host's part of the coming step."""
        for name in names:
            self._of(name).feed()

    def sets(self, names: Iterable[str]) -> Sets:
        """The input sets of the present step that are asked for. Of the target domain images alone: even their
        positions would tell classes, by their order."""
        batches = {name: self._of(name).batch() for name in names}
        return {name: Batch(batch.images, None) if name == TARGET else batch for name, batch in batches.items()}

    def advance(self, names: Iterable[str]) -> None:
        """Go on to the next step."""
        for name in names:
            self._of(name).advance()

    def at(self, step: int, timeline: Timeline) -> Batch:
        """The data set's batch of any step, which may be kept. Other steps have to be sought again."""
        self.source.seek(step, timeline)
        self.source.feed()
        batch = self.source.batch()
        assert batch.index is not None and batch.view is not None
        return replace(batch, images=batch.images.clone(), index=batch.index.clone(), view=batch.view.clone())

    def _of(self, name: str) -> Domain:
        """The domain that an input set comes from."""
        if name == SECOND:
            return self.second
        if name != TARGET:
            return self.source
        assert self.target is not None
        return self.target


def _domain(spec: CellSpec, data: AnyData, device: torch.device, ranks: Ranks, prefix: str = "") -> Domain:
    chosen = spec.protocol.augmentation
    if isinstance(data, Pictures) or chosen.resized_crop or chosen.transforms:
        return StreamedDomain(spec, data, device, prefix, ranks)
    return ResidentDomain(spec, data, device, prefix, ranks)


def _unlabelled(data: AnyData) -> AnyData:
    """The training split of a data set without its labels (zeros stand in their place), and no test split."""
    if isinstance(data, Pictures):
        none = torch.zeros(len(data.train_files), dtype=torch.int64)
        return replace(data, train_labels=none, test_files=(), test_labels=none[:0])
    none = torch.zeros(len(data.train_images), dtype=torch.int64)
    return replace(data, train_labels=none, test_images=data.test_images[:0], test_labels=none[:0])
