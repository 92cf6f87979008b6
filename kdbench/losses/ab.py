"""Activation Boundaries (AB).

Heo, Lee, Yun, Choi: Knowledge Transfer via Distillation of Activation Boundaries Formed by Hidden Neurons. AAAI 2019,
arXiv 1811.03233.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from kdbench.losses.checks import full, logits_shape, positive, same_shape


def activation_boundary(student: Tensor, teacher: Tensor, margin: float = 1.0) -> Tensor:
    r"""Squared hinge loss on the signs of the teacher's neurons: the paper's differentiable form.

    $$
    L = \frac{1}{N} \left\| \rho(T) \circ \sigma(\mu \mathbf{1} - S)
    + (\mathbf{1} - \rho(T)) \circ \sigma(\mu \mathbf{1} + S) \right\|_2^2
    $$

    ρ(t) is 1 if t > 0 and 0 otherwise, and σ is the ReLU. With y = +1 for active teacher neurons and y = -1 for the
    others (t = 0 is inactive), each neuron adds max(0, μ - y s)². Only the side of the boundary matters, not the
    teacher's magnitude. Both tensors are values *before* the ReLU.

    The loss is summed over all elements and divided by the batch size, so it grows with C·H·W. The official weight
    3/1000 is for this reduction and for feature maps of CIFAR size.

    Args:
        student: Responses before the ReLU, after the connector, [N, ...].
        teacher: Responses before the ReLU, same shape.
        margin: μ, above 0. The official scripts use 1.

    Returns:
        Scalar, at least 0. It is 0 if every student neuron is beyond the margin on the teacher's side.

    Raises:
        ValueError: The shapes differ, or the margin is not positive.
    """
    same_shape(student, teacher, "activation_boundary")
    positive(margin, "margin")
    student = full(student)
    shortfall = torch.where(teacher.detach() > 0, margin - student, margin + student)
    return F.relu(shortfall).square().sum() / len(student)


def centred_mse(student: Tensor, teacher: Tensor) -> Tensor:
    r"""Mean squared error of logits after each sample's own mean is subtracted.

    $$
    L = \frac{1}{NK} \sum_{n,k} \left( (s_{nk} - \bar{s}_n) - (t_{nk} - \bar{t}_n) \right)^2
    $$

    A constant on all logits of a sample does not change its softmax, so it does not count here either. AB's script for
    MIT scenes uses this term ("DTL", weight 10) with an extra classifier on the student's pooled features, which
    follows the teacher's logits on the teacher's own classes.

    Args:
        student: Logits of the extra classifier (a connector), [N, K].
        teacher: The teacher's logits, same shape.

    Returns:
        Scalar, at least 0: the mean over N and K.

    Raises:
        ValueError: The shapes differ, or are not [N, K].
    """
    logits_shape(student, teacher, "centred_mse")
    difference = full(student) - full(teacher.detach())
    return (difference - difference.mean(dim=1, keepdim=True)).square().mean()


def activation_agreement(student: Tensor, teacher: Tensor) -> Tensor:
    r"""Share of neurons that are on the teacher's side of their boundary.

    $$
    A = 1 - \frac{1}{|S|} \left\| \rho(T) - \rho(S) \right\|_1
    $$

    One minus the paper's activation transfer loss per neuron. 0 is inactive in both networks. The official script
    prints this number as "activation similarity".

    Args:
        student: Responses before the ReLU, after the connector, [N, ...].
        teacher: Responses before the ReLU, same shape.

    Returns:
        Scalar in [0, 1], without gradient.

    Raises:
        ValueError: The shapes differ.
    """
    same_shape(student, teacher, "activation_agreement")
    return ((student > 0) == (teacher > 0)).float().mean()


class ConstantAgreement:
    """The reference for `activation_agreement`: the agreement of the best student that ignores its input.

    Each of its neurons stays on the side on which the teacher's neuron is more often. If most responses of a network
    are positive, this reference is near 1, and a high agreement says little. The sides are chosen on the same images,
    which favours the reference a little: by 0.4/√n for a neuron that is active on half of n images.
    """

    def __init__(self) -> None:
        self.active: Tensor | None = None
        self.images = 0

    def add(self, teacher: Tensor) -> None:
        """Count a batch of images.

        Args:
            teacher: The teacher's responses before the ReLU, [N, ...]. All dimensions but N are the same in every
                call.
        """
        active = (teacher > 0).sum(dim=0)
        self.active = active if self.active is None else self.active + active
        self.images += len(teacher)

    def value(self) -> float:
        """The agreement so far.

        Returns:
            The mean over neurons of max(p, 1 - p), in [0.5, 1], where p is the share of images on which the teacher's
            neuron is active.

        Raises:
            ValueError: No image was counted yet.
        """
        if self.active is None or not self.images:
            raise ValueError("the agreement of a constant needs images")
        share = self.active.double() / self.images
        return torch.maximum(share, 1 - share).mean().item()
