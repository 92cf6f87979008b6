"""Neuron selectivity transfer. Huang, Wang: Like What You Like: Knowledge Distill via Neuron Selectivity Transfer,
arXiv 1707.01219."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from kdbench.losses.features import inner_products, maps_of_one_size


def neuron_selectivity(student: Tensor, teacher: Tensor) -> Tensor:
    """Squared maximum mean discrepancy between the channels of two maps, with the polynomial kernel k(a, b) = (aᵀ b)².

    A channel of a sample is a vector over positions, divided by its L2 norm: the network's samples are its channels.
    mean k(s, s') + mean k(t, t') - 2 mean k(s, t), each over all pairs of channels, then over the batch. Numbers of
    channels may differ; of two sizes the larger map is average-pooled to the smaller. Takes memory of C · C' numbers a
    sample, not C · C' · H · W. Scaling a channel, even by a negative number, changes nothing.

    Args:
        student: [N, C, H, W].
        teacher: [N, C', H', W'].

    Returns:
        Scalar in [0, 2] but for rounding; 0 for equal maps.

    Raises:
        ValueError: when either is not [N, C, H, W], or the batches differ.
    """
    student, teacher = maps_of_one_size(student, teacher.detach(), "neuron_selectivity")
    own, taught = (F.normalize(feature.flatten(2), dim=2) for feature in (student, teacher))
    return _kernel(own, own) + _kernel(taught, taught) - 2 * _kernel(own, taught)


def _kernel(a: Tensor, b: Tensor) -> Tensor:
    """Mean of k over the batch and all pairs of channels."""
    return inner_products(a, b).square().mean()
