"""Batches of synthesized images, in passes over a pool that may grow while a cell trains. How images are made is a
subclass's matter; that they are kept, shown, counted and found again by a resumed cell is told here.
"""

from __future__ import annotations

import time
from abc import abstractmethod
from collections.abc import Callable, Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor

from kdbench.data.augment import Augmentation
from kdbench.data.streams import generator, permutation
from kdbench.engine.data.batch import Batch, Epoch
from kdbench.engine.inputs import Source, SourceContext, SourceStep
from kdbench.errors import CellError, UserError
from kdbench.methods.deep_inversion.inversion import Synthesized
from kdbench.methods.deep_inversion.made import SIDE, About, MadeImages, halves
from kdbench.version import __version__

FOLDER = "synthesized"
# Bytes of a value as the images are kept.
HALF = 2


class PooledImages(Source):
    """Gives images and the labels that they were made for: of the classes that the teacher was trained on.

    Args:
        images: of a batch of the pool.
        every: steps after which a batch is added that is made against the student as it is; 0: never.
        augment: crop and mirror images as the protocol does with real ones.
        as_set: name of the input set, as the card's `gives` has it: "data" in place of the data set's, or another.

    Attributes:
        at_begin: batches that are added before the first step.
        own: where the cell keeps what it adds; set by subclasses that know what to write there.
        added: number, sha256 and seconds of each batch that was added.
    """

    streams: ClassVar[tuple[str, ...]] = ("synthesized/order", "synthesized/augmentation")
    by_step = None
    at_begin: ClassVar[int] = 0
    own: MadeImages | None = None

    def __init__(
        self, context: SourceContext, images: int, every: int, augment: bool = True, as_set: str = "data"
    ) -> None:
        spec = context.spec
        if context.teacher is None or spec.teacher is None:
            raise UserError("images are synthesized from a teacher, and this cell has none")
        self.context, self.teacher, self.as_set = context, context.teacher, as_set
        self.size, self.every = images, every
        self.seed, self.batch_size = spec.seed, spec.protocol.batch_size
        known = spec.teacher.knows(spec.data)
        self.classes = spec.teacher.known_classes or list(range(known.classes))
        self.image_shape = known.image_shape
        crop = spec.protocol.augmentation
        # Images have their size: where real ones are cut out of larger pictures, these are only mirrored.
        self.augmentation = Augmentation(crop.padding, crop.mode, crop.flip) if augment else Augmentation()
        self.notes = {"data": known.name, "data_classes": known.classes}
        self.added: list[tuple[int, str, float]] = []
        # Images, float16 [n, C, H, W], and labels, int64 [n], on the device, once they are asked for.
        self._images: tuple[Tensor, Tensor] | None = None
        # Growth and number of the pass whose order is on the device.
        self._pass: tuple[int, int] | None = None
        self.epoch = Epoch(context.device)

    @abstractmethod
    def first_images(self) -> tuple[Tensor, Tensor]:
        """Images and labels that are there before any is added."""

    @abstractmethod
    def made(self, growth: int, now: SourceStep, stopping: Callable[[], bool]) -> Synthesized | None:
        """The batch of a growth, which begins at 1; None when stopped: then there is nothing of it."""

    def made_of(self, seed: int, settings: dict[str, Any]) -> dict[str, Any]:
        """What decides about images, the machine left out."""
        teacher = self.context.spec.teacher
        assert teacher is not None
        return {
            "teacher_sha256": self.context.files.teacher_sha256,
            **teacher.choice,
            "teacher": teacher.model.name,
            "normalization": teacher.normalization.model_dump(mode="json"),
            "classes": self.classes,
            "image_shape": list(self.image_shape),
            "images_per_batch": self.size,
            "seed": seed,
            "settings": settings,
        }

    def own_folder(self, key: dict[str, Any]) -> MadeImages | None:
        """Where a cell keeps what it adds; nowhere if it only tries something out."""
        folder = self.context.files.folder
        return MadeImages(folder / FOLDER / self.context.stage, key, self.notes) if folder is not None else None

    def bounded(self, made: Synthesized, batch: int) -> Synthesized:
        """A batch whose values can be kept. UserError for another."""
        if not bool(torch.isfinite(halves(made.images)).all()):
            name = self.teacher.extractor.model_name
            what = f"the images synthesized from '{name}' grew out of all bounds in batch {batch}"
            raise UserError(what, hint="try a smaller learning rate ('rate'), or smaller weights")
        return made

    def about(self, made: Synthesized, start: float) -> dict[str, Any]:
        """What a batch's JSON file says beside its sha256."""
        return {
            "terms": made.terms,
            "seconds": round(time.monotonic() - start, 3),
            "kdbench": __version__,
            "torch": torch.__version__,
            "device": self.context.device.type,
            "threads": torch.get_num_threads(),
        }

    @property
    def images(self) -> tuple[Tensor, Tensor]:
        """The first images, made or read when they are first asked for, and what was added."""
        if self._images is None:
            self._images = self._on_device(*self.first_images())
        return self._images

    def add(self, images: Tensor, labels: Tensor, more: dict[str, Tensor]) -> None:
        """Take a batch into the pool, just made or read again."""
        both = zip(self.images, self._on_device(images, labels), strict=True)
        held, known = (torch.cat(values) for values in both)
        self._images = held, known

    def _on_device(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        return halves(images).to(self.context.device), labels.to(self.context.device)

    def ready(self, now: SourceStep, tell: Callable[[str], None], stopping: Callable[[], bool]) -> bool:
        growth, _ = self._growth(now)
        if growth > len(self.added) and not self._grow(growth, now, tell, stopping):
            return False
        self._seek(now)
        return True

    def stretch(self, now: SourceStep) -> int:
        """Until the pass over the pool ends, or it grows."""
        _, since = self._growth(now)
        each = max(self.memory() // self.batch_size, 1)
        left = each - since % each
        return min(left, self.every - since) if self.every else left

    def memory(self) -> int:
        return len(self.images[1])

    def _growth(self, now: SourceStep) -> tuple[int, int]:
        """How many batches are to be added by a step, and the steps since the last of them."""
        done = now.step - now.begin
        grown, since = divmod(done, self.every) if self.every and not now.ahead else (0, done)
        return self.at_begin + grown, since

    def _seek(self, now: SourceStep) -> None:
        """Have the pass over the pool that a step belongs to on the device, at its batch."""
        growth, since = self._growth(now)
        assert now.ahead or growth == len(self.added), "asked for a step that was not made ready"
        n = self.memory()
        number, position = divmod(since, max(n // self.batch_size, 1))
        if self._pass != (growth, number):
            of_growth = f"/{growth}" if growth else ""
            source = generator(self.seed, f"synthesized/augmentation{of_growth}", number)
            views = self.augmentation.draw(source, n)
            self.epoch.begin(permutation(n, self.seed, f"synthesized/order{of_growth}", number), views)
            self._pass = (growth, number)
        first = position * self.batch_size
        self.epoch.seek(first, min(self.batch_size, n - first))

    def sets(self, now: SourceStep) -> dict[str, Batch]:
        if now.ahead:
            self._seek(now)
        index, view = self.epoch.batch()
        self.epoch.advance()
        images, labels = self.images
        return {self.as_set: Batch(self.augmentation.view(images[index].float(), view), labels[index])}

    def _grow(self, growth: int, now: SourceStep, tell: Callable[[str], None], stopping: Callable[[], bool]) -> bool:
        """Add a batch. False when stopped before its end: then there is nothing of it."""
        start, growths = time.monotonic(), self.growths(now.end - now.begin)
        seconds = sum(seconds for _, _, seconds in self.added)
        left = left_of(seconds, len(self.added), growths - growth + 1)
        tell(f"adding synthesized images: batch {growth} of {growths}{left}")
        now.student.model.eval()
        made = self.made(growth, now, stopping)
        if made is None:
            return False
        digest = ""
        if self.own is not None:
            self.own.begin()
            digest = self.own.write(growth, made.images, made.labels, self.about(made, start), made.more)
            # Not of whatever lies there: a killed process may have gone on further than its last checkpoint.
            self.own.picture(range(1, growth + 1), SIDE)
        self.added.append((growth, digest, round(time.monotonic() - start, 3)))
        self.add(made.images, made.labels, made.more)
        return True

    def growths(self, steps: int) -> int:
        """Batches that are added in a stage of so many steps."""
        return self.at_begin + ((steps - 1) // self.every if self.every else 0)

    def state(self) -> dict[str, Any]:
        return {"added": [list(a) for a in self.added]}

    def load_state(self, state: dict[str, Any]) -> None:
        self.added = []
        for growth, digest, seconds in state["added"]:
            if self.own is None:
                raise CellError("what this cell added to the synthesized images was not kept: it had no folder")
            self.add(*self.own.read_all(growth, digest))
            self.added.append((growth, digest, seconds))


def mean_terms(abouts: Iterable[About]) -> dict[str, float]:
    """Mean final terms of batches, by the names that the first one has."""
    abouts = list(abouts)
    names = abouts[0].terms if abouts else {}
    return {name: sum(about.terms.get(name, 0.0) for about in abouts) / len(abouts) for name in names}


def left_of(seconds: float, done: int, left: int) -> str:
    """How long what is left will take, by what is done."""
    return f", {seconds / done:.0f} s each, about {left * seconds / done / 60:.0f} min left" if done else ""
