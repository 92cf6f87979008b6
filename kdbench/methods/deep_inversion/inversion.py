"""Images from a trained network alone: pixels optimized as DeepInversion says (Yin et al., CVPR 2020).

`synthesize` makes one batch. Its draws are addressed by (seed, stream, batch), so a batch can be made again alone.
"""

import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kdbench.data.streams import address, uniform
from kdbench.losses.deep_inversion import BatchNormInputs, competition, l2_norm, total_variation
from kdbench.methods.settings import above, at_least, two_betas


@dataclass(frozen=True)
class Inversion:
    """How a batch is made. Defaults are those of the authors' CIFAR-10 code where it has them.

    With `iterations` 0 the images are noise; with `feature` 0 they are DeepDream's.

    Attributes:
        iterations: optimizer steps. lr, betas: of Adam, begun anew for every batch.
        decay: "none", or "cosine" to 0 over the iterations, after a linear rise over the first `warmup` of them.
        tv, l2, feature, competition: weights of total variation, of the norm, of the batch norms' statistics, and of
            the competition with a student. The cross-entropy with the target labels has weight 1.
        first_layer: factor of the first batch norm.
        jitter: images are rolled by up to so many pixels each way in every iteration, all of a batch alike.
        flip: they are mirrored in every other iteration by chance.
        per_image: total variation and norm of each image, averaged; else of the whole batch, with weights that belong
            to a batch size.
        clip: values stay where real pixels can be.
        form, temperature: of the competition.
        keep: the last iterate, or the best: the one whose weighted sum of terms was the lowest.
    """

    iterations: int = 2000
    lr: float = 0.1
    betas: tuple[float, float] = (0.9, 0.999)
    decay: Literal["none", "cosine"] = "none"
    warmup: int = 0
    tv: float = 2.5e-5
    l2: float = 0.0
    feature: float = 100.0
    competition: float = 0.0
    first_layer: float = 1.0
    jitter: int = 2
    flip: bool = False
    per_image: bool = False
    clip: bool = False
    form: Literal["paper", "code"] = "paper"
    temperature: float = 3.0
    keep: Literal["last", "best"] = "last"

    def __post_init__(self) -> None:
        at_least(self, 0, "iterations", "warmup", "tv", "l2", "feature", "competition", "first_layer", "jitter")
        above(self, 0, "lr", "temperature")
        two_betas(self)

    def plain(self) -> dict[str, Any]:
        """The settings as plain data."""
        return asdict(self) | {"betas": list(self.betas)}

    def rate(self, iteration: int) -> float:
        """The learning rate of an iteration."""
        if iteration < self.warmup:
            return self.lr * (iteration + 1) / self.warmup
        if self.decay == "none":
            return self.lr
        part = (iteration - self.warmup) / max(self.iterations - self.warmup, 1)
        return self.lr * 0.5 * (1 + math.cos(math.pi * part))


@dataclass(frozen=True)
class BatchDraws:
    """The random numbers of a batch, addressed by (seed, stream, batch)."""

    seed: int
    stream: str
    batch: int

    def noise(self, shape: tuple[int, ...]) -> Tensor:
        """Independent N(0, 1), float32 on the CPU, so that every device begins alike."""
        generator = torch.Generator().manual_seed(address(self.seed, f"{self.stream}/noise", self.batch))
        return torch.randn(shape, generator=generator)

    def moves(self, iterations: int, jitter: int) -> list[tuple[int, int, bool]]:
        """Of each iteration: rows and columns in −jitter … jitter, and whether images are mirrored."""
        drawn = uniform(3 * iterations, self.seed, f"{self.stream}/moves", self.batch).reshape(-1, 3).tolist()
        width = 2 * jitter + 1
        return [(int(a * width) - jitter, int(b * width) - jitter, c < 0.5) for a, b, c in drawn]


@dataclass(frozen=True)
class Synthesized:
    """A batch. images: [N, C, H, W], pixel values on the scale of [0, 1] (which they may leave). terms: of the iterate
    that was kept, unweighted, "loss" their weighted sum. more: what else is kept of it."""

    images: Tensor
    labels: Tensor
    terms: dict[str, float]
    more: dict[str, Tensor] = field(default_factory=dict)


def labels_in_turn(n: int, classes: int, first: int = 0) -> Tensor:
    """n target labels in turn: first, first + 1, … modulo the classes. int64 [n]."""
    return (torch.arange(n) + first) % classes


