"""Batches that a generator makes, which learns from the teacher, or from teacher and student, while the student learns
from its images: DAFL, ZSKT, DFAD, DFQ.

The generator takes its steps in rounds between the student's, so that the student's run in stretches. All noise is
addressed by the round that it belongs to.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from kdbench.data.streams import address, seed_draws, uniform
from kdbench.engine.computing.memory import Saved
from kdbench.engine.data.batch import Batch
from kdbench.engine.inputs import Cost, Source, SourceContext, SourceStep
from kdbench.errors import UserError
from kdbench.files import atomic
from kdbench.losses.deep_inversion import BatchNormInputs
from kdbench.methods.data_free.generator import Generation, Generator, generator_terms, operations
from kdbench.methods.deep_inversion.made import SIDE, grid

FOLDER = "generated"
# Streams of a stage: first weights, noise of the student's batches and of the generator's, a student's dropout.
WEIGHTS, IMAGES, OWN, DROPOUT = "weights", "images", "own", "dropout"


class GeneratedImages(Source):
    """Makes "data", in place of the data set's: images without labels.

    Every option is one of `Generation`.
    """

    by_step = None

    def __init__(self, context: SourceContext, **settings: Any) -> None:
        spec, device = context.spec, context.device
        if context.teacher is None or spec.teacher is None:
            raise UserError("a generator learns from a teacher, and this cell has none")
        known = spec.teacher.knows(spec.data)
        self.context, self.teacher, self.classes = context, context.teacher, spec.teacher.known_classes
        self.seed, self.size = spec.seed, spec.protocol.batch_size
        self.streams = tuple(map(self._stream, (WEIGHTS, IMAGES, OWN, DROPOUT)))  # type: ignore[misc]
        try:
            self.settings = Generation(**settings)
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(address(self.seed, self._stream(WEIGHTS)))
                self.generator = Generator(self.settings, known.image_shape).to(device)
        except ValueError as error:
            raise UserError(f"stage '{context.stage}', source: {error}") from None
        if self.settings.feature:
            try:
                BatchNormInputs(self.teacher.model)
            except ValueError as error:
                raise UserError(f"stage '{context.stage}', source, 'feature': {error}") from None
        if self.settings.activation:
            self.teacher.extractor.place("pooled")
        self.parameters = list(self.generator.parameters())
        # Beside the default, Adam's `foreach` and `fused` forms round differently.
        self.optimizer = torch.optim.Adam(
            self.parameters, lr=self.settings.lr, betas=self.settings.betas, foreach=False
        )
        # Rounds that were taken, and the last one's terms.
        self.rounds, self.terms = 0, dict[str, Tensor]()
        # Noise of the student's steps of a round, a row each, and the row of the coming step.
        self.rows = torch.zeros((self.settings.every, self.size, self.settings.latent), device=device)
        self.drawn, self.row = -1, torch.zeros(1, dtype=torch.int64, device=device)

    def ready(self, now: SourceStep, tell: Callable[[str], None], stopping: Callable[[], bool]) -> bool:
        number, since = divmod(now.step - now.begin, self.settings.every)
        due = number + (not self.settings.student_first)
        if self.rounds < due:
            if stopping():
                return False
            self._learn(due, now)
        if self.drawn != number:
            self.rows.copy_(self._noise(IMAGES, number, self.settings.every))
            self.drawn = number
        self.row.fill_(since)
        if now.end - now.step <= self.settings.every - since:
            self._picture()
        return True

    def stretch(self, now: SourceStep) -> int:
        return self.settings.every - (now.step - now.begin) % self.settings.every

    def sets(self, now: SourceStep) -> dict[str, Batch]:
        if now.ahead:
            # Asked before its round is ready: by whoever wants batches before the first step.
            number, since = divmod(now.step - now.begin, self.settings.every)
            noise = self._noise(IMAGES, number, self.settings.every)[since]
        else:
            noise = self.rows.index_select(0, self.row).squeeze(0)
            self.row.add_(1)
        self.generator.train(self.settings.sampling == "train" and not now.ahead)
        with torch.no_grad():
            return {"data": Batch(self._pixels(self.generator, noise), None)}

    def _learn(self, number: int, now: SourceStep) -> None:
        """The generator's steps of a round; the first one has the number 1."""
        chosen, kept = self.settings, self.settings.noise == "kept"
        noise = self._noise(IMAGES, number - 1, 1) if kept else self._noise(OWN, number - 1, chosen.iterations)
        self.generator.train()
        if chosen.student_mode == "train" and any(isinstance(m, nn.SyncBatchNorm) for m in now.student.model.modules()):
            what = (
                "the generator learns on one process alone, where the student's batch norms would wait for the others'"
            )
            raise UserError(what, hint="leave out --sync-batch-norm, or set the source's 'student_mode' to eval")
        now.student.model.train(chosen.student_mode == "train")
        seed_draws(address(self.seed, self._stream(DROPOUT), number), self.context.device)
        self.optimizer.param_groups[0]["lr"] = chosen.rate(now.progress)
        for iteration in range(chosen.iterations):
            images = self._pixels(self.generator, noise[iteration % len(noise)])
            terms = generator_terms(images, self.teacher, now.student.logits, chosen, self.classes)
            # Of the generator alone: a student's own gradients are its training's.
            gradients = torch.autograd.grad(terms["loss"], self.parameters)
            for parameter, gradient in zip(self.parameters, gradients, strict=True):
                parameter.grad = gradient
            if chosen.clip:
                nn.utils.clip_grad_norm_(self.parameters, chosen.clip)
            self.optimizer.step()
            self.terms = {name: value.detach() for name, value in terms.items()}
        self.rounds = number

    def _stream(self, name: str) -> str:
        return f"generator/{self.context.stage}/{name}"

    def _noise(self, stream: str, number: int, steps: int) -> Tensor:
        """Noise of a round's steps, float32 [steps, N, latent]."""
        shape = (1 if self.settings.noise == "kept" else steps, self.size, self.settings.latent)
        # Half a step up from multiples of 2⁻⁵³: 0 has no quantile.
        share = uniform(torch.Size(shape).numel(), self.seed, self._stream(stream), number) + 2.0**-54
        drawn = torch.special.ndtri(torch.from_numpy(share)).float().view(shape)
        return drawn.to(self.context.device).expand(steps, -1, -1)

    def _pixels(self, model: nn.Module, noise: Tensor) -> Tensor:
        """Images of noise [N, latent], as pixel values on the scale of [0, 1]."""
        made: Tensor = model(noise)
        return made if self.settings.output == "sigmoid" else self.teacher.normalizer.pixels(made)

    def _picture(self) -> None:
        """Draw some of the last images into the cell's folder, made as the student's are."""
        if self.context.files.folder is None:
            return
        model = copy.deepcopy(self.generator).train(self.settings.sampling == "train")
        with torch.no_grad():
            images = self._pixels(model, self.rows[0])[: SIDE**2].cpu()
        folder = self.context.files.folder / FOLDER / self.context.stage
        folder.mkdir(parents=True, exist_ok=True)
        with atomic(folder / "grid.png") as temporary:
            grid(images).save(temporary, format="PNG")

    def cost(self, steps: int) -> Cost:
        """The generator's own steps, a forward pass and two as long backwards, and a pass for each of the student's."""
        images = -(-steps // self.settings.every) * self.settings.iterations * self.size
        kept = Saved(self.generator)
        with kept:
            self.generator.eval()(self.rows[0, :1])
        # Weights with their gradients and Adam's two moments.
        weights = 4 * sum(parameter.nbytes for parameter in self.parameters)
        return Cost(
            teacher=images,
            student=images if self.settings.adversarial else 0,
            operations=operations(self.generator) * (3 * images + steps * self.size),
            at_once=self.size,
            held=weights + self.rows.nbytes + kept.bytes * self.size,
        )

    def state(self) -> dict[str, Any]:
        return {
            "generator": self.generator.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "rounds": self.rounds,
            "terms": self.terms,
        }

    def load_state(self, state: dict[str, Any]) -> None:
        self.generator.load_state_dict(state["generator"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.rounds, self.terms = state["rounds"], dict(state["terms"])

    def record(self) -> dict[str, Any]:
        """Rounds of the generator, and the terms of its last step, unweighted; "loss" is their weighted sum."""
        return {
            "settings": dataclasses.asdict(self.settings),
            "rounds": self.rounds,
            "terms": {name: float(value) for name, value in self.terms.items()},
        }
