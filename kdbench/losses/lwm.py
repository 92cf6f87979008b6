"""The attention distillation of Learning without Memorizing (LwM).

Dhar, Singh, Peng, Wu, Chellappa: Learning Without Memorizing. CVPR 2019, arXiv 1811.08051.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from kdbench.losses.checks import shape
from kdbench.losses.features import maps_of_one_size


def attention_distillation(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    r"""Distance between maps of where a layer speaks for the label of an image.

    $$
    Q = \operatorname{vec} \operatorname{ReLU} \sum_c \bar G_c M_c, \qquad
    L = \frac{1}{N H W} \sum_n \left\| \frac{Q_n^S}{\|Q_n^S\|_2} - \frac{Q_n^T}{\|Q_n^T\|_2} \right\|_1
    $$

    G is the gradient of the logit of each image's label with respect to the layer's feature F. Its mean over positions
    weights the channels of M: of G itself where G is given alone, as in the code of the Knowledge Distillation Zoo, and
    of F where F is given too, which is Grad-CAM. The larger maps are average-pooled to the smaller size first.

    Args:
        student: G [N, C, H, W] with a graph, as `torch.autograd.grad(..., create_graph=True)` gives it; alone or
            followed by F.
        teacher: As many of the teacher's. C, H and W may differ.

    Returns:
        Scalar in [0, √(2 / (H·W))]. A map without a positive value stays zero.

    Raises:
        ValueError: They are not lists of one or two maps [N, C, H, W] of each network, or F has not the shape of G.
    """
    if isinstance(student, Tensor) or isinstance(teacher, Tensor):
        raise ValueError("attention_distillation takes lists of maps, as of 'hook: [layer2.gradient]'")
    if len(student) != len(teacher) or len(student) not in (1, 2):
        raise ValueError(
            "attention_distillation needs a gradient of each network, with or without its feature, not "
            f"{len(student)} and {len(teacher)} maps"
        )
    for side in (student, teacher):
        if side[0].shape != side[-1].shape:
            raise ValueError(f"attention_distillation: a gradient {shape(side[0])} of a feature {shape(side[-1])}")
    pairs = [maps_of_one_size(s, t.detach(), "attention_distillation") for s, t in zip(student, teacher, strict=True)]
    own, taught = (_where(maps[0], maps[-1]) for maps in zip(*pairs, strict=True))
    return F.l1_loss(own, taught)


def _where(gradient: Tensor, weighted: Tensor) -> Tensor:
    """Unit vectors Q, [N, H·W]."""
    summed: Tensor = torch.relu((gradient.mean(dim=(2, 3), keepdim=True) * weighted).sum(dim=1))
    return F.normalize(summed.flatten(1), dim=1)
