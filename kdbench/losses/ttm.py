"""Transformed teacher matching (TTM), and its weighted form (WTTM).

Zheng, Yang: Knowledge Distillation Based on Transformed Teacher Matching. ICLR 2024, arXiv 2402.11148.
"""

from torch import Tensor
from torch.nn import functional as F

from kdbench.losses.checks import full, logits_shape, positive
from kdbench.losses.kl import divergences


def transformed_teacher(
    student_logits: Tensor, teacher_logits: Tensor, gamma: float = 0.1, weighted: bool = False
) -> Tensor:
    r"""KL divergence from a power of the teacher's probabilities to the student's, which have no temperature.

    $$
    L = \frac{1}{N} \sum_n u_n \mathrm{KL}(q_n \,\|\, p^S_n), \qquad
    q_{nk} = \frac{(p^T_{nk})^\gamma}{\sum_j (p^T_{nj})^\gamma}
    $$

    q equals the teacher's softmax at temperature 1 / γ. The weights u are 1 (TTM), or Σ_j (p_j)^γ (WTTM): images on
    which the teacher is less certain count more.

    Args:
        student_logits: [N, K].
        teacher_logits: [N, K].
        gamma: γ, above 0.
        weighted: WTTM. The weights lie between 1 and K^(1 - γ) for γ ≤ 1.

    Returns:
        Scalar, at least 0.

    Raises:
        ValueError: The shapes are not the same [N, K], or γ is not positive.
    """
    logits_shape(student_logits, teacher_logits, "transformed_teacher")
    positive(gamma, "gamma")
    powers = gamma * F.log_softmax(full(teacher_logits.detach()), dim=1)
    student = F.log_softmax(full(student_logits), dim=1)
    divergence = divergences(student, powers.log_softmax(dim=1))
    return (divergence * powers.logsumexp(dim=1).exp() if weighted else divergence).mean()
