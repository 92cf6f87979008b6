"""Universal self-knowledge distillation (USKD).

Yang, Zeng, Li, Zhang, Yuan, Li: From Knowledge Distillation to Self-Knowledge Distillation: A Unified Approach with
Normalized Loss and Customized Soft Labels. ICCV 2023, arXiv 2303.13005.
"""

from collections.abc import Sequence
from typing import Literal

from torch import Tensor, nn
from torch.nn import functional as F

from kdbench.losses.checks import Shape, full, labelled_logits, one_of, share
from kdbench.losses.dkd import other_logits

# Keeps the probability of all other classes away from 0, as in the authors' code.
EPS = 1e-6


def customized_target(student_logits: Tensor, labels: Tensor) -> Tensor:
    r"""Cross-entropy in which images of which the student is surer than on average count more.

    $$
    L = -\frac{1}{N} \sum_n \left( p_n^2 + 1 - \frac{1}{N} \sum_m p_m^2 \right) \log p_n
    $$

    p_n is the student's probability of the label. The weights count as constants; their mean is 1.

    Args:
        student_logits: [N, K].
        labels: Class indices, int64 [N].

    Returns:
        Scalar, at least 0. It depends on the batch; for a batch of one it is the cross-entropy.

    Raises:
        ValueError: The logits are not [N, K] with K ≥ 2, or the labels not [N] indices.
    """
    labelled_logits(student_logits, student_logits, labels, "customized_target")
    loss = F.cross_entropy(full(student_logits), labels, reduction="none")
    squares = (-2 * loss.detach()).exp()
    return ((squares + 1 - squares.mean()) * loss).mean()


def customized_others(
    student_logits: Tensor,
    weak_logits: Tensor,
    labels: Tensor,
    ranking: Literal["logarithms", "probabilities"] = "logarithms",
) -> Tensor:
    r"""Cross-entropy among the other classes with soft labels that fall with a class's rank, by Zipf's law.

    $$
    L = -\frac{1}{N} \sum_n \sum_{k \ne y_n} q_{nk} \log \hat p_{nk}, \qquad
    q_{nk} = \frac{1 / r_{nk}}{\sum_{j \ne y_n} 1 / r_{nj}}
    $$

    p̂ is the softmax of the student's logits over the K - 1 other classes. r is the rank, from 1, of a class among all K
    by the sum of what two outputs say, the student's own and those of a weak classifier at an earlier layer: w / (1 -
    w_y) + l / (1 - l_y), with the weak probabilities w and the student's log-probabilities l, or its probabilities.
    The soft labels count as constants.

    Args:
        student_logits: [N, K].
        weak_logits: [N, K]. No gradient reaches them.
        labels: Class indices, int64 [N].
        ranking: Whether l are logarithms, as in the authors' code, or probabilities.

    Returns:
        Scalar, above 0 for K > 2.

    Raises:
        ValueError: The logits are not one [N, K] with K ≥ 2, the labels not [N] indices, or there is no such ranking.
    """
    labelled_logits(student_logits, weak_logits, labels, "customized_others")
    one_of(ranking, "ranking", "logarithms", "probabilities")
    student, weak = full(student_logits), full(weak_logits.detach())
    own = F.log_softmax(student.detach(), dim=1) if ranking == "logarithms" else F.softmax(student.detach(), dim=1)
    worth = _over_the_rest(F.softmax(weak, dim=1), labels) + _over_the_rest(own, labels)
    # The place of each class in the order is the inverse of the order.
    places = worth.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    zipf = other_logits(1 / (places + 1).to(student.dtype), labels)
    return F.cross_entropy(other_logits(student, labels), zipf / zipf.sum(dim=1, keepdim=True))


def _over_the_rest(outputs: Tensor, labels: Tensor) -> Tensor:
    return outputs / (1 - outputs.gather(1, labels.unsqueeze(1)) + EPS)


class CustomizedSoftLabels(nn.Module):
    r"""Both losses above, and a weak classifier at the layer before the last one.

    $$
    L = \alpha\, \mathrm{target} + \beta\, \mathrm{others} + \mu\, \mathrm{CE}_\varepsilon(w, y)
    $$

    The weak logits w are a linear layer on the average over the positions of the second map from the end. Their
    cross-entropy, with labels smoothed by ε, trains that layer and the student's layers before it. "target" is
    `customized_target` and "others" `customized_others`. No teacher is needed.

    Args:
        student_shapes: Two maps (C, H, W) or more from shallow to deep, and the logits (K,), in this order.
        alpha: α, weight of the label's class.
        beta: β, weight of the other classes.
        mu: μ, weight of the weak classifier.
        smoothing: ε, in [0, 1]. The authors' code has 0.1.
        ranking: As in `customized_others`.

    Raises:
        ValueError: The shapes are others, or ε lies outside of [0, 1].
    """

    def __init__(
        self,
        student_shapes: Sequence[Shape],
        *,
        alpha: float = 1.0,
        beta: float = 0.1,
        mu: float = 0.005,
        smoothing: float = 0.1,
        ranking: Literal["logarithms", "probabilities"] = "logarithms",
    ) -> None:
        super().__init__()
        *maps, logits = student_shapes
        if len(maps) < 2 or {len(one) for one in maps} != {3} or len(logits) != 1:
            raise ValueError(f"it takes two maps or more, and logits, not {student_shapes}")
        share(smoothing, "smoothing")
        self.alpha, self.beta, self.mu, self.smoothing, self.ranking = alpha, beta, mu, smoothing, ranking
        self.classifier = nn.Linear(maps[-2][0], logits[0])

    def forward(self, student: Sequence[Tensor], labels: Tensor) -> Tensor:
        """The loss of features [N, ...] of the shapes that it was built with; labels are class indices [N]. Scalar."""
        *maps, logits = student
        weak = full(self.classifier(full(maps[-2]).mean(dim=(2, 3))))
        target = customized_target(logits, labels)
        others = customized_others(logits, weak, labels, self.ranking)
        supervised = F.cross_entropy(weak, labels, label_smoothing=self.smoothing)
        return self.alpha * target + self.beta * others + self.mu * supervised
