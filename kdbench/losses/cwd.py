"""Channel-wise distillation (CWD).

Shu, Liu, Gao, Yan, Shen: Channel-wise Knowledge Distillation for Dense Prediction. ICCV 2021, arXiv 2011.13256.
"""

from torch import Tensor
from torch.nn import functional as F

from kdbench.losses.checks import positive, same_shape
from kdbench.losses.features import maps_of_one_size


def channel_wise(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    r"""KL divergence between the two networks' distributions of each channel over the positions of a map.

    $$
    L = \frac{T^2}{N C} \sum_{n,c} \mathrm{KL}(\phi^T_{nc} \,\|\, \phi^S_{nc}), \qquad
    \phi_{nc} = \operatorname{softmax}_{hw}(F_{nchw} / T)
    $$

    A constant added to a channel changes nothing. The larger map is average-pooled to the smaller.

    Args:
        student: Map after a connector, [N, C, H, W].
        teacher: Map, [N, C, H', W'].
        temperature: T, above 0.

    Returns:
        Scalar, at least 0.

    Raises:
        ValueError: The shapes do not match, or T is not positive.
    """
    positive(temperature)
    maps = maps_of_one_size(student, teacher.detach(), "channel_wise")
    same_shape(*maps, "channel_wise")
    own, taught = (F.log_softmax(one.flatten(2).flatten(0, 1) / temperature, dim=1) for one in maps)
    return temperature**2 * F.kl_div(own, taught, reduction="batchmean", log_target=True)
