"""Knowledge distillation. Hinton, Vinyals, Dean: Distilling the Knowledge in a Neural Network, arXiv 1503.02531."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from kdbench.losses.checks import full, logits_shape


def kd(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 4.0, scale: bool = True) -> Tensor:
    """KL(softmax(teacher / T) ‖ softmax(student / T)), summed over classes, batch mean; × T² when `scale`.

    The gradient with respect to the student's logits is (p_s - p_t) / (T N), × T² when `scale`: the T² keeps its size
    about independent of T, as section 2 of the paper recommends. It differs from cross-entropy with the teacher's soft
    targets by the teacher's entropy, a constant: gradients are equal, and this value is 0 when the two agree.

    Args:
        student_logits: [N, K].
        teacher_logits: [N, K].
        temperature: T > 0.
        scale: multiply by T². The codes of AB and BSS leave it out.

    Returns:
        Scalar, at least 0; finite for any finite logits.

    Raises:
        ValueError: when the shapes are not one [N, K], or T is not positive.
    """
    logits_shape(student_logits, teacher_logits, "kd")
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, not {temperature}")
    log_student = F.log_softmax(full(student_logits) / temperature, dim=1)
    log_teacher = F.log_softmax(full(teacher_logits.detach()) / temperature, dim=1)
    value = F.kl_div(log_student, log_teacher, reduction="batchmean", log_target=True)
    return value * temperature**2 if scale else value
