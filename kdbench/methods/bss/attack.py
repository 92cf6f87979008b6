"""Images moved to a network's decision boundary.

Heo, Lee, Yun, Choi: Knowledge Distillation with Adversarial Samples Supporting Decision Boundary, AAAI 2019, arXiv
1805.05532.

With the gap L(x) = f_b(x) - f_k(x) of the logits of base class b and target class k, an image in class b moves by

* "newton": x ← x - η (L + ε) ∇L / ‖∇L‖², η = 1: first-order Newton. On a linear network one step ends at L = -ε;
* "released": x ← x - η (L + ε) ∇L / ‖∇L‖, η = 0.3, the authors' code: η ‖∇L‖ Newton steps in one, so it goes too far
  wherever ‖∇L‖ > 1 / η.

ε pushes it slightly across. Plain functions of tensors, usable in anyone's loop. None reads a value from a GPU: shapes
are fixed, masks say which rows count.
"""

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

StepRule = Literal["newton", "released"]
# η where none is given: the whole way to the linearized boundary, and what the authors' code has.
RATES: dict[StepRule, float] = {"newton": 1.0, "released": 0.3}
# A gradient shorter than this, in logits per unit of length, leads nowhere. Its square is far from the least float32,
# so that no step's size overflows.
FLAT = 1e-12
# Devices on which it costs no waiting to ask which images still move, so that an attack goes on with these alone.
ASKED = ("cpu",)


class Attacked(NamedTuple):
    """What an attack gives.

    images: [N, ...], where the attack ended. logits: [N, K], of the network there. crossed: bool [N], whether they lie
    in another class than the base class. arrived: bool [N], whether they lie in the target class. Neither holds where
    an image or its logits are not finite.
    """

    images: Tensor
    logits: Tensor
    crossed: Tensor
    arrived: Tensor


def boundary_attack(
    network: Callable[[Tensor], Tensor],
    images: Tensor,
    base: Tensor,
    target: Tensor,
    *,
    step: StepRule = "newton",
    rate: float | None = None,
    iterations: int = 10,
    epsilon: float = 1e-4,
    clamp: tuple[float, float] | None = None,
) -> Attacked:
    """Move images from their base class towards a target class until the network takes them for another class.

    An image stays where it left its base class, in the target class or in a third one, and where no step is possible:
    where ‖∇L‖ < 1e-12, or where a step would not end at a finite place.

    Args:
        network: images [N, ...] -> logits [N, K]; differentiable, in eval mode (no image's logits depend on another's).
            Gradients are taken of the images alone: its parameters' `.grad` stays as it is.
        images: floating point, in the space in which the network takes them and in which lengths are measured.
        base: int64 [N], the classes in which the images lie. target: int64 [N], others.
        rate: η; None for the rule's own.
        iterations: at most so many steps.
        epsilon: ε ≥ 0, in units of a logit.
        clamp: range of values, kept after every step.

    Returns:
        images, logits, crossed and arrived, without gradients.

    Raises:
        ValueError: not one class for each image, an unknown step, a rate that is not positive, or no iteration.
    """
    eta = _checked(images, base, target, step, rate, iterations, epsilon)
    x, logits = images.detach(), None
    # Rows that are attacked: all, or those that still move.
    rows = torch.arange(len(images), device=images.device)
    for left in reversed(range(iterations + 1)):
        some = x[rows].requires_grad_(left > 0)
        with torch.set_grad_enabled(left > 0):
            here = network(some)
            gap = (here.gather(1, base[rows, None]) - here.gather(1, target[rows, None])).squeeze(1)
            total = gap.sum()
        logits = here.detach().clone() if logits is None else logits.index_copy(0, rows, here.detach())
        if not left:
            break
        (gradient,) = torch.autograd.grad(total, some)
        moved, steep = _stepped(some.detach(), gradient, eta * (gap.detach() + epsilon), newton=step == "newton")
        moved = moved if clamp is None else moved.clamp(*clamp)
        moves = (here.detach().argmax(dim=1) == base[rows]) & steep & _finite(moved)
        x = x.index_copy(0, rows, torch.where(moves.view(-1, *(1,) * (x.ndim - 1)), moved, some.detach()))
        rows = _where(rows, moves)
        if not len(rows):
            break
    assert logits is not None
    winner, sound = logits.argmax(dim=1), _finite(x) & _finite(logits)
    return Attacked(x, logits, sound & (winner != base), sound & (winner == target))


