"""Self-supervision for knowledge distillation (SSKD).

Xu, Liu, Li, Loy: Knowledge Distillation Meets Self-Supervision. ECCV 2020, arXiv 2006.07114.

Batches hold each image four times, one after another: upright, then turned by 90, 180 and 270 degrees: [4 N, ...].
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kdbench.losses.ce import cross_entropy
from kdbench.losses.checks import Shape, full, labelled_logits, logits_shape, positive, shape, share
from kdbench.losses.features import inner_products
from kdbench.losses.kd import kd
from kdbench.losses.kl import divergences

TURNS = 4


def upright_cross_entropy(student_logits: Tensor, labels: Tensor, label_smoothing: float = 0.0) -> Tensor:
    r"""`cross_entropy` of the upright images alone.

    $$
    L = -\frac{1}{N} \sum_{n,k} q_{nk} \log p_{nk}, \qquad q = (1 - \varepsilon)\, y + \frac{\varepsilon}{K}
    $$

    Args:
        student_logits: [4 N, K].
        labels: Class indices, int64 [4 N].
        label_smoothing: ε, in [0, 1].

    Returns:
        Scalar, at least 0.

    Raises:
        ValueError: The shapes do not match, images are not in fours, or ε is outside [0, 1].
    """
    labelled_logits(student_logits, student_logits, labels, "upright_cross_entropy")
    _in_fours(student_logits)
    return cross_entropy(student_logits[::TURNS], labels[::TURNS], label_smoothing)


def upright_kd(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 4.0) -> Tensor:
    r"""`kd` of the upright images alone.

    $$
    L = \frac{T^2}{N} \sum_n \mathrm{KL}(p^T_n \,\|\, p^S_n)
    $$

    Args:
        student_logits: [4 N, K].
        teacher_logits: [4 N, K].
        temperature: T, above 0.

    Returns:
        Scalar, at least 0.

    Raises:
        ValueError: The shapes do not match, images are not in fours, or T is not positive.
    """
    logits_shape(student_logits, teacher_logits, "upright_kd")
    _in_fours(student_logits)
    return kd(student_logits[::TURNS], teacher_logits[::TURNS], temperature)


def turned_kd(
    student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, temperature: float = 4.0, ratio: float = 1.0
) -> Tensor:
    r"""`kd` of the turned images, without those that the teacher gets most wrong.

    $$
    L = \frac{T^2}{|M|} \sum_{m \in M} \mathrm{KL}(p^T_m \,\|\, p^S_m)
    $$

    M are the images whose label is first among the teacher's outputs, and a share of the others, those with the best
    rank of the label. Of images with equal rank the first count.

    Args:
        student_logits: [4 N, K].
        teacher_logits: [4 N, K].
        labels: Class indices, int64 [4 N].
        temperature: T, above 0.
        ratio: Share of the others, from 0 to 1, rounded down.

    Returns:
        Scalar, at least 0.

    Raises:
        ValueError: The shapes do not match, images are not in fours, or an option is out of range.
    """
    labelled_logits(student_logits, teacher_logits, labels, "turned_kd")
    student, teacher, truth = (_turned(one) for one in (student_logits, teacher_logits.detach(), labels))
    return _selected(full(student), full(teacher), truth, temperature, ratio)


def similarity_kd(
    student: Tensor,
    teacher: Tensor,
    student_head: nn.Module,
    teacher_head: nn.Module,
    temperature: float = 0.5,
    ratio: float = 0.75,
) -> Tensor:
    r"""KL divergence between the two networks' probabilities of which upright image a turned one shows.

    $$
    L = \frac{T^2}{|M|} \sum_{m \in M} \mathrm{KL}(b^T_m \,\|\, b^S_m), \qquad
    b_m = \operatorname{softmax}_n \frac{\cos(h_m, h_n)}{T}
    $$

    M are the images that the teacher's own belief gets right, and a share of the others, those with the best rank of
    the right one.

    Args:
        student: Feature, [4 N, D].
        teacher: Feature, [4 N, D'].
        student_head: Gives h of the student's feature.
        teacher_head: Gives h of the teacher's feature; it gets no gradient.
        temperature: T, above 0.
        ratio: Share of the others, from 0 to 1, rounded down.

    Returns:
        Scalar, at least 0.

    Raises:
        ValueError: The shapes do not match, images are not in fours, or an option is out of range.
    """
    own, taught = turned_similarities(student_head(student)), turned_similarities(teacher_head(teacher.detach()))
    return _selected(own, taught.detach(), _shown(own), temperature, ratio)


def recognize_turned(teacher: Tensor, teacher_head: nn.Module) -> Tensor:
    r"""Cross-entropy of finding the upright image of each turned one. It trains the teacher's head.

    $$
    L = -\frac{1}{3 N} \sum_m \log \frac{\exp \cos(h_m, h_{n(m)})}{\sum_n \exp \cos(h_m, h_n)}
    $$

    Args:
        teacher: Feature, [4 N, D].
        teacher_head: Gives h.

    Returns:
        Scalar, at least 0.

    Raises:
        ValueError: The features are not [4 N, D].
    """
    similarities = turned_similarities(teacher_head(teacher.detach()))
    return F.cross_entropy(similarities, _shown(similarities))


def student_head(student_shape: Shape) -> nn.Module:
    """Two fully connected layers as wide as the student's feature, with a ReLU between them."""
    return teacher_head(student_shape)


def teacher_head(teacher_shape: Shape) -> nn.Module:
    """The same of the teacher's feature."""
    width = math.prod(teacher_shape)
    return nn.Sequential(nn.Flatten(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width))


def turned_similarities(feature: Tensor) -> Tensor:
    """Cosine of every turned image's feature with every upright one's, [3 N, N], of features [4 N, D].

    Raises:
        ValueError: They are not.
    """
    if feature.ndim != 2:
        raise ValueError(f"it takes vectors [4 N, D], not {shape(feature)}")
    _in_fours(feature)
    units = F.normalize(full(feature), dim=1)
    return inner_products(_turned(units), units[::TURNS])


def _selected(student: Tensor, teacher: Tensor, truth: Tensor, temperature: float, ratio: float) -> Tensor:
    """`kd` of the rows that the teacher gets right, and of a share of the others."""
    positive(temperature)
    share(ratio, "ratio")
    rank = (teacher > teacher.gather(1, truth.unsqueeze(1))).sum(dim=1)
    wrong = (rank > 0).sum()
    kept = len(rank) - wrong + (wrong * ratio).floor()
    place = rank.argsort(stable=True).argsort()
    values = divergences(F.log_softmax(student / temperature, dim=1), F.log_softmax(teacher / temperature, dim=1))
    return temperature**2 * torch.where(place < kept, values, 0.0).sum() / kept.clamp_min(1)


def _turned(batch: Tensor) -> Tensor:
    """The turned images of a batch, [3 N, ...]."""
    _in_fours(batch)
    return batch.unflatten(0, (-1, TURNS))[:, 1:].flatten(0, 1)


def _shown(similarities: Tensor) -> Tensor:
    """Which upright image each turned one shows."""
    n = similarities.shape[1]
    return torch.arange(n, device=similarities.device).repeat_interleave(TURNS - 1)


def _in_fours(batch: Tensor) -> None:
    if len(batch) == 0 or len(batch) % TURNS:
        raise ValueError(f"images come in fours, upright and turned, and these are {len(batch)}")
