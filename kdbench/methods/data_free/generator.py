"""A network that makes images of noise, and what a teacher and a student want of its images."""

import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from kdbench.engine.networks.network import Network
from kdbench.losses.dafl import activation_strength, class_balance, one_hot
from kdbench.losses.deep_inversion import BatchNormInputs
from kdbench.losses.kl import kl_divergence
from kdbench.methods.settings import above, at_least, two_betas

# Values of images below and above this factor of the size are made by doubling it twice.
GROWTH = 4
# Options that are weights of terms.
WEIGHTS = ("adversarial", "one_hot", "activation", "balance", "feature")


@dataclass(frozen=True)
class GeneratorForm:
    """What a generator is made of.

    Attributes:
        latent: numbers of noise, N(0, 1), that an image is made of.
        widths: channels of its three layers.
        output: what it ends with. "sigmoid": pixel values in [0, 1]. "tanh", "linear": a batch norm, without or with
            weights of its own, makes of its values images as the teacher's normalization gives them.
        bias: of its convolutions but the last. eps: of the batch norms behind them.
    """

    latent: int = 256
    widths: tuple[int, int, int] = (256, 128, 64)
    output: Literal["sigmoid", "tanh", "linear"] = "sigmoid"
    bias: bool = False
    eps: float = 1e-5

    def __post_init__(self) -> None:
        at_least(self, 1, "latent")
        above(self, 0, "eps")
        if len(self.widths) != 3 or min(self.widths) < 1:
            raise ValueError(f"'widths' are three numbers of channels, not {list(self.widths)}")


@dataclass(frozen=True)
class Generation(GeneratorForm):
    """A generator, how it is trained, and when. Defaults are those that DataFree's code has for all its methods.

    Attributes:
        latent, widths, output, bias, eps: of the generator itself.
        lr, betas: of Adam. decay: of its rate, "none", or "cosine" to 0 over the stage. clip: the largest norm of its
            gradient; 0 for any.
        every: steps of the student in a round. iterations: the generator's own steps, before them.
        student_first: the student takes the first steps, with the generator as it was made.
        noise: "new" for every step, or "kept" for all steps of a round, the generator's and the student's.
        sampling: mode of the generator while the student learns: with "train" each batch is normalized by itself.
        student_mode: of the student while the generator learns; in "train" its running statistics follow.
        adversarial: weight of the distance of the two networks, which the generator raises. divergence: which one,
            "kl" (batch mean, at T = 1), "kl_elements" (mean over elements) or "l1" (of logits, over elements).
        one_hot, activation, balance: weights of DAFL's three terms. base: of the last one's logarithm.
        feature: weight of the batch norms' statistics, as DeepInversion has them.
    """

    lr: float = 1e-3
    betas: tuple[float, float] = (0.5, 0.999)
    decay: Literal["none", "cosine"] = "none"
    clip: float = 0.0
    every: int = 5
    iterations: int = 1
    student_first: bool = False
    noise: Literal["new", "kept"] = "new"
    sampling: Literal["eval", "train"] = "eval"
    student_mode: Literal["eval", "train"] = "eval"
    adversarial: float = 0.0
    divergence: Literal["kl", "kl_elements", "l1"] = "kl"
    one_hot: float = 0.0
    activation: float = 0.0
    balance: float = 0.0
    base: float = 2.718281828459045
    feature: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 1, "every", "iterations")
        at_least(self, 0, "clip", *WEIGHTS)
        above(self, 0, "lr")
        above(self, 1, "base")
        two_betas(self)
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas cannot be {list(self.betas)}: both lie in [0, 1)")
        if not any(getattr(self, name) for name in WEIGHTS):
            raise ValueError(f"the generator would learn nothing: give one of {', '.join(WEIGHTS)} a weight")

    def rate(self, progress: float) -> float:
        """The learning rate where this share of the stage is done."""
        return self.lr * (0.5 * (1 + math.cos(math.pi * progress)) if self.decay == "cosine" else 1.0)


