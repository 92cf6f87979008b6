"""Factor transfer (FT).

Kim, Park, Kwak: Paraphrasing Complex Network: Network Compression via Factor Transfer. NeurIPS 2018, arXiv 1802.04977.
"""

from typing import Any, Literal

from torch import Tensor, nn
from torch.nn import functional as F

from kdbench.losses.checks import Shape, full, one_of
from kdbench.losses.features import maps_of_one_size


class Paraphraser(nn.Module):
    """Autoencoder of a teacher's map; its middle holds the teacher's factors.

    Three 3×3 convolutions (C → C → C·rate → C·rate) and three transposed ones back, each with a leaky ReLU of slope 0.1
    behind it, the last one too. It is trained to reconstruct its input, and then frozen.

    Args:
        teacher_shape: (C, H, W).
        rate: Factors for each channel; C · rate is rounded down.
        batch_norm: Whether a batch norm stands before each leaky ReLU.
    """

    def __init__(self, teacher_shape: Shape, *, rate: float = 0.5, batch_norm: bool = False) -> None:
        super().__init__()
        channels = teacher_shape[0]
        factors = _factors(channels, rate)
        self.encoder = _encoder(channels, channels, factors, batch_norm)
        self.decoder = nn.Sequential(
            *_layer(nn.ConvTranspose2d(factors, factors, 3, padding=1), batch_norm),
            *_layer(nn.ConvTranspose2d(factors, channels, 3, padding=1), batch_norm),
            *_layer(nn.ConvTranspose2d(channels, channels, 3, padding=1), batch_norm),
        )

    def forward(self, feature: Tensor) -> Tensor:
        """The reconstruction of maps [N, C, H, W], of the same shape."""
        reconstruction: Tensor = self.decoder(self.encoder(feature))
        return reconstruction


class Translator(nn.Module):
    """A student's factors: an encoder like the paraphraser's from the student's map to as many factors.

    Args:
        student_shape: (C, H, W).
        teacher_shape: (C', H', W').
        rate: That of the paraphraser.
        batch_norm: Whether a batch norm stands before each leaky ReLU.
    """

    def __init__(
        self, student_shape: Shape, teacher_shape: Shape, *, rate: float = 0.5, batch_norm: bool = False
    ) -> None:
        super().__init__()
        channels = student_shape[0]
        self.encoder = _encoder(channels, channels, _factors(teacher_shape[0], rate), batch_norm)

    def forward(self, feature: Tensor) -> Tensor:
        """Factors [N, C' · rate, H, W] of maps [N, C, H, W]."""
        factors: Tensor = self.encoder(feature)
        return factors


def factor_transfer(student: Tensor, teacher: Tensor, form: Literal["factors", "attention"] = "factors") -> Tensor:
    r"""Mean absolute difference of the two networks' normalized factors.

    $$
    L = \operatorname{mean} \left| \frac{F_S}{\|F_S\|_2} - \frac{F_T}{\|F_T\|_2} \right|
    $$

    F are one sample's factors as one vector. The form "factors" takes all of them, as the authors' code does;
    "attention" takes the mean of their squares over channels, one value for each position, as HobbitLong/RepDistiller
    does. If the maps differ in size, the larger one is average-pooled to the smaller size first.

    Args:
        student: Factors of the translator, [N, C, H, W].
        teacher: Factors of the paraphraser, [N, C', H', W']. C' = C, except in the form "attention".
        form: Which of the two forms.

    Returns:
        Scalar, at least 0. It does not change if either side is multiplied by a positive number.

    Raises:
        ValueError: A tensor is not [N, C, H, W], batch sizes or channels do not match, or there is no such form.
    """
    one_of(form, "form", "factors", "attention")
    student, teacher = maps_of_one_size(student, teacher.detach(), "factor_transfer")
    if form == "attention":
        student, teacher = (factors.square().mean(dim=1) for factors in (student, teacher))
    elif student.shape[1] != teacher.shape[1]:
        raise ValueError(f"factor_transfer needs equal numbers of factors, not {student.shape[1]}, {teacher.shape[1]}")
    return F.l1_loss(F.normalize(student.flatten(1), dim=1), F.normalize(teacher.flatten(1), dim=1))


def paraphrased(
    student: Tensor, teacher: Tensor, paraphraser: nn.Module, form: Literal["factors", "attention"] = "factors"
) -> Tensor:
    r"""`factor_transfer` to the factors that a trained paraphraser finds in the teacher's map.

    $$
    L = \operatorname{mean} \left| \frac{F_S}{\|F_S\|_2} - \frac{F_T}{\|F_T\|_2} \right|, \qquad F_T = E(T)
    $$

    E is the paraphraser's encoder, F_S what the translator makes of the student's map.

    Args:
        student: Factors of the translator, [N, C, H, W].
        teacher: Feature map, [N, C', H', W'].
        paraphraser: A `Paraphraser`; only its encoder is used, and it gets no gradient.
        form: Which of the two forms.

    Returns:
        Scalar, at least 0.

    Raises:
        ValueError: The translator and the paraphraser do not make as many factors; or as of `factor_transfer`.
    """
    encoder: Any = paraphraser.encoder
    factors = encoder(teacher.detach())
    if student.ndim > 1 and student.shape[1] != factors.shape[1]:
        raise ValueError(
            f"the translator makes {student.shape[1]} factors and the paraphraser {factors.shape[1]}: give both "
            "modules one rate"
        )
    return factor_transfer(student, factors, form)


def reconstruction(teacher: Tensor, paraphraser: nn.Module, power: Literal[1, 2] = 1) -> Tensor:
    r"""How far a paraphraser's output is from the teacher's map: the loss that trains it.

    $$
    L = \operatorname{mean} | P(T) - T |^p
    $$

    Args:
        teacher: Feature map, [N, C, H, W].
        paraphraser: Gives maps of the same shape.
        power: p. Mean absolute difference (1), as the authors' code has it, or mean squared difference (2).

    Returns:
        Scalar, at least 0.

    Raises:
        ValueError: The power is neither 1 nor 2.
    """
    if power not in (1, 2):
        raise ValueError(f"power is 1 or 2, not {power}")
    distance = F.l1_loss if power == 1 else F.mse_loss
    return distance(full(paraphraser(teacher.detach())), full(teacher.detach()))


def _factors(channels: int, rate: float) -> int:
    if (factors := int(channels * rate)) < 1:
        raise ValueError(f"a rate of {rate} leaves no factor of {channels} channels")
    return factors


def _encoder(inputs: int, middle: int, factors: int, batch_norm: bool) -> nn.Sequential:
    return nn.Sequential(
        *_layer(nn.Conv2d(inputs, middle, 3, padding=1), batch_norm),
        *_layer(nn.Conv2d(middle, factors, 3, padding=1), batch_norm),
        *_layer(nn.Conv2d(factors, factors, 3, padding=1), batch_norm),
    )


def _layer(convolution: nn.Conv2d | nn.ConvTranspose2d, batch_norm: bool) -> list[nn.Module]:
    norm = [nn.BatchNorm2d(convolution.out_channels)] if batch_norm else []
    return [convolution, *norm, nn.LeakyReLU(0.1)]
