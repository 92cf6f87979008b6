"""Information theoretic representation distillation (ITRD).

Miles, Lopez Rodriguez, Mikolajczyk: Information Theoretic Representation Distillation. BMVC 2022, arXiv 2112.00459.
"""

from torch import Tensor, nn
from torch.nn import functional as F

from kdbench.losses.checks import Shape, full, positive, same_shape, two_vectors
from kdbench.losses.features import centred_units, inner_products, same_batch


def itrd_correlation(student: Tensor, teacher: Tensor, order: float = 1.5, eps: float = 1e-6) -> Tensor:
    r"""Logarithm of how far each channel of the student is from full correlation with the teacher's.

    $$
    L = \log_2 \sum_d | v_d - 1 |^{2 \alpha}, \qquad
    v_d = \frac{1}{N} \sum_n \frac{s_{nd} - \bar s_d}{\hat\sigma(s_d)} \frac{t_{nd} - \bar t_d}{\hat\sigma(t_d)}
    $$

    The deviations divide by N - 1 but the mean by N, so v is Pearson's correlation times (N - 1) / N, and the logarithm
    stays finite. Scaling a channel by a positive factor or shifting it changes nothing.

    Args:
        student: s, after the connector, [N, ...], flattened.
        teacher: t, the same shape.
        order: α, above 0; Rényi's order, as the authors call it.
        eps: A channel whose centred values have no larger norm is constant: its v is 0, without gradient.

    Returns:
        Scalar between log2 D - 2 α log2 N, where all channels agree, and log2 D + 2 α log2 ((2 N - 1) / N); log2 D for
        a batch of one, without gradient.

    Raises:
        ValueError: The shapes differ, a feature is not [N, ...], or α is not positive.
    """
    same_batch(student, teacher, "itrd_correlation")
    same_shape(student, teacher, "itrd_correlation")
    positive(order, "order")
    n = len(student)
    # Unit vectors for deviations: (N - 1) / N is all that is left of the two divisors.
    own, taught = (centred_units(full(one).flatten(1), 0, eps) for one in (student, teacher.detach()))
    correlations = (n - 1) / n * (own * taught).sum(dim=0)
    return (1 - correlations).pow(2 * order).sum().log2()


def itrd_mutual(student: Tensor, teacher: Tensor, eps: float = 1e-12) -> Tensor:
    r"""What the student's similarities between the images of a batch say beyond those that the teacher shares.

    $$
    L = \left\| \frac{G_S}{\operatorname{tr} G_S} \right\|_F^2
    - \left\| \frac{G_S \circ G_T}{\operatorname{tr} (G_S \circ G_T)} \right\|_F^2
    $$

    G holds the cosines of all pairs of images. Minus the logarithm of the squared norm of a matrix of trace one is its
    entropy of Rényi's order 2; here the norms themselves are taken. The least value is not that of a student like its
    teacher: it is 0 wherever each pair of images is orthogonal for the student, or parallel for the teacher.

    Args:
        student: [N, ...], flattened.
        teacher: [N, ...], flattened; its width may differ.
        eps: Least norm of an image's feature, and least trace.

    Returns:
        Scalar in [0, 1), unless an image's feature is zero; 0 for a batch of one.

    Raises:
        ValueError: The batches differ, or a feature is not [N, ...].
    """
    same_batch(student, teacher, "itrd_mutual")
    own, taught = _cosines(student, eps), _cosines(teacher.detach(), eps)
    alone, shared = (_of_trace_one(matrix, eps).square().sum() for matrix in (own, own * taught))
    return alone - shared


def _cosines(feature: Tensor, eps: float) -> Tensor:
    rows = F.normalize(full(feature).flatten(1), dim=1, eps=eps)
    return inner_products(rows, rows)


def _of_trace_one(matrix: Tensor, eps: float) -> Tensor:
    return matrix / matrix.diagonal().sum().clamp_min(eps)


class InformationTheoretic(nn.Module):
    r"""Both losses of pooled features, whose student's is brought to the teacher's width by one linear layer.

    $$
    L = \lambda_c L_c(W s + b, t) + \lambda_m L_m
    $$

    L_c is `itrd_correlation`. L_m is `itrd_mutual` of W s + b and t too if the widths differ, and otherwise of s and t,
    as in the authors' code.

    Args:
        student_shape: (D,): the pooled feature.
        teacher_shape: (D',).
        correlation: λ_c.
        mutual: λ_m.
        order: α of the correlations, above 0.

    Raises:
        ValueError: A feature is no vector, or α is not positive.
    """

    def __init__(
        self,
        student_shape: Shape,
        teacher_shape: Shape,
        *,
        correlation: float = 2.0,
        mutual: float = 1.0,
        order: float = 1.5,
    ) -> None:
        super().__init__()
        two_vectors(student_shape, teacher_shape)
        positive(order, "order")
        self.embedding = nn.Linear(student_shape[0], teacher_shape[0])
        self.correlation, self.mutual, self.order = correlation, mutual, order

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """The loss of features [N, D] and [N, D']; no gradient reaches the latter. Scalar; can be negative."""
        same_batch(student, teacher, "information_theoretic")
        student = full(student)
        embedded = full(self.embedding(student))
        compared = student if student.shape == teacher.shape else embedded
        correlation = itrd_correlation(embedded, teacher, self.order)
        return self.correlation * correlation + self.mutual * itrd_mutual(compared, teacher)
