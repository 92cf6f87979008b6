"""One cell while it trains: its student, the terms of its stage, its optimizer, what it measured so far."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kdbench.engine.batches import Batch, Batches, Normalizer
from kdbench.engine.build import Shape, Term, build_extractor, build_model, build_optimizer, build_schedule, build_terms
from kdbench.engine.compute import REFERENCE, Computing
from kdbench.engine.logits import PartLogits
from kdbench.engine.network import Network, autocast, memory_format
from kdbench.engine.timeline import Timeline, timeline
from kdbench.errors import CellError, UserError
from kdbench.models.hooks import Extractor
from kdbench.recipe.schema import CellSpec
from kdbench.sources.streams import address

# Agreement needs features of the teacher: it is measured on at most this many evenly spaced test images.
PROBE_IMAGES = 2000


class Teacher:
    """A frozen network in eval mode, shared by all cells that learn from it.

    Args:
        shapes: of its hook points, per image.
        logits: the table of its logits for the training part, where there is one.
    """

    def __init__(
        self,
        extractor: Extractor,
        normalizer: Normalizer,
        shapes: Mapping[str, Shape],
        computing: Computing = REFERENCE,
        logits: PartLogits | None = None,
    ) -> None:
        self.normalizer, self.shapes, self.computing, self.logits = normalizer, shapes, computing, logits
        self.network = Network(extractor, computing, frozen=True)
        self.network.model.eval().requires_grad_(False)

    def __call__(self, images: Tensor, points: list[str]) -> dict[str, Tensor]:
        """Values of hook points for bytes [N, C, H, W], in float32, without gradients."""
        with torch.no_grad():
            return self.network(self.normalizer(images), points)

    def step(self, batch: Batch, points: list[str]) -> dict[str, Tensor]:
        """Values of hook points for a training batch, in the run's precision: logits from their table where there is
        one, everything else from one pass that runs no further than it must."""
        values = {}
        if self.logits is not None and "logits" in points:
            values["logits"] = self.logits.at(batch.index, batch.view)
        rest = [point for point in points if point not in values]
        if rest:
            with torch.no_grad(), autocast(self.computing.precision, batch.images.device):
                values |= self.network.step(self.normalizer(batch.images), rest)
        return values

    def training_copy(self) -> Extractor:
        """A copy that may run in train mode: the codes that do so let their teacher's statistics drift."""
        extractor = self.network.extractor
        model = copy.deepcopy(extractor.model).train()
        return Extractor(model, extractor.places, extractor.model_name)


@dataclass
class Meter:
    """Sums over the steps since the last evaluation, on the device; nothing is read before `result`."""

    sums: dict[str, Tensor] = field(default_factory=dict)
    steps: int = 0
    images: int = 0

    def add(self, name: str, value: Tensor) -> None:
        value = value.detach()
        self.sums[name] = self.sums[name] + value if name in self.sums else value.clone()

    def result(self) -> dict[str, float]:
        return {name: value.item() / max(self.steps, 1) for name, value in self.sums.items()}


