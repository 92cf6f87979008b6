"""Maximum mean discrepancy. Gretton et al.: A Kernel Two-Sample Test, JMLR 13, 2012; several Gaussian kernels as in
Long et al.: Learning Transferable Features with Deep Adaptation Networks, arXiv 1502.02791."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from kdbench.losses.checks import full, shape


def mmd(
    student: Tensor,
    other: Tensor,
    kernels: int = 5,
    factor: float = 2.0,
    reduction: Literal["sum", "mean"] = "sum",
    eps: float = 1e-12,
) -> Tensor:
    """Squared MMD of two samples of one network's features, biased estimator over the whole batches.

    With k(a, b) = Σᵢ exp(-‖a - b‖² / σᵢ): mean k(x, x') + mean k(y, y') - 2 mean k(x, y), all pairs, each with itself
    too. σᵢ = σ̄ · factor^(i - ⌊kernels / 2⌋), i = 0 … kernels - 1, around σ̄, the mean squared distance of all ordered
    pairs of different samples of the two batches together, through which no gradient goes.

    Args:
        student: features [N, …] on one input set, at least one; flattened.
        other: the same network's features on another set, [M, …] of the same shape but for N.
        kernels: number of Gaussian kernels.
        factor: ratio of neighbouring bandwidths.
        reduction: "sum" of the kernels (as in the code of arXiv 2005.07839), or their "mean".
        eps: least σ̄, for batches that are one point.

    Returns:
        Scalar in [0, 2 · kernels] ("mean": [0, 2]), but for rounding; 0 for equal samples.

    Raises:
        ValueError: when the shapes do not fit, or an option is out of range.
    """
    if student.shape[1:] != other.shape[1:] or student.ndim < 2 or not len(student) or not len(other):
        raise ValueError(f"mmd needs two batches [N, …] of one shape: {shape(student)} and {shape(other)}")
    if kernels < 1 or not factor > 0 or reduction not in ("sum", "mean"):
        raise ValueError(f"mmd cannot have kernels {kernels}, factor {factor}, reduction {reduction!r}")
    n = len(student)
    both = torch.cat([full(student).flatten(1), full(other).flatten(1)])
    # Differences, not ‖a‖² + ‖b‖² - 2ab: that loses the small distances, which the narrow kernels are about.
    squared = (both.unsqueeze(0) - both.unsqueeze(1)).square().sum(dim=2)
    pairs = max(len(both) * (len(both) - 1), 1)
    width = (squared.detach().sum() / pairs).clamp(min=eps)
    total = torch.zeros_like(squared)
    for i in range(kernels):
        total = total + torch.exp(-squared / (width * factor ** (i - kernels // 2)))
    value = total[:n, :n].mean() + total[n:, n:].mean() - 2 * total[:n, n:].mean()
    return value if reduction == "sum" else value / kernels
