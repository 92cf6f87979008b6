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
from torch import Tensor

from kdbench.engine.inputs import Cost, SourceContext, SourceStep
from kdbench.errors import CellError, UserError, counted
from kdbench.files import locked
from kdbench.methods.deep_inversion.inversion import BatchDraws, Inversion, Synthesized, labels_in_turn, synthesize
from kdbench.methods.deep_inversion.made import SIDE, MadeImages
from kdbench.methods.deep_inversion.pool import FOLDER, HALF, PooledImages, left_of, mean_terms


class SynthesizedImages(PooledImages):
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

    streams = ("pool", "adaptive", *PooledImages.streams)

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
        super().__init__(context, images, every, augment, as_set)
        if batches < 1 or images < 1 or every < 0:
            what = f"a pool of {counted(batches, 'batch')} of {counted(images, 'image')}, growing every {every} steps,"
            raise UserError(f"{what} cannot be made", hint="'batches' and 'images' are at least 1, 'every' at least 0")
        try:
            self.settings = Inversion(**settings)
        except ValueError as error:
            raise UserError(f"stage '{context.stage}', source: {error}") from None
        self.batches = batches
        self.pool_seed = self.seed if pool_seed is None else pool_seed
        # A pool is made before there is a student: two sources that differ in what they add share it.
        self.pool_settings = replace(self.settings, competition=0.0, form="paper", temperature=3.0)
        self.key, shared = self.made_of(self.pool_seed, self.pool_settings.plain()), context.files.shared
        self.pool = MadeImages.among(shared / FOLDER, self.key, self.notes) if shared is not None else None
        self.own = self.own_folder({"added_to": self.key, "settings": self.settings.plain()})

    @classmethod
    def prepare(
        cls, context: SourceContext, tell: Callable[[str], None], stopping: Callable[[], bool], **options: Any
    ) -> None:
        source = cls(context, **options)
        assert source.pool is not None
        source.pool.folder.mkdir(parents=True, exist_ok=True)
        # Sources that differ only in what they add want the same pool, at the same time.
        with locked(source.pool.folder / ".lock", -1, UserError("another run makes these images")):
            source.fill(source.pool, tell, stopping)

    def fill(self, pool: MadeImages, tell: Callable[[str], None], stopping: Callable[[], bool]) -> None:
        """Make the batches that the pool lacks."""
        pool.begin()
        begun, first = time.monotonic(), pool.done
        for batch in range(first, self.batches):
            # Asked before every iteration too, of which noise has none.
            if stopping():
                return
            left = left_of(time.monotonic() - begun, batch - first, self.batches - batch)
            tell(f"synthesizing images: batch {batch + 1} of {self.batches}{left}")
            start = time.monotonic()
            made = self._make(self.pool_settings, BatchDraws(self.pool_seed, "pool", batch), None, stopping)
            if made is None:
                return
            pool.write(batch, made.images, made.labels, self.about(made, start))
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
        return self.bounded(made, draws.batch) if made is not None else None

    def made(self, growth: int, now: SourceStep, stopping: Callable[[], bool]) -> Synthesized | None:
        """A batch on which the present student and the teacher disagree."""
        draws = BatchDraws(self.seed, f"adaptive/{self.context.stage}", growth)
        return self._make(self.settings, draws, now.student.logits, stopping)

    def first_images(self) -> tuple[Tensor, Tensor]:
        """The pool."""
        if self.pool is None:
            # Only tried out: noise costs a step the same.
            noise = BatchDraws(self.seed, "pool", 0).noise((len(self.classes), *self.image_shape))
            return noise, torch.tensor(self.classes)
        if self.pool.done < self.batches:
            what = f"{self.pool.done} of {counted(self.batches, 'batch')} of synthesized images there"
            hint = "run the recipe again: they are made before its cells train"
            raise UserError(what, str(self.pool.folder), hint)
        read = [self.pool.read(batch) for batch in range(self.batches)]
        images, labels = (torch.cat(values) for values in zip(*read, strict=True))
        return images, labels

    def cost(self, steps: int) -> Cost:
        growths = self.growths(steps)
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
        return {"pool": self._digests() if self._images is not None else None, **super().state()}

    def load_state(self, state: dict[str, Any]) -> None:
        if state["pool"] is not None and state["pool"] != self._digests():
            raise CellError(
                f"the synthesized images that this cell began with have changed ({self.context.files.shared}): "
                "remove the cell's folder to start again"
            )
        super().load_state(state)

    def _digests(self) -> list[str]:
        return [self.pool.about(batch).sha256 for batch in range(self.batches)] if self.pool else []

    def record(self) -> dict[str, Any]:
        """Images, where they lie, what they took, and the mean final terms of the pool's batches."""
        abouts = [self.pool.about(batch) for batch in range(self.batches)] if self.pool is not None else []
        return {
            "pool": self.pool.folder.name if self.pool is not None else None,
            "images": self.batches * self.size,
            "seconds": round(sum(about.seconds for about in abouts), 1),
            "terms": mean_terms(abouts),
            "added_images": len(self.added) * self.size,
            "added_seconds": round(sum(seconds for _, _, seconds in self.added), 1),
        }
