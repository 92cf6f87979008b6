"""Batches of images synthesized from the teacher alone, in place of the data set's: DeepInversion, and Adaptive
DeepInversion, whose pool grows with images made against the student as it is (Yin et al., CVPR 2020).

The pool is made before cells train and shared by all that want the same one. What an adaptive cell adds lies in its own
folder.
"""

import json
import math
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from filelock import FileLock
from torch import Tensor

from kdbench.data.augment import Augmentation
from kdbench.data.streams import generator, permutation
from kdbench.engine.batch import Batch, Epoch
from kdbench.engine.inputs import Cost, Source, SourceContext, SourceStep
from kdbench.errors import CellError, UserError, counted
from kdbench.methods.deep_inversion.inversion import BatchDraws, Inversion, Synthesized, labels_in_turn, synthesize
from kdbench.methods.deep_inversion.made import SIDE, MadeImages, halves
from kdbench.version import __version__

FOLDER = "synthesized"
# Bytes of a value as the images are kept.
HALF = 2


class SynthesizedImages(Source):
    """Gives images and the labels that they were made for: of the classes that the teacher was trained on.

    Args:
        as_set: name of the input set, as the card's `gives` has it: "data" in place of the data set's, or another.
        batches, images: of the pool: how many batches of how many images.
        pool_seed: of the pool; the cell's where absent. A fixed one is made once for all seeds of a table, whose
            deviations then say nothing of it.
        augment: crop and mirror images as the protocol does with real ones.
        every: steps after which a batch is added that is synthesized against the student as it is (0: never), with
            `competition` as its weight. The shared pool is made without competition.

    Every other option is one of `Inversion`.
    """

    streams = ("pool", "adaptive", "synthesized/order", "synthesized/augmentation")

    by_step = None

    def __init__(
        self,
        context: SourceContext,
        *,
        as_set: str = "data",
        batches: int = 1000,
        images: int = 256,
        pool_seed: int | None = None,
        augment: bool = True,
        every: int = 0,
        **settings: Any,
    ) -> None:
        spec = context.spec
        if context.teacher is None or spec.teacher is None:
            raise UserError("images are synthesized from a teacher, and this cell has none")
        if batches < 1 or images < 1 or every < 0:
            what = f"a pool of {counted(batches, 'batch')} of {counted(images, 'image')}, growing every {every} steps,"
            raise UserError(f"{what} cannot be made", hint="'batches' and 'images' are at least 1, 'every' at least 0")
        try:
            self.settings = Inversion(**settings)
        except ValueError as error:
            raise UserError(f"stage '{context.stage}', source: {error}") from None
        self.context, self.teacher, self.as_set = context, context.teacher, as_set
        self.batches, self.size, self.every = batches, images, every
        self.seed, self.batch_size = spec.seed, spec.protocol.batch_size
        self.pool_seed = spec.seed if pool_seed is None else pool_seed
        known = spec.teacher.knows(spec.data)
        self.classes = spec.teacher.known_classes or list(range(known.classes))
        self.image_shape = known.image_shape
        # A pool is made before there is a student: two sources that differ in what they add share it.
        self.pool_settings = replace(self.settings, competition=0.0, form="paper", temperature=3.0)
        crop = spec.protocol.augmentation
        # Images have their size: where real ones are cut out of larger pictures, these are only mirrored.
        self.augmentation = Augmentation(crop.padding, crop.mode, crop.flip) if augment else Augmentation()
        notes = {"data": known.name, "data_classes": known.classes}
        self.key, files = self._key(), context.files
        self.pool = MadeImages.among(files.shared / FOLDER, self.key, notes) if files.shared is not None else None
        added = {"added_to": self.key, "settings": self.settings.plain()}
        own = files.folder / FOLDER / context.stage if files.folder is not None else None
        self.own = MadeImages(own, added, notes) if own is not None else None
        # Number, sha256 and seconds of each batch that was added.
        self.added: list[tuple[int, str, float]] = []
        # Images, float16 [n, C, H, W], and labels, int64 [n], on the device, once they are asked for.
        self._images: tuple[Tensor, Tensor] | None = None
        # Growth and number of the pass whose order is on the device.
        self._pass: tuple[int, int] | None = None
        self.epoch = Epoch(context.device)

    def _key(self) -> dict[str, Any]:
        """What decides about the pool's images, its size and the machine left out."""
        assert self.context.spec.teacher is not None
        return {
            "teacher_sha256": self.context.files.teacher_sha256,
            **self.context.spec.teacher.choice,
            "teacher": self.context.spec.teacher.model.name,
            "normalization": self.context.spec.teacher.normalization.model_dump(mode="json"),
            "classes": self.classes,
            "image_shape": list(self.image_shape),
            "images_per_batch": self.size,
            "seed": self.pool_seed,
            "settings": self.pool_settings.plain(),
        }

    @classmethod
    def prepare(
        cls, context: SourceContext, tell: Callable[[str], None], stopping: Callable[[], bool], **options: Any
    ) -> None:
        source = cls(context, **options)
        assert source.pool is not None
        source.pool.folder.mkdir(parents=True, exist_ok=True)
        # Sources that differ only in what they add want the same pool, at the same time.
        with FileLock(source.pool.folder / ".lock"):
            source.fill(source.pool, tell, stopping)

    def fill(self, pool: MadeImages, tell: Callable[[str], None], stopping: Callable[[], bool]) -> None:
        """Make the batches that the pool lacks."""
        pool.begin()
        begun, first = time.monotonic(), pool.done
        for batch in range(first, self.batches):
            # Asked before every iteration too, of which noise has none.
            if stopping():
                return
            left = _left(time.monotonic() - begun, batch - first, self.batches - batch)
            tell(f"synthesizing images: batch {batch + 1} of {self.batches}{left}")
            start = time.monotonic()
            made = self._make(self.pool_settings, BatchDraws(self.pool_seed, "pool", batch), None, stopping)
            if made is None:
                return
            pool.write(batch, made.images, made.labels, self._about(made, start))
            if batch in (first, self.batches - 1):
                pool.picture(range(batch + 1), min(self.size, SIDE**2))

    def _make(
        self,
        settings: Inversion,
        draws: BatchDraws,
        student: Callable[[Tensor], Tensor] | None,
        stopping: Callable[[], bool],
    ) -> Synthesized | None:
        turn = labels_in_turn(self.size, len(self.classes), draws.batch * self.size)
        labels = torch.tensor(self.classes)[turn].to(self.context.device)
        name = self.teacher.extractor.model_name
        mean, std = self.teacher.normalizer.mean, self.teacher.normalizer.std
        try:
            made = synthesize(
                self.teacher.model, labels, self.image_shape, settings, draws, mean, std, student, stopping
            )
        except ValueError as error:
            raise UserError(f"images cannot be synthesized from '{name}': {error}") from None
        if made is not None and not bool(torch.isfinite(halves(made.images)).all()):
            what = f"the images synthesized from '{name}' grew out of all bounds in batch {draws.batch}"
            raise UserError(what, hint="try a smaller learning rate ('rate'), or smaller weights")
        return made

    def _about(self, made: Synthesized, start: float) -> dict[str, Any]:
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
        """The pool, read when it is first asked for, and what was added."""
        if self._images is None:
            if self.pool is None:
                # Only tried out: noise costs a step the same.
                noise = BatchDraws(self.seed, "pool", 0).noise((len(self.classes), *self.image_shape))
                self._images = self._on_device(noise, torch.tensor(self.classes))
            elif self.pool.done < self.batches:
                what = f"{self.pool.done} of {counted(self.batches, 'batch')} of synthesized images there"
                hint = "run the recipe again: they are made before its cells train"
                raise UserError(what, str(self.pool.folder), hint)
            else:
                read = [self.pool.read(batch) for batch in range(self.batches)]
                images, labels = (torch.cat(values) for values in zip(*read, strict=True))
                self._images = self._on_device(images, labels)
        return self._images

    def _add(self, images: Tensor, labels: Tensor) -> None:
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
        growth, since = self._growth(now)
        each = max(self.memory() // self.batch_size, 1)
        left = each - since % each
        return min(left, self.every - since) if self.every else left

    def memory(self) -> int:
        return len(self.images[1])

    def _growth(self, now: SourceStep) -> tuple[int, int]:
        """How many batches are to be there beside the pool's at a step, and the steps since the last of them."""
        done = now.step - now.begin
        return divmod(done, self.every) if self.every and not now.ahead else (0, done)

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
        """Synthesize a batch on which the present student and the teacher disagree.

        False when stopped before its end: then there is nothing of it.
        """
        start, growths = time.monotonic(), self._growths(now.end - now.begin)
        seconds = sum(seconds for _, _, seconds in self.added)
        left = _left(seconds, len(self.added), growths - growth + 1)
        tell(f"adding synthesized images: batch {growth} of {growths}{left}")
        now.student.model.eval()
        draws = BatchDraws(self.seed, f"adaptive/{self.context.stage}", growth)
        made = self._make(self.settings, draws, now.student.logits, stopping)
        if made is None:
            return False
        digest = ""
        if self.own is not None:
            self.own.begin()
            digest = self.own.write(growth, made.images, made.labels, self._about(made, start))
            # Not of whatever lies there: a killed process may have gone on further than its last checkpoint.
            self.own.picture(range(1, growth + 1), SIDE)
        self.added.append((growth, digest, round(time.monotonic() - start, 3)))
        self._add(made.images, made.labels)
        return True

    def _growths(self, steps: int) -> int:
        """Batches that are added in a stage of so many steps."""
        return (steps - 1) // self.every if self.every else 0

    def cost(self, steps: int) -> Cost:
        growths = self._growths(steps)
        added = growths * self.size
        total = self.batches * self.size + added
        # While images are added, there are the old and the new ones.
        held = HALF * math.prod(self.image_shape) * (2 * total if growths else total)
        return Cost(
            teacher=added * self.settings.iterations,
            student=added * self.settings.iterations if self.settings.competition else 0,
            prepared=self.batches * self.size * self.settings.iterations,
            key=json.dumps(self.key, sort_keys=True),
            at_once=self.size if growths and self.settings.iterations else 0,
            held=held,
        )

    def state(self) -> dict[str, Any]:
        return {"pool": self._digests() if self._images is not None else None, "added": [list(a) for a in self.added]}

    def load_state(self, state: dict[str, Any]) -> None:
        if state["pool"] is not None and state["pool"] != self._digests():
            raise CellError(
                f"the synthesized images that this cell began with have changed ({self.context.files.shared}): "
                "remove the cell's folder to start again"
            )
        self.added = []
        for growth, digest, seconds in state["added"]:
            if self.own is None:
                raise CellError("what this cell added to the synthesized images was not kept: it had no folder")
            self._add(*self.own.read(growth, digest))
            self.added.append((growth, digest, seconds))

    def _digests(self) -> list[str]:
        return [self.pool.about(batch).sha256 for batch in range(self.batches)] if self.pool else []

    def record(self) -> dict[str, Any]:
        """Images, where they lie, what they took, and the mean final terms of the pool's batches."""
        abouts = [self.pool.about(batch) for batch in range(self.batches)] if self.pool is not None else []
        names = abouts[0].terms if abouts else {}
        return {
            "pool": self.pool.folder.name if self.pool is not None else None,
            "images": self.batches * self.size,
            "seconds": round(sum(about.seconds for about in abouts), 1),
            "terms": {name: sum(about.terms.get(name, 0.0) for about in abouts) / len(abouts) for name in names},
            "added_images": len(self.added) * self.size,
            "added_seconds": round(sum(seconds for _, _, seconds in self.added), 1),
        }


def _left(seconds: float, done: int, left: int) -> str:
    """How long what is left will take, by what is done."""
    return f", {seconds / done:.0f} s each, about {left * seconds / done / 60:.0f} min left" if done else ""
