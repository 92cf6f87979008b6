"""Attention transfer. Zagoruyko, Komodakis: Paying More Attention to Attention, ICLR 2017, arXiv 1612.03928."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from kdbench.losses.checks import full, shape


def attention_transfer(
    student: Tensor, teacher: Tensor, p: float = 2, form: Literal["code", "paper"] = "code"
) -> Tensor:
    """Distance of the activation-based attention maps of one pair of layers (the paper's equation 2).

    A map is Q = vec(Σ_c |A_c|^p), divided by its L2 norm, one unit vector of H·W elements a sample. The two forms:

    * "code": mean over samples and positions of (Q_s - Q_t)², as in the authors' code; in [0, 2 / (H·W)].
    * "paper": mean over samples of ‖Q_s - Q_t‖₂; in [0, √2]. The paper's factor β / 2 belongs to the term's weight.

    Both are invariant to positive scaling of either feature, since Q is. Maps of different size: the larger *feature*
    is average-pooled to the smaller before its map is taken, as the usual re-implementations do (the authors' code
    does not handle that case). |A|^p equals A^p for every even p and for features after a ReLU.

    Args:
        student: [N, C, H, W]; C may differ from the teacher's.
        teacher: [N, C', H', W'].
        p: exponent, at least 1; 2 in the authors' code.
        form: which of the two distances.

    Returns:
        Scalar, at least 0. A sample whose feature is zero everywhere has the zero map, not NaN.

    Raises:
        ValueError: when either is not [N, C, H, W], the batches differ, or p is below 1.
    """
    if student.ndim != 4 or teacher.ndim != 4 or len(student) != len(teacher) or len(student) == 0:
        raise ValueError(
            "attention_transfer needs maps [N, C, H, W] of one batch: "
            f"student {shape(student)}, teacher {shape(teacher)}"
        )
    if not p >= 1:
        raise ValueError(f"p must be at least 1, not {p}")
    if form not in ("code", "paper"):
        raise ValueError(f"form must be 'code' or 'paper', not {form!r}")
    size = (min(student.shape[2], teacher.shape[2]), min(student.shape[3], teacher.shape[3]))
    difference = _attention(full(student), size, p) - _attention(full(teacher.detach()), size, p)
    if form == "code":
        return difference.square().mean()
    distances: Tensor = torch.linalg.vector_norm(difference, dim=1)
    return distances.mean()


def _attention(feature: Tensor, size: tuple[int, int], p: float) -> Tensor:
    """Unit attention vectors [N, H·W]. The mean over channels in place of the sum cancels in the normalization."""
    if feature.shape[2:] != size:
        feature = F.adaptive_avg_pool2d(feature, size)
    return F.normalize(feature.abs().pow(p).mean(dim=1).flatten(1), dim=1)
