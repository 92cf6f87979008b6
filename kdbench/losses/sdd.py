"""Scale-decoupled distillation (SDD).

Wei, Luo, Luo: Scale Decoupled Distillation. CVPR 2024, arXiv 2403.13512.
"""

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kdbench.losses.checks import full, labelled_logits, positive, shape
from kdbench.losses.dkd import decoupled
from kdbench.losses.kl import divergences
from kdbench.losses.lskd import standardized
from kdbench.losses.nkd import nkd_of_images
from kdbench.losses.rld import rld_of_images

Host = Literal["kd", "dkd", "nkd", "rld"]


def scale_decoupled(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    host: Host = "kd",
    temperature: float = 4.0,
    alpha: float = 1.0,
    beta: float = 8.0,
    standardize: bool = False,
) -> Tensor:
    r"""Another loss of logits, averaged over the regions of an image; twice where the teacher contradicts itself.

    $$
    L = \frac{1}{N R} \sum_{n,r} w_{nr}\, \ell(z^S_{nr}, z^T_{nr}, y_n)
    $$

    w is 2 where the teacher is right in the region and wrong on the whole image, or the other way round, else 1. ℓ is
    KD (× T²), DKD or RLD (α, β, T; × T²), or NKD (γ = β, T).

    Args:
        student_logits: Of R regions, the first one the whole image, [N, R, K].
        teacher_logits: [N, R, K].
        labels: Class indices, int64 [N].
        host: ℓ.
        temperature: T, above 0.
        alpha: α of DKD or RLD.
        beta: β of DKD or RLD, or NKD's γ.
        standardize: Whether each region's logits are standardized first (LSKD).

    Returns:
        Scalar.

    Raises:
        ValueError: The shapes do not match, there is one class only, the labels are no indices, T is not positive, or
            there is no such host.
    """
    if student_logits.ndim != 3 or student_logits.shape != teacher_logits.shape or labels.ndim != 1:
        raise ValueError(
            f"scale_decoupled needs logits of regions, [N, R, K], and labels [N]: student {shape(student_logits)}, "
            f"teacher {shape(teacher_logits)}, labels {shape(labels)}"
        )
    positive(temperature)
    own, taught = (full(logits).flatten(0, 1) for logits in (student_logits, teacher_logits.detach()))
    of_regions = labels.repeat_interleave(student_logits.shape[1])
    labelled_logits(own, taught, of_regions, "scale_decoupled")
    if standardize:
        own, taught = standardized(own), standardized(taught)
    right = teacher_logits.argmax(dim=2) == labels.unsqueeze(1)
    weights = 1 + (right != right[:, :1]).to(torch.float32).flatten()
    return (weights * _of_each(own, taught, of_regions, host, temperature, alpha, beta)).mean()


def _of_each(
    own: Tensor, taught: Tensor, labels: Tensor, host: str, temperature: float, alpha: float, beta: float
) -> Tensor:
    """The host's loss of each row of logits [M, K], in full precision: [M]."""
    if host == "nkd":
        return nkd_of_images(own, taught, labels, beta, temperature)
    if host == "rld":
        return rld_of_images(own, taught, labels, alpha, beta, temperature, temperature)
    if host == "dkd":
        own_target, own_others = decoupled(own / temperature, labels)
        target, others = decoupled(taught / temperature, labels)
        return temperature**2 * (alpha * divergences(own_target, target) + beta * divergences(own_others, others))
    if host == "kd":
        logs = [F.log_softmax(z / temperature, dim=1) for z in (own, taught)]
        return temperature**2 * divergences(logs[0], logs[1])
    raise ValueError(f"host is 'kd', 'dkd', 'nkd' or 'rld', not {host!r}")


def sdd(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor,
    student_classifier: nn.Module,
    teacher_classifier: nn.Module,
    scales: tuple[int, ...] = (1, 2),
    host: Host = "kd",
    temperature: float = 4.0,
    alpha: float = 1.0,
    beta: float = 8.0,
    relu: bool = False,
    standardize: bool = False,
) -> Tensor:
    r"""`scale_decoupled` of the logits that both classifiers give for regions of the last maps.

    $$
    L = \frac{1}{N R} \sum_{n,r} w_{nr}\, \ell(W_S \bar F^S_{nr} + b_S,\ W_T \bar F^T_{nr} + b_T,\ y_n)
    $$

    F̄ are means over regions: a map is pooled to 4 × 4, and that to each of the scales.

    Args:
        student: The map that the classifier pools, [N, C, H, W].
        teacher: [N, C', H', W'].
        labels: Class indices, int64 [N].
        student_classifier: From [.., C] to logits; it gets a gradient.
        teacher_classifier: From [.., C'] to logits.
        scales: Regions along a side, each 1, 2 or 4, with 1 as the first one: the whole image.
        host: Loss of a region's logits.
        temperature: Of the host, above 0.
        alpha: α of DKD or RLD.
        beta: β of DKD or RLD, or NKD's γ.
        relu: Whether the maps come before their ReLU, which is then applied.
        standardize: Whether each region's logits are standardized first (LSKD).

    Returns:
        Scalar.

    Raises:
        ValueError: The scales are others; or as of `scale_decoupled`.
    """
    if not scales or scales[0] != 1 or not {*scales} <= {1, 2, 4}:
        raise ValueError(f"the first of the scales is 1, the others 2 or 4, not {scales}")
    own, taught = (_regions(one.relu() if relu else one, scales) for one in (student, teacher.detach()))
    regions = student_classifier(own), teacher_classifier(taught)
    return scale_decoupled(*regions, labels, host, temperature, alpha, beta, standardize)


def _regions(feature: Tensor, scales: tuple[int, ...]) -> Tensor:
    """Means over regions of a map [N, C, H, W], from the whole to the finest: [N, R, C]."""
    finest = F.adaptive_avg_pool2d(feature, 4)
    return torch.cat([F.adaptive_avg_pool2d(finest, scale).flatten(2) for scale in scales], dim=2).transpose(1, 2)
