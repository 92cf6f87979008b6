"""KL divergence of softened outputs, either way round, with gradients to both sides."""

from __future__ import annotations

from typing import Literal

from torch import Tensor
from torch.nn import functional as F

from kdbench.losses.checks import full, logits_shape


def kl_divergence(
    student_logits: Tensor,
    teacher_logits: Tensor,
    temperature: float = 4.0,
    scale: bool = True,
    kl_direction: Literal["forward", "reversed"] = "forward",
) -> Tensor:
    """KL(p_t ‖ p_s) of softmax(· / T), summed over classes, batch mean; "reversed": KL(p_s ‖ p_t). × T² when `scale`.

    The one loss whose gradient reaches the teacher's logits too: for methods whose teacher learns from its student. A
    term's `detach` (true by default) ends it before it gets there; forward and detached it is `kd`.

    Args:
        student_logits: [N, K].
        teacher_logits: [N, K].
        temperature: T > 0.
        scale: multiply by T².
        kl_direction: which of the two the mean is over: the teacher's classes (forward), or the student's (reversed).

    Returns:
        Scalar, at least 0; finite for any finite logits.

    Raises:
        ValueError: when the shapes are not one [N, K], T is not positive, or the direction is no direction.
    """
    logits_shape(student_logits, teacher_logits, "kl_divergence")
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, not {temperature}")
    if kl_direction not in ("forward", "reversed"):
        raise ValueError(f"kl_direction is 'forward' or 'reversed', not {kl_direction!r}")
    log_student = F.log_softmax(full(student_logits) / temperature, dim=1)
    log_teacher = F.log_softmax(full(teacher_logits) / temperature, dim=1)
    pair = (log_student, log_teacher) if kl_direction == "forward" else (log_teacher, log_student)
    value = F.kl_div(*pair, reduction="batchmean", log_target=True)
    return value * temperature**2 if scale else value
