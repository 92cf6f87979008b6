"""Boundary supporting samples (BSS).

Heo, Lee, Yun, Choi: Knowledge Distillation with Adversarial Samples Supporting Decision Boundary. AAAI 2019, arXiv
1805.05532. `kdbench.methods.bss.attack` makes the samples.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from kdbench.losses.checks import full, logits_shape, positive, same_shape, shape


def soft_cross_entropy(
    student_logits: Tensor, teacher_logits: Tensor, mask: Tensor | None = None, temperature: float = 3.0
) -> Tensor:
    r"""Cross-entropy between softened outputs, averaged over the samples that count.

    $$
    L = -\frac{1}{|M|} \sum_{n \in M} \sum_k p^T_{nk} \log p^S_{nk}, \qquad p = \operatorname{softmax}(z / T)
    $$

    This is the authors' L_KD on clean images and L_BS on boundary supporting samples. It has no factor T². It differs
    from `kd(scale=False)` on the same samples by the teacher's entropy, a constant, so the gradients are equal.

    Args:
        student_logits: [N, K].
        teacher_logits: [N, K].
        mask: Which samples count (M), bool [N]. None means all.
        temperature: T, above 0. The authors' code uses 3.

    Returns:
        Scalar, at least 0. It is 0 if no sample counts.

    Raises:
        ValueError: The shapes are not the same [N, K], the mask is not bool [N], or T is not positive.
    """
    logits_shape(student_logits, teacher_logits, "soft_cross_entropy")
    positive(temperature)
    mask = _checked(mask, student_logits, "soft_cross_entropy")
    log_student = F.log_softmax(full(student_logits) / temperature, dim=1)
    taught = F.softmax(full(teacher_logits.detach()) / temperature, dim=1)
    each = -(taught * log_student).sum(dim=1)
    return torch.where(mask, each, 0.0).sum() / mask.sum().clamp_min(1)


def magnitude_similarity(student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
    r"""MagSim: how similar the distances of the two networks' boundaries are.

    $$
    \text{MagSim} = \frac{1}{|M|} \sum_{n \in M} \frac{\min(\|s_n\|, \|t_n\|)}{\max(\|s_n\|, \|t_n\|)}
    $$

    s and t are the displacements that move one image to each network's own boundary with one class. If both have the
    same length, the boundaries are equally far away. The paper names the measure and its range. The formula is the
    usual reading and is unverified: the authors published no code for it.

    Args:
        student: Displacements, [N, ...].
        teacher: Displacements, same shape.
        mask: Which samples count (M), bool [N]. None means all.

    Returns:
        Scalar in [0, 1], without gradient. NaN if no sample counts. A displacement of length 0 counts as 0.

    Raises:
        ValueError: The shapes differ, or the mask is not bool [N].
    """
    own, other, _ = _ways(student, teacher, "magnitude_similarity")
    each = torch.minimum(own, other) / torch.maximum(own, other).clamp_min(torch.finfo(own.dtype).tiny)
    return _mean(each, mask, student, "magnitude_similarity")


def angle_similarity(student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
    r"""AngSim: how similar the directions to the two networks' boundaries are.

    $$
    \text{AngSim} = \frac{1}{|M|} \sum_{n \in M} \frac{\langle s_n, t_n \rangle}{\|s_n\| \, \|t_n\|}
    $$

    s and t are as in `magnitude_similarity`, and this formula is unverified for the same reason.

    Args:
        student: Displacements, [N, ...].
        teacher: Displacements, same shape.
        mask: Which samples count (M), bool [N]. None means all.

    Returns:
        Scalar in [-1, 1], without gradient; the paper gives the range [0, 1]. NaN if no sample counts. A displacement
        of length 0 counts as 0.

    Raises:
        ValueError: The shapes differ, or the mask is not bool [N].
    """
    own, other, product = _ways(student, teacher, "angle_similarity")
    tiny = torch.finfo(own.dtype).tiny
    return _mean(product / own.clamp_min(tiny) / other.clamp_min(tiny), mask, student, "angle_similarity")


def _ways(student: Tensor, teacher: Tensor, what: str) -> tuple[Tensor, Tensor, Tensor]:
    """Lengths of both displacements and their inner products, [N] each."""
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
