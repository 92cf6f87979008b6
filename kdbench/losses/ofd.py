"""Overhaul of feature distillation (OFD).

Heo, Kim, Yun, Park, Kwak, Choi: A Comprehensive Overhaul of Feature Distillation. ICCV 2019, arXiv 1904.01866.
"""

import math

import torch
from torch import Tensor, nn

from kdbench.losses.checks import full, same_shape, shape
from kdbench.losses.features import maps_of_one_size


@torch.no_grad()
def batch_norm_margin(weight: Tensor, bias: Tensor) -> Tensor:
    r"""The mean of each channel's negative values behind a batch norm, if they are normally distributed.

    $$
    m = \mu - \sigma \frac{\varphi(\mu / \sigma)}{\Phi(-\mu / \sigma)}, \qquad \sigma = |w|, \quad \mu = b
    $$

    φ and Φ are the density and the distribution function of the standard normal distribution. A channel that is
    negative with a probability of 0.001 or less gets -3 σ, as in the authors' code.

    Args:
        weight: w of the batch norm, [C].
        bias: b of the batch norm, [C].

    Returns:
        [C], without gradient, at most 0.

    Raises:
        ValueError: The shapes differ, or are not [C].
    """
    if weight.ndim != 1 or weight.shape != bias.shape:
        raise ValueError(f"a batch norm has weight and bias [C], not {shape(weight)} and {shape(bias)}")
    sigma = full(weight).abs()
    ratio = full(bias) / sigma
    log_share = torch.special.log_ndtr(-ratio)  # Φ(-μ/σ), whose quotient with φ is stable as a difference of logarithms
    tail = (-ratio.square() / 2 - math.log(2 * math.pi) / 2 - log_share).exp()
    return torch.where(log_share > math.log(0.001), full(bias) - sigma * tail, -3 * sigma)


def ofd(student: Tensor, teacher: Tensor, teacher_batch_norm: nn.Module) -> Tensor:
    r"""`overhaul` with the margin that the batch norm before the teacher's ReLU gives (`batch_norm_margin`).

    $$
    L = \frac{1}{N} \sum_{nchw} \begin{cases} 0 & s \le t \le 0 \\ (s - t)^2 & \text{else} \end{cases}, \qquad
    t = \max(T, m_c)
    $$

    Args:
        student: Feature map after the connector, [N, C, H, W].
        teacher: Feature map before the ReLU, [N, C, H', W'].
        teacher_batch_norm: Its last batch norm, of C channels, with weight and bias.

    Returns:
        Scalar, at least 0.

    Raises:
        ValueError: The batch norm has neither, or the shapes do not match.
    """
    weight, bias = getattr(teacher_batch_norm, "weight", None), getattr(teacher_batch_norm, "bias", None)
    if weight is None or bias is None:
        raise ValueError("ofd takes its margin from the batch norm's weight and bias, and this one has none")
    return overhaul(student, teacher, batch_norm_margin(weight, bias))


def overhaul(student: Tensor, teacher: Tensor, margin: Tensor) -> Tensor:
    r"""Partial squared distance of the student's map to the teacher's behind a margin ReLU.

    $$
    t = \max(T, m_c), \qquad
    L = \frac{1}{N} \sum_{nchw} \begin{cases} 0 & s \le t \le 0 \\ (s - t)^2 & \text{else} \end{cases}
    $$

    Where the teacher's neuron is off, the student's may be as far below as it likes. Both maps are taken before the
    ReLU. The loss is a sum over elements, so its weight depends on the map's size. If the maps differ in size, the
    larger one is average-pooled to the smaller size first.

    Args:
        student: Feature map after the connector, [N, C, H, W].
        teacher: T, [N, C, H', W'].
        margin: m, [C], at most 0.

    Returns:
        Scalar, at least 0.

    Raises:
        ValueError: The shapes do not match.
    """
    student, teacher = maps_of_one_size(student, teacher.detach(), "overhaul")
    same_shape(student, teacher, "overhaul")
    if margin.shape != student.shape[1:2]:
        raise ValueError(f"overhaul needs a margin for each channel: student {shape(student)}, margin {shape(margin)}")
    target = torch.maximum(teacher, margin.detach().to(teacher).view(1, -1, 1, 1))
    counts = (student > target) | (target > 0)
    return torch.where(counts, student - target, 0.0).square().sum() / len(student)
