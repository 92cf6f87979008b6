"""Attention transfer (AT). Zagoruyko, Komodakis: Paying More Attention to Attention. ICLR 2017, arXiv 1612.03928."""

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from kdbench.losses.checks import at_least_one, one_of
from kdbench.losses.features import maps_of_one_size


def attention_transfer(
    student: Tensor, teacher: Tensor, p: float = 2, form: Literal["code", "paper"] = "code"
) -> Tensor:
    r"""Distance between the attention maps of a student's and a teacher's layer (equation 2 of the paper).

    $$
    Q = \operatorname{vec}\left( \sum_c |A_c|^p \right), \qquad
    d_n = \frac{Q_S}{\|Q_S\|_2} - \frac{Q_T}{\|Q_T\|_2}
    $$

    Each sample has one unit vector of H·W elements for each network. The loss has two forms:

    - "code", as in the authors' code: the mean of the squared elements of d over samples and positions, in
      [0, 2 / (H·W)].
    - "paper": the mean of ‖d‖₂ over samples, in [0, √2]. The paper's factor β / 2 is left to the term's weight.

    Both stay the same if either feature is multiplied by a positive number. If the maps differ in size, the larger
    *feature* is average-pooled to the smaller size first, as the usual re-implementations do; the authors' code does
    not handle that case. |A|^p equals A^p for even p and for features after a ReLU.

    Args:
        student: Feature map, [N, C, H, W]. C may differ from the teacher's.
        teacher: Feature map, [N, C', H', W'].
        p: Exponent, at least 1. The authors' code uses 2.
        form: Which of the two forms.

    Returns:
        Scalar, at least 0. A sample whose feature is zero everywhere has the zero map, not NaN.

    Raises:
        ValueError: A tensor is not [N, C, H, W], the batch sizes differ, p is below 1, or there is no such form.
    """
    student, teacher = maps_of_one_size(student, teacher.detach(), "attention_transfer")
    at_least_one(p, "p")
    one_of(form, "form", "code", "paper")
    difference = _attention(student, p) - _attention(teacher, p)
    if form == "code":
        return difference.square().mean()
    distances: Tensor = torch.linalg.vector_norm(difference, dim=1)
    return distances.mean()


def _attention(feature: Tensor, p: float) -> Tensor:
    """Unit attention vectors, [N, H·W]. The mean over channels is the sum up to a factor that cancels."""
    return F.normalize(feature.abs().pow(p).mean(dim=1).flatten(1), dim=1)
