"""Batches that a generator makes, which learns from the teacher, or from teacher and student, while the student learns
from its images: DAFL, ZSKT, DFAD, DFQ.

The generator takes its steps between the student's, so that theirs run in stretches. All noise is addressed by the
turn that it belongs to.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kdbench.data.streams import address, generator, seed_draws
from kdbench.engine.batch import Batch
from kdbench.engine.inputs import Cost, Source, SourceContext, SourceStep
from kdbench.errors import UserError
from kdbench.files import atomic
from kdbench.methods.data_free.generator import Generation, Generator, generator_terms
from kdbench.methods.deep_inversion.made import SIDE, grid

WEIGHTS, STUDENT, OWN = "generator/weights", "generator/images", "generator/steps"
FOLDER = "generated"


class GeneratedImages(Source):
    """Makes "data", in place of the data set's: images without labels.

    Every option is one of `Generation`.
    """

    streams = (WEIGHTS, STUDENT, OWN)
    by_step = None

    def __init__(self, context: SourceContext, **settings: Any) -> None:
        spec, device = context.spec, context.device
        if context.teacher is None or spec.teacher is None:
            raise UserError("a generator learns from a teacher, and this cell has none")
        known = spec.teacher.knows(spec.data)
        seeded = torch.random.fork_rng(devices=[])
        try:
            self.settings = Generation(**settings)
            with seeded:
                torch.manual_seed(address(spec.seed, WEIGHTS))
                self.generator = Generator(self.settings, known.image_shape).to(device)
        except ValueError as error:
            raise UserError(f"stage '{context.stage}', source: {error}") from None
        self.context, self.teacher, self.classes = context, context.teacher, spec.teacher.known_classes
        self.seed, self.size = spec.seed, spec.protocol.batch_size
        self.parameters = list(self.generator.parameters())
        # Beside the default, Adam's `foreach` and `fused` forms round differently.
        self.optimizer = torch.optim.Adam(
            self.parameters, lr=self.settings.lr, betas=self.settings.betas, foreach=False
        )
        # Turns that were taken, and the last one's terms.
        self.turns, self.terms = 0, dict[str, Tensor]()
        # Noise of the student's steps of a turn, a row each, and the row of the coming step.
        self.noise = torch.zeros((self.settings.every, self.size, self.settings.latent), device=device)
        self.drawn, self.row = -1, torch.zeros(1, dtype=torch.int64, device=device)

    @classmethod
    def prepare(
        cls, context: SourceContext, tell: Callable[[str], None], stopping: Callable[[], bool], **options: Any
    ) -> None:
        """Nothing but to refuse what cannot be, before anything trains."""
        source = cls(context, **options)
        if source.settings.feature and not any(isinstance(m, nn.BatchNorm2d) for m in source.teacher.model.modules()):
            raise UserError("the teacher has no batch norms whose statistics a generator could match ('feature')")

    def ready(self, now: SourceStep, tell: Callable[[str], None], stopping: Callable[[], bool]) -> bool:
        turn, since = divmod(now.step - now.begin, self.settings.every)
        due = turn + (not self.settings.student_first)
        if self.turns < due:
            if stopping():
                return False
            self._learn(due, now)
        if self.drawn != turn:
            self.noise.copy_(self._latents(STUDENT, turn, self.settings.every))
            self.drawn = turn
        self.row.fill_(since)
        if now.end - now.step <= self.settings.every - since:
            self._picture()
        return True

    def stretch(self, now: SourceStep) -> int:
        return self.settings.every - (now.step - now.begin) % self.settings.every

    def sets(self, now: SourceStep) -> dict[str, Batch]:
        if now.ahead:
            # Asked before the turn is ready: by whoever wants batches before the first step.
            turn, since = divmod(now.step - now.begin, self.settings.every)
            noise = self._latents(STUDENT, turn, self.settings.every)[since]
        else:
            noise = self.noise.index_select(0, self.row).squeeze(0)
            self.row.add_(1)
        self.generator.train(self.settings.sampling == "train" and not now.ahead)
        with torch.no_grad():
            return {"data": Batch(self._pixels(noise), None)}

    def _learn(self, turn: int, now: SourceStep) -> None:
        """The generator's steps of a turn."""
        chosen, kept = self.settings, self.settings.latents == "kept"
        noise = self._latents(STUDENT, turn - 1, 1) if kept else self._latents(OWN, turn - 1, chosen.iterations)
        self.generator.train()
        now.student.model.train(chosen.student_mode == "train")
        seed_draws(address(self.seed, "generator/dropout", turn), self.context.device)
        self.optimizer.param_groups[0]["lr"] = chosen.rate(now.progress)
        for iteration in range(chosen.iterations):
            images = self._pixels(noise[iteration % len(noise)])
            terms = generator_terms(images, self.teacher, now.student.logits, chosen, self.classes)
            # Of the generator alone: a student's own gradients are its training's.
            gradients = torch.autograd.grad(terms["loss"], self.parameters)
            for parameter, gradient in zip(self.parameters, gradients, strict=True):
                parameter.grad = gradient
            if chosen.clip:
                nn.utils.clip_grad_norm_(self.parameters, chosen.clip)
            self.optimizer.step()
            self.terms = {name: value.detach() for name, value in terms.items()}
        self.turns = turn

    def _latents(self, stream: str, turn: int, steps: int) -> Tensor:
        """Noise of a turn's steps, [steps, N, latent]."""
        rows = 1 if self.settings.latents == "kept" else steps
        shape = (rows, self.size, self.settings.latent)
        drawn = torch.randn(shape, generator=generator(self.seed, stream, turn))
        return drawn.to(self.context.device).expand(steps, -1, -1)

    def _pixels(self, noise: Tensor) -> Tensor:
        """Images of noise [N, latent], as pixel values on the scale of [0, 1]."""
        made: Tensor = self.generator(noise)
        if self.settings.output == "sigmoid":
            return made
        normalizer = self.teacher.normalizer
        return made * normalizer.std.view(-1, 1, 1) + normalizer.mean.view(-1, 1, 1)

    def _picture(self) -> None:
        """Draw some of the last images into the cell's folder."""
        folder: Path | None = self.context.files.folder
        if folder is None:
            return
        self.generator.eval()
        with torch.no_grad():
            images = self._pixels(self.noise[0][: SIDE**2]).cpu()
        (folder / FOLDER).mkdir(parents=True, exist_ok=True)
        with atomic(folder / FOLDER / "grid.png") as temporary:
            grid(images).save(temporary, format="PNG")

    def cost(self, steps: int) -> Cost:
        images = -(-steps // self.settings.every) * self.settings.iterations * self.size
        # Weights with their gradients and Adam's two moments.
        held = 16 * sum(parameter.numel() for parameter in self.parameters) + 4 * self.noise.numel()
        return Cost(teacher=images, student=images if self.settings.adversarial else 0, at_once=self.size, held=held)

    def state(self) -> dict[str, Any]:
        return {
            "generator": self.generator.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "turns": self.turns,
            "terms": self.terms,
        }

    def load_state(self, state: dict[str, Any]) -> None:
        self.generator.load_state_dict(state["generator"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.turns, self.terms = state["turns"], dict(state["terms"])

    def record(self) -> dict[str, Any]:
        """Turns of the generator, and the terms of its last step, unweighted; "loss" is their weighted sum."""
        return {
            "settings": dataclasses.asdict(self.settings),
            "turns": self.turns,
            "terms": {name: float(value) for name, value in self.terms.items()},
        }
