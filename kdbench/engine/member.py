"""One cell in training: its student, its loss terms, its present stage, and what it did so far."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch

from kdbench.data.streams import address, seed_draws
from kdbench.engine.computing.compute import REFERENCE, Computing
from kdbench.engine.data.batch import Batch, Sets
from kdbench.engine.data.batches import Batches
from kdbench.engine.inputs import Source, SourceContext, SourceFiles, SourceStep
from kdbench.engine.log import Log
from kdbench.engine.meter import Meter
from kdbench.engine.modules import CellModules
from kdbench.engine.networks.network import Network
from kdbench.engine.networks.weights import weights_of
from kdbench.engine.operations import OperationContext, build_operation
from kdbench.engine.source_of_ranks import source_on
from kdbench.engine.stage import Stage, asked_points, schedule_span_of, shared_teacher_points
from kdbench.engine.teachers.anchors import AnchorTeacher
from kdbench.engine.teachers.teacher import PointValues, Teacher
from kdbench.errors import NOT_FINITE, CellError, UserError
from kdbench.recipe import route
from kdbench.recipe.specs import CellSpec
from kdbench.recipe.timeline import timeline


class Member:
    """One cell in training. `step` is the number of optimizer steps done.

    Args:
        files: where its batch sources keep theirs.
    """

    def __init__(
        self,
        spec: CellSpec,
        batches: Batches,
        teacher: Teacher | None,
        device: torch.device,
        computing: Computing = REFERENCE,
        files: SourceFiles = SourceFiles(),  # noqa: B008 - frozen
    ) -> None:
        self.spec, self.batches, self.teacher, self.computing = spec, batches, teacher, computing
        self.timeline = timeline(spec, len(batches.train))
        self.modules = CellModules(spec, batches, teacher, device, computing)
        self.anchors = self._anchors()
        self.sources: dict[str, Source] = {}
        self.operations = {}
        for name, stage in spec.method.stages.items():
            if stage.source is not None:
                frozen = teacher.network if teacher else None
                self.sources[name] = source_on(batches, SourceContext(spec, name, device, frozen, files))
            if stage.begins is not None:
                self.operations[name] = build_operation(stage.begins)
        self.meter = Meter([*(n for s in spec.method.stages.values() for n in s.losses), "loss"], device)
        self.log = Log()
        self.step = 0
        self.enter(0)

    @property
    def device(self) -> torch.device:
        return self.batches.device

    @property
    def student(self) -> Network:
        return self.modules.student

    @property
    def finished(self) -> bool:
        return self.step >= self.timeline.total

    @property
    def route_due(self) -> bool:
        """Whether this step's student is to be kept and is not yet."""
        kept = self.log.route[-1]["step"] if self.log.route else 0
        return self.step != kept and self.step in self.route_points

    @property
    def route_points(self) -> tuple[int, ...]:
        """The steps after which the student is kept."""
        return route.points(self.spec.route, self.timeline.total)

    @property
    def evaluation_due(self) -> bool:
        """Whether this step is an evaluation point that was not measured yet."""
        measured = self.log.history[-1]["step"] if self.log.history else 0
        return self.step != measured and self.step in self.timeline.evaluations

    @property
    def answers(self) -> Network:
        """What is tested and kept: the student, its average, or the whole through which its method has it answer."""
        return self.student.answers

    @property
    def compiled(self) -> bool:
        """Whether networks or losses run as compiled graphs, or did before the cell was stopped."""
        return self.log.compiled or self.modules.compiled

    @property
    def points_read(self) -> list[list[str]]:
        """What its terms read of each network on each input set, over all stages."""
        terms = [term for span in self.timeline.spans for term in self.modules.terms_of(span.name).values()]
        return [points for term in terms for of in ("student", "teacher") for points in term.points(of).values()]

    def teacher_uses(self, step: int) -> dict[str, list[str]]:
        """What this member will need of the shared teacher at a step: input set -> hook points."""
        name = self.timeline.spans[self.timeline.stage(step)].name
        if name in self.spec.method.own_teacher_stages:
            return {}
        return shared_teacher_points(self.modules.terms_of(name).values(), self.spec.method.stages[name])

    def student_uses(self) -> Counter[frozenset[str]]:
        """Sets of hook points that are asked of the student in train mode, and for how many steps yet."""
        uses: Counter[frozenset[str]] = Counter()
        for span in (span for span in self.timeline.spans if span.stop > self.step):
            stage = self.spec.method.stages[span.name]
            if stage.modes.student == "train":
                for asked in asked_points(self.modules.terms_of(span.name).values(), stage, "student").values():
                    uses[frozenset(asked)] += span.stop - max(self.step, span.start)
        return uses

    def enter(self, index: int) -> None:
        """Begin a stage: a new optimizer over what it trains (or the one before where it goes on with that), modes set,
        every other parameter frozen."""
        before: Stage | None = getattr(self, "stage", None)
        span = self.timeline.spans[index]
        spec = self.spec.method.stages[span.name]
        self.modules.freeze_others(span.name)
        follows = before is not None and index > 0 and before.span == self.timeline.spans[index - 1]
        optimizers = before.optimizers if before and follows and spec.continues else self.modules.optimizers(span.name)
        self.stage = Stage(
            spec,
            span,
            schedule_span_of(self.timeline.spans, self.spec.method.stages, index),
            self.timeline,
            self.modules.terms_of(span.name),
            optimizers,
            self.modules.teacher_of(span.name),
            self.sources.get(span.name),
            self.device,
        )
        self.set_modes()

    def set_modes(self, evaluating: bool = False) -> None:
        """Modes of this stage, or of an evaluation between its steps."""
        self.modules.set_modes(self.stage.span.name, evaluating)

    def ready(self, tell: Callable[[str], None], stopping: Callable[[], bool]) -> bool:
        """Do what comes before the next steps: the stage's anchor and operation, and what its source makes ahead.

        Returns:
            False when stopped: no step may be taken then, and whoever asks again goes on from there.
        """
        name = self.stage.span.name
        if self.anchors is not None and self.stage.spec.anchor is not None and self.anchors.stage != name:
            self.student.model.eval()
            self.anchors.begin(name)
        operation = self.operations.get(name)
        if operation is not None and not operation.performed:
            torch.manual_seed(address(self.spec.seed, f"operation/{name}", self.step))
            operation.perform(self._operation_context())
            operation.performed = True
        source = self.stage.source
        done = source is None or source.ready(self.source_step(), tell, stopping)
        self.set_modes()
        return done

    def steps_alike(self, most: int) -> int:
        """How many of the coming steps, at most `most`, are the same computation: until an evaluation, a checkpoint of
        the route, the stage's end, or a change that its source or its terms' weights make."""
        due = [at for at in (*self.timeline.evaluations, *self.route_points, self.stage.span.stop) if at > self.step]
        most = min(most, min(due) - self.step)
        if self.stage.source is not None:
            most = min(most, self.stage.source.stretch(self.source_step()))
        return self.stage.alike(self.step, most) if most > 1 else most

    def prepare(self, steps: int) -> None:
        """Put what the coming steps need on the device."""
        self.stage.prepare(self.step, steps)
        self.meter.step.fill_(self.step)

    def before_step(self) -> None:
        """The host's part of the coming step: where its draws begin, and the rates of optimizers that take numbers."""
        seed_draws(address(self.spec.seed, "dropout", self.step), self.device)
        for optimizer in self.stage.optimizers:
            optimizer.set_rates(self.stage.moment(self.step))

    def after_step(self, images: int) -> None:
        """Count a step that was done."""
        self.meter.count([*(name for turn in self.stage.turns for name in turn.active), "loss"], images)
        self.log.images += images
        self.log.rate = self.stage.rate(self.step)
        self.step += 1
        if self.step == self.stage.span.stop and not self.finished:
            self.enter(self.timeline.stage(self.step))

    def make(self, sets: Sets, values: dict[str, PointValues]) -> Sets:
        """The input sets that the stage's source makes of what it reads."""
        source, reads = self.stage.source, self.stage.spec.source
        assert source is not None and reads is not None
        now = self.source_step(
            sets={name: sets[name] for name in reads.reads},
            values={network: {name: values[network].get(name, {}) for name in reads.reads} for network in values},
        )
        with torch.autocast(self.device.type, enabled=False):
            made = source.sets(now)
        self.set_modes()
        return made

    def source_step(self, **more: Any) -> SourceStep:
        """What the stage's source is told of the present step."""
        span = self.stage.span
        return SourceStep(self.step, self.stage.progress(self.step), self.student, span.start, span.stop, **more)

    def check_finite(self) -> None:
        """Raises CellError when a loss was not finite, naming step, stage and term."""
        bad = self.meter.not_finite()
        if not bad:
            return
        step = min(bad.values())
        terms = ", ".join(name for name, at in bad.items() if at == step and name != "loss") or "the weighted sum"
        raise self.diverged(step, terms, trained=step > 0)

    def diverged(self, step: int, terms: str, trained: bool) -> CellError:
        """What to raise for terms that were not finite at a step; `trained`: whether training can have made them so."""
        stage = self.timeline.spans[self.timeline.stage(step)].name
        advice = "look at the loss itself: nothing was trained yet"
        advice = "try a smaller learning rate or weight" if trained else advice
        return CellError(f"{NOT_FINITE} at step {step}, stage '{stage}', term {terms}; {advice}")

    def keep_best(self) -> None:
        """Keep the present weights where the recipe asks for the best ones, and no evaluation before was as good, also
        of those before a stop after which it asks for something else."""
        *before, entry = self.log.history
        part = "validation" if "validation" in entry else "test"
        accuracy = entry[part]["accuracy"]
        if self.spec.keep is None:
            self.log.best = None
        elif all(accuracy > other[part]["accuracy"] for other in before):
            found = {"step": entry["step"], "part": part, "accuracy": accuracy}
            self.log.best = found | {"weights": weights_of(self.answers.model)}

    def state(self) -> dict[str, Any]:
        """Everything that a resumed member needs, as tensors and plain data."""
        return {
            **self.modules.state(),
            "optimizers": [one.optimizer.state_dict() for one in self.stage.optimizers],
            "sources": {name: source.state() for name, source in self.sources.items()},
            "operations": {name: one.state() for name, one in self.operations.items() if one.performed},
            "step": self.step,
            "anchors": self.anchors.record() if self.anchors else [],
            "meter": self.meter.state(),
            "log": vars(self.log) | {"compiled": self.compiled},
            **self.answers.state(),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from a state."""
        self.modules.load_state(state)
        if self.anchors is not None:
            self.anchors.chosen = {entry["stage"]: dict(entry) for entry in state["anchors"]}
        self.step, self.log = state["step"], Log(**state["log"])
        self.enter(self.timeline.stage(min(self.step, self.timeline.total - 1)))
        if not self.finished:
            for optimizer, kept in zip(self.stage.optimizers, state["optimizers"], strict=True):
                optimizer.load_state(kept)
        for name, source in self.sources.items():
            source.load_state(state["sources"][name])
        for name, kept in state["operations"].items():
            self.operations[name].load_state(kept, self._operation_context())
            self.operations[name].performed = True
        self.meter.load_state(state["meter"])
        self.answers.load_state(state)

    def _anchors(self) -> AnchorTeacher | None:
        """What makes this member's own teacher the anchors of its stages."""
        stages, teacher = self.spec.method.stages.items(), self.teacher
        anchors = {name: stage.anchor for name, stage in stages if stage.anchor is not None}
        if not anchors or teacher is None:
            return None
        if teacher.route is None:
            what = f"method '{self.spec.method.name}': the teacher's training left no checkpoints to learn from"
            raise UserError(what, hint="its recipe says 'route: 20' for 20 of them")
        own, student = self.modules.own_teacher, self.student
        assert own is not None
        return AnchorTeacher(
            anchors,
            teacher.route,
            own.model,
            lambda images: student.logits(images).float(),
            lambda images: own.network.logits(images).float(),
            self.batches.validation,
        )

    def _operation_context(self) -> OperationContext:
        """What the present stage's operation is given."""
        source, spec, start = self.stage.source, self.stage.spec.source, self.stage.span.start

        def batch(number: int) -> Batch:
            if source is None or spec is None or "data" not in spec.gives:
                return self.batches.at(start + number, self.timeline)
            ahead = SourceStep(start + number, 0.0, self.student, start, self.stage.span.stop, ahead=True)
            made = source.sets(ahead)["data"]
            self.set_modes()
            return made

        given = self.teacher.network if self.teacher else None
        return OperationContext(self.student, given, self.batches.image_shape, self.device, batch, self.stage.span.name)
