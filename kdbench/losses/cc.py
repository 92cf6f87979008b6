"""Correlation congruence (CC).

Peng, Jin, Liu, Li, Wu, Liu, Zhou, Zhang: Correlation Congruence for Knowledge Distillation. ICCV 2019, arXiv
1904.01802.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kdbench.losses.checks import Shape, at_least_one, full, positive, same_shape
from kdbench.losses.features import inner_products, same_batch


def neighbour_congruence(student: Tensor, teacher: Tensor) -> Tensor:
    r"""The loss called CC in the usual CIFAR-100 tables.

    $$
    L = \frac{1}{N - 1} \sum_{i=1}^{N-1} \sum_d \delta_{id}\, \delta_{(i+1)d}, \qquad \delta = |s - t|
    $$

    Two images that follow each other in the batch should not differ from the teacher's embeddings in the same
    dimensions. It has no kernel. The gradient reaches the teacher's embedding too, which learns; the caller
    detaches the teacher's feature before it is embedded.

    Args:
        student: Embeddings [N, D].
        teacher: Embeddings [N, D].

    Returns:
        Scalar, at least 0; 0 for equal embeddings, and for a batch of one. It is also 0 if one of each two neighbours
        agrees with the teacher, so it is not a distance.

    Raises:
        ValueError: The shapes differ.
    """
    same_shape(student, teacher, "neighbour_congruence")
    distance = (full(student) - full(teacher)).abs().flatten(1)
    return (distance[:-1] * distance[1:]).sum() / max(len(distance) - 1, 1)


class NeighbourCongruence(nn.Module):
    r"""`neighbour_congruence` of two learned embeddings, with a fully connected layer for each network.

    $$
    L = \frac{1}{N - 1} \sum_{i=1}^{N-1} \sum_d \delta_{id}\, \delta_{(i+1)d}, \qquad \delta = |W_S f_S - W_T f_T|
    $$

    The layers start with torch's default initialization and train with the student.

    Args:
        student_shape: Of one sample, without the batch; flattened.
        teacher_shape: Of one sample.
        dim: Width of the embeddings.

    Raises:
        ValueError: It is below 1.
    """

    def __init__(self, student_shape: Shape, teacher_shape: Shape, *, dim: int = 128) -> None:
        super().__init__()
        at_least_one(dim, "dim")
        self.student = nn.Linear(math.prod(student_shape), dim)
        self.teacher = nn.Linear(math.prod(teacher_shape), dim)

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """The loss of features [N, *student_shape] and [N, *teacher_shape]; no gradient reaches the latter. Scalar."""
        own, taught = (full(feature).flatten(1) for feature in (student, teacher.detach()))
        return neighbour_congruence(self.student(own), self.teacher(taught))


def kernel_congruence(student: Tensor, teacher: Tensor, gamma: float = 0.4, order: int = 2) -> Tensor:
    r"""Mean squared difference of the two networks' correlations between the images of a batch, by a Gaussian kernel.

    $$
    L = \frac{1}{N^2} \sum_{i,j} \left( k(s_i, s_j) - k(t_i, t_j) \right)^2, \qquad
    k(a, b) = e^{-2\gamma} \sum_{p=0}^{P} \frac{(2\gamma)^p}{p!} (a^\top b)^p
    $$

    k is the Taylor series of the kernel exp(-γ ‖a - b‖²) of unit vectors, up to order P. The widths of the networks
    may differ.

    Args:
        student: [N, ...], flattened, divided by each row's L2 norm.
        teacher: [N, ...], the same.
        gamma: γ > 0.
        order: P, at least 1.

    Returns:
        Scalar, at least 0, mean over all N² pairs; 0 for equal features.

    Raises:
        ValueError: The batches differ, or an option is out of range.
    """
    same_batch(student, teacher, "kernel_congruence")
    positive(gamma, "gamma")
    at_least_one(order, "order")
    return F.mse_loss(_correlations(student, gamma, order), _correlations(teacher.detach(), gamma, order))


def _correlations(feature: Tensor, gamma: float, order: int) -> Tensor:
    rows = F.normalize(full(feature).flatten(1), dim=1)
    cosines = inner_products(rows, rows)
    series = torch.ones_like(cosines)
    for p in range(order, 0, -1):  # Horner's scheme
        series = 1 + 2 * gamma / p * cosines * series
    # A gamma that changes while training lies in a tensor.
    return series * (torch.exp(-2 * gamma) if isinstance(gamma, Tensor) else math.exp(-2 * gamma))
