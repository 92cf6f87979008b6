"""Instance relationship graph (IRG).

Liu, Cao, Li, Yuan, Hu, Li, Duan: Knowledge Distillation via Instance Relationship Graph. CVPR 2019.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional as F

from kdbench.losses.checks import full, shape
from kdbench.losses.features import inner_products, maps_of_one_size, same_batch


def instance_edges(student: Sequence[Tensor], teacher: Sequence[Tensor], eps: float = 1e-12) -> Tensor:
    r"""Squared difference of the distances between the images of a batch, in units of the largest, at several layers.

    $$
    L = \frac{1}{M N^2} \sum_m \sum_{i,j} \left( A^{S,m}_{ij} - A^{T,m}_{ij} \right)^2, \qquad
    A^m_{ij} = \frac{\| f^m_i - f^m_j \|_2^2}{\max_{i',j'} \| f^m_{i'} - f^m_{j'} \|_2^2}
    $$

    Unlike `rkd_distance`, it compares squared distances. A gradient goes through the student's largest distance too.
    Rotation, translation and scaling of any layer's features change nothing.

    Args:
        student: Features [N, ...] of M layers, flattened.
        teacher: As many; their widths may differ.
        eps: Least value of the largest squared distance.

    Returns:
        Scalar in [0, 1]; 0 for a batch of one.

    Raises:
        ValueError: There is no layer or not as many, the batches differ, or a feature is not [N, ...].
    """
    _fit(student, teacher, 1, "instance_edges")
    each = [
        F.mse_loss(_distances(own, eps), _distances(taught.detach(), eps))
        for own, taught in zip(student, teacher, strict=True)
    ]
    return torch.stack(each).mean()


def instance_transformation(student: Sequence[Tensor], teacher: Sequence[Tensor], eps: float = 1e-12) -> Tensor:
    r"""Squared difference of how far each image's map moves from one layer to the next, in units of the farthest.

    $$
    L = \frac{1}{(M - 1) N} \sum_m \sum_n \left( t^{S,m}_n - t^{T,m}_n \right)^2, \qquad
    t^m_n = \frac{\| F^{m+1}_n - F^m_n \|_2^2}{\max_{n'} \| F^{m+1}_{n'} - F^m_{n'} \|_2^2}
    $$

    Within a network, the larger of two maps is average-pooled to the smaller, and the channels of the wider one too:
    where it has twice as many, means of two neighbours. A gradient goes through the student's largest distance too.

    Args:
        student: Maps [N, C, H, W] of M layers, at least two, from the shallowest to the deepest.
        teacher: As many maps, of any sizes.
        eps: Least value of the largest squared distance.

    Returns:
        Scalar in [0, 1]; 0 for a batch of one in which both maps move.

    Raises:
        ValueError: There are not as many maps, or fewer than two; the batches differ, or one is no map.
    """
    _fit(student, teacher, 2, "instance_transformation")
    if no_maps := [one for one in (*student, *teacher) if one.ndim != 4]:
        raise ValueError(f"instance_transformation needs maps [N, C, H, W], not {shape(no_maps[0])}")
    each = [
        F.mse_loss(_moves(own, next_own, eps), _moves(taught.detach(), next_taught.detach(), eps))
        for (own, next_own), (taught, next_taught) in zip(pairwise(student), pairwise(teacher), strict=True)
    ]
    return torch.stack(each).mean()


def _fit(student: Sequence[Tensor], teacher: Sequence[Tensor], least: int, loss: str) -> None:
    # A tensor could be read as a list, of its images.
    if isinstance(student, Tensor) or isinstance(teacher, Tensor):
        raise ValueError(f"{loss} needs lists of features: in a recipe, a list of hook points")
    if len(student) != len(teacher) or len(student) < least:
        found = " and ".join(f"{len(side)} of the {who}" for side, who in ((student, "student"), (teacher, "teacher")))
        raise ValueError(f"{loss} needs as many features of both networks, at least {least}, not {found}")
    for own, taught in zip(student, teacher, strict=True):
        same_batch(own, taught, loss)


def _distances(feature: Tensor, eps: float) -> Tensor:
    """Squared distances between images in units of the largest, [N, N].

    From inner products: of maps, all differences would not fit into memory. The batch's mean changes no distance, and
    without it less is lost where features are far from 0.
    """
    rows = full(feature).flatten(1)
    rows = rows - rows.mean(dim=0)
    squares = rows.square().sum(dim=1)
    found = squares.unsqueeze(0) + squares.unsqueeze(1) - 2 * inner_products(rows, rows)
    found = found.clamp_min(0) * (1 - torch.eye(len(rows), dtype=rows.dtype, device=rows.device))
    return found / found.amax().clamp_min(eps)


def _moves(first: Tensor, second: Tensor, eps: float) -> Tensor:
    """Squared distances from each image's first map to its second, in units of the largest, [N]."""
    first, second = maps_of_one_size(first, second, "instance_transformation")
    channels = min(first.shape[1], second.shape[1])
    difference = _of_channels(second, channels) - _of_channels(first, channels)
    found = difference.square().flatten(1).sum(dim=1)
    return found / found.amax().clamp_min(eps)


def _of_channels(feature: Tensor, channels: int) -> Tensor:
    """Average-pooled over the channels, [N, H W, channels]."""
    positions = feature.flatten(2).transpose(1, 2)
    return positions if positions.shape[2] == channels else F.adaptive_avg_pool1d(positions, channels)
