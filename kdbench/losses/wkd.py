"""Wasserstein distance in place of KL divergence (WKD).

Lv, Yang, Li: Wasserstein Distance Rivals Kullback-Leibler Divergence for Knowledge Distillation. NeurIPS 2024,
arXiv 2412.08139.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kdbench.losses.checks import at_labels, at_least_one, full, labelled_logits, positive, same_shape, shape
from kdbench.losses.features import inner_products


def class_distances(prototypes: Tensor, sharpness: float = 1.0) -> Tensor:
    r"""How far classes lie apart: the cost of moving probability from one to another.

    $$
    c_{ij} = 1 - e^{-\kappa (1 - \cos(w_i, w_j))}, \qquad \text{for}\ \kappa = 0\quad c_{ij} = 1 - \cos(w_i, w_j)
    $$

    Args:
        prototypes: w, a vector for each class, as the rows of a classifier's weight, [K, D].
        sharpness: κ, at least 0: how much closer than others near classes are.

    Returns:
        [K, K]; on the diagonal 0 but for rounding, unless a row is all zeros.

    Raises:
        ValueError: The prototypes are not [K, D].
    """
    if prototypes.ndim != 2:
        raise ValueError(f"class_distances needs a vector for each class, [K, D], not {shape(prototypes)}")
    rows = F.normalize(full(prototypes), dim=1)
    distances = 1 - inner_products(rows, rows)
    # One that changes while training lies in a tensor, and is not read.
    return -torch.expm1(-sharpness * distances) if isinstance(sharpness, Tensor) or sharpness else distances


def sinkhorn_cost(
    student: Tensor,
    teacher: Tensor,
    cost: Tensor,
    regularization: float = 0.05,
    iterations: int = 10,
    classes: Tensor | None = None,
    eps: float = 1e-8,
) -> Tensor:
    r"""Cost of turning each row of probabilities into the teacher's, by a few iterations of Sinkhorn's algorithm.

    $$
    \sum_{i,j} u_i e^{-c_{ij} / \eta} v_j\, c_{ij}, \qquad v = \frac{q^T}{e^{-c / \eta}{}^\top u + \varepsilon},
    \quad u = \frac{q^S}{e^{-c / \eta} v + \varepsilon}
    $$

    u begins uniform; v and u are computed in turn. The student's side of the plan is exact at the end, the teacher's
    only after many iterations. The entropy that η adds keeps the cost of equal rows above 0.

    Args:
        student: Rows q_S that sum to 1, [N, K]. Gradients go through all iterations.
        teacher: Rows q_T, [N, K].
        cost: c, of moving a unit from the student's class i to the teacher's class j, [K, K]. It may get a gradient.
        regularization: η > 0.
        iterations: At least 1.
        classes: Which classes of each row take part, bool [N, K]; all by default. The others have probability 0.
        eps: ε.

    Returns:
        [N], at least 0.

    Raises:
        ValueError: The shapes do not match, or an option is out of range.
    """
    same_shape(student, teacher, "sinkhorn_cost")
    if student.ndim != 2 or cost.shape != student.shape[1:] * 2:
        raise ValueError(f"sinkhorn_cost needs rows [N, K] and costs [K, K]: {shape(student)}, {shape(cost)}")
    positive(regularization, "regularization")
    at_least_one(iterations, "iterations")
    student, teacher, cost = full(student), full(teacher.detach()), full(cost)
    kernel = torch.exp(-cost / regularization)
    # A class without probability has u = v = 0, so one kernel serves all rows, whichever classes they leave out.
    own = torch.ones_like(teacher) if classes is None else classes.to(teacher.dtype)
    own = own / own.sum(dim=1, keepdim=True)
    for _ in range(iterations):
        taught = teacher / (inner_products(own, kernel.t()) + eps)
        own = student / (inner_products(taught, kernel) + eps)
    return (own * inner_products(taught, kernel * cost)).sum(dim=1)


def wasserstein_logits(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    teacher_classifier: nn.Module,
    temperature: float = 8.0,
    sharpness: float = 1.0,
    regularization: float = 0.05,
    iterations: int = 10,
) -> Tensor:
    r"""`sinkhorn_cost` between the networks' probabilities of the classes that are not the label's (WKD-L).

    $$
    L = \frac{1}{N} \sum_n W_\eta(\hat q^S_n, \hat q^T_n; c), \qquad
    \hat q_n = \operatorname{softmax}_{k \ne y_n}(z_{nk} / T)
    $$

    Mistaking a class for a similar one costs little: c are the `class_distances` of the teacher's classifier, at least
    0, plus 1e-8. There is no factor T².

    Args:
        student_logits: [N, K].
        teacher_logits: [N, K].
        labels: Class indices, int64 [N].
        teacher_classifier: Linear, of weight [K, D].
        temperature: T > 0.
        sharpness: κ of the distances, at least 0.
        regularization: η > 0.
        iterations: Of Sinkhorn's algorithm, at least 1.

    Returns:
        Scalar, at least 0. Its least value is not at a student that equals its teacher.

    Raises:
        ValueError: The logits are not one [N, K] with K ≥ 2, the labels are not [N] indices, the classifier is not
            linear or has other classes, or an option is out of range.
    """
    labelled_logits(student_logits, teacher_logits, labels, "wasserstein_logits")
    positive(temperature)
    if not isinstance(teacher_classifier, nn.Linear):
        raise ValueError(f"wasserstein_logits needs a linear classifier, not {type(teacher_classifier).__name__}")
    cost = class_distances(teacher_classifier.weight.detach(), sharpness).relu() + 1e-8
    others = ~at_labels(student_logits, labels)
    own, taught = (
        F.softmax(full(logits).masked_fill(~others, -torch.inf) / temperature, dim=1)
        for logits in (student_logits, teacher_logits.detach())
    )
    return sinkhorn_cost(own, taught, cost.to(own.dtype), regularization, iterations, others).mean()


def wasserstein_gaussian(
    student: Tensor, teacher: Tensor, mean_weight: float = 4.0, grid: int = 1, eps: float = 1e-5
) -> Tensor:
    r"""Squared Wasserstein distance between the networks' features, as Gaussians of uncorrelated channels (WKD-F).

    $$
    L = \frac{1}{N G^2} \sum_{n,g,c} \left( \gamma (\mu^S_{ngc} - \mu^T_{ngc})^2
    + (\sigma^S_{ngc} - \sigma^T_{ngc})^2 \right), \qquad \sigma^2 = \operatorname{var} + \varepsilon
    $$

    μ and the unbiased variance are those of a channel over the positions of one of G² regions, the windows of torch's
    adaptive pooling. The variance of a single position is 0. For γ = 1 it is the squared distance.

    Args:
        student: Map after a connector, [N, C, H, W].
        teacher: [N, C, H, W].
        mean_weight: γ.
        grid: G, regions along a side, at least 1.
        eps: ε > 0, which keeps the derivative finite in a constant channel.

    Returns:
        Scalar, at least 0 for γ ≥ 0; 0 for equal maps.

    Raises:
        ValueError: The shapes are not one [N, C, H, W], or an option is out of range.
    """
    same_shape(student, teacher, "wasserstein_gaussian")
    if student.ndim != 4:
        raise ValueError(
            f"wasserstein_gaussian needs maps [N, C, H, W]: student {shape(student)}, teacher {shape(teacher)}"
        )
    at_least_one(grid, "grid")
    positive(eps, "eps")
    squares = student.new_zeros((), dtype=full(student).dtype)
    for own, taught in zip(_regions(full(student), grid), _regions(full(teacher.detach()), grid), strict=True):
        squares = squares + mean_weight * (own.mean(dim=2) - taught.mean(dim=2)).square().sum()
        squares = squares + (_deviation(own, eps) - _deviation(taught, eps)).square().sum()
    return squares / (len(student) * grid**2)


def _regions(feature: Tensor, grid: int) -> list[Tensor]:
    """The windows of adaptive pooling to grid × grid, each [N, C, positions]."""
    rows, columns = (
        [slice(i * size // grid, -(-(i + 1) * size // grid)) for i in range(grid)] for size in feature.shape[2:]
    )
    return [feature[:, :, row, column].flatten(2) for row in rows for column in columns]


def _deviation(region: Tensor, eps: float) -> Tensor:
    """Standard deviation of each channel, [N, C]. One position alone has none: torch's unbiased one is not a number."""
    return (region.var(dim=2, correction=min(1, region.shape[2] - 1)) + eps).sqrt()
