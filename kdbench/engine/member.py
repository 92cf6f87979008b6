"""One cell while it trains: its student, the terms of its stage, its optimizer, what it measured so far."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypedDict

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kdbench.engine import route
from kdbench.engine.anchors import Guide, Route
from kdbench.engine.batches import SLICE, Batch, Batches, Normalizer, Sets, place_of
from kdbench.engine.build import (
    Shape,
    Term,
    Values,
    build_extractor,
    build_model,
    build_optimizer,
    build_schedule,
    build_terms,
    start_from,
)
from kdbench.engine.compute import REFERENCE, Computing
from kdbench.engine.inputs import Eyes, Moment, Workplace, build_source
from kdbench.engine.logits import PartLogits
from kdbench.engine.network import Network, autocast, memory_format
from kdbench.engine.operations import Occasion, build_operation
from kdbench.engine.timeline import Span, Timeline, timeline
from kdbench.errors import CellError, UserError
from kdbench.models.hooks import Extractor
from kdbench.recipe.schema import CellSpec, StageSpec, TargetSpec
from kdbench.sources.streams import address

# Agreement needs features of the teacher: it is measured on at most this many evenly spaced test images.
PROBE_IMAGES = 2000


class Teacher:
    """A frozen network in eval mode, shared by all cells that learn from it.

    Args:
        shapes: of its hook points, per image.
        logits: the table of its logits for the training part, where there is one.
        route: the checkpoints of its training, where they were kept.
    """

    def __init__(
        self,
        extractor: Extractor,
        normalizer: Normalizer,
        shapes: Mapping[str, Shape],
        computing: Computing = REFERENCE,
        logits: PartLogits | None = None,
        route: Route | None = None,
    ) -> None:
        self.normalizer, self.shapes, self.computing, self.logits = normalizer, shapes, computing, logits
        self.route = route
        self.network = Network(extractor, computing, frozen=True)
        self.network.model.eval().requires_grad_(False)

    def __call__(self, images: Tensor, points: list[str]) -> dict[str, Tensor]:
        """Values of hook points for bytes [N, C, H, W], in float32, without gradients."""
        with torch.no_grad():
            return self.network(self.normalizer(images), points)

    def step(self, sets: Sets, points: Mapping[str, list[str]]) -> dict[str, dict[str, Tensor]]:
        """Values of hook points for a step's input sets, in the run's precision.

        Args:
            points: input set -> hook points.
        """
        return {name: self._values(name, sets[name], asked) for name, asked in points.items()}

    def _values(self, name: str, batch: Batch, points: list[str]) -> dict[str, Tensor]:
        """Logits of the data set from their table where there is one, everything else from one pass that runs no
        further than it must."""
        values = {}
        if self.logits is not None and name == "data" and "logits" in points:
            assert batch.index is not None and batch.view is not None
            values["logits"] = self.logits.at(batch.index, batch.view)
        rest = [point for point in points if point not in values]
        if rest:
            with torch.no_grad(), autocast(self.computing.precision, batch.images.device):
                values |= self.network.step(self.normalizer(batch.images), rest)
        return values

    def eyes(self) -> Eyes:
        return Eyes(self.network, self.normalizer)

    def training_copy(self) -> Extractor:
        """A copy that may run in train mode, or be trained: the shared one stays as it was."""
        extractor = self.network.extractor
        model = copy.deepcopy(extractor.model).train()
        return Extractor(model, extractor.places, extractor.model_name)


@dataclass
class Meter:
    """Means over the steps since the last evaluation, on the device; nothing is read before `result`."""

    sums: dict[str, Tensor] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    images: int = 0

    def add(self, name: str, value: Tensor) -> None:
        value = value.detach()
        self.sums[name] = self.sums[name] + value if name in self.sums else value.clone()
        self.counts[name] = self.counts.get(name, 0) + 1

    def result(self) -> dict[str, float]:
        return {name: value.item() / self.counts[name] for name, value in self.sums.items()}


class Pacer:
    """An optimizer and the schedule of its rates."""

    def __init__(self, optimizer: TargetSpec, schedule: TargetSpec, trained: list[nn.Parameter]) -> None:
        self.optimizer = build_optimizer(optimizer, trained)
        self.base_rates = [group["lr"] for group in self.optimizer.param_groups]
        self.schedule = build_schedule(schedule)

    @property
    def rate(self) -> float:
        rate: float = self.optimizer.param_groups[0]["lr"]
        return rate

    def step(self, progress: float, before: float) -> None:
        """An optimizer step at the rate of `progress`; `before`: progress at the step before."""
        factor = self.schedule.factor(progress)
        for group, base in zip(self.optimizer.param_groups, self.base_rates, strict=True):
            group["lr"] = base * factor
        if any(before + 1e-9 < reset <= progress + 1e-9 for reset in self.schedule.resets):
            self.optimizer.state.clear()
        self.optimizer.step()


class Places(TypedDict, total=False):
    """Where a member's sources keep their files: fields of Workplace."""

    teacher_sha256: str
    folder: Path | None
    shared: Path | None


