"""Schedules of learning rates and loss weights: pure functions of the progress through a stage.

A schedule card names one of these functions. Each returns a `Schedule`; `factor(progress)` multiplies the base value,
with progress in [0, 1) = steps done / steps of the stage (or of the epoch, where the schedule's clock is that). Being a
function of the position alone, a schedule needs no state in a checkpoint.
"""

import math
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple


class Moment(NamedTuple):
    """Where training is: the progress of the stage and of the epoch, in [0, 1), and the epochs done of the stage."""

    progress: float = 0.0
    epoch: float = 0.0
    epochs: float = 0.0


class Schedule(NamedTuple):
    """`factor`: progress -> multiplier of the base value.

    `resets`: progress points at which momentum is forgotten. `clock`: whether progress is that of the stage, begins
    anew with every epoch, or counts the stage's epochs.
    """

    factor: Callable[[float], float]
    resets: tuple[float, ...] = ()
    clock: Literal["stage", "epoch", "epochs"] = "stage"

    def at(self, progress: float, epoch: float = 0.0, epochs: float = 0.0) -> float:
        """The multiplier at a `Moment`."""
        return self.factor({"stage": progress, "epoch": epoch, "epochs": epochs}[self.clock])


def product(schedules: Sequence[Schedule]) -> Callable[[Moment], float]:
    """Moment -> product of the schedules' multipliers; 1 for none."""
    return lambda now: math.prod(one.at(*now) for one in schedules)


def share(text: str) -> float:
    """ "30%" -> 0.3. Raises ValueError for anything else, or outside 0 % to 100 %."""
    written = f"a share is written like '30%', not {text!r}"
    if not isinstance(text, str) or not text.strip().endswith("%"):
        raise ValueError(written)
    try:
        value = float(text.strip()[:-1]) / 100
    except ValueError:
        raise ValueError(written) from None
    if not 0 <= value <= 1:
        raise ValueError(f"a share lies between 0% and 100%, not {text!r}")
    return value


def constant(*, reset_momentum_at: list[str] | None = None) -> Schedule:
    """The base value throughout; momentum may be forgotten at given shares of the stage."""
    return Schedule(lambda progress: 1.0, tuple(share(s) for s in reset_momentum_at or []))


def multistep(*, at: list[str], gamma: float = 0.1, reset_momentum: bool = False) -> Schedule:
    """Times `gamma` at each share of the stage; `reset_momentum` forgets momentum there, as codes do that build a new
    optimizer for every drop."""
    drops = tuple(sorted(share(s) for s in at))
    # A drop at 57.1 % of 1000 steps belongs to step 571, although 571 / 1000 < 57.1 / 100 in floating point.
    return Schedule(lambda progress: gamma ** sum(progress + 1e-9 >= d for d in drops), drops if reset_momentum else ())


def cosine(*, end: float = 0.0, warmup: str = "0%") -> Schedule:
    """Half a cosine from 1 to `end`, after a linear rise over the share `warmup` (Loshchilov & Hutter 2017)."""
    rise = share(warmup)

    def factor(progress: float) -> float:
        if progress < rise:
            return progress / rise
        return _half_cosine(math.pi * (progress - rise) / max(1 - rise, 1e-12), end)

    return Schedule(factor)


def _half_cosine(angle: float, end: float) -> float:
    """From 1 at 0 to `end` at π."""
    return end + (1 - end) * 0.5 * (1 + math.cos(angle))


def _in_parts(levels: int | None) -> Callable[[float], float]:
    """Progress -> where its part of the stage ends, of `levels` equal ones; progress itself where there are none."""
    if levels is None:
        return lambda progress: progress
    if levels < 1:
        raise ValueError(f"levels must be at least 1, not {levels}")
    # A step that begins a part belongs to it, whatever floating point makes of the quotient.
    return lambda progress: (math.floor(progress * levels + 1e-9) + 1) / levels


def linear(*, start: float = 1.0, end: float = 0.0, until: str = "100%", levels: int | None = None) -> Schedule:
    """A straight line from `start` to `end`, reached at the share `until` and kept.

    With `levels` the stage has so many equal parts, and each keeps the value that the line has at the part's end, as
    codes do that set a value once an epoch, by the epoch's number from 1.
    """
    stop, place = share(until), _in_parts(levels)

    def factor(progress: float) -> float:
        at = place(progress)
        return end if at > stop - 1e-12 else start + (end - start) * (at / stop)

    return Schedule(factor)


def late_cosine(*, after: str, end: float = 0.0, levels: int | None = None) -> Schedule:
    """1 until the share `after` of the stage, then half a cosine down to `end`.

    With `levels`, as `linear`: each of so many equal parts keeps the value at its end, also the one that holds `after`.
    """
    start, place = share(after), _in_parts(levels)
    return Schedule(
        lambda progress: _half_cosine(math.pi * (max(place(progress) - start, 0.0) / max(1 - start, 1e-12)), end)
    )


def piecewise(*, at: list[str], factors: list[float]) -> Schedule:
    """Constant between the shares `at` of the stage: one factor more than shares, the first from the beginning."""
    changes = [share(s) for s in at]
    if len(factors) != len(changes) + 1 or changes != sorted(changes):
        raise ValueError(f"piecewise takes rising shares and one factor more, not {at} and {factors}")
    # As of `multistep`: a change belongs to the first step that has reached its share.
    return Schedule(lambda progress: factors[sum(progress + 1e-9 >= change for change in changes)])


def warmup(*, epochs: float, first: int = 1) -> Schedule:
    """Rises to 1 by the number of the epoch, in the stage's first epochs: min((epoch + first) / epochs, 1).

    Codes count epochs from 1 (`first` 1: not 0 in the first epoch), or from 0.
    """
    if epochs <= 0 or first not in (0, 1):
        raise ValueError(f"a warm-up takes more than 0 epochs, counted from 0 or 1, not {epochs} from {first}")
    return Schedule(lambda done: min((math.floor(done + 1e-9) + first) / epochs, 1.0), clock="epochs")


def exponential(*, start: float, end: float, complement: bool = False) -> Schedule:
    """Geometric from `start` to `end`: start * (end / start) ** progress; with `complement` 1 minus that.

    Both must be positive.
    """
    if start <= 0 or end <= 0:
        raise ValueError("exponential needs positive start and end")

    def factor(progress: float) -> float:
        value = start * (end / start) ** progress
        return 1 - value if complement else value

    return Schedule(factor)


def inverse_power(*, scale: float = 10.0, power: float = 0.75) -> Schedule:
    """1 / (1 + scale * progress) ** power: 1 at first, 0.166 at the end by default (Ganin et al. 2016)."""
    if scale < 0:
        raise ValueError("inverse_power needs a scale of at least 0")
    return Schedule(lambda progress: (1 + scale * progress) ** -power)


def sigmoid_ramp(*, steepness: float = 10.0, per: Literal["stage", "epoch"] = "stage") -> Schedule:
    """2 / (1 + exp(-steepness * progress)) - 1: from 0 towards 1 (Ganin et al. 2016), once or in every epoch."""
    if per not in ("stage", "epoch"):
        raise ValueError(f"a ramp is per 'stage' or per 'epoch', not {per!r}")
    return Schedule(lambda progress: 2 / (1 + math.exp(-steepness * progress)) - 1, clock=per)
