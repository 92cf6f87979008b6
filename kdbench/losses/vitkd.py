"""Feature distillation between vision transformers (ViTKD): mimicking in shallow layers, generation in the last one.

Yang, Li, Zeng, Li, Yuan, Li: ViTKD: Practical Guidelines for ViT feature knowledge distillation. 2022, arXiv
2209.02432.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from kdbench.losses.checks import Shape, full, positive, same_shape, share, two_maps
from kdbench.losses.mgd import generation


class PatchMimicking(nn.Module):
    r"""Squared error of the teacher's patches, from the student's through a linear map of each layer.

    $$
    L = \frac{1}{N} \sum_l \left\| A_l(F_S^l) - F_T^l \right\|_F^2
    $$

    A is a 1×1 convolution with bias to the teacher's channels, that is one linear layer for all patches, with torch's
    default initialization; it is left out if the channels agree. The sum over elements makes weights small.

    Args:
        student_shapes: (C, H, W) of each layer.
        teacher_shapes: (C', H, W) of each layer.

    Raises:
        ValueError: A feature is no map, the grids of patches differ, or one network has more layers.
    """

    def __init__(self, student_shapes: Sequence[Shape], teacher_shapes: Sequence[Shape]) -> None:
        super().__init__()
        if len(student_shapes) != len(teacher_shapes):
            raise ValueError(f"it takes as many layers of both: student {student_shapes}, teacher {teacher_shapes}")
        self.align = nn.ModuleList(
            _aligned(own, taught) for own, taught in zip(student_shapes, teacher_shapes, strict=True)
        )

    def forward(self, student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
        """The loss of maps [N, C, H, W] of the layers that it was built for; the teacher's are constants. Scalar."""
        errors = [
            _difference(align(full(own)), taught, "patch_mimicking").square().sum()
            for align, own, taught in zip(self.align, student, teacher, strict=True)
        ]
        return torch.stack(errors).sum() / len(teacher[0])


class PatchGeneration(nn.Module):
    r"""Squared error of the teacher's patches, generated where the student's were left out.

    $$
    L = \frac{1}{\lambda N} \left\| m \odot \left( G((1 - m) \odot A(F_S) + m \odot e) - F_T \right) \right\|_F^2
    $$

    A is as in `PatchMimicking`, e a learned token that begins as zeros, G a 3×3 convolution, a ReLU and another 3×3
    convolution, with bias and torch's default initialization. A new mask m is drawn at each call from torch's
    generator: of each image, a share λ of the patches (rounded up) is 1, the same for all channels. The sum over
    elements makes weights small.

    Args:
        student_shape: (C, H, W).
        teacher_shape: (C', H, W).
        masked: λ, above 0 and at most 1.

    Raises:
        ValueError: A feature is no map, the grids of patches differ, or λ is out of range.
    """

    def __init__(self, student_shape: Shape, teacher_shape: Shape, *, masked: float = 0.5) -> None:
        super().__init__()
        self.align = _aligned(student_shape, teacher_shape)
        positive(masked, "masked")
        share(masked, "masked")
        channels = teacher_shape[0]
        self.masked = masked
        self.token = nn.Parameter(torch.zeros(1, channels, 1, 1))
        self.generation = generation(channels)

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """The loss of maps [N, *student_shape] and [N, *teacher_shape]; no gradient reaches the latter. Scalar, ≥ 0."""
        aligned = full(self.align(full(student)))
        n, _, height, width = aligned.shape
        kept = int(height * width * (1 - self.masked))
        # The rank of each patch in a random order of its image's.
        ranks = torch.rand(n, height * width, device=aligned.device).argsort(dim=1).argsort(dim=1)
        mask = (ranks >= kept).view(n, 1, height, width)
        generated = self.generation(torch.where(mask, self.token, aligned))
        return (_difference(generated, teacher, "patch_generation") * mask).square().sum() / (n * self.masked)


def _difference(student: Tensor, teacher: Tensor, loss: str) -> Tensor:
    same_shape(student, teacher, loss)
    taught = full(teacher.detach())
    return full(student).to(taught.dtype) - taught


def _aligned(student_shape: Shape, teacher_shape: Shape) -> nn.Module:
    two_maps(student_shape, teacher_shape)
    (own, *grid), (channels, *taught) = student_shape, teacher_shape
    if grid != taught:
        raise ValueError(
            f"it takes patches on one grid: the student's is {grid[0]}×{grid[1]}, the teacher's {taught[0]}×{taught[1]}"
            "; choose networks with the same number of patches, or another 'image_size' beside one of them"
        )
    return nn.Identity() if own == channels else nn.Conv2d(own, channels, 1)
