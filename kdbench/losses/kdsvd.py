"""Distillation by singular value decomposition (KDSVD).

Lee, Kim, Song: Self-supervised Knowledge Distillation Using Singular Value Decomposition. ECCV 2018,
arXiv 1807.06819.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from kdbench.losses.checks import one_of, shape
from kdbench.losses.features import inner_products, maps_of_one_size

Matrix = Literal["channels", "columns"]


def singular_vectors(
    student: Sequence[Tensor], teacher: Sequence[Tensor], k: int = 1, matrix: Matrix = "channels"
) -> Tensor:
    r"""How the leading singular vectors of one layer's map relate to the next layer's, compared between the networks.

    $$
    L = \frac{1}{N} \sum_l \sum_{n,i,j,m} \left( R^S_{nijm} - R^T_{nijm} \right)^2, \qquad
    R_{nijm} = \exp\left( -\tfrac{1}{8} \left( v^{l+1}_{nim} - v^l_{njm} \right)^2 \right)
    $$

    v [.., m] are the k leading right singular vectors of an image's map as a matrix, times the teacher's singular
    values of unit length: for k = 1, times 1. Of the student's k + 3 leading vectors, those count that are most like
    each of the teacher's, with its sign. A vector's own sign is arbitrary; here the teacher's largest entry is
    positive. A gradient flows through vectors whose singular values differ.

    Args:
        student: Maps [N, C, H, W], at least two, from the shallowest to the deepest.
        teacher: As many maps; channels must agree for the matrix "channels".
        k: How many vectors.
        matrix: "channels" is [H W, C], whose vectors are over channels. "columns" is [C H, W], whose vectors are over
            the width of a map; the larger map is average-pooled.

    Returns:
        Scalar, at least 0.

    Raises:
        ValueError: There are not as many maps, or they do not fit.
    """
    one_of(matrix, "matrix", "channels", "columns")
    if len(student) != len(teacher) or len(student) < 2:
        raise ValueError(
            f"singular_vectors needs as many maps of both networks, at least two: {len(student)}, {len(teacher)}"
        )
    pairs = [_vectors(own, taught, k, matrix) for own, taught in zip(student, teacher, strict=True)]
    total = torch.zeros((), device=student[0].device, dtype=pairs[0][0].dtype)
    for (own, taught), (next_own, next_taught) in zip(pairs[:-1], pairs[1:], strict=True):
        difference = _relations(next_own, own) - _relations(next_taught, taught)
        total = total + difference.square().sum() / len(own)
    return total


def _vectors(student: Tensor, teacher: Tensor, k: int, matrix: Matrix) -> tuple[Tensor, Tensor]:
    """Both networks' vectors of one layer, [N, D, k]."""
    student, teacher = maps_of_one_size(student, teacher.detach(), "singular_vectors")
    own, taught = (
        one.flatten(2).transpose(1, 2) if matrix == "channels" else one.flatten(1, 2) for one in (student, teacher)
    )
    if own.shape[2] != taught.shape[2] or not 1 <= k <= taught.shape[2]:
        raise ValueError(
            f"singular_vectors needs maps of equal channels, and k in their number: student {shape(student)}, "
            f"teacher {shape(teacher)}, k = {k}"
        )
    values, vectors = _leading(taught, k)
    largest = vectors.gather(1, vectors.abs().argmax(dim=1, keepdim=True))
    vectors = vectors * largest.sign()
    _, candidates = _leading(own, k + 3)
    cosines = inner_products(candidates.detach().transpose(1, 2), vectors.transpose(1, 2))
    best = cosines.abs().argmax(dim=1, keepdim=True)
    chosen = candidates.gather(2, best.expand(-1, candidates.shape[1], -1)) * cosines.gather(1, best).sign()
    scales = F.normalize(values, dim=1).unsqueeze(1)
    return chosen * scales, vectors * scales


def _leading(matrices: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k leading singular values [N, k] and right singular vectors [N, D, k] of matrices [N, ., D].

    The vectors' gradient is that of first-order perturbation: a vector moves by its products with the others, each
    divided by the difference of their squared singular values. Of a full decomposition the gradient is not a number as
    soon as two of the least singular values are 0.
    """
    gram = inner_products(matrices.transpose(1, 2), matrices.transpose(1, 2))
    squares, vectors = torch.linalg.eigh(gram.detach())
    squares, vectors = squares.flip(1).clamp_min(0), vectors.flip(2)
    leading = vectors[:, :, :k]
    gaps = squares[:, None, :k] - squares[:, :, None]
    gaps = gaps.where(gaps.abs() > 1e-6 * squares[:, :1, None], torch.inf)
    with torch.autocast(gram.device.type, enabled=False):
        moves = vectors.transpose(1, 2) @ (gram - gram.detach()) @ leading / gaps
        return squares[:, :k].sqrt(), leading + vectors @ moves


def _relations(a: Tensor, b: Tensor) -> Tensor:
    return torch.exp((a.unsqueeze(2) - b.unsqueeze(1)).square() / -8)
