"""Similarity-preserving distillation (SP).

Tung, Mori: Similarity-Preserving Knowledge Distillation. ICCV 2019, arXiv 1907.09682.
"""

from torch import Tensor
from torch.nn import functional as F

from kdbench.losses.checks import full
from kdbench.losses.features import inner_products, same_batch


def similarity_preserving(student: Tensor, teacher: Tensor) -> Tensor:
    r"""Squared difference of the two networks' similarities between the images of a batch, averaged over all pairs.

    $$
    L = \frac{1}{N^2} \left\| G_S - G_T \right\|_F^2
    $$

    G is A Aᵀ with each row divided by its L2 norm, where the rows of A [N, D] are the features. The widths of the
    networks may differ, since each G is [N, N]. Positive scaling of either feature changes nothing. A weight is for
    one batch size, since the entries of the rows shrink as 1/√N.

    Args:
        student: [N, ...], flattened.
        teacher: [N, ...], flattened.

    Returns:
        Scalar in [0, 4 / N]; after a ReLU, where no similarity is negative, in [0, 2 / N].

    Raises:
        ValueError: The batches differ, or a feature is not [N, ...].
    """
    same_batch(student, teacher, "similarity_preserving")
    return F.mse_loss(_similarities(student), _similarities(teacher.detach()))


def _similarities(feature: Tensor) -> Tensor:
    rows = full(feature).flatten(1)
    return F.normalize(inner_products(rows, rows), dim=1)
