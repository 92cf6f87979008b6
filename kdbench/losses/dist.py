"""DIST. Huang, You, Wang, Qian, Xu: Knowledge Distillation from A Stronger Teacher. NeurIPS 2022, arXiv 2205.10536."""

import torch
from torch import Tensor
from torch.nn import functional as F

from kdbench.losses.checks import full, logits_shape, positive


def dist(
    student_logits: Tensor,
    teacher_logits: Tensor,
    beta: float = 1.0,
    gamma: float = 1.0,
    temperature: float = 4.0,
    scale: bool = True,
    eps: float = 1e-8,
) -> Tensor:
    r"""One minus the correlation of the two networks' probabilities, over each image's classes and each class's images.

    $$
    L = T^2 \left( \beta \left( 1 - \frac{1}{N} \sum_n \rho(p^S_{n\cdot}, p^T_{n\cdot}) \right)
    + \gamma \left( 1 - \frac{1}{K} \sum_k \rho(p^S_{\cdot k}, p^T_{\cdot k}) \right) \right),
    \qquad p = \operatorname{softmax}(z / T)
    $$

    ρ is Pearson's correlation. Without `scale` the factor T² is 1. Scaling or shifting the student's probabilities
    changes nothing, so the sharper outputs of a stronger teacher need not be matched exactly. The second part depends
    on the batch; for a batch of one it is γ, without gradient.

    Args:
        student_logits: [N, K].
        teacher_logits: [N, K].
        beta: β, weight of the rows.
        gamma: γ, weight of the columns.
        temperature: T > 0.
        scale: Multiply by T².
        eps: Added to the products of the norms.

    Returns:
        Scalar in [0, 2 (β + γ)], × T² when `scale`.

    Raises:
        ValueError: The shapes are not one [N, K], or T is not positive.
    """
    logits_shape(student_logits, teacher_logits, "dist")
    positive(temperature)
    own = F.softmax(full(student_logits) / temperature, dim=1)
    taught = F.softmax(full(teacher_logits.detach()) / temperature, dim=1)
    rows, columns = (1 - _correlation(own, taught, dim, eps).mean() for dim in (1, 0))
    value = beta * rows + gamma * columns
    return value * temperature**2 if scale else value


def _correlation(a: Tensor, b: Tensor, dim: int, eps: float) -> Tensor:
    """Pearson's correlation along one dimension."""
    a, b = (x - x.mean(dim=dim, keepdim=True) for x in (a, b))
    norms = torch.linalg.vector_norm(a, dim=dim) * torch.linalg.vector_norm(b, dim=dim)
    return (a * b).sum(dim=dim) / (norms + eps)
