"""Simple recipe distillation (SRD).

Miles, Mikolajczyk: Understanding the Role of the Projector in Knowledge Distillation. AAAI 2024, arXiv 2303.11098.
"""

from torch import Tensor, nn

from kdbench.losses.checks import Shape, at_least_one, full, same_shape, two_vectors


def log_power_sum(student: Tensor, teacher: Tensor, exponent: float = 4.0) -> Tensor:
    r"""Logarithm of the sum of powers of all differences of a batch.

    $$
    L = \log \sum_{n,d} | u_{nd} - v_{nd} |^\alpha
    $$

    Args:
        student: u, [N, D].
        teacher: v, [N, D].
        exponent: α, at least 1: below, the gradient of equal elements would be no number.

    Returns:
        Scalar, larger by log(N D) than the logarithm of the mean; -∞, without a gradient, where all elements are equal.

    Raises:
        ValueError: The shapes differ, or α is below 1.
    """
    same_shape(student, teacher, "log_power_sum")
    at_least_one(exponent, "exponent")
    return (full(student) - full(teacher.detach())).abs().pow(exponent).sum().log()


class SimpleRecipe(nn.Module):
    r"""`log_power_sum` of projected features after batch norms without parameters.

    $$
    L = \log \sum_{n,d} \left| \operatorname{BN}(W s_n + b)_d - \operatorname{BN}(t_n)_d \right|^\alpha
    $$

    Args:
        student_shape: (D,): the pooled feature.
        teacher_shape: (D',).
        exponent: α, at least 1.
        eps: Of the batch norms.

    Raises:
        ValueError: A feature is no vector, or α is below 1.
    """

    def __init__(self, student_shape: Shape, teacher_shape: Shape, *, exponent: float = 4.0, eps: float = 1e-4) -> None:
        super().__init__()
        two_vectors(student_shape, teacher_shape)
        at_least_one(exponent, "exponent")
        self.projector = nn.Linear(student_shape[0], teacher_shape[0])
        self.student_norm, self.teacher_norm = (
            nn.BatchNorm1d(teacher_shape[0], eps=eps, affine=False) for _ in range(2)
        )
        self.exponent = exponent

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """The loss of features [N, D] and [N, D']; no gradient reaches the latter. Scalar."""
        own = self.student_norm(full(self.projector(full(student))))
        return log_power_sum(own, self.teacher_norm(full(teacher.detach())), self.exponent)
