"""Attentive feature distillation (AFD), with an attention of two layers.

Wang, Gao, Zhao, Li, Dou, Xu: Pay Attention to Features, Transfer Learn Faster CNNs. ICLR 2020.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kdbench.losses.checks import Shape, positive, shape, two_maps
from kdbench.losses.features import maps_of_one_size


def attended_channels(student: Tensor, teacher: Tensor, shares: Tensor, eps: float = 1e-6) -> Tensor:
    r"""Squared distance of channels of unit length, by a share for each channel of each image.

    $$
    L = \frac{1}{N} \sum_{n,c} \rho_{nc} \frac{1}{H W} \left\|
    \frac{S_{nc}}{\| S_{nc} \|_2 + \varepsilon} - \frac{T_{nc}}{\| T_{nc} \|_2 + \varepsilon} \right\|_2^2
    $$

    Scaling a channel of either map by a positive factor changes nothing, but for ε. The larger map is average-pooled to
    the smaller.

    Args:
        student: S, [N, C, H, W].
        teacher: T, [N, C, H', W'].
        shares: ρ, at least 0, [N, C]. A gradient reaches them.
        eps: ε, added to the norms.

    Returns:
        Scalar in [0, 4 / (H W)] where an image's shares sum to one.

    Raises:
        ValueError: The shapes do not fit.
    """
    student, teacher = maps_of_one_size(student, teacher.detach(), "attended_channels")
    if student.shape != teacher.shape or shares.shape != student.shape[:2]:
        raise ValueError(
            "attended_channels needs maps [N, C, H, W] of as many channels, and shares [N, C]: "
            f"student {shape(student)}, teacher {shape(teacher)}, shares {shape(shares)}"
        )
    distances = (_of_unit_length(student, eps) - _of_unit_length(teacher, eps)).square().mean(dim=(2, 3))
    return (shares * distances).sum() / len(student)


def _of_unit_length(feature: Tensor, eps: float) -> Tensor:
    return feature / (torch.linalg.vector_norm(feature, dim=(2, 3), keepdim=True) + eps)


class AttendedChannels(nn.Module):
    r"""`attended_channels` with shares that are learned from the teacher's channel means.

    $$
    \rho_{nc} = \frac{\sigma(z_{nc})}{\sum_{c'} \sigma(z_{nc'})}, \qquad
    z_n = W_2 \operatorname{ReLU}(W_1 \operatorname{mean}_{hw} T_n + b_1) + b_2
    $$

    The weights W are drawn as He's for the fan-out, and the biases begin as zero. A 1×1 convolution without bias brings
    the student's map to the teacher's channels; it is left out if they agree.

    Args:
        student_shape: (C, H, W).
        teacher_shape: (C', H', W').
        factor: How many times as wide as the teacher's map the attention's middle is, above 0.
        eps: Added to the norms of channels.

    Raises:
        ValueError: A feature is no map, or the factor is not positive.
    """

    def __init__(self, student_shape: Shape, teacher_shape: Shape, *, factor: float = 1.0, eps: float = 1e-6) -> None:
        super().__init__()
        two_maps(student_shape, teacher_shape)
        positive(factor, "factor")
        own, channels = student_shape[0], teacher_shape[0]
        middle = max(1, int(channels * factor))
        self.eps = eps
        self.align = nn.Identity() if own == channels else nn.Conv2d(own, channels, 1, bias=False)
        self.attention = nn.Sequential(nn.Linear(channels, middle), nn.ReLU(), nn.Linear(middle, channels))
        for layer in self.attention:
            if isinstance(layer, nn.Linear):
                nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
                nn.init.zeros_(layer.bias)

    def shares(self, teacher: Tensor) -> Tensor:
        """ρ of the teacher's maps [N, C', H', W']: positive, of sum one for each image, [N, C']."""
        scores = self.attention(teacher.mean(dim=(2, 3)))
        # The quotient of sigmoids, without their sum of zero where all scores are far below zero.
        return F.softmax(F.logsigmoid(scores), dim=1)

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """The loss of maps [N, *student_shape] and [N, *teacher_shape]; no gradient reaches the latter. Scalar, ≥ 0."""
        student, teacher = maps_of_one_size(student, teacher.detach(), "attended_channels")
        return attended_channels(self.align(student), teacher, self.shares(teacher), self.eps)
