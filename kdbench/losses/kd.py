"""Knowledge distillation (KD).

Hinton, Vinyals, Dean: Distilling the Knowledge in a Neural Network. arXiv 1503.02531.
"""

from torch import Tensor

from kdbench.losses.checks import logits_shape
from kdbench.losses.kl import kl_divergence


def kd(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 4.0, scale: bool = True) -> Tensor:
    r"""KL divergence from the teacher's to the student's softened outputs.

    $$
    L = \frac{T^2}{N} \sum_{n,k} p^T_{nk} \log \frac{p^T_{nk}}{p^S_{nk}}, \qquad p = \operatorname{softmax}(z / T)
    $$

    It is summed over classes and averaged over the batch. Without `scale` the factor T² is 1. The gradient with
    respect to the student's logits is (p_S - p_T) / (T N), times T² with `scale`; the factor keeps its size about
    independent of T, as section 2 of the paper recommends. The loss differs from cross-entropy with the teacher's soft
    targets by the teacher's entropy, a constant: the gradients are equal, and this loss is 0 if the two networks
    agree.

    Args:
        student_logits: [N, K].
        teacher_logits: [N, K].
        temperature: T, above 0.
        scale: Whether to multiply by T². The codes of AB and BSS do not.

    Returns:
        Scalar, at least 0, finite for all finite logits.

    Raises:
        ValueError: The shapes are not the same [N, K], or T is not positive.
    """
    logits_shape(student_logits, teacher_logits, "kd")
    return kl_divergence(student_logits, teacher_logits.detach(), temperature, scale)
