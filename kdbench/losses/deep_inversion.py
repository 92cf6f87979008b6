r"""DeepInversion and Adaptive DeepInversion (ADI). Yin et al.: Dreaming to Distill. CVPR 2020, arXiv 1912.08795.

The network is fixed, and this is minimized over the pixels of images (sections 3.2 and 3.3 of the paper):

$$
\mathrm{CE}(f(x), y) + \alpha_{tv} R_{TV}(x) + \alpha_{\ell_2} R_{\ell_2}(x) + \alpha_f R_{feature}(x)
+ \alpha_c R_{compete}(x)
$$

These terms have gradients with respect to images, unlike the losses of students. `kdbench.methods.deep_inversion`
minimizes them.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from functools import reduce
from types import TracebackType
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.hooks import RemovableHandle

from kdbench.losses.checks import full, logits_shape, one_of, positive, shape

# Probabilities lie in this range in the authors' form of the competition.
CLAMPED = (0.01, 0.99)


def batch_norm_distance(inputs: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
    r"""How far the statistics of one layer are from its batch norm's (one summand of R_feature, equation 4).

    $$
    \left\| \mu(x) - \text{mean} \right\|_2 + \left\| \sigma^2(x) - \text{variance} \right\|_2
    $$

    Args:
        inputs: What enters the batch norm, [N, C, ...]. Its statistics are over images and positions; the variance is
            the biased one, which a batch norm uses in train mode.
        mean: The batch norm's running mean, [C].
        variance: The batch norm's running variance, [C].

    Returns:
        Scalar, at least 0. It is 0 if the statistics agree. The norms are not squared.

    Raises:
        ValueError: The shapes do not match.
    """
    if inputs.ndim < 2 or len(inputs) == 0 or mean.shape != (inputs.shape[1],) or variance.shape != mean.shape:
        raise ValueError(
            f"batch_norm_distance needs [N, C, ...] and two [C]: {shape(inputs)}, {shape(mean)}, {shape(variance)}"
        )
    inputs = full(inputs)
    own_variance, own_mean = torch.var_mean(inputs, dim=[0, *range(2, inputs.ndim)], correction=0)
    return torch.linalg.vector_norm(own_mean - mean) + torch.linalg.vector_norm(own_variance - variance)


class WatchedBatchNorms(ABC):
    """What enters the batch norms of a network, looked at as the network runs, as a context manager.

    Hooks are at the batch norms' inputs inside the `with` block only; they are removed however it ends. The network
    should be in eval mode. In train mode each layer would see statistics that the layers before it just normalized.

    Args:
        network: A network with batch norms.

    Raises:
        ValueError: The network has no batch norm that keeps running statistics.
    """

    def __init__(self, network: nn.Module) -> None:
        self.norms = [m for m in network.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None]
        if not self.norms:
            raise ValueError("the network has no batch norm with running statistics: there is nothing to match")
        self._handles: list[RemovableHandle] = []
        self._found: list[Tensor] = []

    def __enter__(self) -> Self:
        self._handles = [norm.register_forward_pre_hook(self._look) for norm in self.norms]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles, self._found = [], []

    def taken(self) -> list[Tensor]:
        """What was found at the batch norms that ran since the last call, in the order in which they ran.

        Raises:
            ValueError: The network did not run since the last call.
        """
        found, self._found = self._found, []
        if not found:
            raise ValueError("the network did not run since it was last asked")
        return found

    @abstractmethod
    def find(self, norm: _BatchNorm, inputs: Tensor) -> Tensor:
        """What is wanted of the inputs [N, C, ...] of a batch norm."""

    def _look(self, norm: nn.Module, args: tuple[Any, ...]) -> None:
        assert isinstance(norm, _BatchNorm)
        self._found.append(self.find(norm, args[0]))


class BatchNormInputs(WatchedBatchNorms):
    """R_feature: the distances of all batch norms of a network, as a context manager.

    Hooks are at the batch norms' inputs inside the `with` block only; they are removed however it ends. The network
    should be in eval mode. In train mode each layer would see statistics that the layers before it just normalized.

    Args:
        network: A network with batch norms.

    Raises:
        ValueError: The network has no batch norm that keeps running statistics.
    """

    def distance(self, first: float = 1.0) -> Tensor:
        """Sum over the batch norms that ran since the last call, in the order in which they ran.

        Args:
            first: Factor of the first one. 1 in the paper, 10 in the authors' code for ImageNet.

        Returns:
            Scalar, at least 0.

        Raises:
            ValueError: The network did not run since the last call.
        """
        found = self.taken()
        return reduce(torch.add, found[1:], found[0] * first)

    def find(self, norm: _BatchNorm, inputs: Tensor) -> Tensor:
        """The distance of one batch norm, as `batch_norm_distance` gives it."""
        assert norm.running_mean is not None and norm.running_var is not None
        return batch_norm_distance(inputs, norm.running_mean, norm.running_var)


def total_variation(images: Tensor, per_image: bool = False) -> Tensor:
    r"""R_TV: sum of the L2 norms of four difference maps.

    $$
    R_{TV}(x) = \| \Delta_{\rightarrow} x \|_2 + \| \Delta_{\downarrow} x \|_2
    + \| \Delta_{\searrow} x \|_2 + \| \Delta_{\swarrow} x \|_2
    $$

    The differences are between neighbours across, down, and on both diagonals.

    Args:
        images: [N, C, H, W] with H and W at least 2.
        per_image: Whether to take the norms of each image and average them. By default one norm goes over the whole
            batch, as in the authors' code. It grows with √N, so a weight is for one batch size.

    Returns:
        Scalar, at least 0. It is 0 for images of one colour.

    Raises:
        ValueError: The images are not [N, C, H, W] or smaller than 2 × 2 pixels.
    """
    if images.ndim != 4 or len(images) == 0 or min(images.shape[2:]) < 2:
        raise ValueError(f"total_variation needs [N, C, H, W] of at least 2×2 pixels: {shape(images)}")
    x = full(images)
    maps = (
        x[..., :, 1:] - x[..., :, :-1],
        x[..., 1:, :] - x[..., :-1, :],
        x[..., 1:, 1:] - x[..., :-1, :-1],
        x[..., 1:, :-1] - x[..., :-1, 1:],
    )
    return reduce(torch.add, (_norm(difference, per_image) for difference in maps))


def l2_norm(images: Tensor, per_image: bool = False) -> Tensor:
    r"""R_l2: the L2 norm of images.

    $$
    R_{\ell_2}(x) = \| x \|_2
    $$

    Args:
        images: [N, ...].
        per_image: Whether to average the norms of the images, as in the authors' ImageNet code. By default one norm
            goes over the whole batch and grows with √N.

    Returns:
        Scalar, at least 0.

    Raises:
        ValueError: The images are not a batch [N, ...].
    """
    if images.ndim < 2 or len(images) == 0:
        raise ValueError(f"l2_norm needs a batch [N, ...]: {shape(images)}")
    return _norm(full(images), per_image)


def jensen_shannon(
    student_logits: Tensor, teacher_logits: Tensor, temperature: float = 3.0, form: Literal["paper", "code"] = "paper"
) -> Tensor:
    r"""Jensen-Shannon divergence of two networks' softened outputs (equation 8), in nats, averaged over the batch.

    $$
    \mathrm{JS} = \tfrac{1}{2} \mathrm{KL}(p \,\|\, M) + \tfrac{1}{2} \mathrm{KL}(q \,\|\, M),
    \qquad M = \tfrac{1}{2}(p + q)
    $$

    p and q are the networks' probabilities at `temperature`. The loss has two forms:

    - "paper": the formula above, in [0, ln 2].
    - "code", as in the authors' code: ½ KL(M ‖ p) + ½ KL(M ‖ q), with p, q and M clamped to [0.01, 0.99], so that they
      no longer sum to 1. ln 2 is then not a bound.

    Gradients go to both networks' logits.

    Args:
        student_logits: [N, K].
        teacher_logits: [N, K].
        temperature: Above 0. The authors' code uses 3.
        form: Which of the two forms.

    Returns:
        Scalar, 0 if the two networks agree.

    Raises:
        ValueError: The shapes are not the same [N, K], the temperature is not positive, or there is no such form.
    """
    logits_shape(student_logits, teacher_logits, "jensen_shannon")
    positive(temperature)
    one_of(form, "form", "paper", "code")
    log_p = F.log_softmax(full(teacher_logits) / temperature, dim=1)
    log_q = F.log_softmax(full(student_logits) / temperature, dim=1)
    if form == "paper":
        log_m = torch.logaddexp(log_p, log_q) - math.log(2)
        return 0.5 * (
            F.kl_div(log_m, log_p, reduction="batchmean", log_target=True)
            + F.kl_div(log_m, log_q, reduction="batchmean", log_target=True)
        )
    m = (0.5 * (log_p.exp() + log_q.exp())).clamp(*CLAMPED)
    p, q = log_p.exp().clamp(*CLAMPED), log_q.exp().clamp(*CLAMPED)
    return 0.5 * (F.kl_div(p.log(), m, reduction="batchmean") + F.kl_div(q.log(), m, reduction="batchmean"))


def competition(
    student_logits: Tensor, teacher_logits: Tensor, temperature: float = 3.0, form: Literal["paper", "code"] = "paper"
) -> Tensor:
    r"""R_compete (equation 7): small for images on which student and teacher disagree.

    $$
    R_{compete}(x) = 1 - \mathrm{JS}(p^T, p^S)
    $$

    The divergence is clamped to [0, 1] first, as in the authors' code. The paper's form never reaches the upper end.

    Args:
        student_logits: [N, K].
        teacher_logits: [N, K].
        temperature: Above 0. The authors' code uses 3.
        form: The form of `jensen_shannon`.

    Returns:
        Scalar in [0, 1].

    Raises:
        ValueError: As for `jensen_shannon`.
    """
    return 1 - jensen_shannon(student_logits, teacher_logits, temperature, form).clamp(0, 1)


def kd_over_classes(
    student_logits: Tensor,
    teacher_logits: Tensor,
    known_classes: list[int] | None = None,
    temperature: float = 1.0,
    conditional: bool = True,
) -> Tensor:
    r"""KL divergence from a teacher that knows only some of the classes, averaged over the batch (section 4.5).

    $$
    L = \frac{1}{N} \sum_n \mathrm{KL}\left( p^T_n(\cdot \mid C_o) \,\|\, p^S_n(\cdot \mid C_o) \right)
    $$

    C_o are the teacher's classes. With `conditional` the student's probabilities are those among C_o, as in the third
    term of the paper's continual learning. Without it they are those among all classes, as on images of the teacher's
    classes: what the student gives to other classes counts against it.

    Args:
        student_logits: [N, K].
        teacher_logits: [N, K]. Logits of classes outside C_o are ignored.
        known_classes: The labels C_o. None means all. The engine fills it in.
        temperature: Above 0.
        conditional: Whether the student's probabilities are those among C_o.

    Returns:
        Scalar, at least 0.

    Raises:
        ValueError: The shapes are not the same [N, K], or the temperature is not positive.
        IndexError: A label in C_o is K or more.
    """
    logits_shape(student_logits, teacher_logits, "kd_over_classes")
    positive(temperature)
    own, taught = full(student_logits) / temperature, full(teacher_logits.detach()) / temperature
    if known_classes is None:
        return F.kl_div(F.log_softmax(own, 1), F.log_softmax(taught, 1), reduction="batchmean", log_target=True)
    if not conditional:
        own = F.log_softmax(own, dim=1)
    # By views: an index tensor would be sent to the device at every step.
    own, taught = (torch.stack([z[:, label] for label in known_classes], dim=1) for z in (own, taught))
    log_q = F.log_softmax(own, dim=1) if conditional else own
    return F.kl_div(log_q, F.log_softmax(taught, dim=1), reduction="batchmean", log_target=True)


def _norm(values: Tensor, per_image: bool) -> Tensor:
    if per_image:
        return torch.linalg.vector_norm(values.flatten(1), dim=1).mean()
    return torch.linalg.vector_norm(values)
