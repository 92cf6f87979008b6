"""DeepInversion and Adaptive DeepInversion. Yin et al.: Dreaming to Distill, CVPR 2020, arXiv 1912.08795.

What is minimized over the pixels of images, with the network fixed (section 3.2 and 3.3 of the paper):

    CE(f(x), y) + α_tv R_TV(x) + α_l2 R_l2(x) + α_f R_feature(x) + α_c R_compete(x)

Unlike the losses of students these have gradients with respect to images. `kdbench.methods.deep_inversion` minimizes
them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from types import TracebackType
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.hooks import RemovableHandle

from kdbench.losses.checks import full, logits_shape, shape

# Probabilities lie in this range in the authors' form of the competition.
CLAMPED = (0.01, 0.99)


def batch_norm_distance(inputs: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
    """‖μ(x) − mean‖₂ + ‖σ²(x) − variance‖₂ of one layer (R_feature's summand, equation 4).

    Args:
        inputs: what enters a batch norm, [N, C, ...]; its statistics are over images and positions, the variance
            biased, as a batch norm in train mode takes it for normalizing.
        mean, variance: the batch norm's running statistics, [C].

    Returns:
        Scalar, at least 0; 0 where the statistics agree. The norms are not squared.

    Raises:
        ValueError: when the shapes do not fit.
    """
    if inputs.ndim < 2 or len(inputs) == 0 or mean.shape != (inputs.shape[1],) or variance.shape != mean.shape:
        raise ValueError(
            f"batch_norm_distance needs [N, C, ...] and two [C]: {shape(inputs)}, {shape(mean)}, {shape(variance)}"
        )
    inputs = full(inputs)
    own_variance, own_mean = torch.var_mean(inputs, dim=[0, *range(2, inputs.ndim)], correction=0)
    off = torch.linalg.vector_norm(own_mean - mean) + torch.linalg.vector_norm(own_variance - variance)
    return off


class BatchNormInputs:
    """The distances of all batch norms of a network, while in its `with` block: R_feature.

    Hooks stand at the batch norms' inputs inside the block only, however it is left. The network belongs in eval mode:
    in train mode every layer would see statistics that the layers before it just normalized.

    Raises:
        ValueError: a network without batch norms that keep running statistics.
    """

    def __init__(self, network: nn.Module) -> None:
        self.norms = [m for m in network.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None]
        if not self.norms:
            raise ValueError("the network has no batch norm with running statistics: there is nothing to match")
        self._handles: list[RemovableHandle] = []
        self._found: list[Tensor] = []

    def __enter__(self) -> BatchNormInputs:
        self._handles = [norm.register_forward_pre_hook(self._look) for norm in self.norms]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles, self._found = [], []

    def distance(self, first: float = 1.0) -> Tensor:
        """Sum over the batch norms that ran since the last call, in the order in which they ran. Scalar.

        Args:
            first: factor of the first one. 1 in the paper; 10 in the authors' code for ImageNet.
        """
        found, self._found = self._found, []
        if not found:
            raise ValueError("the network did not run since distances were last asked for")
        total = found[0] * first
        for value in found[1:]:
            total = total + value
        return total

    def _look(self, norm: nn.Module, args: tuple[Any, ...]) -> None:
        assert isinstance(norm, _BatchNorm) and norm.running_mean is not None and norm.running_var is not None
        self._found.append(batch_norm_distance(args[0], norm.running_mean, norm.running_var))


def total_variation(images: Tensor, per_image: bool = False) -> Tensor:
    """Sum of the L2 norms of four maps of differences: between neighbours across, down, and on both diagonals.

    Args:
        images: [N, C, H, W] with H and W at least 2.
        per_image: norms of each image, averaged. By default one norm goes over the whole batch, as in the authors'
            code: it grows as √N, so a weight belongs to a batch size.

    Returns:
        Scalar, at least 0; 0 for images of one colour.

    Raises:
        ValueError: when there are no neighbours.
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
    return _sum_of(_norm(difference, per_image) for difference in maps)


def l2_norm(images: Tensor, per_image: bool = False) -> Tensor:
    """‖x‖₂ of [N, ...], over the whole batch, or of each image, averaged (`per_image`, the authors' ImageNet code).

    Scalar, at least 0. Over the whole batch it grows as √N.
    """
    if images.ndim < 2 or len(images) == 0:
        raise ValueError(f"l2_norm needs a batch [N, ...]: {shape(images)}")
    return _norm(full(images), per_image)


def jensen_shannon(
    student_logits: Tensor, teacher_logits: Tensor, temperature: float = 3.0, form: Literal["paper", "code"] = "paper"
) -> Tensor:
    """Distance of two networks' softened outputs, batch mean, in nats.

    With p and q their probabilities at `temperature` and M = (p + q) / 2:

    * `form` "paper" (equation 8): ½ KL(p ‖ M) + ½ KL(q ‖ M), the Jensen-Shannon divergence, in [0, ln 2].
    * `form` "code" (the authors' code): ½ KL(M ‖ p) + ½ KL(M ‖ q), of p, q and M each clamped to [0.01, 0.99], after
      which they no longer sum to 1. Not bounded by ln 2.

    Gradients go to both: whoever moves only images asks for those of the images.

    Args:
        student_logits, teacher_logits: [N, K].
        temperature: above 0; 3 in the authors' code, whatever KD uses.

    Returns:
        Scalar; 0 where the two agree.

    Raises:
        ValueError: when the shapes are not one [N, K], T is not positive, or there is no such form.
    """
    logits_shape(student_logits, teacher_logits, "jensen_shannon")
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, not {temperature}")
    log_p = F.log_softmax(full(teacher_logits) / temperature, dim=1)
    log_q = F.log_softmax(full(student_logits) / temperature, dim=1)
    if form == "paper":
        log_m = torch.logaddexp(log_p, log_q) - math.log(2)
        return 0.5 * (
            F.kl_div(log_m, log_p, reduction="batchmean", log_target=True)
            + F.kl_div(log_m, log_q, reduction="batchmean", log_target=True)
        )
    if form == "code":
        m = (0.5 * (log_p.exp() + log_q.exp())).clamp(*CLAMPED)
        p, q = log_p.exp().clamp(*CLAMPED), log_q.exp().clamp(*CLAMPED)
        return 0.5 * (F.kl_div(p.log(), m, reduction="batchmean") + F.kl_div(q.log(), m, reduction="batchmean"))
    raise ValueError(f"form must be 'paper' or 'code', not '{form}'")


def competition(
    student_logits: Tensor, teacher_logits: Tensor, temperature: float = 3.0, form: Literal["paper", "code"] = "paper"
) -> Tensor:
    """R_compete = 1 − JS (equation 7): small for images on which student and teacher disagree. Scalar, in [0, 1].

    Args as for `jensen_shannon`. The authors' code clamps its divergence to [0, 1] first, and so does this in both
    forms; the paper's never reaches the upper end.
    """
    return 1 - jensen_shannon(student_logits, teacher_logits, temperature, form).clamp(0, 1)


def kd_over_classes(
    student_logits: Tensor,
    teacher_logits: Tensor,
    known_classes: list[int] | None = None,
    temperature: float = 1.0,
    conditional: bool = True,
) -> Tensor:
    """KL(teacher ‖ student) where the teacher knows some of the classes only, batch mean (section 4.5).

    The teacher's probabilities are those among its own classes. The student's are too when `conditional`, p(· | C_o) of
    the paper's third term: how it divides what it gives to them. Else they are among all classes, as on images of the
    teacher's classes: what it gives to others counts against it.

    Args:
        student_logits, teacher_logits: [N, K]; the teacher's logits of classes that it does not know are not looked at.
        known_classes: labels that the teacher was trained on; None for all. The engine fills it in.
        temperature: above 0.

    Returns:
        Scalar, at least 0.

    Raises:
        ValueError: when the shapes are not one [N, K], or T is not positive.
    """
    logits_shape(student_logits, teacher_logits, "kd_over_classes")
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, not {temperature}")
    log_p, own = full(teacher_logits.detach()) / temperature, full(student_logits) / temperature
    if known_classes is None:
        return F.kl_div(F.log_softmax(own, 1), F.log_softmax(log_p, 1), reduction="batchmean", log_target=True)
    # By views: an index tensor would be sent to the device at every step.
    known = [slice(label, label + 1) for label in known_classes]
    log_p = F.log_softmax(torch.cat([log_p[:, at] for at in known], dim=1), dim=1)
    if not conditional:
        own = F.log_softmax(own, dim=1)
    own = torch.cat([own[:, at] for at in known], dim=1)
    log_q = F.log_softmax(own, dim=1) if conditional else own
    return F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)


def _norm(values: Tensor, per_image: bool) -> Tensor:
    if per_image:
        return torch.linalg.vector_norm(values.flatten(1), dim=1).mean()
    return torch.linalg.vector_norm(values)


def _sum_of(values: Iterable[Tensor]) -> Tensor:
    first, *rest = values
    for value in rest:
        first = first + value
    return first
