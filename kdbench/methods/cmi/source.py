"""Batches of images that are inverted from the teacher while the student learns from them, each batch to be told from
those before: contrastive model inversion (Fang et al., IJCAI 2021).

The first batch is made before the first step, and another one every so many steps. All lie in the cell's own folder,
with the features by which later ones are told from them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kdbench.engine.data.batch import Batch
from kdbench.engine.inputs import Cost, SourceContext, SourceStep
from kdbench.errors import UserError, counted
from kdbench.losses.cmi import BatchNormMeans
from kdbench.losses.deep_inversion import BatchNormInputs
from kdbench.methods.cmi.inversion import Contrast, ContrastiveInversion, InversionDraws, invert
from kdbench.methods.data_free.generator import operations
from kdbench.methods.deep_inversion.inversion import Synthesized
from kdbench.methods.deep_inversion.pool import HALF, PooledImages, mean_terms


class InvertedImages(PooledImages):
    """Gives images and the labels that they were made for: of the classes that the teacher was trained on.

    Args:
        images: of a batch that is made at once.
        every: steps after which another one is added; 0: the first one stays alone.
        augment: crop and mirror images as the protocol does with real ones.

    Every other option is one of `ContrastiveInversion`.
    """

    streams = ("cmi/head", "cmi", *PooledImages.streams)
    at_begin = 1

    def __init__(
        self, context: SourceContext, *, images: int = 256, every: int = 400, augment: bool = True, **settings: Any
    ) -> None:
        super().__init__(context, images, every, augment)
        if images < 2 or every < 0:
            what = f"batches of {counted(images, 'image')} every {every} steps cannot be made"
            raise UserError(what, hint="'images' is at least 2, 'every' at least 0")
        self.stream = f"cmi/{context.stage}"
        try:
            self.settings = ContrastiveInversion(**settings)
            generator = InversionDraws(self.seed, self.stream, 0).generator(self.settings, self.image_shape)
        except ValueError as error:
            raise UserError(f"stage '{context.stage}', source: {error}") from None
        self.weights = sum(parameter.numel() for parameter in generator.parameters())
        self.operations = operations(generator)
        # The head and what is remembered, where there is a contrast.
        self.contrast: Contrast | None = None
        try:
            if self.settings.feature:
                BatchNormInputs(self.teacher.model)
            if self.settings.contrast:
                self.contrast = Contrast(self._features(), self.settings, self.seed, context.device)
        except ValueError as error:
            name = self.teacher.extractor.model_name
            raise UserError(f"images cannot be inverted from '{name}': {error}") from None
        self.own = self.own_folder(self.made_of(self.seed, self.settings.plain()))

    def _features(self) -> int:
        """How many numbers the teacher's batch norms make of an image."""
        with torch.no_grad(), BatchNormMeans(self.teacher.model) as means:
            dry = torch.zeros((1, *self.image_shape), device=self.context.device)
            self.teacher.model(self.teacher.normalizer(dry))
            return means.features().shape[1]

    def first_images(self) -> tuple[Tensor, Tensor]:
        """None."""
        return torch.zeros((0, *self.image_shape)), torch.zeros(0, dtype=torch.int64)

    def made(self, growth: int, now: SourceStep, stopping: Callable[[], bool]) -> Synthesized | None:
        """A batch that the present student does not master yet, unlike those that were made before."""
        draws = InversionDraws(self.seed, self.stream, growth)
        labels = draws.labels(self.size, self.classes).to(self.context.device)
        # What was not made to its end is to leave no trace, so a copy learns.
        contrast = self.contrast.copied() if self.contrast is not None else None
        made = invert(
            self.teacher, now.student.logits, labels, self.image_shape, self.settings, draws, contrast, stopping
        )
        if made is None:
            return None
        self.contrast = contrast
        return self.bounded(made, growth)

    def add(self, images: Tensor, labels: Tensor, more: dict[str, Tensor]) -> None:
        super().add(images, labels, more)
        if self.contrast is not None:
            self.contrast.remember(more["features"])

    def sets(self, now: SourceStep) -> dict[str, Batch]:
        if not now.ahead:
            return super().sets(now)
        # Asked for before the first images are made: noise costs the same.
        draws = InversionDraws(self.seed, self.stream, 0)
        noise = draws.latents(self.batch_size, math.prod(self.image_shape)).view(-1, *self.image_shape)
        labels = draws.labels(self.batch_size, self.classes)
        return {self.as_set: Batch(noise.to(self.context.device), labels.to(self.context.device))}

    def cost(self, steps: int) -> Cost:
        chosen, growths = self.settings, self.growths(steps)
        images, views = growths * self.size, 2 if chosen.contrast else 1
        # Weights with their gradients and Adam's two moments.
        held = 16 * self.weights
        values = math.prod(self.image_shape) * images
        if self.contrast is not None:
            # The head is copied while it learns.
            held += 2 * 16 * sum(parameter.numel() for parameter in self.contrast.head.parameters())
            values += self.contrast.bank.shape[1] * min(images, chosen.bank)
        # While images are added, there are the old and the new ones; so with what is remembered.
        held += 2 * HALF * values
        return Cost(
            teacher=images * views * chosen.iterations,
            student=images * chosen.iterations if chosen.adversarial else 0,
            operations=3 * self.operations * images * chosen.iterations,
            at_once=views * self.size,
            held=held,
        )

    def state(self) -> dict[str, Any]:
        return {**super().state(), "contrast": self.contrast.state() if self.contrast is not None else None}

    def load_state(self, state: dict[str, Any]) -> None:
        super().load_state(state)
        if self.contrast is not None:
            self.contrast.load_state(state["contrast"])

    def record(self) -> dict[str, Any]:
        """Images, what they took, and the mean final terms of their batches, unweighted; "loss" is the weighted sum."""
        abouts = [self.own.about(growth) for growth, _, _ in self.added] if self.own is not None else []
        return {
            "settings": self.settings.plain(),
            "images": len(self.added) * self.size,
            "seconds": round(sum(seconds for _, _, seconds in self.added), 1),
            "terms": mean_terms(abouts),
        }
