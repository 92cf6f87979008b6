"""Neuron selectivity transfer (NST).

Huang, Wang: Like What You Like: Knowledge Distill via Neuron Selectivity Transfer. arXiv 1707.01219.
"""

from torch import Tensor
from torch.nn import functional as F

from kdbench.losses.features import inner_products, maps_of_one_size


def neuron_selectivity(student: Tensor, teacher: Tensor) -> Tensor:
    r"""Squared maximum mean discrepancy between the channels of two maps, with a polynomial kernel.

    $$
    L = \frac{1}{C^2} \sum_{c,c'} k(s_c, s_{c'}) + \frac{1}{C'^2} \sum_{c,c'} k(t_c, t_{c'})
    - \frac{2}{C C'} \sum_{c,c'} k(s_c, t_{c'}),
    \qquad k(a, b) = (a^\top b)^2
    $$

    Each channel of an image is a vector over positions, divided by its L2 norm. The loss is averaged over the batch.
    The numbers of channels may differ. If the maps differ in size, the larger one is average-pooled to the smaller
    size. It needs memory for C · C' numbers per image. Scaling a channel, even by a negative number, changes nothing.

    Args:
        student: [N, C, H, W].
        teacher: [N, C', H', W'].

    Returns:
        Scalar in [0, 2] but for rounding; 0 for equal maps.

    Raises:
        ValueError: Either is not [N, C, H, W], or the batches differ.
    """
    student, teacher = maps_of_one_size(student, teacher.detach(), "neuron_selectivity")
    own, taught = (F.normalize(feature.flatten(2), dim=2) for feature in (student, teacher))
    return _kernel(own, own) + _kernel(taught, taught) - 2 * _kernel(own, taught)


def _kernel(a: Tensor, b: Tensor) -> Tensor:
    """Mean of k over the batch and all pairs of channels."""
    return inner_products(a, b).square().mean()
