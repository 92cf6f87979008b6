"""Weighted soft labels for distillation (WSLD).

Zhou, Song, Chen, Zhou, Wang, Yuan, Zhang: Rethinking Soft Labels for Knowledge Distillation: A Bias-Variance Tradeoff
Perspective. ICLR 2021, arXiv 2102.00650.
"""

from torch import Tensor
from torch.nn import functional as F

from kdbench.losses.checks import full, labelled_logits, positive


def weighted_soft_labels(
    student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, temperature: float = 4.0, eps: float = 1e-7
) -> Tensor:
    r"""Cross-entropy with the teacher's soft outputs, weighted down for images that the student knows better.

    $$
    L = \frac{T^2}{N} \sum_n w_n \left( -\sum_k p^T_{nk} \log p^S_{nk} \right), \qquad
    w_n = 1 - \exp\left( -\frac{\ell^S_n}{\ell^T_n + \varepsilon} \right)
    $$

    p is the softmax of z / T. ℓ are both networks' cross-entropies with the label, at temperature 1; no gradient goes
    through the weights.

    Args:
        student_logits: [N, K].
        teacher_logits: [N, K].
        labels: Class indices, int64 [N].
        temperature: T, above 0.
        eps: ε.

    Returns:
        Scalar, at least 0. Its minimum is not at the teacher's outputs: it is a cross-entropy with changing weights.

    Raises:
        ValueError: The logits are not one [N, K] with K ≥ 2, the labels not [N] indices, or T not positive.
    """
    labelled_logits(student_logits, teacher_logits, labels, "weighted_soft_labels")
    positive(temperature)
    student, teacher = full(student_logits), full(teacher_logits.detach())
    own, taught = (F.cross_entropy(logits, labels, reduction="none") for logits in (student.detach(), teacher))
    weights = -(-own / (taught + eps)).expm1()
    soft = F.cross_entropy(student / temperature, F.softmax(teacher / temperature, dim=1), reduction="none")
    return temperature**2 * (weights * soft).mean()
