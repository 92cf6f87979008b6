"""Streamlined knowledge distillation (SKD).

Jeong, Lee, Choi: Streamlined Knowledge Distillation. CVPR 2026.
"""

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from kdbench.losses.checks import full, logits_shape, one_of, positive
from kdbench.losses.features import inner_products
from kdbench.losses.kd import kd
from kdbench.losses.mlkd import at_most_the_median


def gram_direction(
    student_logits: Tensor, teacher_logits: Tensor, tikhonov: float = 0.1, over_classes: bool = False
) -> Tensor:
    r"""Mahalanobis distance between the two networks' cosines of all pairs of images, averaged over images.

    $$
    L = \frac{1}{N} \sum_n \sqrt{d_n^\top (\Sigma + \lambda I)^{-1} d_n}, \qquad
    D = G^S - G^T, \quad G_{nm} = \cos(z_n, z_m)
    $$

    d_n is a row of D, and Σ the unbiased covariance of the rows; for a batch of one it counts as 0. A gradient flows
    through Σ too. Where d_n is 0, so is its gradient.

    Args:
        student_logits: [N, K].
        teacher_logits: [N, K].
        tikhonov: λ, above 0.
        over_classes: Whether D is divided by K, as in the authors' code. λ then outweighs Σ.

    Returns:
        Scalar, at least 0. It depends on the batch.

    Raises:
        ValueError: The shapes are not one [N, K], or λ is not positive.
    """
    logits_shape(student_logits, teacher_logits, "gram_direction")
    positive(tikhonov, "tikhonov")
    own, taught = (F.normalize(full(z), dim=1) for z in (student_logits, teacher_logits.detach()))
    difference = inner_products(own, own) - inner_products(taught, taught)
    if over_classes:
        difference = difference / student_logits.shape[1]
    # With λ in its diagonal the matrix always has a factor, so torch need not look whether it found one. In float32
    # rounding could hide a small λ.
    wide = difference.double()
    n = len(wide)
    # The columns of a symmetric matrix are its rows.
    centred = wide - wide.mean(dim=1, keepdim=True)
    covariance = inner_products(centred, centred) / max(n - 1, 1)
    ridge = tikhonov * torch.eye(n, dtype=wide.dtype, device=wide.device)
    factor = torch.linalg.cholesky_ex(covariance + ridge).L
    whitened = torch.linalg.solve_triangular(factor, wide, upper=False)
    return torch.linalg.vector_norm(whitened, dim=0).mean().to(difference.dtype)


def skd(
    student_logits: Tensor,
    teacher_logits: Tensor,
    temperature: float = 4.0,
    tikhonov: float = 0.1,
    form: Literal["code", "described"] = "code",
) -> Tensor:
    r"""KD of each image and `gram_direction` of all pairs of images.

    $$
    \text{code:}\ m_N\, T^2\, \mathrm{KD} + m_K\, \mathrm{DIR}(D / K), \qquad
    \text{described:}\ \mathrm{KD} + \mathrm{DIR}(D)
    $$

    KD is the mean KL divergence at temperature T, and DIR is `gram_direction`, of the matrix D there. m_N and m_K are
    the shares of images (of classes) whose confidence, by the teacher at temperature 1, is at most the median: about
    one half, whichever they are.

    Args:
        student_logits: [N, K].
        teacher_logits: [N, K].
        temperature: T, above 0.
        tikhonov: λ of `gram_direction`, above 0.
        form: "code" is the authors' code, "described" the sum without masks, T² and division by K.

    Returns:
        Scalar, at least 0. It depends on the batch.

    Raises:
        ValueError: The shapes are not one [N, K], there is no such form, or T or λ is not positive.
    """
    logits_shape(student_logits, teacher_logits, "skd")
    one_of(form, "form", "code", "described")
    instance = kd(student_logits, teacher_logits, temperature, scale=form == "code")
    direction = gram_direction(student_logits, teacher_logits, tikhonov, over_classes=form == "code")
    if form == "described":
        return instance + direction
    sure = F.softmax(full(teacher_logits.detach()), dim=1)
    images, classes = (at_most_the_median(one, form) for one in (sure.amax(dim=1), sure.sum(dim=0)))
    return images * instance + classes * direction
