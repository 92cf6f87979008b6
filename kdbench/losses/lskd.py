"""Logit standardization (LSKD), before another loss of logits.

Sun, Ren, Li, Wang, Cao: Logit Standardization in Knowledge Distillation. CVPR 2024, arXiv 2403.01427.
"""

from torch import Tensor

from kdbench.losses.checks import full, labelled_logits, logits_shape, shape
from kdbench.losses.dkd import dkd
from kdbench.losses.kd import kd


def standardized(logits: Tensor, eps: float = 1e-7) -> Tensor:
    r"""Each image's logits with mean 0 and standard deviation 1 over the classes.

    $$
    Z(z)_{nk} = \frac{z_{nk} - \bar z_n}{\sigma_n + \varepsilon}, \qquad
    \sigma_n^2 = \frac{1}{K - 1} \sum_k (z_{nk} - \bar z_n)^2
    $$

    Args:
        logits: [N, K], K at least 2.
        eps: ε.

    Returns:
        [N, K]; zeros where all logits of an image are equal.

    Raises:
        ValueError: They are not [N, K] with K ≥ 2: one class has no deviation.
    """
    if logits.ndim != 2 or logits.shape[1] < 2:
        raise ValueError(f"standardized logits need at least two classes, [N, K]: {shape(logits)}")
    logits = full(logits)
    return (logits - logits.mean(dim=1, keepdim=True)) / (logits.std(dim=1, keepdim=True) + eps)


def standardized_kd(
    student_logits: Tensor, teacher_logits: Tensor, temperature: float = 2.0, scale: bool = True
) -> Tensor:
    r"""`kd` of standardized logits: the student need not match the mean or the size of its teacher's logits.

    $$
    L = \frac{T^2}{N} \sum_n \mathrm{KL}(p^T_n \,\|\, p^S_n), \qquad
    p = \operatorname{softmax}\left( \frac{z - \bar z}{\sigma(z)\, T} \right)
    $$

    The mean and the unbiased standard deviation σ are those of an image's logits. Replacing z by a z + b with a > 0,
    with other a and b for each image and network, does not change the value.

    Args:
        student_logits: [N, K], K at least 2.
        teacher_logits: [N, K].
        temperature: T, above 0.
        scale: Whether to multiply by T².

    Returns:
        Scalar, at least 0.

    Raises:
        ValueError: The shapes are not the same [N, K] with K ≥ 2, or T is not positive.
    """
    logits_shape(student_logits, teacher_logits, "standardized_kd")
    return kd(standardized(student_logits), standardized(teacher_logits), temperature, scale)


def standardized_dkd(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    alpha: float = 1.0,
    beta: float = 8.0,
    temperature: float = 2.0,
) -> Tensor:
    r"""`dkd` of standardized logits.

    $$
    L = \frac{T^2}{N} \sum_n \left( \alpha\, \mathrm{KL}(b^T_n \,\|\, b^S_n)
    + \beta\, \mathrm{KL}(\hat p^T_n \,\|\, \hat p^S_n) \right)
    $$

    b and p̂ are those of `dkd`, of (z - z̄) / σ(z) in place of z.

    Args:
        student_logits: [N, K], K at least 2.
        teacher_logits: [N, K].
        labels: Class indices, int64 [N].
        alpha: α, weight of the label's class against the others.
        beta: β, weight of the other classes among themselves.
        temperature: T, above 0.

    Returns:
        Scalar, at least 0 for α, β ≥ 0.

    Raises:
        ValueError: As `dkd`.
    """
    labelled_logits(student_logits, teacher_logits, labels, "standardized_dkd")
    return dkd(standardized(student_logits), standardized(teacher_logits), labels, alpha, beta, temperature)
