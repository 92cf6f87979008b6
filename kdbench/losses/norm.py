"""N-to-one representation matching (NORM).

Liu, Li, Li, Yao: NORM: Knowledge Distillation via N-to-One Representation Matching. ICLR 2023.
"""

import math
from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F

from kdbench.losses.ce import cross_entropy
from kdbench.losses.checks import Shape, at_least_one, full, shape, two_maps
from kdbench.losses.kd import kd


class FeatureTransform(nn.Module):
    r"""Two linear layers behind the student's last map F, with a shortcut around them.

    $$
    E = \operatorname{BN}(A F), \qquad F' = F + \operatorname{BN}(B E)
    $$

    A and B are 1×1 convolutions without bias, to N times the teacher's channels and back, with weights ~ N(0, 2 / out
    channels). There is no ReLU. It stays part of the student, which classifies F'.

    Args:
        student_shape: (C, H, W).
        teacher_shape: (C', H', W').
        number: N, at least 1.

    Raises:
        ValueError: A feature is no map, or N is below 1.
    """

    def __init__(self, student_shape: Shape, teacher_shape: Shape, *, number: int = 8) -> None:
        super().__init__()
        two_maps(student_shape, teacher_shape)
        at_least_one(number, "number")
        wide = number * teacher_shape[0]
        self.expansion, self.contraction = _pointwise(student_shape[0], wide), _pointwise(wide, student_shape[0])

    def forward(self, student: Tensor) -> tuple[Tensor, Tensor]:
        """E [N, number · C', H, W] and F' [N, C, H, W] of a map [N, C, H, W]."""
        expanded: Tensor = self.expansion(student)
        return expanded, student + self.contraction(expanded)


def _pointwise(inputs: int, outputs: int) -> nn.Sequential:
    convolution = nn.Conv2d(inputs, outputs, 1, bias=False)
    nn.init.normal_(convolution.weight, std=math.sqrt(2 / outputs))
    return nn.Sequential(convolution, nn.BatchNorm2d(outputs))


def n_to_one(student: Tensor, teacher: Tensor) -> Tensor:
    r"""Squared errors of several parts of the student's channels, each against all of the teacher's map.

    $$
    L = \sum_{i=1}^{N} \operatorname{mean} (E_i - F_T)^2
    $$

    E_i are the student's channels from i C' on, C' of them. The larger map is max-pooled to the smaller.

    Args:
        student: E, [n, N · C', H, W].
        teacher: F_T, [n, C', H', W'].

    Returns:
        Scalar, at least 0; 0 where each part is the teacher's map.

    Raises:
        ValueError: They are no maps of one batch, or the student's channels no multiple of the teacher's.
    """
    maps = student.ndim == teacher.ndim == 4 and len(student) == len(teacher) > 0
    if not maps or teacher.shape[1] == 0 or student.shape[1] % teacher.shape[1]:
        raise ValueError(
            "n_to_one needs maps [N, C, H, W] of one batch, the student's channels a multiple of the teacher's: "
            f"student {shape(student)}, teacher {shape(teacher)}"
        )
    size = [min(sides) for sides in zip(student.shape[2:], teacher.shape[2:], strict=True)]
    own, taught = (_max_pooled(full(one), size) for one in (student, teacher.detach()))
    parts = own.unflatten(1, (-1, taught.shape[1]))
    return (parts - taught.unsqueeze(1)).square().mean() * parts.shape[1]


def _max_pooled(feature: Tensor, size: list[int]) -> Tensor:
    return feature if [*feature.shape[2:]] == size else F.adaptive_max_pool2d(feature, size)


def normalized_logits(logits: Tensor, scale: float = 2.5, eps: float = 1e-7) -> Tensor:
    r"""Each image's logits with mean 0 and one size, that of `scale`, over the classes.

    $$
    z'_{nk} = s\, \frac{z_{nk} - \bar z_n}{\sqrt{\sigma_n^2 + \varepsilon}}, \qquad
    \sigma_n^2 = \frac{1}{K} \sum_k (z_{nk} - \bar z_n)^2
    $$

    Args:
        logits: [N, K].
        scale: s.
        eps: ε.

    Returns:
        [N, K]; zeros where all logits of an image are equal. Of two classes only the order is left.

    Raises:
        ValueError: They are not [N, K].
    """
    if logits.ndim != 2:
        raise ValueError(f"normalized_logits needs logits [N, K], not {shape(logits)}")
    return scale * F.layer_norm(full(logits), logits.shape[1:], eps=eps)


def norm(
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    labels: Tensor,
    transform: nn.Module,
    student_classifier: nn.Module,
    gamma: float = 0.1,
    alpha: float = 1.0,
    beta: float = 1.0,
    temperature: float = 4.0,
    scale: float = 2.5,
    relu: bool = False,
) -> Tensor:
    r"""`cross_entropy` and `n_to_one` of a student with a `FeatureTransform`; `kd` if the teacher's logits are given.

    $$
    L = \gamma\, \mathrm{CE}(z'_S, y) + \beta \sum_i \operatorname{mean} (E_i - F_T)^2
    + \alpha\, \mathrm{KD}(z'_S, z'_T)
    $$

    z' are `normalized_logits`; the student's are those of its classifier on the pooled F'. All parts are in one loss so
    that the batch norms of the transform see each batch once.

    Args:
        student: The map that its classifier pools, [N, C, H, W], alone.
        teacher: F_T, [N, C', H', W'], alone or followed by its logits [N, K].
        labels: Class indices, int64 [N].
        transform: A `FeatureTransform`, which gets a gradient.
        student_classifier: From pooled features [N, C] to logits; it gets a gradient.
        gamma: γ, weight of CE.
        alpha: α, weight of KD. Without the teacher's logits it has no effect.
        beta: β, weight of the maps.
        temperature: T of KD, above 0.
        scale: s of the normalized logits.
        relu: Whether the student's map comes before its ReLU, which is then applied.

    Returns:
        Scalar, at least 0 for weights of at least 0.

    Raises:
        ValueError: There are other numbers of features, or as of its parts.
    """
    if len(student) != 1 or len(teacher) not in (1, 2):
        raise ValueError(
            f"norm needs one map of the student and one of the teacher, with or without its logits, not {len(student)} "
            f"and {len(teacher)} features"
        )
    given = full(student[0])
    expanded, transformed = transform(given.relu() if relu else given)
    logits = normalized_logits(student_classifier(transformed.mean(dim=(2, 3))), scale)
    value = gamma * cross_entropy(logits, labels) + beta * n_to_one(expanded, teacher[0])
    if len(teacher) == 2:
        value = value + alpha * kd(logits, normalized_logits(teacher[1], scale), temperature)
    return value


class TransformedHead(nn.Module):
    """Replaces the student's classifier: its last map [N, C, H, W] to `normalized_logits` of the transformed map.

    Args:
        transform: Trained by `norm`.
        student_classifier: From pooled features [N, C] to logits.
        scale: Of the normalized logits.
        relu: Whether the map comes before its ReLU, which is then applied.
    """

    def __init__(
        self, transform: nn.Module, student_classifier: nn.Module, *, scale: float = 2.5, relu: bool = False
    ) -> None:
        super().__init__()
        self.transform, self.classifier = transform, student_classifier
        self.scale, self.relu = scale, relu

    def forward(self, student: Tensor) -> Tensor:
        """Logits [N, K]."""
        _, transformed = self.transform(student.relu() if self.relu else student)
        return normalized_logits(self.classifier(transformed.mean(dim=(2, 3))), self.scale)
