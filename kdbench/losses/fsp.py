"""Flow of solution procedure (FSP). Yim, Joo, Bae, Kim: A Gift from Knowledge Distillation. CVPR 2017."""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional as F

from kdbench.losses.checks import shape
from kdbench.losses.features import inner_products, maps_of_one_size


def fsp_matrix(shallow: Tensor, deep: Tensor) -> Tensor:
    r"""Inner products of the channels of two layers of one network, which describe what the layers between them do.

    $$
    M_{nij} = \frac{1}{HW} \sum_{h,w} A_{nihw} B_{njhw}
    $$

    If the maps differ in size, the larger one is average-pooled to the smaller size first.

    Args:
        shallow: A, feature map, [N, C, H, W].
        deep: B, feature map, [N, C', H', W'].

    Returns:
        [N, C, C'].

    Raises:
        ValueError: A tensor is not [N, C, H, W], or the batch sizes differ.
    """
    a, b = maps_of_one_size(shallow, deep, "fsp_matrix")
    return inner_products(a.flatten(2), b.flatten(2)) / a[0, 0].numel()


def fsp(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    r"""Mean squared difference of the FSP matrices of neighbouring layers, summed over the pairs of layers.

    $$
    L = \sum_l \operatorname{mean} \left( M^S_{l,\,l+1} - M^T_{l,\,l+1} \right)^2
    $$

    Both networks need the same number of channels at each layer; sizes of the maps may differ.

    Args:
        student: Feature maps from shallow to deep, at least two, [N, C_l, H_l, W_l].
        teacher: As many, with the same C_l.

    Returns:
        Scalar, at least 0.

    Raises:
        ValueError: The numbers of layers differ or are below two, or the shapes do not match.
    """
    if len(student) != len(teacher) or len(student) < 2:
        raise ValueError(f"fsp needs two layers of each network or more: {len(student)} and {len(teacher)}")
    for own, taught in zip(student, teacher, strict=True):
        if own.shape[:2] != taught.shape[:2]:
            raise ValueError(f"fsp needs equal channels: student {shape(own)}, teacher {shape(taught)}")
    matrices = [[fsp_matrix(a, b) for a, b in pairwise(maps)] for maps in (student, [t.detach() for t in teacher])]
    return torch.stack([F.mse_loss(own, taught) for own, taught in zip(*matrices, strict=True)]).sum()
