"""Multi-level logit distillation (MLKD).

Jin, Wang, Lin: Multi-Level Logit Distillation. CVPR 2023.
"""

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from kdbench.losses.checks import full, logits_shape, one_of, positive
from kdbench.losses.features import inner_products
from kdbench.losses.kd import kd
from kdbench.losses.kl import divergences
from kdbench.losses.lskd import standardized

Form = Literal["code", "described"]


def kd_at_temperatures(
    student_logits: Tensor,
    teacher_logits: Tensor,
    temperatures: tuple[float, ...] = (4.0, 3.0, 5.0),
    standardize: bool = False,
) -> Tensor:
    r"""Sum of `kd` at several temperatures.

    $$
    L = \sum_T \frac{T^2}{N} \sum_n \mathrm{KL}(p^T_n \,\|\, p^S_n)
    $$

    Args:
        student_logits: [N, K].
        teacher_logits: [N, K].
        temperatures: Above 0, at least one.
        standardize: Whether logits are standardized first (LSKD).

    Returns:
        Scalar, at least 0.

    Raises:
        ValueError: The shapes are not the same [N, K], or there is no temperature or one that is not positive.
    """
    _check(temperatures)
    if standardize:
        student_logits, teacher_logits = standardized(student_logits), standardized(teacher_logits)
    values = [kd(student_logits, teacher_logits, temperature) for temperature in temperatures]
    return torch.stack(values).sum()


def multi_level(
    student_logits: Tensor,
    teacher_logits: Tensor,
    temperatures: tuple[float, ...] = (4.0, 3.0, 5.0, 2.0, 6.0),
    form: Form = "code",
    standardize: bool = False,
) -> Tensor:
    r"""Agreement of images, of pairs of images and of pairs of classes, at several temperatures.

    $$
    L = \sum_T \left( \frac{m_N T^2}{N} \sum_n \mathrm{KL}(p^T_n \,\|\, p^S_n)
    + \frac{m_N}{N} \left\| P_S P_S^\top - P_T P_T^\top \right\|_F^2
    + \frac{m_K}{K} \left\| P_S^\top P_S - P_T^\top P_T \right\|_F^2 \right)
    $$

    P [N, K] are softened outputs. In the form "code", m_N and m_K are the shares of images (of classes) whose
    confidence, by the teacher at temperature 1, is at most the median: about one half, whichever they are. In the form
    "described", the others are left out of the sums: of images, of pairs by their second image, and of pairs of classes
    by their second class.

    Args:
        student_logits: [N, K].
        teacher_logits: [N, K].
        temperatures: Above 0, at least one.
        form: Which of the two forms.
        standardize: Whether the logits of the first part are standardized first (LSKD).

    Returns:
        Scalar, at least 0.

    Raises:
        ValueError: The shapes are not the same [N, K], there is no such form, no temperature, or one that is not
            positive.
    """
    logits_shape(student_logits, teacher_logits, "multi_level")
    _check(temperatures)
    one_of(form, "form", "code", "described")
    student, teacher = full(student_logits), full(teacher_logits.detach())
    sure = F.softmax(teacher, dim=1)
    images, classes = (at_most_the_median(one, form) for one in (sure.amax(dim=1), sure.sum(dim=0)))
    own, taught = (standardized(z) if standardize else z for z in (student, teacher))
    total = torch.zeros((), dtype=student.dtype, device=student.device)
    for temperature in temperatures:
        divergence = divergences(F.log_softmax(own / temperature, dim=1), F.log_softmax(taught / temperature, dim=1))
        ours, theirs = (F.softmax(z / temperature, dim=1) for z in (student, teacher))
        of_images = (inner_products(ours, ours) - inner_products(theirs, theirs)).square()
        of_classes = (inner_products(ours.T, ours.T) - inner_products(theirs.T, theirs.T)).square()
        total = total + temperature**2 * (divergence * images).mean()
        total = total + (of_images * images).sum() / len(ours) + (of_classes * classes).sum() / len(ours.T)
    return total


def _check(temperatures: tuple[float, ...]) -> None:
    if not temperatures:
        raise ValueError("it takes at least one temperature")
    for temperature in temperatures:
        positive(temperature)


def at_most_the_median(confidence: Tensor, form: Form) -> Tensor:
    """1 where it is, else 0; in the form of the code, the share of these everywhere."""
    ordered = confidence.sort().values
    n = len(ordered)
    chosen = (confidence <= (ordered[(n - 1) // 2] + ordered[n // 2]) / 2).to(confidence.dtype)
    return chosen.mean() if form == "code" else chosen
