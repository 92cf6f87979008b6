"""Deep mutual learning (DML). Zhang, Xiang, Hospedales, Lu: Deep Mutual Learning. CVPR 2018, arXiv 1706.00384."""

from torch import Tensor

from kdbench.losses.kl import kl_divergence


def mutual(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    r"""Two networks learn from each other; each term has a gradient for one of them.

    $$
    L = \frac{1}{N} \sum_n \mathrm{KL}(\bar p^T_n \,\|\, p^S_n) + \mathrm{KL}(\bar p^S_n \,\|\, p^T_n)
    $$

    A bar means: without gradient. So each network's gradient is that of its own term, as if there were two losses.

    Args:
        student_logits: [N, K].
        teacher_logits: [N, K]; they get a gradient too (on a term: `detach: false`).

    Returns:
        Scalar, at least 0.

    Raises:
        ValueError: The shapes are not the same [N, K].
    """
    to_student = kl_divergence(student_logits, teacher_logits.detach(), temperature=1.0)
    return to_student + kl_divergence(teacher_logits, student_logits.detach(), temperature=1.0)
