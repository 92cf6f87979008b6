"""A cell's budget in steps, its stages and its evaluation points. Pure arithmetic."""

import bisect
import math
from dataclasses import dataclass
from fractions import Fraction

from kdbench.errors import UserError
from kdbench.recipe.choices import MOST_EVALUATIONS
from kdbench.recipe.model_specs import DataSpec
from kdbench.recipe.specs import CellSpec

# A budget may stand in anybody's record: what would take the memory of the machine to count is refused.
MOST_STEPS = 10**9


@dataclass(frozen=True)
class Span:
    """Steps [start, stop) of one stage."""

    name: str
    start: int
    stop: int

    @property
    def steps(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class Timeline:
    """A cell's steps. `extra`: steps on top of the protocol's budget, which come first in the stages that have them."""

    batches_per_epoch: int
    spans: tuple[Span, ...]
    extra: int
    evaluations: tuple[int, ...]

    @property
    def total(self) -> int:
        return self.spans[-1].stop

    def stage(self, step: int) -> int:
        """Index of the stage that a step belongs to."""
        return bisect.bisect_right([span.stop for span in self.spans], step)

    def epochs(self, steps: int) -> float:
        return steps / self.batches_per_epoch


def validation_images(spec: DataSpec) -> int:
    """Images of the validation part, as the card's counts give it."""
    return _part(spec.validation, spec.train) if 0 < spec.validation < 1 else int(spec.validation)


def training_images(spec: DataSpec) -> int:
    """Images of the labelled training part, as the card's counts give it."""
    left = spec.train - validation_images(spec)
    if spec.fraction is not None:
        return max(_part(spec.fraction, left), spec.classes)
    return left if spec.per_class is None else spec.per_class * len(spec.only_classes or range(spec.classes))


def _part(share: float, images: int) -> int:
    """A share of images, halves up and in decimal arithmetic, as `data.splits` takes it."""
    return math.floor(Fraction(str(share)) * images + Fraction(1, 2))


def batches_per_epoch(images: int, batch_size: int, last_batch: str) -> int:
    """Batches of one pass over the training set. A set smaller than a batch is one batch in any case."""
    full = images // batch_size
    return max(full, 1) if last_batch == "drop" else max(math.ceil(images / batch_size), 1)


def timeline(spec: CellSpec, images: int) -> Timeline:
    """The steps of a cell that trains on `images` images.

    The protocol's budget is the total over all stages; shares are rounded to steps, at least one each; the stage
    without a share takes the rest, or the last one where all have shares. Evaluation comes at even points, at the end
    of every stage and at the end.
    """
    per_epoch = batches_per_epoch(images, spec.protocol.batch_size, spec.protocol.last_batch)
    if spec.protocol.steps is not None:
        budget = spec.protocol.steps
    else:
        assert spec.protocol.epochs is not None
        budget = _steps(spec.protocol.epochs * per_epoch)
    stages = spec.method.stages
    lengths = {}
    for name, stage in stages.items():
        if stage.extra_epochs is not None:
            lengths[name] = _steps(stage.extra_epochs * per_epoch)
        elif stage.extra_share is not None:
            lengths[name] = _steps(stage.extra_share * budget)
        elif stage.share is not None:
            lengths[name] = _steps(stage.share * budget)
    extra = sum(lengths[name] for name, stage in stages.items() if stage.extra)
    rest = [name for name in stages if name not in lengths] or [name for name, stage in stages.items() if stage.share]
    if rest:
        lengths[rest[-1]] = max(budget + extra - sum(lengths[name] for name in lengths if name != rest[-1]), 1)
    spans, start = [], 0
    for name in stages:
        spans.append(Span(name, start, start + lengths[name]))
        start += lengths[name]
    total = _steps(start)
    if (total // per_epoch if spec.evaluations == "epoch" else spec.evaluations) > MOST_EVALUATIONS:
        raise UserError(f"more than {MOST_EVALUATIONS:,} evaluations", hint="reduce 'evaluations'")
    if spec.evaluations == "epoch":
        points = set(range(per_epoch, total + 1, per_epoch))
    else:
        points = {round(i * total / spec.evaluations) for i in range(1, spec.evaluations + 1)}
    points |= {span.stop for span in spans}
    points.discard(0)
    return Timeline(per_epoch, tuple(spans), extra, tuple(sorted(points)))


def _steps(wanted: float) -> int:
    """To the nearest whole number, at least one. UserError for what nobody can train."""
    if wanted > MOST_STEPS:
        hint = f"reduce 'epochs' or 'steps': the limit is {MOST_STEPS:.0e} steps"
        raise UserError(f"a budget of {wanted:.3g} steps is too large", hint=hint)
    return max(round(wanted), 1)


def planned_timeline(spec: CellSpec) -> Timeline:
    return timeline(spec, training_images(spec.data))
