"""Refined logit distillation (RLD).

Sun, Chen, Lyu, Chen, Chen, Wang: Knowledge Distillation with Refined Logits. ICCV 2025, arXiv 2408.07703.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from kdbench.losses.checks import full, labelled_logits, positive
from kdbench.losses.dkd import decoupled
from kdbench.losses.kl import divergences


def rld(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    alpha: float = 1.0,
    beta: float = 8.0,
    temperature: float = 4.0,
    confidence_temperature: float | None = None,
) -> Tensor:
    r"""KD in two parts that hold no wrong answer of the teacher: its confidence, and the classes below the label's.

    $$
    L = \frac{1}{N} \sum_n \left( \alpha\, \tau^2\, \mathrm{KL}(b^T_n \,\|\, b^S_n)
    + \beta\, T^2\, \mathrm{KL}(\hat p^T_n \,\|\, \hat p^S_n) \right)
    $$

    With p = softmax(z / τ), b^T = (max p^T, 1 - max p^T) is the teacher's confidence in whichever class it prefers, and
    b^S = (p_y, 1 - p_y) the student's in the label y (sample confidence, SCD). p̂ is the softmax of z / T over the
    classes whose logits are smaller than the label's in the teacher (masked correlation, MCD): the label, and all that
    the teacher holds for as likely or likelier, are left out of both networks. An image with at most one class left has
    no second part. Where the teacher is right everywhere, and τ = T, this is `dkd`.

    Args:
        student_logits: [N, K].
        teacher_logits: [N, K].
        labels: Class indices, int64 [N].
        alpha: α, weight of SCD.
        beta: β, weight of MCD.
        temperature: T > 0, of MCD.
        confidence_temperature: τ > 0, of SCD. None: T.

    Returns:
        Scalar, at least 0 for α, β ≥ 0; finite for logits up to 1e30.

    Raises:
        ValueError: The logits are not one [N, K] with K ≥ 2, the labels are not [N] indices, or a temperature is not
            positive.
    """
    labelled_logits(student_logits, teacher_logits, labels, "rld")
    of_confidence = temperature if confidence_temperature is None else confidence_temperature
    positive(temperature)
    positive(of_confidence, "confidence_temperature")
    own, taught = full(student_logits), full(teacher_logits.detach())
    return rld_of_images(own, taught, labels, alpha, beta, temperature, of_confidence).mean()


def rld_of_images(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor,
    alpha: float,
    beta: float,
    temperature: float,
    confidence_temperature: float,
) -> Tensor:
    """The loss of each image, [N], of logits in full precision."""
    own_target, _ = decoupled(student / confidence_temperature, labels)
    target, _ = decoupled(teacher / confidence_temperature, teacher.argmax(dim=1))
    left_out = teacher >= teacher.gather(1, labels.unsqueeze(1))
    own, taught = (_among_others(logits / temperature, left_out) for logits in (student, teacher))
    scd = confidence_temperature**2 * divergences(own_target, target)
    return alpha * scd + beta * temperature**2 * divergences(own, taught)


def _among_others(logits: Tensor, left_out: Tensor) -> Tensor:
    """Logarithms of the probabilities among the classes that are not left out, [N, K]; of all where none is.

    The others get a logit whose probability is 0, and whose differences are finite: -∞ would make 0 · ∞ of a class, and
    0 / 0 of an image without classes. The same in both networks, it adds nothing to a divergence and has no gradient.
    """
    return F.log_softmax(logits.masked_fill(left_out, torch.finfo(logits.dtype).min / 2), dim=1)
