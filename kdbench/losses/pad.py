"""Prime-aware adaptive distillation (PAD).

Zhang, Lan, Dai, Zeng, Bai, Chang, Wei: Prime-Aware Adaptive Distillation. ECCV 2020, arXiv 2008.01458.
"""

from torch import Tensor, nn

from kdbench.losses.checks import Shape, full, same_shape, shape


def adaptive_mse(student: Tensor, teacher: Tensor, log_variance: Tensor, eps: float = 1e-6) -> Tensor:
    r"""Squared error, each element in units of a variance of its own, averaged over all elements.

    $$
    L = \operatorname{mean} \left( \frac{(t - s)^2}{\varepsilon + e^v} + v \right)
    $$

    An image whose feature cannot be matched is given a large variance, and counts little.

    Args:
        student: Feature, [N, ...].
        teacher: Feature of the same shape; it gets no gradient.
        log_variance: v, of the same shape.
        eps: ε.

    Returns:
        Scalar; negative where variances are small and features agree.

    Raises:
        ValueError: The shapes differ.
    """
    same_shape(student, teacher, "adaptive_mse")
    if log_variance.shape != student.shape:
        raise ValueError(f"adaptive_mse needs a variance {shape(student)}, not {shape(log_variance)}")
    v = full(log_variance)
    return ((full(student) - full(teacher.detach())).square() / (eps + v.exp()) + v).mean()


class PrimeAware(nn.Module):
    r"""`adaptive_mse` with variances that a head on the student's feature predicts.

    $$
    L = \operatorname{mean} \left( \frac{(t - s)^2}{\varepsilon + e^v} + v \right), \qquad
    v = \operatorname{BN}(W s + b)
    $$

    Args:
        student_shape: (D,): the pooled feature, behind a connector where the widths differ.
        teacher_shape: (D,).
        eps: ε.

    Raises:
        ValueError: They are not vectors of one width.
    """

    def __init__(self, student_shape: Shape, teacher_shape: Shape, *, eps: float = 1e-6) -> None:
        super().__init__()
        if len(student_shape) != 1 or student_shape != teacher_shape:
            raise ValueError(f"it takes vectors of one width, not {student_shape} and {teacher_shape}")
        (width,) = student_shape
        self.head = nn.Sequential(nn.Linear(width, width), nn.BatchNorm1d(width))
        self.eps = eps

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """The loss of features [N, D]; no gradient reaches the teacher's. Scalar."""
        return adaptive_mse(student, teacher, self.head(full(student)), self.eps)
