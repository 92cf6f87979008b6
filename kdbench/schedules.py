"""Schedules of learning rates and loss weights: pure functions of the progress through a stage.

A schedule card names one of these functions. Each returns a `Schedule`; `factor(progress)` multiplies the base value,
with progress in [0, 1) = steps done / steps of the stage. Being a function of the position alone, a schedule needs no
state in a checkpoint.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple


class Schedule(NamedTuple):
    """`factor`: progress -> multiplier of the base value. `resets`: progress points at which momentum is forgotten."""

    factor: Callable[[float], float]
    resets: tuple[float, ...] = ()


def share(text: str) -> float:
    """ "30%" -> 0.3. Raises ValueError for anything else, or outside 0 % to 100 %."""
    if not isinstance(text, str) or not text.strip().endswith("%"):
        raise ValueError(f"a share is written like '30%', not {text!r}")
    value = float(text.strip()[:-1]) / 100
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
    # A drop at 30 % of 10 steps belongs to step 3; 3 / 10 < 0.3 in floating point must not delay it.
    return Schedule(lambda progress: gamma ** sum(progress + 1e-9 >= d for d in drops), drops if reset_momentum else ())


def cosine(*, end: float = 0.0, warmup: str = "0%") -> Schedule:
    """Half a cosine from 1 to `end`, after a linear rise over the share `warmup` (Loshchilov & Hutter 2017)."""
    rise = share(warmup)

    def factor(progress: float) -> float:
        if progress < rise:
            return progress / rise
        return end + (1 - end) * 0.5 * (1 + math.cos(math.pi * (progress - rise) / max(1 - rise, 1e-12)))

    return Schedule(factor)


def linear(*, start: float = 1.0, end: float = 0.0, until: str = "100%", levels: int | None = None) -> Schedule:
    """A straight line from `start` to `end`, reached at the share `until` and kept.

    With `levels` the stage has so many equal parts, and each keeps the value that the line has at the part's end, as
    codes do that set a value once an epoch, by the epoch's number from 1."""
    stop = share(until)
    if levels is not None and levels < 1:
        raise ValueError(f"levels must be at least 1, not {levels}")

    def factor(progress: float) -> float:
        # A step that begins a part belongs to it, whatever floating point makes of the quotient.
        at = progress if levels is None else (math.floor(progress * levels + 1e-9) + 1) / levels
        done = at / max(stop, 1e-12)
        return end if done > 1 - 1e-12 else start + (end - start) * done

    return Schedule(factor)


def exponential(*, start: float, end: float) -> Schedule:
    """Geometric from `start` to `end`: start * (end / start) ** progress. Both must be positive."""
    if start <= 0 or end <= 0:
        raise ValueError("exponential needs positive start and end")
    return Schedule(lambda progress: start * (end / start) ** progress)


def sigmoid_ramp(*, steepness: float = 10.0) -> Schedule:
    """2 / (1 + exp(-steepness * progress)) - 1: from 0 towards 1 (Ganin et al. 2016)."""
    return Schedule(lambda progress: 2 / (1 + math.exp(-steepness * progress)) - 1)
