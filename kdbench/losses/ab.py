"""Activation boundaries. Heo, Lee, Yun, Choi: Knowledge Transfer via Distillation of Activation Boundaries Formed by
Hidden Neurons, AAAI 2019, arXiv 1811.03233."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from kdbench.losses.checks import full, logits_shape, same_shape


def activation_boundary(student: Tensor, teacher: Tensor, margin: float = 1.0) -> Tensor:
    """Squared hinge on the signs of the teacher's neurons, summed over all elements, divided by the batch size.

    The paper's alternative loss ‖ρ(T) ∘ σ(μ - S) + (1 - ρ(T)) ∘ σ(μ + S)‖²₂ with ρ(t) = 1[t > 0] and σ = ReLU: with
    y = +1 where t > 0 and -1 elsewhere (t = 0 counts as inactive), Σ max(0, μ - y s)² / N. Only the side of the
    boundary matters, never the teacher's magnitude. Both tensors are taken *before* the ReLU.

    A sum, so it grows with C·H·W: weights such as 3/1000 belong to this reduction and to CIFAR-sized maps.

    Args:
        student: [N, ...], after the connector.
        teacher: same shape.
        margin: μ > 0; 1 in every official script.

    Returns:
        Scalar, at least 0; 0 when every student neuron is beyond the margin on the teacher's side.

    Raises:
        ValueError: when the shapes differ, or the margin is not positive.
    """
    same_shape(student, teacher, "activation_boundary")
    if not margin > 0:
        raise ValueError(f"margin must be positive, not {margin}")
    student = full(student)
    shortfall = torch.where(teacher.detach() > 0, margin - student, margin + student)
    return F.relu(shortfall).square().sum() / len(student)


def centred_mse(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared error of logits after each sample's own mean is taken off: what a constant on all logits is, softmax
    does not see.

    The term by which AB's script for transferred teachers lets an extra classifier on the student's pooled features
    follow the teacher's logits on its own classes (there called DTL, weighted by 10).

    Args:
        student: [N, K], of the extra classifier (a connector).
        teacher: same shape.

    Returns:
        Scalar, at least 0, a mean over N and K.

    Raises:
        ValueError: when the shapes differ, or are not [N, K].
    """
    logits_shape(student, teacher, "centred_mse")
    difference = full(student) - full(teacher.detach())
    return (difference - difference.mean(dim=1, keepdim=True)).square().mean()


def activation_agreement(student: Tensor, teacher: Tensor) -> Tensor:
    """Share of neurons on the teacher's side of the boundary: 1 - mean(1[s > 0] XOR 1[t > 0]).

    One minus the paper's activation transfer loss per neuron; 0 counts as inactive in both. The official script prints
    it as "activation similarity".

    Args:
        student: [N, ...], after the connector.
        teacher: same shape.

    Returns:
        Scalar in [0, 1], without gradient.

    Raises:
        ValueError: when the shapes differ.
    """
    same_shape(student, teacher, "activation_agreement")
    return ((student > 0) == (teacher > 0)).float().mean()


class ConstantAgreement:
    """What `activation_agreement` must be held against: the agreement of the best student that never looks at its
    input, whose every neuron stays on the side on which its teacher's is more often.

    Where most sums of a residual network are positive this is near 1, and a high agreement says little. The sides are
    chosen on the same images, which favours the constant a little: by 0.4/√n for a neuron active on half of n images.
    """

    def __init__(self) -> None:
        self.active: Tensor | None = None
        self.images = 0

    def add(self, teacher: Tensor) -> None:
        """Further images. teacher: [N, ...], before the ReLU, the same shape but for N in every call."""
        active = (teacher > 0).sum(dim=0)
        self.active = active if self.active is None else self.active + active
        self.images += len(teacher)

    def value(self) -> float:
        """The mean over neurons of max(p, 1 - p), p the share of images on which the teacher's neuron is active: in
        [0.5, 1].

        Raises:
            ValueError: before any image.
        """
        if self.active is None or not self.images:
            raise ValueError("the agreement of a constant needs images")
        share = self.active.double() / self.images
        return torch.maximum(share, 1 - share).mean().item()
