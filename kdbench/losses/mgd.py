"""Masked generative distillation (MGD).

Yang, Li, Shao, Shi, Yuan, Yuan: Masked Generative Distillation. ECCV 2022, arXiv 2205.01529.
"""

import torch
from torch import Tensor, nn

from kdbench.losses.checks import Shape, share, two_maps
from kdbench.losses.features import maps_of_one_size


class MaskedGeneration(nn.Module):
    r"""Squared error of the teacher's map, generated from the student's with some of its channels left out.

    $$
    L = \frac{1}{N} \left\| G(m \odot A(F_S)) - F_T \right\|_F^2
    $$

    A is a 1×1 convolution to the teacher's channels (left out if they agree), G a 3×3 convolution, a ReLU and another
    3×3 convolution, all with bias and torch's default initialization. A new mask m is drawn at each call from
    torch's generator: each channel of each image is 0 with probability λ. The larger map is average-pooled to the
    smaller. The sum over elements makes weights small.

    Args:
        student_shape: (C, H, W).
        teacher_shape: (C', H', W').
        masked: λ, from 0 to 1.

    Raises:
        ValueError: A feature is no map, or λ is out of range.
    """

    def __init__(self, student_shape: Shape, teacher_shape: Shape, *, masked: float = 0.15) -> None:
        super().__init__()
        two_maps(student_shape, teacher_shape)
        share(masked, "masked")
        own, channels = student_shape[0], teacher_shape[0]
        self.masked = masked
        self.align = nn.Identity() if own == channels else nn.Conv2d(own, channels, 1)
        self.generation = generation(channels)

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """The loss of maps [N, *student_shape] and [N, *teacher_shape]; no gradient reaches the latter. Scalar, ≥ 0."""
        student, teacher = maps_of_one_size(student, teacher.detach(), "masked_generation")
        aligned = self.align(student)
        kept = torch.rand(*aligned.shape[:2], 1, 1, device=aligned.device) >= self.masked
        generated = self.generation(aligned * kept)
        return (generated.to(teacher.dtype) - teacher).square().sum() / len(teacher)


def generation(channels: int) -> nn.Sequential:
    """What makes the teacher's map of a masked one: a 3×3 convolution, a ReLU and another 3×3 convolution."""
    return nn.Sequential(
        nn.Conv2d(channels, channels, 3, padding=1), nn.ReLU(), nn.Conv2d(channels, channels, 3, padding=1)
    )
