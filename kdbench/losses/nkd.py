"""Normalized knowledge distillation (NKD).

Yang, Zeng, Li, Zhang, Yuan, Li: From Knowledge Distillation to Self-Knowledge Distillation: A Unified Approach with
Normalized Loss and Customized Soft Labels. ICCV 2023, arXiv 2303.13005.
"""

from torch import Tensor
from torch.nn import functional as F

from kdbench.losses.checks import full, labelled_logits, positive
from kdbench.losses.dkd import other_logits


def nkd(
    student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, gamma: float = 1.5, temperature: float = 1.0
) -> Tensor:
    r"""Cross-entropy on the label's class, weighted by the teacher's certainty, and among the other classes.

    $$
    L = -\frac{1}{N} \sum_n p^T_{n y_n} \log p^S_{n y_n}
    - \frac{\gamma T^2}{N} \sum_n \sum_{k \ne y_n} \hat p^T_{nk} \log \hat p^S_{nk}
    $$

    p is the softmax of the logits, without temperature; p̂ that of z / T over the K - 1 other classes. Both parts are
    cross-entropies. A student that equals its teacher reaches the minimum of the second part, which is not 0; the first
    part can still fall.

    Args:
        student_logits: [N, K].
        teacher_logits: [N, K].
        labels: Class indices, int64 [N].
        gamma: γ, weight of the other classes.
        temperature: T, above 0, of the other classes alone.

    Returns:
        Scalar, at least 0 for γ ≥ 0.

    Raises:
        ValueError: The logits are not one [N, K] with K ≥ 2, the labels not [N] indices, or T not positive.
    """
    labelled_logits(student_logits, teacher_logits, labels, "nkd")
    positive(temperature)
    return nkd_of_images(full(student_logits), full(teacher_logits.detach()), labels, gamma, temperature).mean()


def nkd_of_images(student: Tensor, teacher: Tensor, labels: Tensor, gamma: float, temperature: float) -> Tensor:
    """The loss of each image, [N], of logits in full precision."""
    at_label = -F.cross_entropy(teacher, labels, reduction="none")
    target = at_label.exp() * F.cross_entropy(student, labels, reduction="none")
    own, taught = (other_logits(logits, labels) / temperature for logits in (student, teacher))
    return target + gamma * temperature**2 * F.cross_entropy(own, F.softmax(taught, dim=1), reduction="none")