def synthesize(
    teacher: nn.Module,
    labels: Tensor,
    image_shape: tuple[int, int, int],
    settings: Inversion,
    draws: BatchDraws,
    mean: Tensor,
    std: Tensor,
    student: Callable[[Tensor], Tensor] | None = None,
    stopping: Callable[[], bool] = lambda: False,
) -> Synthesized | None:
    """Images that a frozen network classifies as `labels`, and that its batch norms take for training images.

    Normalized images are optimized, from N(0, 1) on, as in the authors' code; the terms' weights belong to that scale.

    Args:
        teacher: normalized images -> logits. In eval mode; its weights, buffers and gradients stay as they are.
        labels: int64 [N] on the teacher's device.
        image_shape: (channels, height, width).
        mean, std: of the teacher's normalization, [C], on the device.
        student: pixel values -> logits of the network that the competition is with; needed where it has a weight.
        stopping: asked before every iteration; True leaves without a result.

    Returns:
        the batch, or None when stopped.

    Raises:
        ValueError: a teacher in train mode, or without batch norms, or no student for the competition.
    """
    if any(module.training for module in teacher.modules()):
        raise ValueError("the network must be in eval mode: its running statistics are what images are fitted to")
    mean, std = mean.view(-1, 1, 1), std.view(-1, 1, 1)
    x = draws.noise((len(labels), *image_shape)).to(labels.device).requires_grad_()
    # Beside the default, Adam's `foreach` and `fused` forms round differently.
    optimizer = torch.optim.Adam([x], lr=settings.lr, betas=settings.betas, foreach=False)
    kept: dict[str, Tensor] = {}
    with BatchNormInputs(teacher) if settings.feature else nullcontext() as norms:
        other = None if student is None else (lambda images: student(images * std + mean))
        terms_of = partial(_terms, teacher=teacher, labels=labels, chosen=settings, norms=norms, student=other)
        for iteration, (down, across, mirrored) in enumerate(draws.moves(settings.iterations, settings.jitter)):
            if stopping():
                return None
            moved = torch.roll(x, (down, across), dims=(2, 3))
            terms = terms_of(moved.flip(3) if settings.flip and mirrored else moved)
            if settings.keep == "best":
                kept = better(kept, {"images": x, **terms})
            # Of the images alone: a student's own gradients are its training's.
            (x.grad,) = torch.autograd.grad(terms["loss"], [x])
            optimizer.param_groups[0]["lr"] = settings.rate(iteration)
            optimizer.step()
            if settings.clip:
                with torch.no_grad():
                    x.copy_(torch.minimum(torch.maximum(x, -mean / std), (1 - mean) / std))
        with torch.no_grad():
            kept = kept or {"images": x.detach(), **terms_of(x)}
    images = kept.pop("images")
    return Synthesized(images * std + mean, labels, {name: value.item() for name, value in kept.items()})


def better(kept: dict[str, Tensor], now: dict[str, Tensor]) -> dict[str, Tensor]:
    """Of two iterates the one with the lower loss, the earlier of equals, without waiting for the device."""
    now = {name: value.detach().clone() for name, value in now.items()}
    if not kept:
        return now
    better = (now["loss"] < kept["loss"]) | kept["loss"].isnan()
    return {name: torch.where(better, value, kept[name]) for name, value in now.items()}


def _terms(
    x: Tensor,
    teacher: nn.Module,
    labels: Tensor,
    chosen: Inversion,
    norms: BatchNormInputs | None,
    student: Callable[[Tensor], Tensor] | None,
) -> dict[str, Tensor]:
    """The terms of normalized images, unweighted, and "loss", their weighted sum. Terms of weight 0 are left out."""
    logits = teacher(x)
    loss = F.cross_entropy(logits, labels)
    terms = {}
    if norms is not None:
        terms["feature"] = norms.distance(chosen.first_layer)
    if chosen.tv:
        terms["tv"] = total_variation(x, chosen.per_image)
    if chosen.l2:
        terms["l2"] = l2_norm(x, chosen.per_image)
    if chosen.competition:
        if student is None:
            raise ValueError("the competition needs a student")
        terms["competition"] = competition(student(x), logits, chosen.temperature, chosen.form)
    total = loss
    for name, value in terms.items():
        total = total + getattr(chosen, name) * value
    return {"cross_entropy": loss, **terms, "loss": total}
