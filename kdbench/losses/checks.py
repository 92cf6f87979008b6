"""Checks and conversions that all losses share."""

from collections.abc import Sequence

import torch
from torch import Tensor

# Of one sample, without the batch.
Shape = tuple[int, ...]


def same_shape(student: Tensor, teacher: Tensor, loss: str) -> None:
    """Check that both tensors are [N, ...] of the same shape with N > 0; nothing is broadcast.

    Raises:
        ValueError: They are not. The message names the loss and both shapes.
    """
    if student.shape != teacher.shape:
        raise ValueError(f"{loss} needs equal shapes: student {shape(student)}, teacher {shape(teacher)}")
    if student.ndim < 1 or len(student) == 0:
        raise ValueError(f"{loss} needs a batch [N, ...]: student {shape(student)}, teacher {shape(teacher)}")


def logits_shape(student: Tensor, teacher: Tensor, loss: str) -> None:
    """Check that both tensors are [N, K] of the same shape.

    Raises:
        ValueError: They are not. The message names the loss and both shapes.
    """
    same_shape(student, teacher, loss)
    if student.ndim != 2:
        raise ValueError(f"{loss} needs logits [N, K]: student {shape(student)}, teacher {shape(teacher)}")


def labelled_logits(student: Tensor, teacher: Tensor, labels: Tensor, loss: str) -> None:
    """Check that both tensors are [N, K] of the same shape with K ≥ 2, and the labels class indices [N].

    Raises:
        ValueError: They are not. The message names the loss and the shapes.
    """
    logits_shape(student, teacher, loss)
    if student.shape[1] < 2 or labels.shape != student.shape[:1] or labels.is_floating_point():
        raise ValueError(
            f"{loss} needs logits [N, K] of at least two classes with class indices [N]: "
            f"student {shape(student)}, labels {shape(labels)} of {labels.dtype}"
        )


def at_labels(logits: Tensor, labels: Tensor) -> Tensor:
    """Which of the logits [N, K] are those of the labels. A label that is no class is torch's error, as in `gather`."""
    return torch.zeros_like(logits, dtype=torch.bool).scatter(1, labels.unsqueeze(1), True)


def positive(value: float | Tensor, name: str = "temperature") -> None:
    """Check an option. One that lies in a tensor, as those that change while training do, is not read.

    Raises:
        ValueError: It is not above 0.
    """
    if not isinstance(value, Tensor) and not value > 0:
        raise ValueError(f"{name} must be positive, not {value}")


def at_least_one(value: float | Tensor, name: str) -> None:
    """The same of an option that counts something, or of an exponent whose power has a finite slope at 0.

    Raises:
        ValueError: It is below 1.
    """
    if not isinstance(value, Tensor) and not value >= 1:
        raise ValueError(f"{name} must be at least 1, not {value}")


def share(value: float | Tensor, name: str) -> None:
    """The same of an option between 0 and 1.

    Raises:
        ValueError: It lies outside.
    """
    if not isinstance(value, Tensor) and not 0 <= value <= 1:
        raise ValueError(f"{name} must lie in [0, 1], not {value}")


def one_of(value: str, name: str, *words: str) -> None:
    """The same of an option that is one of some words.

    Raises:
        ValueError: It is another one.
    """
    if value not in words:
        raise ValueError(f"{name} is {', '.join(map(repr, words[:-1]))} or {words[-1]!r}, not {value!r}")


def two_maps(student_shape: Shape, teacher_shape: Shape) -> None:
    """Check the features that a module is built for.

    Raises:
        ValueError: They are not maps (C, H, W).
    """
    if len(student_shape) != 3 or len(teacher_shape) != 3:
        raise ValueError(f"it takes maps (C, H, W), not {student_shape} and {teacher_shape}")


def two_vectors(student_shape: Shape, teacher_shape: Shape) -> None:
    """The same of pooled features.

    Raises:
        ValueError: They are not vectors (D,).
    """
    if len(student_shape) != 1 or len(teacher_shape) != 1:
        raise ValueError(f"it takes vectors (D,), not {student_shape} and {teacher_shape}")


def lists_of_maps(student_shapes: Sequence[Shape], teacher_shapes: Sequence[Shape]) -> None:
    """The same of several layers of each network.

    Raises:
        ValueError: They are not lists of maps, with at least one each.
    """
    if not student_shapes or not teacher_shapes or {len(s) for s in (*student_shapes, *teacher_shapes)} != {3}:
        raise ValueError(f"it takes lists of maps (C, H, W), not {student_shapes} and {teacher_shapes}")


def full(tensor: Tensor) -> Tensor:
    """float16 and bfloat16 become float32, since sums over thousands of elements would lose every digit."""
    return tensor.float() if tensor.is_floating_point() and tensor.element_size() < 4 else tensor


def shape(tensor: Tensor) -> list[int]:
    """A shape as error messages print it."""
    return list(tensor.shape)
