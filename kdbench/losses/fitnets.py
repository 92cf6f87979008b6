"""FitNets. Romero, Ballas, Kahou, Chassang, Gatta, Bengio: FitNets: Hints for Thin Deep Nets, ICLR 2015."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from kdbench.losses.checks import full, same_shape


def fitnets(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared error between the regressed student feature and the teacher's hint, over all elements.

    The paper's hint loss is half the squared Euclidean distance of one sample, ½ ‖u_h(x) - r(v_g(x))‖²: for features
    of D elements a sample it is D / 2 times this value. The mean is what later implementations share.

    Args:
        student: [N, ...], after the regressor (a connector).
        teacher: same shape.

    Returns:
        Scalar, at least 0.

    Raises:
        ValueError: when the shapes differ.
    """
    same_shape(student, teacher, "fitnets")
    return F.mse_loss(full(student), full(teacher.detach()))
