"""Decoupled knowledge distillation (DKD).

Zhao, Cui, Song, Qiu, Liang: Decoupled Knowledge Distillation. CVPR 2022, arXiv 2203.08679.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from kdbench.losses.checks import full, labelled_logits, positive


def dkd(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    alpha: float = 1.0,
    beta: float = 8.0,
    temperature: float = 4.0,
) -> Tensor:
    r"""KD in two parts with separate weights: one on the target class, one on the other classes.

    $$
    L = \frac{T^2}{N} \sum_n \left( \alpha\, \mathrm{KL}(b^T_n \,\|\, b^S_n)
    + \beta\, \mathrm{KL}(\hat p^T_n \,\|\, \hat p^S_n) \right)
    $$

    With p = softmax(z / T) and the label y, b = (p_y, 1 - p_y) is the target against all others (TCKD), and p̂ is the
    softmax of z / T over the K - 1 other classes (NCKD). KD equals TCKD + (1 - p_y) NCKD with the teacher's p_y, so a
    certain teacher tells little about the other classes. Here their weight is β.

    Args:
        student_logits: [N, K].
        teacher_logits: [N, K].
        labels: Class indices, int64 [N].
        alpha: α, weight of TCKD.
        beta: β, weight of NCKD.
        temperature: T > 0.

    Returns:
        Scalar, at least 0 for α, β ≥ 0; finite for logits up to 1e30.

    Raises:
        ValueError: The logits are not one [N, K] with K ≥ 2, the labels are not [N] indices, or T is not
            positive.
    """
    labelled_logits(student_logits, teacher_logits, labels, "dkd")
    positive(temperature)
    own_target, own_others = decoupled(full(student_logits) / temperature, labels)
    target, others = decoupled(full(teacher_logits.detach()) / temperature, labels)
    tckd = F.kl_div(own_target, target, reduction="batchmean", log_target=True)
    nckd = F.kl_div(own_others, others, reduction="batchmean", log_target=True)
    return temperature**2 * (alpha * tckd + beta * nckd)


def decoupled(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Logarithms of (p_y, 1 - p_y) [N, 2], and of the probabilities among the other classes [N, K - 1].

    Everything is computed with logarithms, because 1 - p_y rounds to 0 long before its logarithm is infinite.
    """
    others = other_logits(logits, labels)
    target = torch.cat([logits.gather(1, labels.unsqueeze(1)), others.logsumexp(dim=1, keepdim=True)], dim=1)
    return F.log_softmax(target, dim=1), F.log_softmax(others, dim=1)


def other_logits(logits: Tensor, labels: Tensor) -> Tensor:
    """The logits [N, K] without the label's: [N, K - 1]."""
    places = torch.arange(logits.shape[1] - 1, device=logits.device)
    return logits.gather(1, places + (places >= labels.unsqueeze(1)))
