"""What every loss does to its tensors before it computes."""

from __future__ import annotations

from torch import Tensor


def same_shape(student: Tensor, teacher: Tensor, loss: str) -> None:
    """Raises ValueError unless both are [N, ...] of one shape with N > 0; nothing is ever broadcast."""
    if student.shape != teacher.shape:
        raise ValueError(f"{loss} needs equal shapes: student {shape(student)}, teacher {shape(teacher)}")
    if student.ndim < 1 or len(student) == 0:
        raise ValueError(f"{loss} needs a batch [N, ...]: student {shape(student)}, teacher {shape(teacher)}")


def logits_shape(student: Tensor, teacher: Tensor, loss: str) -> None:
    """Raises ValueError unless both are [N, K] of one shape."""
    same_shape(student, teacher, loss)
    if student.ndim != 2:
        raise ValueError(f"{loss} needs logits [N, K]: student {shape(student)}, teacher {shape(teacher)}")


def full(tensor: Tensor) -> Tensor:
    """float16 and bfloat16 as float32: sums over thousands of elements lose every digit otherwise."""
    return tensor.float() if tensor.is_floating_point() and tensor.element_size() < 4 else tensor


def shape(tensor: Tensor) -> list[int]:
    """A shape as messages print it."""
    return list(tensor.shape)