class Member:
    """One cell in training. `step` is the number of optimizer steps done."""

    def __init__(
        self,
        spec: CellSpec,
        batches: Batches,
        teacher: Teacher | None,
        device: torch.device,
        computing: Computing = REFERENCE,
    ) -> None:
        self.spec, self.device, self.computing = spec, device, computing
        self.timeline: Timeline = timeline(spec, len(batches.train.labels))
        self.normalizer = Normalizer(spec.protocol.normalization, device)
        student = build_model(spec.student, spec.data, spec.seed)
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
        if teacher and any(stage.modes.teacher == "train" for stage in spec.method.stages.values()):
            self.own_teacher = Network(teacher.training_copy(), computing)
            self.own_teacher.model.to(device)
            self.teacher_normalizer = teacher.normalizer
        self.bad_steps: dict[str, Tensor] = {}
        self.enter(0)

    @property
    def finished(self) -> bool:
        return self.step >= self.timeline.total

    @property
    def evaluation_due(self) -> bool:
        """Whether this step is an evaluation point that was not measured yet."""
        measured = self.history[-1]["step"] if self.history else 0
        return self.step != measured and self.step in self.timeline.evaluations

    def enter(self, stage: int) -> None:
        """Begin a stage: a new optimizer over what it trains, modes set, every other parameter frozen."""
        self.stage_index = stage
        self.span = self.timeline.spans[stage]
        self.stage = self.spec.method.stages[self.span.name]
        self.active = self.terms_of(self.span.name)
        self.student.model.requires_grad_("student" in self.stage.trains)
        self.terms.requires_grad_(False)
        own = self.terms[f"stage:{self.span.name}"]
        own.requires_grad_("connectors" in self.stage.trains)
        trained = [p for module in (self.student.model, own) for p in module.parameters() if p.requires_grad]
        if not trained:
            raise UserError(
                f"method '{self.spec.method.name}', stage '{self.span.name}': nothing to train",
                hint="add 'student' to the stage's 'trains'",
            )
        self.optimizer = build_optimizer(self.stage.optimizer, trained)
        self.base_rates = [group["lr"] for group in self.optimizer.param_groups]
        self.schedule = build_schedule(self.stage.schedule)
        self.student_points = _unique(point for term in self.active.values() for point in term.student_points)
        self.set_modes()

    def terms_of(self, stage: str) -> dict[str, Term]:
        """Loss terms of a stage by name."""
        terms: Any = self.terms[f"stage:{stage}"]
        return {name.removeprefix("loss:"): term for name, term in terms.items()}

    def set_modes(self) -> None:
        """Modes of this stage; evaluation changes them and calls this again."""
        self.student.model.train(self.stage.modes.student == "train")
        for name, terms in self.terms.items():
            terms.train(name == f"stage:{self.span.name}" and "connectors" in self.stage.trains)

    def teacher_points(self, step: int | None = None) -> list[str]:
        """What this member needs of the shared teacher at a step, by default its present one."""
        stage = self.span.name if step is None else self.timeline.spans[self.timeline.stage(step)].name
        if self.own_teacher is not None and self.spec.method.stages[stage].modes.teacher == "train":
            return []
        return _unique(point for term in self.terms_of(stage).values() for point in term.teacher_points)

    def student_uses(self) -> dict[frozenset[str], int]:
        """Sets of hook points that are asked of the student in train mode, and for how many steps yet."""
        uses: dict[frozenset[str], int] = {}
        evaluated = set()
        for span in self.timeline.spans:
            points = frozenset(p for term in self.terms_of(span.name).values() for p in term.student_points)
            uses[points] = uses.get(points, 0) + max(span.stop - max(self.step, span.start), 0)
            if self.spec.method.stages[span.name].modes.student == "eval":
                evaluated.add(points)
        return {points: steps for points, steps in uses.items() if steps and points not in evaluated}

    def train_step(self, batch: Batch, teacher: Mapping[str, Tensor]) -> None:
        """One optimizer step."""
        progress = (self.step - self.span.start) / self.span.steps
        torch.manual_seed(address(self.spec.seed, "dropout", self.step))
        if self.own_teacher is not None and self.stage.modes.teacher == "train":
            teacher = self._own_teacher_values(batch)

        with autocast(self.computing.precision, self.device):
            student = self.student.step(self.normalizer(batch.images), self.student_points)
            loss = torch.zeros((), device=self.device)
            for name, term in self.active.items():
                value = term(student, teacher, batch.labels, batch.index)
                loss = loss + term.weight_at(progress) * value
                self.meter.add(name, value)
                self._watch(name, value.detach())

        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self._schedule(progress)
        self.optimizer.step()

        self.meter.add("loss", loss)
        self.meter.steps += 1
        self.meter.images += len(batch.labels)
        self.images += len(batch.labels)
        self._watch("loss", loss.detach())
        self.step += 1
        if self.step == self.span.stop and not self.finished:
            self.enter(self.stage_index + 1)

    def _schedule(self, progress: float) -> None:
        factor = self.schedule.factor(progress)
        for group, base in zip(self.optimizer.param_groups, self.base_rates, strict=True):
            group["lr"] = base * factor
        self.last_rate = self.optimizer.param_groups[0]["lr"]
        before = (self.step - 1 - self.span.start) / self.span.steps
        if any(before + 1e-9 < reset <= progress + 1e-9 for reset in self.schedule.resets):
            self.optimizer.state.clear()

    def _own_teacher_values(self, batch: Batch) -> dict[str, Tensor]:
        assert self.own_teacher is not None and self.spec.teacher is not None
        points = _unique(point for term in self.active.values() for point in term.teacher_points)
        with torch.no_grad(), autocast(self.computing.precision, self.device):
            return self.own_teacher(self.teacher_normalizer(batch.images), points)

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
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "images": self.images,
            "seconds": self.seconds,
            "evaluation_seconds": self.evaluation_seconds,
            "last_rate": self.last_rate,
            "own_teacher": self.own_teacher.model.state_dict() if self.own_teacher else None,
            "meter": {"sums": self.meter.sums, "steps": self.meter.steps, "images": self.meter.images},
            "bad_steps": self.bad_steps,
            "history": self.history,
        }

    def load_state(self, state: dict[str, Any]) -> None:
        self.student.model.load_state_dict(state["student"])
        self.terms.load_state_dict(state["terms"])
        if self.own_teacher is not None:
            self.own_teacher.model.load_state_dict(state["own_teacher"])
        self.step, self.seconds, self.history = state["step"], state["seconds"], state["history"]
        self.images = state["images"]
        self.evaluation_seconds, self.last_rate = state["evaluation_seconds"], state["last_rate"]
        self.enter(self.timeline.stage(min(self.step, self.timeline.total - 1)))
        if not self.finished:
            self.optimizer.load_state_dict(state["optimizer"])
        meter = state["meter"]
        sums = {name: value.to(self.device) for name, value in meter["sums"].items()}
        self.meter = Meter(sums, meter["steps"], meter["images"])
        self.bad_steps = {name: value.to(self.device) for name, value in state["bad_steps"].items()}


def accuracy(member: Member, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, count of right answers and summed cross-entropy of one slice, all on the device."""
    logits = member.student(member.normalizer(images), ["logits"])["logits"]
    right = (logits.argmax(dim=1) == labels).sum()
    return logits, right, F.cross_entropy(logits.float(), labels, reduction="sum")


def _unique(points: Any) -> list[str]:
    return list(dict.fromkeys(points))