def _stepped(x: Tensor, gradient: Tensor, gap: Tensor, newton: bool) -> tuple[Tensor, Tensor]:
    """Images after a step of `gap` logits, and which of them have a slope to go down: [N, ...], bool [N]."""
    length = gradient.flatten(1).norm(dim=1)
    divisor = length.clamp_min(max(FLAT, torch.finfo(gradient.dtype).tiny ** 0.5))
    size = gap / (divisor.square() if newton else divisor)
    # No comparison holds for a length that is not a number.
    return x - size.view(-1, *(1,) * (x.ndim - 1)) * gradient, length >= divisor


def _checked(
    images: Tensor, base: Tensor, target: Tensor, step: str, rate: float | None, iterations: int, epsilon: float
) -> float:
    """The attack's η, once its arguments are checked."""
    if base.shape != images.shape[:1] or target.shape != images.shape[:1]:
        raise ValueError(
            f"boundary_attack needs one base and one target class for each of {len(images)} images: "
            f"base {list(base.shape)}, target {list(target.shape)}"
        )
    if step not in RATES:
        raise ValueError(f"step must be 'newton' or 'released', not {step!r}")
    eta = RATES[step] if rate is None else rate  # type: ignore[index]
    if not eta > 0 or iterations < 1 or not epsilon >= 0:
        raise ValueError(
            f"rate must be positive, iterations at least 1, epsilon at least 0: {eta}, {iterations}, {epsilon}"
        )
    return eta


def _finite(values: Tensor) -> Tensor:
    """Which rows of [N, ...] hold finite values alone: bool [N]."""
    return values.flatten(1).isfinite().all(dim=1)


def asks(device: torch.device) -> bool:
    """Whether an attack on a device goes on with those images alone that still move. Elsewhere it moves all of them, as
    often as it may, and reads nothing."""
    return device.type in ASKED


def _where(rows: Tensor, moves: Tensor) -> Tensor:
    """The rows of images that go on."""
    return rows[moves] if asks(rows.device) else rows


def base_samples(student: Tensor, teacher: Tensor, labels: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Which images of a batch to attack: of those that both networks classify correctly, where they disagree most.

    The `size` largest of Σ_{c ≠ y} (p_t^c - p_s^c)², with p = softmax at T = 1.

    Args:
        student, teacher: logits [N, K]. labels: int64 [N].

    Returns:
        positions in the batch, int64 [n] with n = min(size, N), the largest distance first, and their mask, bool [n].
        Where there are fewer such images than n, they come again from the first on, masked out; where there is none,
        an arbitrary image stands in all rows, masked out.
    """
    student, teacher = student.detach().float(), teacher.detach().float()
    right = (student.argmax(dim=1) == labels) & (teacher.argmax(dim=1) == labels)
    difference = (F.softmax(teacher, dim=1) - F.softmax(student, dim=1)).square()
    distance = difference.scatter(1, labels[:, None], 0.0).sum(dim=1)
    n = min(size, len(labels))
    ranked = torch.where(right, distance, -1.0).sort(descending=True, stable=True).indices[:n]
    rows, mask = again(right[ranked])
    return ranked[rows], mask


def again(valid: Tensor) -> tuple[Tensor, Tensor]:
    """Rows that put the valid ones first, in order, and fill up with the same again; and the mask of what is no filler.

    Args:
        valid: bool [n].

    Returns:
        rows, int64 [n]; mask, bool [n]: its first valid.sum() are true. Without any valid row, the first everywhere.
    """
    order = (~valid).to(torch.uint8).sort(stable=True).indices
    count, place = valid.sum(), torch.arange(len(valid), device=valid.device)
    return order[place % count.clamp_min(1)], place < count


def target_classes(teacher: Tensor, base: Tensor, draws: Tensor) -> Tensor:
    """A target class for each image, with probability P(k) = p_t^k / (1 - p_t^b) over the classes k ≠ b (T = 1).

    Args:
        teacher: logits [N, K], K ≥ 2. base: int64 [N].
        draws: [N], independent and uniform in [0, 1).

    Returns:
        int64 [N], never the base class.
    """
    others = teacher.detach().double().scatter(1, base[:, None], -torch.inf)
    summed = F.softmax(others, dim=1).cumsum(dim=1)
    # Below the sum by more than its rounding, so that a draw never lies behind the last class.
    draw = draws.to(summed.dtype)[:, None] * summed[:, -1:] * (1 - 2.0**-50)
    return (summed <= draw).sum(dim=1)
