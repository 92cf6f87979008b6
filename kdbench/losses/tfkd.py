"""Teacher-free knowledge distillation (Tf-KD).

Yuan, Tay, Li, Wang, Feng: Revisiting Knowledge Distillation via Label Smoothing Regularization. CVPR 2020,
arXiv 1909.11723.
"""

import torch
from torch import Tensor

from kdbench.losses.checks import at_labels, full, labelled_logits, positive, share
from kdbench.losses.kd import kd


def kd_over_elements(
    student_logits: Tensor, teacher_logits: Tensor, temperature: float = 6.0, scale: bool = True
) -> Tensor:
    r"""`kd` averaged over the classes too, as torch's KLDivLoss averages by default: K times less.

    $$
    L = \frac{T^2}{N K} \sum_{n,k} p^T_{nk} \log \frac{p^T_{nk}}{p^S_{nk}}, \qquad p = \operatorname{softmax}(z / T)
    $$

    The weights of Tf-KD's and TAKD's codes belong to this mean.

    Args:
        student_logits: [N, K].
        teacher_logits: [N, K].
        temperature: T, above 0.
        scale: Whether to multiply by T².

    Returns:
        Scalar, at least 0.

    Raises:
        ValueError: As `kd`.
    """
    return kd(student_logits, teacher_logits, temperature, scale) / student_logits.shape[-1]


def virtual_teacher(
    student_logits: Tensor,
    labels: Tensor,
    temperature: float = 20.0,
    student_temperature: float = 1.0,
    correct: float = 0.99,
) -> Tensor:
    r"""KL divergence from a virtual teacher, right with probability u, to the student, averaged over all elements.

    $$
    L = \frac{1}{N K} \sum_{n,k} q_{nk} \log \frac{q_{nk}}{p_{nk}}, \qquad
    q = \operatorname{softmax}\left( \frac{d}{T} \right), \quad
    d_{nk} = \begin{cases} u & k = y_n \\ \frac{1 - u}{K - 1} & \text{else} \end{cases}
    $$

    p is the student's softmax. The probabilities d are used as logits, so q is almost uniform.

    Args:
        student_logits: [N, K].
        labels: Class indices, int64 [N].
        temperature: T, above 0, of the made-up teacher.
        student_temperature: Of the student, above 0. The code has 1 on CIFAR and T on ImageNet.
        correct: u, from 0 to 1.

    Returns:
        Scalar, at least 0. No factor T².

    Raises:
        ValueError: The logits are not [N, K] with K ≥ 2, the labels not [N] indices, or an option is out of range.
    """
    labelled_logits(student_logits, student_logits, labels, "virtual_teacher")
    positive(temperature)
    positive(student_temperature)
    share(correct, "correct")
    logits = full(student_logits)
    classes = logits.shape[1]
    teacher = torch.where(at_labels(logits, labels), correct, torch.zeros_like(logits) + (1 - correct) / (classes - 1))
    return kd_over_elements(logits / student_temperature, teacher / temperature, 1.0)
