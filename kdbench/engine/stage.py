"""A member's present stage: what trains by which loss terms, at which rates and weights."""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor, nn

from kdbench.engine.data.batch import StepTable
from kdbench.engine.data.domain import place_of
from kdbench.engine.inputs import Source
from kdbench.engine.optimizers import ScheduledOptimizer
from kdbench.engine.teachers.teacher import StageTeacher
from kdbench.engine.terms import Term
from kdbench.recipe.method_specs import StageSpec
from kdbench.recipe.timeline import Span, Timeline
from kdbench.schedules import Moment


@dataclass
class Turn:
    """What is trained by which terms at once.

    Attributes:
        points: network ("student", "teacher") -> input set -> hook points that the terms read.
        active: names of the terms whose weight is not 0 in the present stretch. The others are not computed.
    """

    terms: dict[str, Term]
    optimizers: list[ScheduledOptimizer]
    points: dict[str, dict[str, list[str]]]
    active: list[str] = field(default_factory=list)

    @property
    def parameters(self) -> list[Tensor]:
        """All that it trains."""
        return [parameter for one in self.optimizers for parameter in one.parameters]

    @property
    def separate(self) -> list[Tensor]:
        """Those whose optimizers take gradients of terms that read a teacher apart."""
        return [parameter for one in self.optimizers if one.separates for parameter in one.parameters]

    def reads(self, names: Iterable[str]) -> bool:
        """Whether a term that counts reads one of these input sets."""
        return bool({*names} & {name for term in self.active for name in self.terms[term].input_sets})


class Numbers(NamedTuple):
    """Of a step: the weights of the terms, what they are told, and the rates of the optimizers."""

    weights: dict[str, Tensor]
    told: dict[str, dict[str, Tensor]]
    rates: dict[ScheduledOptimizer, Sequence[Tensor]]


class Stage:
    """Built when a member enters a stage.

    Args:
        spec: of the stage. span: its steps. schedule_span: the steps of its schedules: its own, and those of stages
            that it continues or that continue it.
        timeline: of the member.
        terms: its loss terms by name.
        optimizers: of the student and its connectors, then of a teacher that trains.
        teacher: whose values its terms get; None for a method without one.
        source: what makes further input sets, or None.
        device: of rates and weights.
    """

    def __init__(
        self,
        spec: StageSpec,
        span: Span,
        schedule_span: Span,
        timeline: Timeline,
        terms: dict[str, Term],
        optimizers: list[ScheduledOptimizer],
        teacher: StageTeacher | None,
        source: Source | None,
        device: torch.device,
    ) -> None:
        self.spec, self.span, self.schedule_span, self.timeline = spec, span, schedule_span, timeline
        self.terms, self.optimizers = terms, optimizers
        self.teacher, self.source = teacher, source
        self.turns = self._turns()
        told = sum(len(term.numbers) for term in terms.values())
        self.table = StepTable(len(terms) + told + sum(len(one.base_rates) for one in optimizers), device)

    @property
    def made(self) -> list[str]:
        """Input sets that the source makes."""
        return self.spec.source.gives if self.spec.source is not None else []

    @cached_property
    def shared_sets(self) -> list[str]:
        """Input sets that the data give and the stage reads."""
        return shared_sets(self.terms.values(), self.spec)

    @cached_property
    def teacher_points(self) -> dict[str, list[str]]:
        """What the stage needs of a shared teacher on these: input set -> hook points."""
        if self.teacher is None or not self.teacher.shared_with_others:
            return {}
        return shared_teacher_points(self.terms.values(), self.spec)

    @property
    def by_step(self) -> str | None:
        """Why the host must act at every step; None where it need not."""
        acting = [self.source, *(term.spec.loss for term in self.terms.values())]
        return next((one.by_step for one in acting if one is not None and one.by_step), None)

    def progress(self, step: int) -> float:
        """Progress through the schedules, in [0, 1), before a step."""
        return self.moment(step).progress

    def rate(self, step: int) -> float:
        """The rate of the first optimizer at a step."""
        return self.optimizers[0].rates(self.moment(step))[0]

    def rates(self, step: int) -> list[float]:
        """The rates of all optimizers at a step, one after the other."""
        now = self.moment(step)
        return [rate for one in self.optimizers for rate in one.rates(now)]

    def moment(self, step: int) -> Moment:
        """Where schedules are before a step."""
        return moment_at(step, self.schedule_span, self.timeline)

    def weights(self, step: int) -> dict[str, float]:
        """The weight of every term at a step."""
        now = self.moment(step)
        return {name: term.weight_at(now) for name, term in self.terms.items()}

    def numbers(self, step: int) -> list[float]:
        """What all terms are told at a step, one after the other."""
        now = self.moment(step)
        return [at(now) for term in self.terms.values() for at in term.numbers.values()]

    def alike(self, step: int, most: int) -> int:
        """How many steps from one on, at most `most`, compute the same terms and forget no momentum in between."""
        counting = self._counting(step)
        steps = range(step + 1, min(step + most, self.span.stop))
        return next((at for at in steps if self._counting(at) != counting or any(self._resets(at))), steps.stop) - step

    def prepare(self, step: int, steps: int) -> None:
        """Put rates and weights of the coming steps on the device, and forget momentum where it is time."""
        coming = range(step, step + steps)
        rows = [[*self.weights(at).values(), *self.numbers(at), *self.rates(at)] for at in coming]
        self.table.fill(torch.tensor(rows, dtype=torch.float32))
        for optimizer, resets in zip(self.optimizers, self._resets(step), strict=True):
            if resets:
                optimizer.reset_state()
        counting = self._counting(step)
        for turn in self.turns:
            turn.active = [name for name in turn.terms if name in counting]

    def next_numbers(self) -> Numbers:
        """What changes from step to step, on the device; goes on to the next."""
        row = iter(self.table.row())
        self.table.advance()
        return Numbers(
            {name: next(row) for name in self.terms},
            {name: {told: next(row) for told in term.numbers} for name, term in self.terms.items()},
            {one: [next(row) for _ in one.base_rates] for one in self.optimizers},
        )

    def _counting(self, step: int) -> list[str]:
        return [name for name, weight in self.weights(step).items() if weight]

    def _resets(self, step: int) -> list[bool]:
        return [one.resets(self.progress(step), self.progress(step - 1)) for one in self.optimizers]

    def _turns(self) -> list[Turn]:
        """All is trained by all terms, or the teacher first by its own."""
        if not self.spec.alternating:
            return [self._turn(self.terms, self.optimizers)]
        *others, of_teacher = self.optimizers
        own = {name: term for name, term in self.terms.items() if term.spec.of == "teacher"}
        rest = {name: term for name, term in self.terms.items() if name not in own}
        # A term through whose teacher gradients go trains it a second time.
        through = any("teacher" in term.spec.loss.inputs and not term.spec.detach for term in rest.values())
        return [self._turn(own, [of_teacher]), self._turn(rest, self.optimizers if through else others)]

    def _turn(self, terms: dict[str, Term], optimizers: list[ScheduledOptimizer]) -> Turn:
        points = {network: asked_points(terms.values(), self.spec, network) for network in ("student", "teacher")}
        return Turn(terms, optimizers, points)


