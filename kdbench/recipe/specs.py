"""A cell with every card resolved: plain data that is hashed into the cell's identity, sent to worker processes and
kept in the record."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, Field

from kdbench.cards import DataFields, Points, StageFields, TermFields, Weights
from kdbench.files import expanded, sha256_of_data
from kdbench.forms import IMAGE_SIZE, RESIZE
from kdbench.image_cards import AugmentationFields, Normalization
from kdbench.models.points import LAST, POINT_GROUPS, expand, needed_for, numbered
from kdbench.names import frozen, is_content
from kdbench.recipe.choices import ROUTE_MOST, ComputeChoice, DataPart
from kdbench.recipe.coded import CODE, RECORDED, Coded, Spec, TargetSpec, renamed


class DataSpec(DataPart, DataFields, TargetSpec):
    def images_key(self) -> str:
        """What tells which images they are, before any are left out."""
        return self.model_dump_json(include={"name", "target", "options", "source_sha256", "root"})

    def roots(self, others: Iterable[Path]) -> list[Path]:
        """Folders searched for these data: its own, else the others."""
        return [expanded(self.root, "data.root")] if self.root else [expanded(other, "--data") for other in others]


class WeightsSpec(Coded, Weights):
    """The weights of a teacher card."""

    @property
    def choice(self) -> dict[str, str]:
        """What decides beside the file which weights are read: empty for most."""
        code = self.counts_as.get(self.layout or "", "")
        return {
            **({"entry": self.entry} if self.entry is not None else {}),
            # A card's own code is as old as its file's sha256, a user's may change.
            **({"weights_layout": code} if is_content(code) else {}),
        }


class ModelSpec(TargetSpec):
    hooks: dict[str, str] | Literal["derived"]
    image_size: int | None = Field(default=None, description=IMAGE_SIZE)
    weights: str | None = None
    weights_sha256: str | None = None
    entry: str | None = None
    start: WeightsSpec | None = None
    parts: list[PartSpec] = Field(default=[], description="of several networks as one, by whom they are")

    def untrained(self) -> ModelSpec:
        """This model with first weights."""
        return self.model_copy(update={"weights": None, "entry": None, "start": None})

    def not_started(self) -> ModelSpec:
        """This model without the card's weights that it will start from, which may not be here yet."""
        return self.model_copy(update={"start": None})

    def takes(self, data: DataSpec) -> DataSpec:
        """The data as this model takes them: with its own size of images."""
        own = self.image_size
        return data if own in (None, data.image_size) else data.model_copy(update={"image_size": own})

    def seen_with(self, data: DataSpec) -> ModelSpec:
        """This model for those data, whose own size of images is said by them alone."""
        return self if self.image_size != data.image_size else self.model_copy(update={"image_size": None})

    def reading(self, points: set[str]) -> ModelSpec:
        """This model with only those hook points (or members of groups) that are read."""
        if isinstance(self.hooks, str):
            return self
        groups = [
            (numbered(name)[0], POINT_GROUPS[numbered(name)[1]]) for name in points if numbered(name)[1] in POINT_GROUPS
        ]

        def read(point: str) -> bool:
            number, own = numbered(point)
            return point in points or any(number == of and group.fullmatch(own) for of, group in groups)

        return self.model_copy(update={"hooks": {p: at for p, at in self.hooks.items() if read(p)}})


class PartSpec(Spec):
    """One of several networks that are one."""

    model: ModelSpec
    normalization: Normalization


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
        given = self.weight_schedule or []
        return given if isinstance(given, list) else [given]

    def points(self, network: Literal["student", "teacher"]) -> list[str]:
        """Its hook points and groups of a network's side."""
        own = getattr(self, network)
        return [own] if isinstance(own, str) else own

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
        return [term for stage in self.stages.values() for term in stage.losses.values()]

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


class AugmentationSpec(AugmentationFields, Spec):
    transforms: list[TargetSpec] | None = None

    @property
    def finite(self) -> bool:
        """Whether an image has finitely many views: crops after padding, and mirrors."""
        return not (self.resized_crop or self.transforms or self.mix)


class ProtocolSpec(Spec):
    """`second`: augmentation of the input set of that name, where it is another one."""

    name: str
    batch_size: int = Field(gt=0)
    last_batch: Literal["keep", "drop"]
    augmentation: AugmentationSpec
    second: AugmentationSpec | None = None
    ema: float | None = None
    normalization: Normalization
    epochs: float | None = None
    steps: int | None = None


