"""Probabilistic knowledge transfer. Passalis, Tefas: Learning Deep Representations with Probabilistic Knowledge
Transfer, ECCV 2018, arXiv 1803.10837."""

from __future__ import annotations

import torch
from torch import Tensor

from kdbench.losses.checks import full
from kdbench.losses.features import inner_products, same_batch


def pkt(student: Tensor, teacher: Tensor, eps: float = 1e-7) -> Tensor:
    """Divergence of the two networks' probabilities that one image of a batch is another's neighbour.

    k_ij = (cos(f_i, f_j) + 1) / 2, p_ij = k_ij / Σ_j k_ij (j = i included), and the mean over all N² pairs of
    t_ij log((t_ij + ε) / (s_ij + ε)). The mean of the rows' KL divergences is N times this value: that is why the usual
    weight is 30000.

    Args:
        student: [N, ...], flattened.
        teacher: [N, ...], flattened; its width may differ.
        eps: ε, also added to the features' norms.

    Returns:
        Scalar, at least 0 but for terms of the order of ε.

    Raises:
        ValueError: when the batches differ, or a feature is not [N, ...].
    """
    same_batch(student, teacher, "pkt")
    own, taught = _neighbours(student, eps), _neighbours(teacher.detach(), eps)
    return (taught * ((taught + eps) / (own + eps)).log()).mean()


def _neighbours(feature: Tensor, eps: float) -> Tensor:
    rows = full(feature).flatten(1)
    unit = rows / (torch.linalg.vector_norm(rows, dim=1, keepdim=True) + eps)
    kernel = (inner_products(unit, unit) + 1) / 2
    return kernel / kernel.sum(dim=1, keepdim=True)
