"""Relational knowledge distillation. Park, Kim, Lu, Cho: Relational Knowledge Distillation, CVPR 2019,
arXiv 1904.05068."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from kdbench.losses.checks import full
from kdbench.losses.features import inner_products, same_batch


def rkd_distance(student: Tensor, teacher: Tensor, eps: float = 1e-12) -> Tensor:
    """Smooth L1 (Huber, δ = 1) of the distances between the images of a batch, in units of their mean distance.

    D_ij = ‖f_i - f_j‖₂ divided by the mean over all i ≠ j, of each network; mean of the Huber loss over all N² entries,
    the zeros of the diagonal included. Gradients go through the student's mean distance too. Rotation, translation and
    scaling of either feature change nothing.

    Args:
        student: [N, ...], flattened.
        teacher: [N, ...], flattened; its width may differ.
        eps: least squared distance of two images.

    Returns:
        Scalar, at least 0; 0 for a batch of one.

    Raises:
        ValueError: when the batches differ, or a feature is not [N, ...].
    """
    same_batch(student, teacher, "rkd_distance")
    return F.smooth_l1_loss(_distances(student, eps), _distances(teacher.detach(), eps))


def rkd_angle(student: Tensor, teacher: Tensor, eps: float = 1e-12) -> Tensor:
    """Smooth L1 (Huber, δ = 1) of the cosines of the angles that the images of a batch make at each other.

    cos ∠ j i k = ⟨e_ij, e_ik⟩ with e_ij = (f_j - f_i) / ‖f_j - f_i‖₂; mean over all N³ triples, those included whose
    images are not three (their cosines are 0 or 1 in both networks). Rotation, translation and scaling of either
    feature change nothing. Takes memory of N³ + N² D numbers.

    Args:
        student: [N, ...], flattened.
        teacher: [N, ...], flattened; its width may differ.
        eps: two images that are not further apart have no direction (the zero vector, without gradient).

    Returns:
        Scalar in [0, 1.5]; 0 for a batch of one.

    Raises:
        ValueError: when the batches differ, or a feature is not [N, ...].
    """
    same_batch(student, teacher, "rkd_angle")
    return F.smooth_l1_loss(_cosines(student, eps), _cosines(teacher.detach(), eps))


def _differences(feature: Tensor) -> Tensor:
    """f_j - f_i at [i, j]: [N, N, D]. Not ‖f_i‖² + ‖f_j‖² - 2 ⟨f_i, f_j⟩, which loses small distances."""
    rows = full(feature).flatten(1)
    return rows.unsqueeze(0) - rows.unsqueeze(1)


def _distances(feature: Tensor, eps: float) -> Tensor:
    # The root's derivative is infinite at 0: neither the diagonal nor equal images may reach it.
    distances = _differences(feature).square().sum(dim=2).clamp_min(eps).sqrt()
    n = len(distances)
    distances = distances * (1 - torch.eye(n, dtype=distances.dtype, device=distances.device))
    mean = distances.sum() / max(n * (n - 1), 1)
    return distances / mean.clamp_min(eps**0.5)


def _cosines(feature: Tensor, eps: float) -> Tensor:
    differences = _differences(feature)
    lengths = torch.linalg.vector_norm(differences, dim=2, keepdim=True)
    directions = torch.where(lengths > eps, differences / lengths.clamp_min(eps), 0.0)
    return inner_products(directions, directions)
