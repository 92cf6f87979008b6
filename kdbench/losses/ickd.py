"""Inter-channel correlation (ICKD).

Liu, Huang, Lin, Xie, Wang, Chang, Liang: Exploring Inter-Channel Correlation for Diversity-Preserved Knowledge
Distillation. ICCV 2021, arXiv 2202.03680.
"""

from torch import Tensor
from torch.nn import functional as F

from kdbench.losses.checks import full, shape
from kdbench.losses.features import inner_products


def inter_channel_correlation(student: Tensor, teacher: Tensor) -> Tensor:
    r"""Squared difference of the two networks' similarities between the channels of a map.

    $$
    L = \frac{1}{N C} \sum_n \left\| G^S_n - G^T_n \right\|_F^2
    $$

    G is X Xᵀ with each row divided by its L2 norm, where the rows of X [C, H W] are an image's channels. Positive
    scaling of an image's map and the order of its positions change nothing.

    Args:
        student: Map after a connector, [N, C, H, W].
        teacher: Map, [N, C, H', W'].

    Returns:
        Scalar in [0, 4]; after a ReLU, where no similarity is negative, in [0, 2].

    Raises:
        ValueError: The shapes do not match.
    """
    if student.ndim != 4 or teacher.ndim != 4 or student.shape[:2] != teacher.shape[:2] or len(student) == 0:
        raise ValueError(
            "inter_channel_correlation needs maps of equal channels, [N, C, H, W]: "
            f"student {shape(student)}, teacher {shape(teacher)}"
        )
    own, taught = (_similarities(feature) for feature in (student, teacher.detach()))
    return student.shape[1] * F.mse_loss(own, taught)


def _similarities(feature: Tensor) -> Tensor:
    rows = full(feature).flatten(2)
    return F.normalize(inner_products(rows, rows), dim=2)
