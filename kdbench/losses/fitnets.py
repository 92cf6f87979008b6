"""FitNets. Romero, Ballas, Kahou, Chassang, Gatta, Bengio: FitNets: Hints for Thin Deep Nets. ICLR 2015."""

from torch import Tensor
from torch.nn import functional as F

from kdbench.losses.checks import full, same_shape


def fitnets(student: Tensor, teacher: Tensor) -> Tensor:
    r"""Mean squared error between the regressed student feature and the teacher's hint.

    $$
    L = \frac{1}{ND} \sum_n \left\| u_h(x_n) - r(v_g(x_n)) \right\|_2^2
    $$

    u_h is the teacher's feature of D elements, v_g the student's, and r the regressor (a connector). Later
    implementations share this mean. The paper's hint loss is ½ ‖u_h(x) - r(v_g(x))‖² for each sample, D / 2 times this
    value, so the paper's weights do not carry over.

    Args:
        student: Feature after the regressor, [N, ...].
        teacher: Feature, same shape.

    Returns:
        Scalar, at least 0: the mean over all elements.

    Raises:
        ValueError: The shapes differ.
    """
    same_shape(student, teacher, "fitnets")
    return F.mse_loss(full(student), full(teacher.detach()))
