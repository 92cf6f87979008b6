"""Relational knowledge distillation (RKD).

Park, Kim, Lu, Cho: Relational Knowledge Distillation. CVPR 2019, arXiv 1904.05068.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from kdbench.losses.checks import full
from kdbench.losses.features import inner_products, same_batch


def rkd_distance(student: Tensor, teacher: Tensor, eps: float = 1e-12) -> Tensor:
    r"""Difference of the distances between the images of a batch, in units of their mean distance.

    $$
    L = \frac{1}{N^2} \sum_{i,j} h(D^S_{ij} - D^T_{ij}), \qquad
    D_{ij} = \frac{\| f_i - f_j \|_2}{\operatorname{mean}_{i' \ne j'} \| f_{i'} - f_{j'} \|_2}
    $$

    h is the smooth L1 loss (Huber, δ = 1). The zeros of the diagonal are included. Gradients go through the student's
    mean distance too. Rotation, translation and scaling of either feature change nothing.

    Args:
        student: [N, ...], flattened.
        teacher: [N, ...], flattened; its width may differ.
        eps: Least squared distance of two images.

    Returns:
        Scalar, at least 0; 0 for a batch of one.

    Raises:
        ValueError: The batches differ, or a feature is not [N, ...].
    """
    same_batch(student, teacher, "rkd_distance")
    return F.smooth_l1_loss(_distances(student, eps), _distances(teacher.detach(), eps))


def rkd_angle(student: Tensor, teacher: Tensor, eps: float = 1e-12) -> Tensor:
    r"""Difference of the angles between three images of a batch.

    $$
    L = \frac{1}{N^3} \sum_{i,j,k} h\left( \langle e^S_{ij}, e^S_{ik} \rangle - \langle e^T_{ij}, e^T_{ik} \rangle
    \right), \qquad e_{ij} = \frac{f_j - f_i}{\| f_j - f_i \|_2}
    $$

    h is the smooth L1 loss (Huber, δ = 1). All N³ triples count, also those of fewer than three images, whose cosines
    are 0 or 1 in both networks. Rotation, translation and scaling of either feature change nothing. It needs memory
    for N³ + N² D numbers.

    Args:
        student: [N, ...], flattened.
        teacher: [N, ...], flattened; its width may differ.
        eps: Two images that are not further apart have no direction (the zero vector, without gradient).

    Returns:
        Scalar in [0, 1.5]; 0 for a batch of one.

    Raises:
        ValueError: The batches differ, or a feature is not [N, ...].
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