class TeacherSpec(Spec):
    name: str
    model: ModelSpec
    normalization: Normalization
    weights: WeightsSpec | None = None
    trained_by: CellSpec | None = None
    accuracy: float | None = None
    resize: int | None = Field(default=None, description=RESIZE)
    classes: int | None = Field(
        default=None, description="its own number of classes, where it was trained on other data"
    )
    known_classes: list[int] | None = Field(
        default=None, description="those that it was trained on, where these are not all"
    )
    members: list[TeacherSpec] = Field(default=[], description="where it is several ones")

    @property
    def untrained(self) -> bool:
        """Whether it begins with first values, by the cell's seed, and is trained by the method."""
        return self.weights is None and self.trained_by is None and not self.members

    @property
    def choice(self) -> dict[str, str]:
        """What decides beside a file's sha256 which weights it has."""
        return self.weights.choice if self.weights is not None else {}

    @property
    def each(self) -> list[TeacherSpec]:
        """Its members, or itself where it is one."""
        return self.members or [self]

    def knows(self, data: DataSpec) -> DataSpec:
        """The data as this teacher takes them: with its own classes and size of images."""
        known = data if self.classes is None else data.model_copy(update={"classes": self.classes})
        return self.model.takes(known)

    def identity(self) -> str:
        """sha256 over what affects its outputs, whatever it is called. Hook points do not: they are the cell's."""
        plain = self.model_copy(update={"model": self.model.model_copy(update={"hooks": {}})})
        return sha256_of_data(_numbers(plain))


class CellSpec(Spec):
    """One cell: the unit that runs, resumes and is recorded."""

    data: DataSpec
    target: DataSpec | None = None
    teacher: TeacherSpec | None = None
    student: ModelSpec
    method: MethodSpec
    protocol: ProtocolSpec
    seed: int
    evaluations: int | Literal["epoch"] = 50
    compute: ComputeChoice = ComputeChoice()
    route: int | None = Field(None, gt=0, le=ROUTE_MOST)
    keep: Literal["best"] | None = None

    @property
    def domains(self) -> list[DataSpec]:
        """Its data sets: the source, and the target where it has one."""
        return [self.data] if self.target is None else [self.data, self.target]

    @property
    def teachers(self) -> list[TeacherSpec]:
        """Its teachers one by one."""
        return self.teacher.each if self.teacher is not None else []

    @property
    def networks(self) -> dict[str, tuple[ModelSpec, DataSpec]]:
        """The "student", and the "teacher" where it has one, each with the data as it takes them."""
        found = {"student": (self.student, self.student.takes(self.data))}
        return found | ({"teacher": (one.model, one.knows(self.data))} if (one := self.teacher) else {})

    @property
    def tested(self) -> DataSpec:
        """The data whose test set counts."""
        return self.target or self.data

    def counted(self) -> CellSpec:
        """This cell as it counts: without hook points that no loss reads, and with what of `compute` is fixed."""
        method = self.method.counted(self.student, self.teacher.model if self.teacher else None)
        changes: dict[str, Any] = {"method": method, "student": self.student.reading(method.points("student"))}
        # However it is said: what is fixed counts.
        changes["compute"] = ComputeChoice(**self.compute.fixed())
        # What is left beside the last weights changes none of them.
        changes["keep"] = None
        if self.teacher is not None:
            model = self.teacher.model.reading(method.points("teacher"))
            changes["teacher"] = self.teacher.model_copy(update={"model": model})
        return self.model_copy(update=changes)

    def identity(self, earlier: bool = False) -> str:
        """sha256 over what affects the numbers: no labels, no folders, no hook point that no loss reads, and no field
        that has its default (so that a new field with a default, or a new hook point, reruns nothing).

        Args:
            earlier: as it was hashed before a user's own code counted by its content alone. Shipped cards' cells have
                one identity.
        """
        return sha256_of_data(_numbers(self.counted(), earlier))

    def identities(self) -> tuple[str, str]:
        """The identity, and what it was earlier: a finished cell's record has one of them."""
        return self.identity(), self.identity(earlier=True)


# Names for readers, folders, addresses (also among a data card's options), and what stands beside a metric: they change
# no number. Files count by their sha256, code by what it counts as.
_NOT_NUMBERS = {
    "label", "train", "test", "root", "file", "url", "accuracy", "resize", "mirrors", "official", "references",
    "shares", "counts_as", "by_step",
}  # fmt: skip


def recorded(spec: Spec) -> dict[str, Any]:
    """A spec as plain data that stays: what is code counts under its name, wherever it lies today."""
    return spec.model_dump(mode="json", exclude_none=True, context=RECORDED)


def _numbers(value: Any, earlier: bool = False) -> Any:
    if isinstance(value, BaseModel):
        dropped = _NOT_NUMBERS | ({"weights"} if isinstance(value, ModelSpec) else set())
        # What a thing is called does not count where its target does.
        dropped |= {"name"} if not isinstance(value, MethodSpec) else {"name", "label"}
        result = {}
        for name, field in type(value).model_fields.items():
            part = getattr(value, name)
            if name not in dropped and (field.is_required() or part != field.default):
                if isinstance(value, Coded) and name in CODE:
                    part = renamed(part, {t: n for t, n in value.counts_as.items() if not (earlier and is_content(n))})
                if isinstance(value, DataSpec) and name == "options":
                    part = {key: p for key, p in part.items() if key not in _NOT_NUMBERS}
                # Stages follow each other, and sums of losses round by their order.
                ordered = name in ("stages", "losses") and isinstance(part, dict)
                result[name] = (
                    [[key, _numbers(p, earlier)] for key, p in part.items()] if ordered else _numbers(part, earlier)
                )
        return result
    if isinstance(value, dict):
        return {key: _numbers(part, earlier) for key, part in value.items() if not (earlier and key in _NOT_NUMBERS)}
    if isinstance(value, list | tuple):
        return [_numbers(part, earlier) for part in value]
    return value
