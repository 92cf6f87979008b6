"""Distillation by Pearson's correlation of feature maps (PKD).

Cao, Zhang, Gao, Cheng, Cheng, Cheng: PKD: General Distillation Framework for Object Detectors via Pearson Correlation
Coefficient. NeurIPS 2022, arXiv 2207.02039.
"""

from torch import Tensor

from kdbench.losses.checks import same_shape
from kdbench.losses.features import centred_units, maps_of_one_size


def map_correlation(student: Tensor, teacher: Tensor, eps: float = 1e-6) -> Tensor:
    r"""One minus the correlation of a channel in both networks, over images and positions, averaged over the channels.

    $$
    L = 1 - \frac{1}{C} \sum_c \rho(s_{\cdot c \cdot\cdot}, t_{\cdot c \cdot\cdot})
    $$

    ρ is Pearson's correlation, so scaling or shifting a channel of either map changes nothing. It is computed as half
    the squared distance of centred values of unit length: a channel that is constant in one map adds 1/2, one that is
    constant in both 0. It depends on the batch. If the maps differ in size, the larger one is average-pooled to the
    smaller size first.

    Args:
        student: Map after a connector, [N, C, H, W].
        teacher: [N, C, H', W'].
        eps: Where the norm of the centred values is no larger, a channel counts as constant, without gradient.

    Returns:
        Scalar in [0, 2].

    Raises:
        ValueError: Either is no map, or the batches or the channels differ.
    """
    maps = maps_of_one_size(student, teacher.detach(), "map_correlation")
    same_shape(*maps, "map_correlation")
    own, taught = (centred_units(one.transpose(0, 1).flatten(1), 1, eps) for one in maps)
    return (own - taught).square().sum(dim=1).mean() / 2