def asked_points(terms: Iterable[Term], spec: StageSpec, network: str) -> dict[str, list[str]]:
    """What some terms of a stage, and its source, need of a network: input set -> hook points."""
    of_source = dict.fromkeys(spec.source.reads if spec.source and spec.source.logits else (), ["logits"])
    return union([*(term.points(network) for term in terms), of_source])


def union(each: Iterable[Mapping[str, Iterable[str]]]) -> dict[str, list[str]]:
    """What several need together, every hook point once: input set -> hook points."""
    found: dict[str, dict[str, None]] = {}
    for needed in each:
        for name, points in needed.items():
            found.setdefault(name, {}).update(dict.fromkeys(points))
    return {name: [*points] for name, points in found.items()}


def shared_sets(terms: Iterable[Term], spec: StageSpec) -> list[str]:
    """Input sets that the data give and a stage reads."""
    read = dict.fromkeys(name for term in terms for name in term.input_sets)
    made: Sequence[str] = spec.source.gives if spec.source else ()
    return [name for name in [*read, *(spec.source.reads if spec.source else ())] if name not in made]


def shared_teacher_points(terms: Collection[Term], spec: StageSpec) -> dict[str, list[str]]:
    """What a stage needs of a teacher on the input sets that the data give: input set -> hook points."""
    shared = shared_sets(terms, spec)
    return {name: points for name, points in asked_points(terms, spec, "teacher").items() if name in shared}


@contextmanager
def batch_norms(model: nn.Module, policy: str) -> Iterator[None]:
    """What batch norms do with a batch: "shared", "frozen" or "separate", as on a stage's card.

    Only those in train mode, in which a stage that keeps the student in eval mode has none.
    """
    if policy == "shared":
        yield
        return
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.training]
    tracked = [m.track_running_stats for m in norms]
    for norm in norms:
        if policy == "frozen":
            norm.train(False)
        else:
            norm.track_running_stats = False
    try:
        yield
    finally:
        for norm, track in zip(norms, tracked, strict=True):
            norm.train(True)
            norm.track_running_stats = track


def moment_at(step: int, span: Span, timeline: Timeline) -> Moment:
    """Where schedules with a span of their own are before a step."""
    each, done = timeline.batches_per_epoch, step - span.start
    return Moment(done / span.steps, place_of(step, timeline)[2] / each, done / each)


def schedule_span_of(spans: Sequence[Span], stages: Mapping[str, StageSpec], stage: int) -> Span:
    """Steps of the schedules that a stage is in: its own, and those of stages that it continues or that continue it."""
    first = last = stage
    while stages[spans[first].name].continues:
        first -= 1
    while last + 1 < len(spans) and stages[spans[last + 1].name].continues:
        last += 1
    return Span(spans[stage].name, spans[first].start, spans[last].stop)