class Generator(nn.Module):
    """Noise [N, latent] -> [N, C, H, W]: a linear layer makes a map of a quarter of the size, which is doubled twice by
    repeating its values, each time with a 3×3 convolution behind it; a third one makes the channels.

    Raises:
        ValueError: height or width is no multiple of 4.
    """

    def __init__(self, settings: GeneratorForm, image_shape: tuple[int, int, int]) -> None:
        super().__init__()
        channels, *size = image_shape
        if any(side % GROWTH for side in size):
            near = max(GROWTH, size[0] // GROWTH * GROWTH)
            raise ValueError(
                f"images of {size[0]}×{size[1]} cannot be generated: both sides are multiples of {GROWTH}, "
                f"as with a data card's image_size: {near}"
            )
        first, second, third = settings.widths
        self.start = (first, size[0] // GROWTH, size[1] // GROWTH)
        self.linear = nn.Linear(settings.latent, math.prod(self.start))
        self.body = nn.Sequential(
            nn.BatchNorm2d(first),
            nn.Upsample(scale_factor=2),
            *_layer(first, second, settings),
            nn.Upsample(scale_factor=2),
            *_layer(second, third, settings),
            nn.Conv2d(third, channels, 3, padding=1),
        )
        ends = {
            "sigmoid": nn.Sigmoid(),
            "tanh": nn.Sequential(nn.Tanh(), nn.BatchNorm2d(channels, affine=False)),
            "linear": nn.BatchNorm2d(channels),
        }
        self.end = ends[settings.output]

    def forward(self, noise: Tensor) -> Tensor:
        values: Tensor = self.end(self.body(self.linear(noise).unflatten(1, self.start)))
        return values


def operations(model: Generator) -> int:
    """Floating-point operations of an image (a multiply-add is two)."""
    was_training = model.training
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model.eval()(model.linear.weight.detach()[:1])
    model.train(was_training)
    return counter.get_total_flops()


def _layer(inputs: int, outputs: int, settings: GeneratorForm) -> tuple[nn.Module, ...]:
    convolution = nn.Conv2d(inputs, outputs, 3, padding=1, bias=settings.bias)
    return convolution, nn.BatchNorm2d(outputs, eps=settings.eps), nn.LeakyReLU(0.2)


def generator_terms(
    images: Tensor,
    teacher: Network,
    student: Callable[[Tensor], Tensor],
    settings: Generation,
    classes: list[int] | None = None,
) -> dict[str, Tensor]:
    """What a generator is trained by: the terms whose weight is not 0, unweighted, and "loss", their weighted sum.

    Args:
        images: [N, C, H, W], pixel values on the scale of [0, 1]; gradients go to them.
        teacher: frozen, in eval mode. student: images -> logits [N, K]; asked only where a term needs it.
        classes: labels that the teacher knows; None for all.

    Raises:
        ValueError: there are no batch norms whose statistics could be matched.
    """
    # Of an extractor's first call, which makes dry runs too, these would be watched.
    teacher.extractor.overwritten((images.shape[1], *teacher.normalizer.size))
    with BatchNormInputs(teacher.model) if settings.feature else nullcontext() as norms:
        found = teacher(teacher.normalizer(images), ["logits", *(["pooled"] if settings.activation else [])])
        terms = {"feature": norms.distance()} if norms is not None else {}
    logits = _known(found["logits"], classes)
    if settings.adversarial:
        # Added, so that the generator's optimizer raises it.
        terms["adversarial"] = -distance(_known(student(images), classes), logits, settings.divergence)
    if settings.one_hot:
        terms["one_hot"] = one_hot(logits)
    if settings.activation:
        terms["activation"] = activation_strength(found["pooled"])
    if settings.balance:
        terms["balance"] = class_balance(logits, settings.base)
    loss = sum((getattr(settings, name) * value for name, value in terms.items()), logits.new_zeros(()))
    return {**terms, "loss": loss}


def distance(student: Tensor, teacher: Tensor, divergence: str) -> Tensor:
    """How far two networks' logits [N, K] are apart, with the gradient of both: what a generator raises."""
    if divergence == "l1":
        return F.l1_loss(student, teacher)
    found = kl_divergence(student, teacher, temperature=1.0)
    return found / student.shape[1] if divergence == "kl_elements" else found


def _known(logits: Tensor, classes: list[int] | None) -> Tensor:
    return logits if classes is None else torch.stack([logits[:, label] for label in classes], dim=1)