NOWHERE: Places = {}


class Member:
    """One cell in training. `step` is the number of optimizer steps done."""

    def __init__(
        self,
        spec: CellSpec,
        batches: Batches,
        teacher: Teacher | None,
        device: torch.device,
        computing: Computing = REFERENCE,
        places: Places = NOWHERE,
    ) -> None:
        self.spec, self.device, self.computing = spec, device, computing
        self.teacher = teacher
        self.timeline: Timeline = timeline(spec, len(batches.train))
        self.normalizer = Normalizer(spec.protocol.normalization, device)
        student = build_model(spec.student, spec.data, spec.seed)
        if spec.method.starts_from == "teacher":
            assert teacher is not None and spec.teacher is not None
            weights = {name: value.cpu() for name, value in teacher.network.model.state_dict().items()}
            known = spec.teacher.known_classes
            start_from(student, weights, spec.student.name, spec.teacher.model.name, known)
        extractor = build_extractor(student, spec.student, spec.data)
        image_shape = (spec.data.channels, spec.data.image_size, spec.data.image_size)
        shapes = extractor.shapes(image_shape)
        terms = build_terms(spec, shapes, teacher.shapes if teacher else {})
        # Prefixed, because a name like "training" is already an attribute of every module.
        self.terms = nn.ModuleDict(
            {
                f"stage:{stage}": nn.ModuleDict({f"loss:{name}": term for name, term in by_name.items()})
                for stage, by_name in terms.items()
            }
        )
        student.to(device)
        self.student = Network(extractor, computing)
        self.terms.to(device)
        # torch's stubs lack the overload with a memory format alone.
        self.terms.to(memory_format=memory_format(computing))  # type: ignore[call-overload]
        self.step = 0
        self.images = 0
        self.seconds = 0.0
        self.evaluation_seconds = 0.0
        self.last_rate = 0.0
        self.meter = Meter()
        self.history: list[dict[str, Any]] = []
        self.own_teacher: Network | None = None
        self.with_own_teacher = with_own_teacher(spec.method.stages)
        if teacher and self.with_own_teacher:
            self.own_teacher = Network(teacher.training_copy(), computing)
            self.own_teacher.model.to(device)
        self.guide = self._guide(batches)
        # Of a cell that keeps a route: the steps at which, and what it kept.
        self.route_points = route.points(spec.route, self.timeline.total)
        self.kept: list[dict[str, Any]] = []
        eyes = teacher.eyes() if teacher else None
        self.sources = {
            name: build_source(stage.source, Workplace(spec, name, device, eyes, **places))
            for name, stage in spec.method.stages.items()
            if stage.source is not None
        }
        self.batches = batches
        self.operations = {
            name: build_operation(stage.begins)
            for name, stage in spec.method.stages.items()
            if stage.begins is not None
        }
        self.performed: list[str] = []
        self.bad_steps: dict[str, Tensor] = {}
        self.stage_index = -1
        self._seen: list[Batch] = []
        self.enter(0)

    @property
    def finished(self) -> bool:
        return self.step >= self.timeline.total

    @property
    def route_due(self) -> bool:
        """Whether this step's student is to be kept and is not yet."""
        kept = self.kept[-1]["step"] if self.kept else 0
        return self.step != kept and self.step in self.route_points

    @property
    def evaluation_due(self) -> bool:
        """Whether this step is an evaluation point that was not measured yet."""
        measured = self.history[-1]["step"] if self.history else 0
        return self.step != measured and self.step in self.timeline.evaluations

    def enter(self, stage: int) -> None:
        """Begin a stage: a new optimizer over what it trains (or the one before where it goes on with that), modes set,
        every other parameter frozen."""
        goes_on = stage == self.stage_index + 1
        self.stage_index = stage
        self.span = self.timeline.spans[stage]
        self.stage = self.spec.method.stages[self.span.name]
        self.pace = self._pace(stage)
        self.active = self.terms_of(self.span.name)
        self.student.model.requires_grad_("student" in self.stage.trains)
        self.terms.requires_grad_(False)
        own = self.terms[f"stage:{self.span.name}"]
        own.requires_grad_("connectors" in self.stage.trains)
        trained = [p for module in (self.student.model, own) for p in module.parameters() if p.requires_grad]
        if not trained and "teacher" not in self.stage.trains:
            raise UserError(
                f"method '{self.spec.method.name}', stage '{self.span.name}': nothing to train",
                hint="add 'student' to the stage's 'trains'",
            )
        if not (self.stage.continues and goes_on):
            # Of the student and its connectors first, then of the teacher.
            self.pacers = [Pacer(self.stage.optimizer, self.stage.schedule, trained)] if trained else []
            self.teacher_pacer: Pacer | None = None
            if "teacher" in self.stage.trains:
                assert self.own_teacher is not None
                self.teacher_pacer = Pacer(
                    self.stage.teacher_optimizer or self.stage.optimizer,
                    self.stage.teacher_schedule or self.stage.schedule,
                    list(self.own_teacher.model.parameters()),
                )
                self.pacers.append(self.teacher_pacer)
        if self.own_teacher is not None:
            self.own_teacher.model.requires_grad_("teacher" in self.stage.trains)
        self.set_modes()

    def _pace(self, stage: int) -> Span:
        """Steps of the schedule that a stage is in: its own, with those of stages that it continues or that continue
        it."""
        spans, stages = self.timeline.spans, self.spec.method.stages
        first = last = stage
        while stages[spans[first].name].continues:
            first -= 1
        while last + 1 < len(spans) and stages[spans[last + 1].name].continues:
            last += 1
        return Span(self.span.name, spans[first].start, spans[last].stop)

    def _guide(self, batches: Batches) -> Guide | None:
        """What makes this member's own teacher the anchors of its stages."""
        anchors = {name: stage.anchor for name, stage in self.spec.method.stages.items() if stage.anchor is not None}
        if not anchors or self.teacher is None:
            return None
        if self.teacher.route is None:
            raise UserError(
                f"method '{self.spec.method.name}': the teacher's training left no checkpoints to learn from",
                hint="its recipe says 'route: 20' for 20 of them",
            )
        own, normalizer = self.own_teacher, self.teacher.normalizer
        assert own is not None

        def logits(network: Network, normalize: Normalizer) -> Callable[[Tensor], Tensor]:
            return lambda images: network(normalize(images), ["logits"])["logits"].float()

        return Guide(
            anchors,
            self.teacher.route,
            own.model,
            logits(self.student, self.normalizer),
            logits(own, normalizer),
            batches.validation,
            SLICE[self.device.type],
        )

    @property
    def anchors(self) -> list[dict[str, Any]]:
        """The anchors that this member had so far, as its record lists them."""
        return list(self.guide.chosen.values()) if self.guide else []

    def _begin_anchor(self) -> None:
        """Have the stage's anchor as own teacher, before the stage's first step or the first after a resume."""
        if self.guide is None or self.stage.anchor is None or self.guide.stage == self.span.name:
            return
        self.student.model.eval()
        self.guide.begin(self.span.name)
        self.set_modes()

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """Of the student and its connectors."""
        return self.pacers[0].optimizer

    def terms_of(self, stage: str) -> dict[str, Term]:
        """Loss terms of a stage by name."""
        terms: Any = self.terms[f"stage:{stage}"]
        return {name.removeprefix("loss:"): term for name, term in terms.items()}

    def set_modes(self) -> None:
        """Modes of this stage; evaluation changes them and calls this again."""
        self.student.model.train(self.stage.modes.student == "train")
        if self.own_teacher is not None:
            self.own_teacher.model.train(self.stage.modes.teacher == "train")
        for name, terms in self.terms.items():
            terms.train(name == f"stage:{self.span.name}" and "connectors" in self.stage.trains)

    @property
    def trained_teacher(self) -> Network | None:
        """The cell's own teacher, where the method trains it."""
        trains = any("teacher" in stage.trains for stage in self.spec.method.stages.values())
        return self.own_teacher if trains else None

    def wanted(self, network: str, stage: str, terms: Iterable[Term] | None = None) -> dict[str, list[str]]:
        """What a stage's terms, or some of them, need of a network: input set -> hook points."""
        wanted: dict[str, list[str]] = {}
        for term in self.terms_of(stage).values() if terms is None else terms:
            for name, points in term.points(network).items():
                wanted.setdefault(name, []).extend(points)
        source = self.spec.method.stages[stage].source
        for name in source.reads if source else ():
            wanted.setdefault(name, []).append("logits")
        return {name: _unique(points) for name, points in wanted.items()}

    def teacher_points(self, step: int | None = None) -> dict[str, list[str]]:
        """What this member needs of the shared teacher on the shared input sets at a step, by default its present one:
        input set -> hook points."""
        name = self.span.name if step is None else self.timeline.spans[self.timeline.stage(step)].name
        if name in self.with_own_teacher:
            return {}
        made = _made(self.spec.method.stages[name])
        return {at: points for at, points in self.wanted("teacher", name).items() if at not in made}

    def shared_sets(self) -> list[str]:
        """Names of the shared input sets that the present stage reads."""
        terms = [name for term in self.active.values() for name in term.input_sets]
        names = _unique([*terms, *(self.stage.source.reads if self.stage.source else ())])
        return [name for name in names if name not in _made(self.stage)]

    def student_uses(self) -> dict[frozenset[str], int]:
        """Sets of hook points that are asked of the student in train mode, and for how many steps yet."""
        uses: dict[frozenset[str], int] = {}
        evaluated = set()
        for span in self.timeline.spans:
            for asked in self.wanted("student", span.name).values():
                points = frozenset(asked)
                uses[points] = uses.get(points, 0) + max(span.stop - max(self.step, span.start), 0)
                if self.spec.method.stages[span.name].modes.student == "eval":
                    evaluated.add(points)
        return {points: steps for points, steps in uses.items() if steps and points not in evaluated}

    def ready(self, tell: Callable[[str], None], stopping: Callable[[], bool]) -> bool:
        """Let the stage's source make what the coming step needs. False when stopped: the step must not be taken then,
        and nothing but what lies in files has changed."""
        if self.stage.source is None:
            return True
        progress = (self.step - self.pace.start) / self.pace.steps
        student, span = Eyes(self.student, self.normalizer), self.span
        moment = Moment(self.step, progress, {}, {"student": {}, "teacher": {}}, student, span.start, span.stop)
        done = self.sources[span.name].ready(moment, tell, stopping)
        self.set_modes()
        return done

    def train_step(self, shared: Sets, taught: Values) -> None:
        """One optimizer step; `ready` comes before it.

        Args:
            shared: the input sets of `shared_sets`.
            taught: values of the shared teacher, as `teacher_points` asks for them.
        """
        self._begin_anchor()
        if self.span.name in self.operations and self.span.name not in self.performed:
            torch.manual_seed(address(self.spec.seed, f"operation/{self.span.name}", self.step))
            self.operations[self.span.name].perform(self._occasion())
            self.performed.append(self.span.name)
            self.set_modes()
        torch.manual_seed(address(self.spec.seed, "dropout", self.step))
        loss = torch.zeros((), device=self.device)
        for terms, pacers in self._turns():
            loss = loss + self._turn(terms, pacers, shared, taught)

        # Epochs count the data set's own images; sets beside it are seen with them.
        counted = [shared["data"]] if "data" in shared else self._seen
        images = max(len(batch.images) for batch in counted)
        self.meter.add("loss", loss)
        self.meter.images += images
        self.images += images
        self._watch("loss", loss.detach())
        self.last_rate = self.pacers[0].rate
        self.step += 1
        if self.step == self.span.stop and not self.finished:
            self.enter(self.stage_index + 1)

    def _turns(self) -> list[tuple[dict[str, Term], list[Pacer]]]:
        """What is trained by which terms at once: all by all, or the teacher first by its own terms."""
        if not self.stage.alternating:
            return [(self.active, self.pacers)]
        assert self.teacher_pacer is not None
        own = {name: term for name, term in self.active.items() if term.spec.of == "teacher"}
        others = {name: term for name, term in self.active.items() if name not in own}
        # A term through whose teacher gradients go trains it a second time.
        through = any("teacher" in term.spec.loss.inputs and not term.spec.detach for term in others.values())
        return [
            (own, [self.teacher_pacer]),
            (others, [p for p in self.pacers if through or p is not self.teacher_pacer]),
        ]

    def _turn(self, terms: dict[str, Term], pacers: list[Pacer], shared: Sets, taught: Values) -> Tensor:
        """One step of these optimizers by these terms. Returns their weighted sum, detached."""
        progress = (self.step - self.pace.start) / self.pace.steps
        epoch = place_of(self.step, self.timeline)[2] / self.timeline.batches_per_epoch
        # What counts nothing now is not computed, nor what is made for it alone.
        weights = {name: term.weight_at(progress, epoch) for name, term in terms.items()}
        active = {name: term for name, term in terms.items() if weights[name]}

        with autocast(self.computing.precision, self.device):
            sets, values = self._inputs(terms.values(), active.values(), shared, taught, progress)
            loss = torch.zeros((), device=self.device)
            for name, term in active.items():
                value = term(values, sets)
                loss = loss + weights[name] * value
                self.meter.add(name, value)
                self._watch(name, value.detach())

        for pacer in self.pacers:
            pacer.optimizer.zero_grad(set_to_none=True)
        if active:
            loss.backward()
        for pacer in pacers:
            pacer.step(progress, (self.step - 1 - self.pace.start) / self.pace.steps)
        self._seen = list(sets.values())
        return loss.detach()

    def _occasion(self) -> Occasion:
        """What the present stage's operation is given."""
        source, start = self.stage.source, self.span.start
        student = Eyes(self.student, self.normalizer)

        def batch(number: int) -> Batch:
            if source is None or "data" not in source.gives:
                return self.batches.at(start + number, self.timeline)
            nothing: dict[str, Values] = {"student": {}, "teacher": {}}
            moment = Moment(start + number, 0.0, {}, nothing, student, start, self.span.stop, ahead=True)
            made = self.sources[self.span.name].sets(moment)["data"]
            self.set_modes()
            return made

        shape = self.batches.image_shape
        teacher = self.teacher.eyes() if self.teacher else None
        return Occasion(student, teacher, shape, self.device, batch, self.span.name)

    def _inputs(
        self, looking: Collection[Term], terms: Collection[Term], shared: Sets, taught: Values, progress: float
    ) -> tuple[Sets, dict[str, dict[str, dict[str, Tensor]]]]:
        """The step's input sets, and both networks' values on them: network -> input set -> hook point -> value.

        A source sees the logits of what it reads before it makes its own sets.

        Args:
            looking: terms whose values are computed. terms: those of them that count now.
        """
        source = self.stage.source
        needed = {name for term in terms for name in term.input_sets}
        sets = dict(shared)
        values: dict[str, dict[str, dict[str, Tensor]]] = {
            "student": {},
            # What others of the cohort asked for is not this member's: its teacher may be its own, or its "data" made.
            "teacher": {n: dict(v) for n, v in taught.items() if n in shared}
            if self.span.name not in self.with_own_teacher
            else {},
        }
        self._look(sets, values, looking)
        if source is not None and needed & {*source.gives}:
            moment = Moment(
                self.step,
                progress,
                {name: sets[name] for name in source.reads},
                {network: {name: values[network][name] for name in source.reads} for network in values},
                Eyes(self.student, self.normalizer),
                self.span.start,
                self.span.stop,
            )
            with torch.autocast(self.device.type, enabled=False):
                made = self.sources[self.span.name].sets(moment)
            self.set_modes()
            sets |= made
            self._look(made, values, looking)
        return sets, values

    def _look(self, sets: Sets, values: dict[str, dict[str, dict[str, Tensor]]], terms: Collection[Term]) -> None:
        """Add both networks' values on these input sets, where they are wanted and not there yet."""
        for name, points in self.wanted("student", self.span.name, terms).items():
            if name in sets:
                policy = self.stage.batch_norm.get(name, "shared")
                # Graphs are made for batch norms that take part.
                run = self.student.step if policy == "shared" else self.student
                with statistics(self.student.model, policy):
                    values["student"][name] = run(self.normalizer(sets[name].images), points)
        for name, points in self.wanted("teacher", self.span.name, terms).items():
            if name in sets and name not in values["teacher"]:
                values["teacher"][name] = self._teach(sets[name], points)

    def _teach(self, batch: Batch, points: list[str]) -> dict[str, Tensor]:
        """The teacher's values on an input set of this member's own, or by a teacher of its own."""
        assert self.teacher is not None
        own = self.own_teacher if self.span.name in self.with_own_teacher else None
        with torch.set_grad_enabled("teacher" in self.stage.trains):
            return (own or self.teacher.network)(self.teacher.normalizer(batch.images), points)

    def _watch(self, name: str, value: Tensor) -> None:
        # Remembered on the device, read at the next evaluation: a step never waits for its own loss.
        known = self.bad_steps.get(name, torch.full((), -1, dtype=torch.int64, device=self.device))
        self.bad_steps[name] = torch.where((known < 0) & ~torch.isfinite(value), self.step, known)

    def check_finite(self) -> None:
        """Raises CellError when a loss was not finite, naming step, stage and term."""
        bad = {name: int(step) for name, step in self.bad_steps.items() if int(step) >= 0}
        if not bad:
            return
        step = min(bad.values())
        terms = ", ".join(name for name, at in bad.items() if at == step and name != "loss") or "the weighted sum"
        stage = self.timeline.spans[self.timeline.stage(step)].name
        raise CellError(
            f"the loss was not finite at step {step}, stage '{stage}', term {terms}; "
            + ("try a smaller learning rate or weight" if step else "look at the loss itself: nothing was trained yet")
        )

    def state(self) -> dict[str, Any]:
        """Everything that a resumed member needs, as tensors and plain data."""
        return {
            "student": self.student.model.state_dict(),
            "terms": self.terms.state_dict(),
            "optimizers": [pacer.optimizer.state_dict() for pacer in self.pacers],
            "sources": {name: source.state() for name, source in self.sources.items()},
            "operations": {name: self.operations[name].state() for name in self.performed},
            "step": self.step,
            "images": self.images,
            "seconds": self.seconds,
            "evaluation_seconds": self.evaluation_seconds,
            "last_rate": self.last_rate,
            # Anchors are read from disk again.
            "own_teacher": self.own_teacher.model.state_dict() if self.own_teacher and not self.guide else None,
            "anchors": self.anchors,
            "route": self.kept,
            "meter": {"sums": self.meter.sums, "counts": self.meter.counts, "images": self.meter.images},
            "bad_steps": self.bad_steps,
            "history": self.history,
        }

    def load_state(self, state: dict[str, Any]) -> None:
        self.student.model.load_state_dict(state["student"])
        self.terms.load_state_dict(state["terms"])
        if self.own_teacher is not None and self.guide is None:
            self.own_teacher.model.load_state_dict(state["own_teacher"])
        if self.guide is not None:
            self.guide.chosen = {entry["stage"]: dict(entry) for entry in state["anchors"]}
        self.kept = [dict(entry) for entry in state["route"]]
        self.step, self.seconds, self.history = state["step"], state["seconds"], state["history"]
        self.images = state["images"]
        self.evaluation_seconds, self.last_rate = state["evaluation_seconds"], state["last_rate"]
        self.enter(self.timeline.stage(min(self.step, self.timeline.total - 1)))
        if not self.finished:
            for pacer, kept in zip(self.pacers, state["optimizers"], strict=True):
                pacer.optimizer.load_state_dict(kept)
        for name, source in self.sources.items():
            source.load_state(state["sources"][name])
        self.performed = list(state["operations"])
        for name, kept in state["operations"].items():
            self.operations[name].load_state(kept, self._occasion())
        meter = state["meter"]
        sums = {name: value.to(self.device) for name, value in meter["sums"].items()}
        self.meter = Meter(sums, dict(meter["counts"]), meter["images"])
        self.bad_steps = {name: value.to(self.device) for name, value in state["bad_steps"].items()}


def accuracy(network: Network, normalizer: Normalizer, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, count of right answers and summed cross-entropy of one slice, all on the device."""
    logits = network(normalizer(images), ["logits"])["logits"]
    right = (logits.argmax(dim=1) == labels).sum()
    return logits, right, F.cross_entropy(logits.float(), labels, reduction="sum")


@contextmanager
def statistics(model: nn.Module, policy: str) -> Iterator[None]:
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


def with_own_teacher(stages: Mapping[str, StageSpec]) -> set[str]:
    """Stages whose teacher cannot be the shared one, converged, frozen, in eval mode: also all after one that trained
    it."""
    found, trained = set(), False
    for name, stage in stages.items():
        trained = trained or "teacher" in stage.trains
        if trained or stage.modes.teacher == "train" or stage.anchor is not None:
            found.add(name)
    return found


def _made(stage: StageSpec) -> list[str]:
    """Input sets that a stage's source makes."""
    return stage.source.gives if stage.source is not None else []


def _unique(points: Any) -> list[str]:
    return list(dict.fromkeys(points))
