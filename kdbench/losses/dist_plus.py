"""DIST+, what it adds to DIST.

Huang, You, Wang, Qian, Xu: DIST+: Knowledge Distillation From a Stronger Adaptive Teacher. TPAMI 2025.
"""

from torch import Tensor

from kdbench.losses.checks import shape
from kdbench.losses.features import centred_units, maps_of_one_size


def channel_relation(student: Tensor, teacher: Tensor, eps: float = 1e-6) -> Tensor:
    r"""One minus the correlation of the two networks' channels at a position, averaged over images and positions.

    $$
    L = 1 - \frac{1}{N H W} \sum_{n,h,w} \rho(s_{n \cdot hw}, t_{n \cdot hw})
    $$

    ρ is Pearson's correlation. Scaling or shifting all channels of a position changes nothing. If the maps differ in
    size, the larger one is average-pooled to the smaller size first.

    Args:
        student: [N, C, H, W].
        teacher: [N, C, H', W'].
        eps: Where the norm of the centred values is no larger, ρ is 0, without gradient.

    Returns:
        Scalar in [0, 2].

    Raises:
        ValueError: Either is no map, or the batches or the channels differ.
    """
    own, taught = maps_of_one_size(student, teacher.detach(), "channel_relation")
    if own.shape[1] != taught.shape[1]:
        raise ValueError(
            f"channel_relation needs maps of equal channels: student {shape(student)}, teacher {shape(teacher)}"
        )
    return 1 - _correlation(own, taught, 1, eps).mean()


def spatial_relation(student: Tensor, teacher: Tensor, eps: float = 1e-6) -> Tensor:
    r"""One minus the correlation over the batch of the two networks' sums of channels, averaged over positions.

    $$
    L = 1 - \frac{1}{H W} \sum_{h,w} \rho(a^S_{\cdot hw}, a^T_{\cdot hw}), \qquad a_{nhw} = \sum_c f_{nchw}
    $$

    ρ is Pearson's correlation. Channels need not agree. If the maps differ in size, the larger one is average-pooled to
    the smaller size first. It depends on the batch; for a batch of one it is 1, without gradient.

    Args:
        student: [N, C, H, W].
        teacher: [N, C', H', W'].
        eps: Where the norm of the centred values is no larger, ρ is 0, without gradient.

    Returns:
        Scalar in [0, 2].

    Raises:
        ValueError: Either is no map, or the batches differ.
    """
    own, taught = maps_of_one_size(student, teacher.detach(), "spatial_relation")
    return 1 - _correlation(own.sum(dim=1), taught.sum(dim=1), 0, eps).mean()


def _correlation(own: Tensor, taught: Tensor, dim: int, eps: float) -> Tensor:
    """Pearson's correlation along one dimension."""
    return (centred_units(own, dim, eps) * centred_units(taught, dim, eps)).sum(dim=dim)
