"""Resolved methods: stages, loss terms, modules and batch sources."""

from __future__ import annotations

from typing import Literal

from kdbench.cards import Points, StageFields, TermFields
from kdbench.forms import listed
from kdbench.models.points import LAST, expand, needed_for
from kdbench.names import frozen
from kdbench.recipe.coded import Spec, TargetSpec
from kdbench.recipe.model_specs import ModelSpec


class LossSpec(TargetSpec):
    inputs: list[str]
    by_step: str | None = None
    metrics: dict[str, str] = {}
    references: dict[str, str] = {}
    shares: dict[str, str] = {}


class SourceSpec(TargetSpec):
    reads: list[str]
    gives: list[str]
    logits: bool = True
    teacher: bool


class OperationSpec(TargetSpec):
    teacher: bool


class TermSpec(TermFields, Spec):
    """`through`: the method's module that is its connector. Several hook points are taken at once."""

    loss: LossSpec
    student: Points = "logits"
    teacher: Points = "logits"
    connector: TargetSpec | None = None
    through: str | None = None
    weight_schedule: TargetSpec | list[TargetSpec] | None = None
    schedules: dict[str, TargetSpec] = {}

    @property
    def weight_schedules(self) -> list[TargetSpec]:
        """Those whose product its weight is multiplied by."""
        return listed(self.weight_schedule or [])

    def points(self, network: Literal["student", "teacher"]) -> list[str]:
        """Its hook points and groups of a network's side."""
        return listed(getattr(self, network))

    def counted(self, student: ModelSpec, teacher: ModelSpec | None) -> TermSpec:
        """As it counts: the last layer under its number, where methods once said that number."""
        older = frozen()["last_layers"].get(self.loss.name)
        models = {"student": teacher if self.of == "teacher" else student, "teacher": teacher}
        last = {
            side: older
            for side, model in models.items()
            if older and model and getattr(self, side) == LAST and not isinstance(model.hooks, str)
            if expand([LAST], model.hooks) == [older]
        }
        return self.model_copy(update=last)


class ModuleSpec(TargetSpec):
    """A connector that lives over stages, or that the student answers through."""

    student: str = "logits"
    teacher: str = "logits"
    optimizer: TargetSpec | None = None


class AnchorSpec(Spec):
    """The checkpoint of the teacher's route that a stage learns from: number `at` (from 0) of `n`.

    `delta` and `images` belong to the greedy choice.
    """

    choose: Literal["equal", "greedy", "converged"]
    n: int
    at: int
    delta: float | None = None
    images: int | None = None

    @property
    def last(self) -> bool:
        return self.at == self.n - 1


class StageSpec(StageFields, Spec):
    """`share` is a part of the steps in [0, 1]; None: what the others leave, or what is on top of the budget:
    `extra_epochs`, or `extra_share`, a part of the budget. `continues`: goes on with the optimizer and schedule of the
    stage before."""

    share: float | None = None
    extra_share: float | None = None
    continues: bool = False
    anchor: AnchorSpec | None = None
    source: SourceSpec | None = None
    begins: OperationSpec | None = None
    losses: dict[str, TermSpec]
    optimizer: TargetSpec
    schedule: TargetSpec
    teacher_optimizer: TargetSpec | None = None
    teacher_schedule: TargetSpec | None = None

    @property
    def extra(self) -> bool:
        """Whether its steps are on top of the protocol's budget."""
        return self.extra_epochs is not None or self.extra_share is not None


class MethodSpec(Spec):
    name: str
    label: str
    starts_from: Literal["teacher"] | None = None
    modules: dict[str, ModuleSpec] = {}
    predicts: ModuleSpec | None = None
    stages: dict[str, StageSpec]

    @property
    def terms(self) -> list[TermSpec]:
        """The loss terms of all stages."""
        return [term for *_, term in self.named_terms]

    @property
    def named_terms(self) -> list[tuple[str, str, TermSpec]]:
        """The same with the names of their stage and of themselves."""
        return [(at, name, term) for at, stage in self.stages.items() for name, term in stage.losses.items()]

    def trains(self, network: Literal["student", "teacher"]) -> bool:
        """Whether any stage trains it."""
        return any(network in stage.trains for stage in self.stages.values())

    @property
    def own_teacher_stages(self) -> set[str]:
        """Stages whose teacher cannot be the shared one, converged, frozen, in eval mode: also all after one that
        trained it."""
        found, trained = set(), False
        for name, stage in self.stages.items():
            trained = trained or "teacher" in stage.trains
            if trained or stage.modes.teacher == "train" or stage.anchor is not None:
                found.add(name)
        return found

    def counted(self, student: ModelSpec, teacher: ModelSpec | None) -> MethodSpec:
        """With its terms as they count."""
        stages = {
            name: stage.model_copy(
                update={"losses": {key: term.counted(student, teacher) for key, term in stage.losses.items()}}
            )
            for name, stage in self.stages.items()
        }
        return self.model_copy(update={"stages": stages})

    @property
    def sources(self) -> dict[str, SourceSpec]:
        """Stage -> its batch source."""
        return {name: stage.source for name, stage in self.stages.items() if stage.source is not None}

    def points(self, network: Literal["student", "teacher"]) -> set[str]:
        """Hook points and groups that it reads of a network, also for gradients."""
        terms = self.terms
        read = [point for term in terms if term.of == network for point in term.points("student")]
        modules = [*self.modules.values(), *([self.predicts] if self.predicts else [])]
        read += [getattr(module, network) for module in modules]
        if network == "teacher":
            read += [point for term in terms for point in term.points("teacher")]
        return {*needed_for(read)}
