"""Probabilistic knowledge transfer (PKT).

Passalis, Tefas: Learning Deep Representations with Probabilistic Knowledge Transfer. ECCV 2018, arXiv 1803.10837.
"""

import torch
from torch import Tensor

from kdbench.losses.checks import full
from kdbench.losses.features import inner_products, same_batch


def pkt(student: Tensor, teacher: Tensor, eps: float = 1e-7) -> Tensor:
    r"""Divergence of the two networks' probabilities that one image of a batch is another's neighbour.

    $$
    L = \frac{1}{N^2} \sum_{i,j} t_{ij} \log \frac{t_{ij} + \varepsilon}{s_{ij} + \varepsilon}, \qquad
    p_{ij} = \frac{k_{ij}}{\sum_{j'} k_{ij'}}, \qquad k_{ij} = \frac{\cos(f_i, f_j) + 1}{2}
    $$

    s and t are p of the student and of the teacher; j = i is included. The mean of the rows' KL divergences is N times
    this value, which explains the usual weight of 30000.

    Args:
        student: [N, ...], flattened.
        teacher: [N, ...], flattened; its width may differ.
        eps: ε, also added to the features' norms.

    Returns:
        Scalar, at least 0 but for terms of the order of ε.

    Raises:
        ValueError: The batches differ, or a feature is not [N, ...].
    """
    same_batch(student, teacher, "pkt")
    own, taught = _neighbours(student, eps), _neighbours(teacher.detach(), eps)
    return (taught * ((taught + eps) / (own + eps)).log()).mean()


def _neighbours(feature: Tensor, eps: float) -> Tensor:
    rows = full(feature).flatten(1)
    unit = rows / (torch.linalg.vector_norm(rows, dim=1, keepdim=True) + eps)
    # Rounding takes the cosine of opposite features below -1, and the logarithm of a small batch's shares is then NaN.
    kernel = ((inner_products(unit, unit) + 1) / 2).clamp_min(0)
    return kernel / kernel.sum(dim=1, keepdim=True)
