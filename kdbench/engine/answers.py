"""What a student's test logits say beside its accuracy."""

import torch
from torch import Tensor

# As Guo et al. 2017 and most tables after them.
BINS = 15
# Top-5 accuracy says little where half of the classes are among the five.
FEWEST_CLASSES = 11


def measured(logits: Tensor, labels: Tensor, teacher: Tensor | None) -> dict[str, float]:
    """Numbers of a record's result, in percent with four decimals.

    Args:
        logits: [N, classes]. labels: int64 [N].
        teacher: its logits for the same images; None where there is none, or none that knows these classes.

    Returns:
        `calibration_error`; `balanced_accuracy`, the mean over the classes of the accuracy on their images, where the
        classes have unequal numbers of these; `top5` where there are more than ten classes; `fidelity` where there is a
        teacher of the same classes.
    """
    found = {"calibration_error": calibration_error(logits, labels)}
    if unbalanced(labels):
        found["balanced_accuracy"] = 100 * mean_of_classes(logits.argmax(dim=1) == labels, labels)
    if logits.shape[1] >= FEWEST_CLASSES:
        found["top5"] = 100 * (logits.topk(5, dim=1).indices == labels[:, None]).any(dim=1).double().mean().item()
    if teacher is not None and teacher.shape == logits.shape:
        found["fidelity"] = 100 * (logits.argmax(dim=1) == teacher.argmax(dim=1)).double().mean().item()
    return {name: round(value, 4) for name, value in found.items()}


def unbalanced(labels: Tensor) -> bool:
    """Whether the classes that there are have unequal numbers of images. labels: int64 [N]."""
    numbers = labels.bincount()
    return bool((numbers[numbers > 0] != numbers.max()).any())


def mean_of_classes(right: Tensor, labels: Tensor) -> float:
    """Share of right answers, 0 to 1, as the mean over the classes that there are.

    Args:
        right: bool [N]. labels: int64 [N].
    """
    # On the CPU, where sums have one order.
    labels = labels.cpu()
    numbers = labels.bincount()
    shares = labels.bincount(right.cpu().double()) / numbers
    return shares[numbers > 0].mean().item()


def calibration_error(logits: Tensor, labels: Tensor) -> float:
    """Expected calibration error in percent (Guo et al. 2017, "On Calibration of Modern Neural Networks", equation 5).

    An image's confidence is its largest softmax probability. Images are sorted into bins of equal width, (0, 1/15],
    (1/15, 2/15] …; the error is the mean over all images of the distance between accuracy and mean confidence of
    their bin.

    Args:
        logits: [N, classes]. labels: int64 [N].
    """
    # On the CPU, where sums have one order.
    confidence, answers = logits.detach().cpu().double().softmax(dim=1).max(dim=1)
    place = (confidence * BINS).ceil().long().clamp(1, BINS) - 1
    gaps = torch.zeros(BINS, dtype=torch.float64).index_add(0, place, (answers == labels.cpu()).double() - confidence)
    return 100 * gaps.abs().sum().item() / len(labels)
