"""DIST. Huang, You, Wang, Qian, Xu: Knowledge Distillation from A Stronger Teacher, NeurIPS 2022, arXiv 2205.10536."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from kdbench.losses.checks import full, logits_shape


def dist(
    student_logits: Tensor,
    teacher_logits: Tensor,
    beta: float = 1.0,
    gamma: float = 1.0,
    temperature: float = 4.0,
    scale: bool = True,
    eps: float = 1e-8,
) -> Tensor:
    """β (1 - mean ρ of the rows) + γ (1 - mean ρ of the columns) of the two networks' probabilities; × T² when `scale`.

    ρ is Pearson's correlation of p = softmax(z / T). Rows: one image's classes (inter-class); columns: one class over
    the images of the batch (intra-class). Positive affine maps of the student's probabilities change nothing, so a
    stronger teacher's sharper outputs need not be met exactly. The columns' part depends on the batch, and is γ without
    gradient for a batch of one.

    Args:
        student_logits: [N, K].
        teacher_logits: [N, K].
        beta: β, weight of the rows.
        gamma: γ, weight of the columns.
        temperature: T > 0.
        scale: multiply by T².
        eps: added to the products of the norms.

    Returns:
        Scalar in [0, 2 (β + γ)], × T² when `scale`.

    Raises:
        ValueError: when the shapes are not one [N, K], or T is not positive.
    """
    logits_shape(student_logits, teacher_logits, "dist")
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, not {temperature}")
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
