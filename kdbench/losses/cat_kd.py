"""Class attention transfer (CAT-KD).

Guo, Yan, Li, Lin: Class Attention Transfer Based Knowledge Distillation. CVPR 2023, arXiv 2304.12777.
"""

from torch import Tensor, nn
from torch.nn import functional as F

from kdbench.losses.checks import at_least_one, full, same_shape, shape


def class_attention(student: Tensor, teacher: Tensor, resolution: int = 2, normalize: bool = False) -> Tensor:
    r"""Mean squared difference of two networks' class maps, pooled to a few positions.

    $$
    L = \operatorname{mean} \left( \operatorname{pool}_r(C_S) - \operatorname{pool}_r(C_T) \right)^2
    $$

    Args:
        student: Evidence for each class at each position, [N, K, H, W].
        teacher: [N, K, H', W'].
        resolution: r, positions along a side, at least 1.
        normalize: Whether each pooled class map is divided by its L2 norm first.

    Returns:
        Scalar, at least 0.

    Raises:
        ValueError: The shapes do not match, or the resolution is below 1.
    """
    at_least_one(resolution, "resolution")
    if student.ndim != 4 or teacher.ndim != 4:
        raise ValueError(f"class_attention needs maps [N, K, H, W]: student {shape(student)}, teacher {shape(teacher)}")
    own, taught = (F.adaptive_avg_pool2d(full(one), resolution) for one in (student, teacher.detach()))
    same_shape(own, taught, "class_attention")
    if normalize:
        own, taught = (F.normalize(one.flatten(2), dim=2) for one in (own, taught))
    return F.mse_loss(own, taught)


def cat_kd(
    student: Tensor,
    teacher: Tensor,
    student_classifier: nn.Module,
    teacher_classifier: nn.Module,
    resolution: int = 2,
    normalize: bool = False,
    relu: bool = False,
) -> Tensor:
    r"""`class_attention` of class maps: the classifiers' weights at every position of the last maps.

    $$
    L = \operatorname{mean} \left( \operatorname{pool}_r(C_S) - \operatorname{pool}_r(C_T) \right)^2, \qquad
    C_{nkhw} = \sum_c W_{kc} F_{nchw}
    $$

    The mean of a class map over positions is the class's logit without its bias.

    Args:
        student: The map that the classifier pools, [N, C, H, W].
        teacher: [N, C', H', W'].
        student_classifier: Linear, of weight [K, C]; it gets a gradient.
        teacher_classifier: Linear, of weight [K, C'].
        resolution: r, positions along a side, at least 1.
        normalize: Whether each pooled class map is divided by its L2 norm first.
        relu: Whether the maps come before their ReLU, which is then applied.

    Returns:
        Scalar, at least 0.

    Raises:
        ValueError: A classifier is not linear; or as of `class_attention`.
    """
    own, taught = (one.relu() if relu else one for one in (student, teacher))
    maps = _class_maps(own, student_classifier), _class_maps(taught.detach(), teacher_classifier)
    return class_attention(maps[0], maps[1], resolution, normalize)


def _class_maps(feature: Tensor, classifier: nn.Module) -> Tensor:
    if not isinstance(classifier, nn.Linear):
        raise ValueError(f"cat_kd needs a linear classifier, not {type(classifier).__name__}")
    return F.conv2d(feature, classifier.weight[:, :, None, None])
