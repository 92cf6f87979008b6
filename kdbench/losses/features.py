"""Helpers of several feature losses: checks of two batches, maps of the same size, and products of all pairs."""

import torch
from torch import Tensor
from torch.nn import functional as F

from kdbench.losses.checks import full, shape


def same_batch(student: Tensor, teacher: Tensor, loss: str) -> None:
    """Check that both are [N, ...] with the same N > 0 and at least one more dimension each.

    Raises:
        ValueError: They are not. The message names the loss and both shapes.
    """
    if student.ndim < 2 or teacher.ndim < 2 or len(student) != len(teacher) or len(student) == 0:
        raise ValueError(
            f"{loss} needs features [N, ...] of one batch: student {shape(student)}, teacher {shape(teacher)}"
        )


def maps_of_one_size(student: Tensor, teacher: Tensor, loss: str) -> tuple[Tensor, Tensor]:
    """Both maps in full precision, the larger one average-pooled to the smaller, height and width each for itself.

    Args:
        student: [N, C, H, W].
        teacher: [N, C', H', W'].
        loss: Name for the message.

    Returns:
        [N, C, h, w] and [N, C', h, w], h = min(H, H'), w = min(W, W').

    Raises:
        ValueError: Either is not [N, C, H, W], or the batches differ.
    """
    if student.ndim != 4 or teacher.ndim != 4 or len(student) != len(teacher) or len(student) == 0:
        raise ValueError(
            f"{loss} needs maps [N, C, H, W] of one batch: student {shape(student)}, teacher {shape(teacher)}"
        )
    size = (min(student.shape[2], teacher.shape[2]), min(student.shape[3], teacher.shape[3]))
    return pooled(full(student), size), pooled(full(teacher), size)


def pooled(feature: Tensor, size: tuple[int, int]) -> Tensor:
    """A map [N, C, H, W] average-pooled to a height and width."""
    return feature if feature.shape[2:] == size else F.adaptive_avg_pool2d(feature, size)


def inner_products(a: Tensor, b: Tensor) -> Tensor:
    """Inner products of all rows of `a` [..., n, d] with all rows of `b` [..., m, d]: [..., n, m].

    In the precision of its arguments: under autocast a matrix product would be computed in half precision, which
    leaves nothing of the differences between similarities.
    """
    with torch.autocast(a.device.type, enabled=False):
        return a @ b.transpose(-2, -1)


def centred_units(feature: Tensor, dim: int, eps: float) -> Tensor:
    """Centred along a dimension and of unit length there, so that products sum to Pearson's correlation.

    What is constant there becomes zero, without gradient: where the norm is not above `eps` times one plus the norm of
    as many elements of the largest size, since the mean is rounded by so much.
    """
    centred = feature - feature.mean(dim=dim, keepdim=True)
    lengths = torch.linalg.vector_norm(centred, dim=dim, keepdim=True)
    least = eps * (1 + feature.shape[dim] ** 0.5 * feature.detach().abs().amax(dim=dim, keepdim=True))
    return torch.where(lengths > least, centred / lengths.maximum(least), 0.0)
