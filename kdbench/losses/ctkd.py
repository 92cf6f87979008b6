"""Curriculum temperature (CTKD).

Li, Li, Yang, Zhao, Song, Luo, Li, Yang: Curriculum Temperature for Knowledge Distillation. AAAI 2023,
arXiv 2211.16231.
"""

import math

import torch
from torch import Tensor, nn

from kdbench.losses.checks import Shape, full
from kdbench.losses.kl import kl_divergence
from kdbench.losses.lskd import standardized


def against(parameter: Tensor, strength: Tensor) -> Tensor:
    """The same value, with its gradient multiplied by -strength: 0 stops it, 1 reverses it."""
    return parameter.detach() - strength * (parameter - parameter.detach())


class CurriculumTemperature(nn.Module):
    r"""`kd` at a temperature that is trained against the student, with more strength from epoch to epoch.

    $$
    L = \frac{T^2}{N} \sum_n \mathrm{KL}(p^T_n \,\|\, p^S_n), \qquad
    T = T_0 + T_1 \operatorname{sigmoid}(\theta), \qquad
    \lambda_e = \frac{1}{2} \left( 1 - \cos \frac{\pi \min(e, E)}{E} \right)
    $$

    θ is one number, 1 at first. T stays in the graph, also in T². The gradient that reaches θ is multiplied by -λ, so
    that the student's optimizer moves θ to where the loss is larger; λ rises from 0 to 1 over E epochs, counted from 1.

    Args:
        student_shape: (K,), not needed.
        teacher_shape: (K,), not needed.
        epochs: E, above 0.
        least: T₀, above 0.
        span: T₁, at least 0.
        standardize: Whether logits are standardized first (LSKD).

    Raises:
        ValueError: An option is out of range.
    """

    def __init__(
        self,
        student_shape: Shape,
        teacher_shape: Shape,
        *,
        epochs: float = 10.0,
        least: float = 1.0,
        span: float = 20.0,
        standardize: bool = False,
    ) -> None:
        super().__init__()
        if not epochs > 0 or not least > 0 or span < 0:
            raise ValueError(
                f"epochs and the least temperature are above 0, the span is not negative: {epochs}, {least}, {span}"
            )
        self.theta = nn.Parameter(torch.ones(()))
        self.epochs, self.least, self.span, self.standardize = epochs, least, span, standardize

    def forward(self, student_logits: Tensor, teacher_logits: Tensor, epoch: Tensor) -> Tensor:
        """The loss of logits [N, K].

        Args:
            student_logits: [N, K].
            teacher_logits: [N, K]; they get no gradient.
            epoch: Whole epochs done, from 0, [].

        Returns:
            Scalar, at least 0.

        Raises:
            ValueError: The shapes are not the same [N, K], with K ≥ 2 if they are standardized.
        """
        if self.standardize:
            student_logits, teacher_logits = standardized(student_logits), standardized(teacher_logits)
        strength = (1 - torch.cos(math.pi * ((epoch + 1) / self.epochs).clamp(max=1))) / 2
        temperature = self.least + self.span * torch.sigmoid(against(self.theta, strength))
        # Its gradient reaches the temperature by way of the teacher's outputs too.
        logits = full(student_logits) / temperature, full(teacher_logits.detach()) / temperature
        return temperature**2 * kl_divergence(*logits, 1.0)
