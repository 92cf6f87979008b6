"""Images of a fresh generator that a network takes for training images and can tell from each other: contrastive model
inversion (Fang et al., IJCAI 2021).

`invert` makes one batch. Its draws are addressed by (seed, stream, batch), so with the same memory and head a batch can
be made again alone.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kdbench.data.augment import Augmentation
from kdbench.data.decoding import NUMBERS, crop_box
from kdbench.data.streams import address, generator, permutation, seed_draws, uniform
from kdbench.engine.networks.network import Network
from kdbench.losses.cmi import BatchNormMeans, agreed_divergence, view_contrast
from kdbench.losses.deep_inversion import BatchNormInputs
from kdbench.methods.cmi.views import Views
from kdbench.methods.data_free.generator import Generator, GeneratorForm
from kdbench.methods.deep_inversion.inversion import Synthesized, better
from kdbench.methods.deep_inversion.made import halves
from kdbench.methods.settings import above, at_least, two_betas

# The terms that images are fitted by, each a setting: its weight.
TERMS = ("feature", "cross_entropy", "adversarial", "contrast")
# Deviation of a generator's first weights.
SPREAD = 0.02


@dataclass(frozen=True)
class ContrastiveInversion:
    """How a batch is made. Defaults are those of the authors' script that begins without images.

    Attributes:
        iterations: optimizer steps. lr, betas: of Adam, begun anew for every batch with its generator. The head has an
            Adam of the same rate that goes on from batch to batch.
        latent: numbers of noise, N(0, 1), that an image is made of; they are learned too. widths: channels of the
            generator's three layers.
        feature: weight of the batch norms' statistics, as DeepInversion has them. cross_entropy: of the cross-entropy
            with drawn labels. adversarial: of the KL divergence from student to teacher, which is raised where both
            choose the same class. contrast: of recognizing an image's global view by a local one.
        contrast_temperature: of that. head: numbers of the head's output, which it compares.
        bank: features of the latest so many images are remembered. negatives: of these are drawn for each iteration.
        padding: pixels around an image of which a global view is cropped. area: least share of a local view. flip: both
            views are mirrored by chance.
    """

    iterations: int = 200
    lr: float = 1e-3
    betas: tuple[float, float] = (0.5, 0.999)
    latent: int = 256
    widths: tuple[int, int, int] = (128, 128, 64)
    feature: float = 1.0
    cross_entropy: float = 1.0
    adversarial: float = 0.5
    contrast: float = 0.8
    contrast_temperature: float = 0.1
    head: int = 256
    bank: int = 40960
    negatives: int = 4096
    padding: int = 4
    area: float = 0.25
    flip: bool = True

    def __post_init__(self) -> None:
        at_least(self, 1, "iterations", "head")
        at_least(self, 0, "bank", "negatives", "padding", *TERMS)
        above(self, 0, "lr", "contrast_temperature")
        if not 0 < self.area <= 1:
            raise ValueError(f"'area' cannot be {self.area}: it lies above 0 and is at most 1")
        two_betas(self)
        if not any(getattr(self, name) for name in TERMS):
            raise ValueError("all its weights are 0, so the images would be fitted to nothing")
        # Checked as a generator's.
        self.form()

    def form(self) -> GeneratorForm:
        """What a generator is made of."""
        return GeneratorForm(self.latent, self.widths)

    def plain(self) -> dict[str, Any]:
        """The settings as plain data."""
        return asdict(self) | {"betas": list(self.betas), "widths": list(self.widths)}


class Contrast:
    """What lasts from batch to batch: the head, two fully connected layers, with its optimizer, and the memory bank.

    Attributes:
        bank: features of local and global views, side by side, of the latest images, float16 [n, 2 · features].
    """

    def __init__(self, features: int, settings: ContrastiveInversion, seed: int, device: torch.device) -> None:
        with torch.random.fork_rng(devices=[]):
            seed_draws(address(seed, "cmi/head"), torch.device("cpu"))
            layers = nn.Linear(features, features), nn.ReLU(), nn.Linear(features, settings.head)
        self.head = nn.Sequential(*layers).to(device)
        self.optimizer = torch.optim.Adam(self.head.parameters(), lr=settings.lr, foreach=False)
        self.bank = torch.zeros((0, 2 * features), dtype=torch.float16, device=device)
        self.size = settings.bank

    def copied(self) -> Contrast:
        """One that learns without changing this one."""
        twin = copy.copy(self)
        twin.head, twin.optimizer = copy.deepcopy((self.head, self.optimizer))
        return twin

    def remember(self, features: Tensor) -> None:
        """Take a batch's features, in place of the oldest where the bank is full."""
        kept = torch.cat([self.bank, halves(features).to(self.bank.device)])
        self.bank = kept[max(len(kept) - self.size, 0) :]

    def state(self) -> dict[str, Any]:
        """What is not in files: all but the bank."""
        return {"head": self.head.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load_state(self, state: dict[str, Any]) -> None:
        self.head.load_state_dict(state["head"])
        self.optimizer.load_state_dict(state["optimizer"])


@dataclass(frozen=True)
class InversionDraws:
    """The random numbers of a batch, addressed by (seed, stream, batch)."""

    seed: int
    stream: str
    batch: int

    def labels(self, n: int, classes: list[int]) -> Tensor:
        """n independent uniform labels among some classes. int64 [n]."""
        drawn = uniform(n, self.seed, f"{self.stream}/labels", self.batch)
        return torch.tensor([classes[int(number * len(classes))] for number in drawn])

    def latents(self, n: int, numbers: int) -> Tensor:
        """What images begin as, N(0, 1), float32 [n, numbers] on the CPU."""
        return torch.randn((n, numbers), generator=generator(self.seed, f"{self.stream}/latents", self.batch))

    def generator(self, settings: ContrastiveInversion, image_shape: tuple[int, int, int]) -> Generator:
        """A fresh generator: weights N(0, 0.02), those of batch norms N(1, 0.02), biases 0."""
        source = generator(self.seed, f"{self.stream}/weights", self.batch)
        with torch.random.fork_rng(devices=[]):
            made = Generator(settings.form(), image_shape)
        for module in made.modules():
            if isinstance(module, nn.Linear | nn.Conv2d | nn.BatchNorm2d):
                centre = 1.0 if isinstance(module, nn.BatchNorm2d) else 0.0
                nn.init.normal_(module.weight, centre, SPREAD, generator=source)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        return made

    def views(self, settings: ContrastiveInversion, n: int, image_shape: tuple[int, int, int]) -> Views:
        """Of all iterations, on the CPU: crops after padding with zeros, and boxes as torchvision's RandomResizedCrop
        has them, both mirrored by chance, independently of each other."""
        crop, times = Augmentation(settings.padding, "zero", settings.flip), settings.iterations
        places = crop.draw(generator(self.seed, f"{self.stream}/views", self.batch), times * n).view(times, n)
        numbers = uniform(times * n * (NUMBERS + 1), self.seed, f"{self.stream}/boxes", self.batch)
        boxes = [
            (*crop_box(drawn[:-1], *image_shape[1:], (settings.area, 1.0)), settings.flip and drawn[-1] < 0.5)
            for drawn in numbers.reshape(-1, NUMBERS + 1).tolist()
        ]
        return Views(crop, places, torch.tensor(boxes, dtype=torch.float32).view(times, n, 5))

    def remembered(self, bank: Tensor, most: int, iteration: int, iterations: int) -> Tensor:
        """At most so many different rows of a bank; of a small one all, in their order."""
        if len(bank) <= most:
            return bank
        order = permutation(len(bank), self.seed, f"{self.stream}/bank", self.batch * iterations + iteration)
        return bank.index_select(0, order[:most].to(bank.device))


def invert(
    teacher: Network,
    student: Callable[[Tensor], Tensor],
    labels: Tensor,
    image_shape: tuple[int, int, int],
    settings: ContrastiveInversion,
    draws: InversionDraws,
    contrast: Contrast | None,
    stopping: Callable[[], bool] = lambda: False,
) -> Synthesized | None:
    """The best images that a fresh generator made on its way: those whose weighted sum of terms was the lowest.

    Args:
        teacher: frozen, in eval mode. student: pixel values -> logits, in eval mode; asked only where its term has a
            weight. No gradient of either is touched.
        labels: int64 [N] on the device.
        contrast: its head learns; its bank stays. None where the contrast has no weight.
        stopping: asked before every iteration; True leaves without a result, the head in the middle of its way.

    Returns:
        the batch, its `more` the features of its views; None when stopped.

    Raises:
        ValueError: a teacher without batch norms, or images that cannot be generated.
    """
    device = labels.device
    made = draws.generator(settings, image_shape).to(device).train()
    latents = draws.latents(len(labels), settings.latent).to(device).requires_grad_()
    own = [*made.parameters(), latents]
    # Beside the default, Adam's `foreach` and `fused` forms round differently.
    optimizers = [torch.optim.Adam(own, lr=settings.lr, betas=settings.betas, foreach=False)]
    if contrast is not None:
        optimizers.append(contrast.optimizer)
    learned = [*own, *(contrast.head.parameters() if contrast is not None else ())]
    views = draws.views(settings, len(labels), image_shape).to(device)
    kept: dict[str, Tensor] = {}
    for iteration in range(settings.iterations):
        if stopping():
            return None
        images = made(latents)
        looked, head, remembered = [views.whole(images, iteration)], None, None
        if contrast is not None:
            looked.append(views.local(images, iteration))
            head = contrast.head
            remembered = draws.remembered(contrast.bank, settings.negatives, iteration, settings.iterations)
        terms, features = inversion_terms(looked, labels, teacher, student, settings, head, remembered)
        kept = better(kept, {"images": images, "features": features, **terms})
        # Of what is fitted alone: a student's own gradients are its training's.
        for parameter, gradient in zip(learned, torch.autograd.grad(terms["loss"], learned), strict=True):
            parameter.grad = gradient
        for optimizer in optimizers:
            optimizer.step()
    pixels, features = kept.pop("images"), kept.pop("features")
    more = {"features": halves(features)} if contrast is not None else {}
    return Synthesized(pixels, labels, {name: value.item() for name, value in kept.items()}, more)


def inversion_terms(
    views: Sequence[Tensor],
    labels: Tensor,
    teacher: Network,
    student: Callable[[Tensor], Tensor],
    chosen: ContrastiveInversion,
    head: nn.Module | None = None,
    remembered: Tensor | None = None,
) -> tuple[dict[str, Tensor], Tensor]:
    """What images are fitted by.

    Args:
        views: of the same images, pixel values on the scale of [0, 1], [N, C, H, W]: global ones, and local ones where
            there is a contrast.
        head: features [n, F] -> what is compared [n, D]; None without a contrast.
        remembered: features of other images' local and global views, side by side, [M, 2F].

    Returns:
        the terms whose weight is not 0, unweighted, and "loss", their weighted sum. And such features of these images
        as are remembered, [N, 2F]; without a contrast [N, 0].

    Raises:
        ValueError: the teacher has no batch norms.
    """
    pixels = views[0]
    norms = BatchNormInputs(teacher.model) if chosen.feature else None
    means = BatchNormMeans(teacher.model) if head is not None else None
    # The module itself: an extractor's first call makes dry runs too, and they would be watched.
    with norms or nullcontext(), means or nullcontext():
        logits: Tensor = teacher.model(teacher.normalizer(pixels))
        terms = {"feature": norms.distance()} if norms else {}
        features = means.features() if means else pixels.new_zeros((len(pixels), 0))
    if chosen.cross_entropy:
        terms["cross_entropy"] = F.cross_entropy(logits, labels)
    if chosen.adversarial:
        # Added, so that it is raised.
        terms["adversarial"] = -agreed_divergence(student(pixels), logits)
    if head is not None and means is not None and remembered is not None:
        with means:
            teacher.model(teacher.normalizer(views[1]))
            features = torch.cat([means.features(), features], dim=1)
        local, whole = torch.cat([features, remembered.to(features.dtype)]).chunk(2, dim=1)
        with torch.no_grad():
            others = head(whole)
        terms["contrast"] = view_contrast(head(local), others, len(pixels), chosen.contrast_temperature)
    loss = sum((getattr(chosen, name) * value for name, value in terms.items()), logits.new_zeros(()))
    return {**terms, "loss": loss}, features
