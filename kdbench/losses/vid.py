"""Variational information distillation (VID).

Ahn, Hu, Damianou, Lawrence, Dai: Variational Information Distillation for Knowledge Transfer. CVPR 2019, arXiv
1904.05835.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kdbench.losses.checks import Shape, full, shape, two_maps
from kdbench.losses.features import maps_of_one_size


def gaussian_nll(mean: Tensor, teacher: Tensor, variance: Tensor) -> Tensor:
    r"""Negative log-likelihood of the teacher's map under a Gaussian, without its constant, averaged over all elements.

    $$
    L = \operatorname{mean}\ \tfrac{1}{2} \left( \frac{(t - \mu)^2}{\sigma_c^2} + \log \sigma_c^2 \right)
    $$

    As this falls, a lower bound of the two networks' mutual information grows.

    Args:
        mean: μ, what the student predicts, [N, C, H, W].
        teacher: [N, C, H, W].
        variance: σ² of each channel, [C], positive.

    Returns:
        Scalar; negative where variances are below 1 and predictions good enough.

    Raises:
        ValueError: The shapes do not fit.
    """
    if mean.ndim != 4 or mean.shape != teacher.shape or variance.shape != mean.shape[1:2]:
        raise ValueError(
            "gaussian_nll needs maps [N, C, H, W] and a variance [C]: "
            f"mean {shape(mean)}, teacher {shape(teacher)}, variance {shape(variance)}"
        )
    # torch's own gaussian_nll_loss looks at every variance on the host.
    variance = full(variance).view(1, -1, 1, 1)
    return ((full(mean) - full(teacher.detach())).square() / variance + variance.log()).mean() / 2


class VariationalInformation(nn.Module):
    r"""`gaussian_nll` of the teacher's map given the student's, with a learned mean and a learned variance per channel.

    $$
    L = \operatorname{mean}\ \tfrac{1}{2} \left( \frac{(t - \mu(s))^2}{\sigma_c^2} + \log \sigma_c^2 \right), \qquad
    \sigma_c^2 = \operatorname{softplus}(a_c) + \varepsilon
    $$

    The mean μ is a regressor of three 1×1 convolutions without bias and with ReLUs between them; all are as wide as
    the teacher's map and have torch's default initialization. If the maps differ in size, the larger one is
    average-pooled to the smaller size first.

    Args:
        student_shape: (C, H, W).
        teacher_shape: (C', H', W').
        variance: σ² of every channel at first, above ε.
        eps: ε, the least variance.
        learned: Whether the variances are parameters. False keeps them as they are; the loss is then a mean squared
            error divided by 2 σ², but for a constant.

    Raises:
        ValueError: A feature is no map, or the first variance is not above ε.
    """

    def __init__(
        self,
        student_shape: Shape,
        teacher_shape: Shape,
        *,
        variance: float = 5.0,
        eps: float = 1e-5,
        learned: bool = True,
    ) -> None:
        super().__init__()
        two_maps(student_shape, teacher_shape)
        if not variance > eps > 0:
            raise ValueError(f"the variance must be above eps, and eps positive, not {variance} and {eps}")
        channels = teacher_shape[0]
        self.regressor = nn.Sequential(
            nn.Conv2d(student_shape[0], channels, kernel_size=1, bias=False),
            nn.ReLU(),
            nn.Conv2d(channels, channels, kernel_size=1, bias=False),
            nn.ReLU(),
            nn.Conv2d(channels, channels, kernel_size=1, bias=False),
        )
        self.eps = eps
        # The inverse of the softplus, in a form that does not overflow.
        before = torch.full((channels,), variance - eps + math.log(-math.expm1(eps - variance)))
        if learned:
            self.before_softplus = nn.Parameter(before)
        else:
            self.register_buffer("before_softplus", before)

    @property
    def variance(self) -> Tensor:
        """σ² of each channel, [C']."""
        return F.softplus(full(self.before_softplus)) + self.eps

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """The loss of maps [N, *student_shape] and [N, *teacher_shape]; no gradient reaches the latter. Scalar."""
        student, teacher = maps_of_one_size(student, teacher, "variational_information")
        return gaussian_nll(self.regressor(student), teacher, self.variance)
