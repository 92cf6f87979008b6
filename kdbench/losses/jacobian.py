"""Jacobian matching.

Srinivas, Fleuret: Knowledge Transfer with Jacobian Matching. ICML 2018, arXiv 1803.00443.
"""

from torch import Tensor
from torch.nn import functional as F

from kdbench.losses.checks import full, same_shape
from kdbench.losses.features import same_batch


def jacobian_matching(student: Tensor, teacher: Tensor) -> Tensor:
    r"""Squared distance of the directions in which the logit of an image's label grows.

    $$
    L = \frac{1}{N D} \sum_n \left\| \frac{J_n^S}{\|J_n^S\|_2} - \frac{J_n^T}{\|J_n^T\|_2} \right\|_2^2, \qquad
    J_n = \frac{\partial z_{n y_n}}{\partial x_n}
    $$

    D is the number of values of an image. The sizes of the gradients do not matter.

    Args:
        student: J of the student, [N, ...], with a graph, as `torch.autograd.grad(..., create_graph=True)` gives it.
        teacher: J of the teacher, the same shape.

    Returns:
        Scalar in [0, 4 / D]. A gradient that is zero everywhere has no direction and stays zero.

    Raises:
        ValueError: The shapes differ, or they are not [N, ...].
    """
    same_shape(student, teacher, "jacobian_matching")
    same_batch(student, teacher, "jacobian_matching")
    own, taught = (F.normalize(full(one).flatten(1), dim=1) for one in (student, teacher.detach()))
    return F.mse_loss(own, taught)
