"""KL divergence of softened outputs in either direction, with gradients to both networks."""

from typing import Literal

from torch import Tensor
from torch.nn import functional as F

from kdbench.losses.checks import full, logits_shape, one_of, positive


def kl_divergence(
    student_logits: Tensor,
    teacher_logits: Tensor,
    temperature: float = 4.0,
    scale: bool = True,
    kl_direction: Literal["forward", "reversed"] = "forward",
) -> Tensor:
    r"""KL divergence of softened outputs, in either direction.

    $$
    \text{forward:}\ \frac{T^2}{N} \sum_n \mathrm{KL}(p^T_n \,\|\, p^S_n), \qquad
    \text{reversed:}\ \frac{T^2}{N} \sum_n \mathrm{KL}(p^S_n \,\|\, p^T_n), \qquad p = \operatorname{softmax}(z / T)
    $$

    Its gradient reaches the teacher's logits too, for methods in which the teacher learns from the student. In a recipe
    a term's `detach` (true by default) stops that gradient. Forward and detached, it equals `kd`.

    Args:
        student_logits: [N, K].
        teacher_logits: [N, K].
        temperature: T, above 0.
        scale: Whether to multiply by T². Without it the factor is 1.
        kl_direction: "forward" weights classes by the teacher's probabilities, "reversed" by the student's.

    Returns:
        Scalar, at least 0, finite for all finite logits.

    Raises:
        ValueError: The shapes are not the same [N, K], T is not positive, or there is no such direction.
    """
    logits_shape(student_logits, teacher_logits, "kl_divergence")
    positive(temperature)
    one_of(kl_direction, "kl_direction", "forward", "reversed")
    log_student = F.log_softmax(full(student_logits) / temperature, dim=1)
    log_teacher = F.log_softmax(full(teacher_logits) / temperature, dim=1)
    pair = (log_student, log_teacher) if kl_direction == "forward" else (log_teacher, log_student)
    value = F.kl_div(*pair, reduction="batchmean", log_target=True)
    return value * temperature**2 if scale else value


def divergences(log_student: Tensor, log_teacher: Tensor) -> Tensor:
    """KL divergence of each row from the teacher's to the student's, [N], of logarithms of probabilities [N, K]."""
    return F.kl_div(log_student, log_teacher, reduction="none", log_target=True).sum(dim=1)
