"""Connectors: a method's own modules between a student's feature and its teacher's.

Each function takes the shapes of one sample, maps (C, H, W) or vectors (C,), and returns the module that brings the
student's feature [N, *student_shape] to [N, *teacher_shape]. Initial values come from torch's default random
generator alone. What cannot be bridged is a UserError. Shapes carry no axis names: hook points give every map as
(C, H, W), however the network keeps it.
"""

import math

from torch import nn

from kdbench.errors import UserError
from kdbench.models.points import OF_TOKENS

Shape = tuple[int, ...]


def conv1x1_bn(student_shape: Shape, teacher_shape: Shape, *, identity_if_equal: bool = True) -> nn.Module:
    """The connector of AB: 1×1 convolution without bias, batch norm, no ReLU, since the loss needs signed values.

    Weights ~ N(0, √(2 / (k² · out channels))) with k = 1; batch norm begins as weight 1, bias 0. For vectors, the same
    with a fully connected layer. Heo et al., AAAI 2019.

    Args:
        student_shape: (C, H, W), or (C,).
        teacher_shape: (C', H, W), or (C',): the map's size must agree.
        identity_if_equal: no module where the channels agree, as in the official code.
    """
    _check_kinds(student_shape, teacher_shape)
    if student_shape[1:] != teacher_shape[1:]:
        hint = "'conv_bn' changes the size of maps too"
        raise UserError(f"it keeps the map's size, {_size(student_shape)} is not {_size(teacher_shape)}", hint=hint)
    inputs, outputs = student_shape[0], teacher_shape[0]
    if identity_if_equal and inputs == outputs:
        return nn.Identity()
    layer = (
        nn.Linear(inputs, outputs, bias=False)
        if len(student_shape) == 1
        else nn.Conv2d(inputs, outputs, kernel_size=1, bias=False)
    )
    nn.init.normal_(layer.weight, mean=0.0, std=math.sqrt(2.0 / outputs))
    return nn.Sequential(layer, _batch_norm(teacher_shape))


def conv_bn_relu(
    student_shape: Shape, teacher_shape: Shape, *, relu: bool = True, identity_if_equal: bool = False
) -> nn.Module:
    """The regressor of the usual CIFAR-100 tables: a convolution with bias that may change the size, batch norm, ReLU.

    3×3 with stride 2 where the student's map is twice as large, 4×4 transposed with stride 2 where it is half as large,
    else a valid convolution of kernel 1 + ΔH by 1 + ΔW (1×1 for equal sizes). For vectors, a fully connected layer.
    torch's default initial values. Tian, Krishnan, Isola, ICLR 2020 (code).

    Args:
        student_shape: (C, H, W), or (C,).
        teacher_shape: (C', H', W'), or (C',).
        relu: end with a ReLU. Wrong for a teacher feature that can be negative.
        identity_if_equal: no module where the shapes agree.
    """
    _check_kinds(student_shape, teacher_shape)
    if identity_if_equal and student_shape == teacher_shape:
        return nn.Identity()
    layers = [_resizing(student_shape, teacher_shape), _batch_norm(teacher_shape)]
    return nn.Sequential(*layers, nn.ReLU()) if relu else nn.Sequential(*layers)


def conv(student_shape: Shape, teacher_shape: Shape) -> nn.Module:
    """The convolutional regressor of FitNets: a valid convolution with bias, kernel 1 + ΔH by 1 + ΔW, and nothing else.

    For vectors, a fully connected layer. torch's default initial values. Romero et al., ICLR 2015.

    Args:
        student_shape: (C, H, W), or (C,).
        teacher_shape: (C', H', W') with H' ≤ H and W' ≤ W, or (C',).
    """
    _check_kinds(student_shape, teacher_shape)
    return _valid(student_shape, teacher_shape)


def _resizing(student_shape: Shape, teacher_shape: Shape) -> nn.Module:
    (inputs, *size), (outputs, *target) = student_shape, teacher_shape
    if size and size == [2 * side for side in target]:
        return nn.Conv2d(inputs, outputs, kernel_size=3, stride=2, padding=1)
    if size and target == [2 * side for side in size]:
        return nn.ConvTranspose2d(inputs, outputs, kernel_size=4, stride=2, padding=1)
    return _valid(student_shape, teacher_shape)


def _valid(student_shape: Shape, teacher_shape: Shape) -> nn.Module:
    if len(student_shape) == 1:
        return nn.Linear(student_shape[0], teacher_shape[0])
    kernel = (1 + student_shape[1] - teacher_shape[1], 1 + student_shape[2] - teacher_shape[2])
    if min(kernel) < 1:
        hint = "choose a shallower hook point of the student or a deeper one of the teacher"
        raise UserError(f"it cannot enlarge a map of {_size(student_shape)} to {_size(teacher_shape)}", hint=hint)
    return nn.Conv2d(student_shape[0], teacher_shape[0], kernel_size=kernel)


def _batch_norm(shape: Shape) -> nn.Module:
    return nn.BatchNorm1d(shape[0]) if len(shape) == 1 else nn.BatchNorm2d(shape[0])


def _check_kinds(student_shape: Shape, teacher_shape: Shape) -> None:
    for whose, shape in (("student", student_shape), ("teacher", teacher_shape)):
        if len(shape) == 2:
            raise UserError(
                f"the {whose}'s feature is a sequence of tokens {shape}; connectors here take maps "
                "(C, H, W) and vectors (C,)",
                hint=OF_TOKENS,
            )
        if len(shape) not in (1, 3):
            raise UserError(f"the {whose}'s feature {shape} is neither a map (C, H, W) nor a vector (C,)")
    if len(student_shape) != len(teacher_shape):
        hint = "choose hook points of one kind on both networks"
        raise UserError(f"one side is a map and the other a vector: {student_shape}, {teacher_shape}", hint=hint)


def _size(shape: Shape) -> str:
    return "×".join(str(n) for n in shape[1:])
