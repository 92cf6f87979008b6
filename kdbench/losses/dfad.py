"""Data-free adversarial distillation (DFAD): the distance that the student lowers and the generator raises.

Fang et al.: Data-Free Adversarial Distillation. arXiv 1912.11006.
"""

from torch import Tensor

from kdbench.losses.checks import full, same_shape


def mean_absolute(student: Tensor, teacher: Tensor) -> Tensor:
    r"""Mean absolute difference over all elements.

    $$
    L = \frac{1}{N K} \sum_{n,k} |z^S_{nk} - z^T_{nk}|
    $$

    Args:
        student: [N, ...].
        teacher: The same shape.

    Returns:
        Scalar, at least 0.

    Raises:
        ValueError: The shapes differ.
    """
    same_shape(student, teacher, "mean_absolute")
    return (full(student) - full(teacher.detach())).abs().mean()
