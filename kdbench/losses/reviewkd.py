"""ReviewKD. Chen, Liu, Zhao, Jia: Distilling Knowledge via Knowledge Review. CVPR 2021, arXiv 2104.09044."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kdbench.losses.checks import Shape, at_least_one, full, same_shape, shape

# Levels of the pyramid below the map itself.
LEVELS = (4, 2, 1)
WIDEST = 512


def hierarchical_context(student: Tensor, teacher: Tensor) -> Tensor:
    r"""Mean squared error of two maps, and of their average pools to 4×4, 2×2 and 1×1 (HCL).

    $$
    L = \frac{\sum_l 2^{-l} \operatorname{mean} (P_l S - P_l T)^2}{\sum_l 2^{-l}}
    $$

    P_0 is the map itself. Levels that are not smaller than the map's shorter side are left out, and those that remain
    keep the weights 1, 1/2, 1/4, … in their order.

    Args:
        student: Feature map, [N, C, H, W].
        teacher: Feature map of the same shape.

    Returns:
        Scalar, at least 0.

    Raises:
        ValueError: The shapes differ, or are not [N, C, H, W].
    """
    same_shape(student, teacher, "hierarchical_context")
    if student.ndim != 4:
        raise ValueError(f"hierarchical_context needs maps [N, C, H, W], not {shape(student)}")
    difference = full(student) - full(teacher.detach())
    levels = [level for level in LEVELS if level < min(student.shape[2:])]
    # Pooling is linear, so that the pool of the difference is the difference of the pools.
    errors = [difference, *(F.adaptive_avg_pool2d(difference, level) for level in levels)]
    weights = [0.5**i for i in range(len(errors))]
    weighted = [weight * error.square().mean() for weight, error in zip(weights, errors, strict=True)]
    return torch.stack(weighted).sum() / sum(weights)


class AttentionFusion(nn.Module):
    """One layer of the review (ABF): a student's map, fused with what comes from the deeper layers.

    A 1×1 convolution with batch norm brings the map to `middle` channels. The residual of the deeper layer is resized
    to the map (nearest neighbour); a 1×1 convolution of both with a sigmoid gives one attention map for each, and their
    weighted sum, resized to the teacher's map, is the residual for the next layer. A 3×3 convolution with batch norm
    makes the teacher's channels of it. Convolutions begin as He et al.'s uniform with a = 1; that of the attention with
    torch's default, and it alone has a bias.

    Args:
        inputs: Channels of the student's map.
        middle: Channels of the residual.
        outputs: Channels of the teacher's map.
        size: (H', W') of the teacher's map.
        fuses: Whether there is a deeper layer.
    """

    def __init__(self, inputs: int, middle: int, outputs: int, size: tuple[int, int], fuses: bool) -> None:
        super().__init__()
        self.size = size
        narrow = nn.Conv2d(inputs, middle, 1, bias=False)
        widen = nn.Conv2d(middle, outputs, 3, padding=1, bias=False)
        for convolution in (narrow, widen):
            nn.init.kaiming_uniform_(convolution.weight, a=1)
        self.narrow = nn.Sequential(narrow, nn.BatchNorm2d(middle))
        self.widen = nn.Sequential(widen, nn.BatchNorm2d(outputs))
        self.attention = nn.Sequential(nn.Conv2d(2 * middle, 2, 1), nn.Sigmoid()) if fuses else None

    def forward(self, student: Tensor, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The output [N, outputs, H', W'] and the residual [N, middle, H', W'] for the next layer."""
        fused: Tensor = self.narrow(student)
        if self.attention is not None:
            assert residual is not None
            residual = _resized(residual, (fused.shape[2], fused.shape[3]))
            own, deeper = self.attention(torch.cat([fused, residual], dim=1)).chunk(2, dim=1)
            fused = fused * own + residual * deeper
        fused = _resized(fused, self.size)
        return self.widen(fused), fused


class KnowledgeReview(nn.Module):
    r"""Sum of `hierarchical_context` over layers, each of the teacher's reviewed with all of the student's deeper ones.

    $$
    L = \sum_l D \left( A_{l,l+1}(F^S_l, A_{l+1,l+2}(\dots)),\, F^T_l \right)
    $$

    A are the fusions, D is the hierarchical context loss. From the deepest layer to the shallowest an `AttentionFusion`
    takes the student's map and the residual of the one before. Vectors, such as pooled features, count as maps of 1×1.

    Args:
        student_shapes: (C, H, W) or (C,) of each layer, from shallow to deep.
        teacher_shapes: (C', H', W') or (C',) of as many.
        widest: Most channels of the residual; it has those of the student's deepest layer, if these are fewer.

    Raises:
        ValueError: There are not as many layers of both, one is neither map nor vector, or `widest` is below 1.
    """

    def __init__(
        self, student_shapes: Sequence[Shape], teacher_shapes: Sequence[Shape], *, widest: int = WIDEST
    ) -> None:
        super().__init__()
        if len(student_shapes) != len(teacher_shapes) or not student_shapes:
            raise ValueError(
                f"a review needs as many layers of both networks: {len(student_shapes)} and {len(teacher_shapes)}"
            )
        at_least_one(widest, "widest")
        own, taught = ([_as_map(one) for one in shapes] for shapes in (student_shapes, teacher_shapes))
        middle = min(widest, own[-1][0])
        self.layers = nn.ModuleList(
            AttentionFusion(student[0], middle, teacher[0], (teacher[1], teacher[2]), fuses=i < len(own) - 1)
            for i, (student, teacher) in enumerate(zip(own, taught, strict=True))
        )

    def forward(self, student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
        """The loss of both networks' layers, from shallow to deep; no gradient reaches the teacher's. Scalar."""
        residual: Tensor | None = None
        losses = []
        for layer, own, taught in list(zip(self.layers, student, teacher, strict=True))[::-1]:
            output, residual = layer(_map(own), residual)
            losses.append(hierarchical_context(output, _map(taught)))
        return torch.stack(losses).sum()


def _as_map(one: Shape) -> Shape:
    if len(one) not in (1, 3):
        raise ValueError(f"a review takes maps (C, H, W) and vectors (C,), not {one}")
    return one if len(one) == 3 else (one[0], 1, 1)


def _map(feature: Tensor) -> Tensor:
    return full(feature if feature.ndim == 4 else feature[:, :, None, None])


def _resized(feature: Tensor, size: tuple[int, int]) -> Tensor:
    return feature if feature.shape[2:] == size else F.interpolate(feature, size, mode="nearest")
