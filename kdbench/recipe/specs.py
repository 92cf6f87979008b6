"""A cell with every card resolved: plain data that is hashed into the cell's identity, sent to worker processes and
kept in the record."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, Field

from kdbench.files import sha256_of_data
from kdbench.forms import RESIZE
from kdbench.image_cards import AugmentationFields, Normalization
from kdbench.names import is_content
from kdbench.recipe.choices import ROUTE_MOST, ComputeChoice
from kdbench.recipe.coded import CODE, RECORDED, Coded, Spec, TargetSpec, renamed
from kdbench.recipe.method_specs import MethodSpec
from kdbench.recipe.model_specs import DataSpec, ModelSpec, WeightsSpec


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
