"""Boundary supporting samples. Heo, Lee, Yun, Choi: Knowledge Distillation with Adversarial Samples Supporting Decision
Boundary, AAAI 2019, arXiv 1805.05532. The attack that makes the samples is
`kdbench.methods.bss.attack`."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from kdbench.losses.checks import full, logits_shape, same_shape, shape


def soft_cross_entropy(
    student_logits: Tensor, teacher_logits: Tensor, mask: Tensor | None = None, temperature: float = 3.0
) -> Tensor:
    """-Σ_k softmax(teacher / T)_k log softmax(student / T)_k, mean over the samples that count.

    The paper's L_KD on clean images and L_BS on boundary supporting samples; no factor T². Its gradient is that of
    `kd(scale=False)` over the same samples, from which it differs by the teacher's entropy.

    Args:
        student_logits: [N, K].
        teacher_logits: [N, K].
        mask: bool [N], which samples count; None for all.
        temperature: T > 0; 3 in the authors' code.

    Returns:
        Scalar, at least 0; 0 when no sample counts.

    Raises:
        ValueError: when the shapes are not one [N, K], the mask is not bool [N], or T is not positive.
    """
    logits_shape(student_logits, teacher_logits, "soft_cross_entropy")
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, not {temperature}")
    mask = _checked(mask, student_logits, "soft_cross_entropy")
    log_student = F.log_softmax(full(student_logits) / temperature, dim=1)
    taught = F.softmax(full(teacher_logits.detach()) / temperature, dim=1)
    each = -(taught * log_student).sum(dim=1)
    return torch.where(mask, each, 0.0).sum() / mask.sum().clamp_min(1)


def magnitude_similarity(student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
    """MagSim: mean over samples of min(‖s‖, ‖t‖) / max(‖s‖, ‖t‖), for the two networks' ways to the boundary.

    s and t are the displacements of one image to each network's own boundary with one class: where both have the same
    length, the boundaries are equally far. The paper names the measure and its range; the formula is the usual reading,
    and no code of the authors' has it.

    Args:
        student: displacements [N, ...].
        teacher: same shape.
        mask: bool [N], which samples count; None for all.

    Returns:
        Scalar in [0, 1], without gradient; NaN when no sample counts. A way of length 0 counts 0.

    Raises:
        ValueError: when the shapes differ, or the mask is not bool [N].
    """
    own, other, _ = _ways(student, teacher, "magnitude_similarity")
    each = torch.minimum(own, other) / torch.maximum(own, other).clamp_min(torch.finfo(own.dtype).tiny)
    return _mean(each, mask, student, "magnitude_similarity")


def angle_similarity(student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
    """AngSim: mean over samples of the cosine ⟨s, t⟩ / (‖s‖ ‖t‖) of the two networks' ways to the boundary.

    Arguments, formula's origin and errors as in `magnitude_similarity`.

    Returns:
        Scalar in [-1, 1] (the paper reports values in [0, 1]), without gradient; NaN when no sample counts. A way of
        length 0 counts 0.
    """
    own, other, product = _ways(student, teacher, "angle_similarity")
    tiny = torch.finfo(own.dtype).tiny
    return _mean(product / own.clamp_min(tiny) / other.clamp_min(tiny), mask, student, "angle_similarity")


def _ways(student: Tensor, teacher: Tensor, what: str) -> tuple[Tensor, Tensor, Tensor]:
    """Lengths of both, and their inner products: [N] each."""
    same_shape(student, teacher, what)
    s, t = (full(way.detach()).flatten(1) for way in (student, teacher))
    return s.norm(dim=1), t.norm(dim=1), (s * t).sum(dim=1)


def _mean(each: Tensor, mask: Tensor | None, samples: Tensor, what: str) -> Tensor:
    mask = _checked(mask, samples, what)
    return torch.where(mask, each, 0.0).sum() / mask.sum()


def _checked(mask: Tensor | None, samples: Tensor, what: str) -> Tensor:
    if mask is None:
        return torch.ones(len(samples), dtype=torch.bool, device=samples.device)
    if mask.shape != samples.shape[:1] or mask.dtype != torch.bool:
        raise ValueError(f"{what} needs a mask of bool [{len(samples)}], not {mask.dtype} {shape(mask)}")
    return mask
