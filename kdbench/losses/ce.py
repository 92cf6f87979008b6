"""Cross-entropy with the labels: the loss of the plain student and one term of most methods."""

from torch import Tensor
from torch.nn import functional as F

from kdbench.losses.checks import full, shape, share


def cross_entropy(student: Tensor, labels: Tensor, label_smoothing: float = 0.0) -> Tensor:
    r"""Cross-entropy between the labels and the student's probabilities, averaged over the batch.

    $$
    L = -\frac{1}{N} \sum_{n,k} q_{nk} \log p^S_{nk}, \qquad q = (1 - \varepsilon)\, y + \frac{\varepsilon}{K}
    $$

    Args:
        student: Logits, [N, K].
        labels: Class indices, int64 [N]; or soft targets [N, K], where each row is a distribution.
        label_smoothing: ε, in [0, 1].

    Returns:
        Scalar, at least 0.

    Raises:
        ValueError: The shapes do not match, or ε is outside [0, 1].
    """
    soft = labels.is_floating_point()
    if student.ndim != 2 or len(student) == 0 or labels.shape != (student.shape if soft else student.shape[:1]):
        raise ValueError(
            "cross_entropy needs logits [N, K] with class indices [N] or soft targets [N, K]: "
            f"student {shape(student)}, labels {shape(labels)} of {labels.dtype}"
        )
    share(label_smoothing, "label_smoothing")
    student = full(student)
    labels = labels.to(student.dtype) if soft else labels
    if not isinstance(label_smoothing, Tensor):
        return F.cross_entropy(student, labels, label_smoothing=label_smoothing)
    # torch reads it on the host.
    uniform = -F.log_softmax(student, dim=1).mean()
    return (1 - label_smoothing) * F.cross_entropy(student, labels) + label_smoothing * uniform
