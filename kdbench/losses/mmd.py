"""Maximum mean discrepancy (MMD).

Gretton et al.: A Kernel Two-Sample Test. JMLR 13, 2012. Several Gaussian kernels as in Long et al.: Learning
Transferable Features with Deep Adaptation Networks. arXiv 1502.02791.
"""

from typing import Literal

import torch
from torch import Tensor

from kdbench.losses.checks import at_least_one, full, one_of, positive, shape


def mmd(
    student: Tensor,
    other: Tensor,
    kernels: int = 5,
    factor: float = 2.0,
    reduction: Literal["sum", "mean"] = "sum",
    eps: float = 1e-12,
) -> Tensor:
    r"""Squared MMD between one network's features on two sets of images (biased estimator over the whole batches).

    $$
    L = \frac{1}{N^2} \sum_{n,n'} k(x_n, x_{n'}) + \frac{1}{M^2} \sum_{m,m'} k(y_m, y_{m'})
    - \frac{2}{NM} \sum_{n,m} k(x_n, y_m),
    \qquad k(a, b) = \sum_i e^{-\|a - b\|^2 / \sigma_i}
    $$

    The bandwidths are σᵢ = σ̄ · factor^(i - ⌊kernels / 2⌋) for i = 0 … kernels - 1. σ̄ is the mean squared distance of
    all ordered pairs of different samples in both batches together; no gradient goes through it.

    Args:
        student: Features on one input set, [N, ...] with N at least 1. They are flattened.
        other: The same network's features on another set, [M, ...], the same shape except for M.
        kernels: Number of Gaussian kernels, at least 1.
        factor: Ratio of neighbouring bandwidths, above 0.
        reduction: The "sum" over the kernels (as in the code of arXiv 2005.07839) or their "mean".
        eps: Smallest σ̄, for batches whose samples are all equal.

    Returns:
        Scalar in [0, 2 · kernels] for "sum" and in [0, 2] for "mean", up to rounding. It is 0 for equal samples.

    Raises:
        ValueError: The shapes do not match, or an option is out of range.
    """
    if student.shape[1:] != other.shape[1:] or student.ndim < 2 or not len(student) or not len(other):
        raise ValueError(f"mmd needs two batches [N, …] of one shape: {shape(student)} and {shape(other)}")
    positive(factor, "factor")
    at_least_one(kernels, "kernels")
    one_of(reduction, "reduction", "sum", "mean")
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
