"""What a record says of its cell, built from the cards of this installation.

A record is data, whoever wrote it. Its names are looked up, the code is that of the cards found, options pass the
signature of that code, and what cards say otherwise must be what the record says. Anything else is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import ValidationError

from kdbench.cards import Weights
from kdbench.errors import UserError
from kdbench.recipe.networks import weights_spec
from kdbench.recipe.specs import (
    CellSpec,
    DataSpec,
    LossSpec,
    ModelSpec,
    StageSpec,
    TargetSpec,
    TeacherSpec,
    TermSpec,
    WeightsSpec,
)
from kdbench.registry import Registry, singular
from kdbench.signature import check_options

S = TypeVar("S", bound=TargetSpec)
T = TypeVar("T", CellSpec, ModelSpec, DataSpec)


class NotHere(UserError):
    """What a record names is not, or not in that form, in this installation. Other refusals are of records that no
    version of kdbench wrote."""


_COMMIT = "check out the commit that the record names, where its cards are"
_OWN = "a card of your own lies in a registry folder: name it with --registry (registries=[…] in Python)"


def cell_of(spec: Any, registry: Registry, where: str) -> CellSpec:
    """The cell of a record's `spec`.

    Args:
        where: the record, for messages.

    Raises:
        UserError: it is of a form that this version does not know, names what no card here is called, or says of a card
            what that card does not say.
    """
    return _Reader(registry, where).cell(_parsed(CellSpec, spec, where))


def student_of(spec: Any, registry: Registry, where: str) -> tuple[ModelSpec, DataSpec]:
    """The student of a record's `spec`, and the data it is for, which give it its sizes: nothing here reads them.

    Raises:
        UserError: as of `cell_of`.
    """
    plain = spec if isinstance(spec, Mapping) else {}
    student = _parsed(ModelSpec, plain.get("student"), where)
    return _Reader(registry, where).model(student), _parsed(DataSpec, plain.get("data"), where)


def _parsed(kind: type[T], plain: Any, where: str) -> T:
    try:
        return kind.model_validate(plain)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        said = "this should be a mapping" if first["type"] in ("model_type", "dict_type") else first["msg"]
        raise NotHere(
            f"this record's recipe has a form that this version cannot read: '{place}': {said}",
            where=where,
            hint="check out the commit that the record names",
        ) from None


class _Reader:
    """Rebuilds the parts of one record."""

    def __init__(self, registry: Registry, where: str) -> None:
        self.registry, self.where = registry, where

    def refused(self, what: str) -> UserError:
        hint = "no version of kdbench writes this: leave the folder out, or get it again from where it comes"
        return UserError(f"this record is not built: {what}", where=self.where, hint=hint)

    def not_here(self, what: str, hint: str = _COMMIT) -> NotHere:
        return NotHere(f"this record cannot be built here: {what}", where=self.where, hint=hint)

    def cell(self, spec: CellSpec) -> CellSpec:
        stages = {name: self.stage(stage) for name, stage in spec.method.stages.items()}
        return spec.model_copy(
            update={
                "data": self.data(spec.data),
                "target": self.data(spec.target) if spec.target is not None else None,
                "teacher": self.teacher(spec.teacher) if spec.teacher is not None else None,
                "student": self.model(spec.student),
                "method": spec.method.model_copy(update={"stages": stages}),
            }
        )

    def stage(self, stage: StageSpec) -> StageSpec:
        parts: dict[str, Any] = {
            part: self.thing(kind, found)
            for part, kind in (
                ("optimizer", "optimizers"),
                ("schedule", "schedules"),
                ("teacher_optimizer", "optimizers"),
                ("teacher_schedule", "schedules"),
            )
            if (found := getattr(stage, part)) is not None
        }
        if (source := stage.source) is not None:
            parts["source"] = self.thing("sources", source, "reads", "gives", "teacher")
        if (operation := stage.begins) is not None:
            parts["begins"] = self.thing("operations", operation, "teacher")
        return stage.model_copy(update={**parts, "losses": {key: self.term(one) for key, one in stage.losses.items()}})

    def term(self, term: TermSpec) -> TermSpec:
        schedule = term.weight_schedule
        if schedule is not None:
            several = isinstance(schedule, list)
            read = [self.thing("schedules", one) for one in (schedule if isinstance(schedule, list) else [schedule])]
            schedule = read if several else read[0]
        connector = self.thing("connectors", term.connector) if term.connector is not None else None
        return term.model_copy(
            update={"loss": self.loss(term.loss), "connector": connector, "weight_schedule": schedule}
        )

    def loss(self, loss: LossSpec) -> LossSpec:
        card = self.card("losses", loss)
        built = self.thing("losses", loss, "inputs")
        if loss.metrics.keys() != card.metrics.keys():
            raise self.not_here(f"the metrics of the loss '{loss.name}' are not those of its card")
        for name, target in loss.metrics.items():
            self.check_code(f"metric '{name}' of the loss '{loss.name}'", target, card.metrics[name], built.counts_as)
        return built.model_copy(update={"metrics": card.metrics, "references": card.references})

    def data(self, data: DataSpec) -> DataSpec:
        fields = ("classes", "channels", "image_size", "train", "test", "normalization", "streamed")
        built = self.thing("datasets", data, *fields)
        if data.options != self.card("datasets", data).args:
            raise self.not_here(f"the options of the data set '{data.name}' are not those of its card")
        return built.model_copy(update={"options": data.options})

    def model(self, model: ModelSpec) -> ModelSpec:
        built = self.thing("models", model)
        return built.model_copy(update={"start": self.weights(model.start)}) if model.start is not None else built

    def teacher(self, teacher: TeacherSpec) -> TeacherSpec:
        # Folders are called after it.
        if not teacher.name or any(mark in teacher.name for mark in "/\\\0"):
            raise self.refused(f"a teacher cannot be called '{teacher.name}'")
        return teacher.model_copy(
            update={
                "model": self.model(teacher.model),
                "weights": self.weights(teacher.weights, teacher.name) if teacher.weights is not None else None,
                "trained_by": self.cell(teacher.trained_by) if teacher.trained_by is not None else None,
            }
        )

    def weights(self, weights: WeightsSpec, own: str | None = None) -> WeightsSpec:
        """Those of a teacher card that has a file of this sha256 and reads it in this way.

        Args:
            own: the name of a teacher, which may have a user's own file.
        """
        for key in self.registry.keys("teachers"):
            plain = self.registry.tree("teachers", key).data.get("weights")
            if isinstance(plain, dict) and plain.get("sha256") == weights.sha256:
                card: Weights = self.registry.card("teachers", key).weights
                built = weights_spec(key, card)
                if weights.layout in (card.layout, *built.counts_as.values()):
                    return built
        if own is None or weights.layout is not None or weights.url is not None:
            raise self.not_here(f"no teacher card here has the weights '{weights.file}'", _OWN)
        return weights

    def card(self, kind: str, spec: TargetSpec) -> Any:
        try:
            return self.registry.card(kind, spec.name, self.where)
        except UserError as error:
            raise self.not_here(error.what, _OWN) from None

    def thing(self, kind: str, spec: S, *same: str) -> S:
        """A named thing from its card.

        Args:
            same: fields that the record repeats from the card.
        """
        card, what = self.card(kind, spec), f"the {singular(kind)} '{spec.name}'"
        code = self.registry.code(kind, spec.name)
        if spec.source_sha256 != code["source_sha256"]:
            raise self.not_here(
                f"the code of {what} is not that of the record (sha256 of its file)",
                "restore the file as it was when the cell was trained",
            )
        if spec.source_sha256 is None or spec.target.partition(":")[2] != card.target.partition(":")[2]:
            self.check_code(f"code of {what}", spec.target, card.target, code["counts_as"])
        if spec.version != code["version"]:
            raise self.not_here(f"{what} has version {code['version']} here, and {spec.version} in the record")
        for field in same:
            if getattr(spec, field) != getattr(card, field):
                raise self.not_here(f"'{field}' of {what} is not what its card says")
        try:
            settable = self.registry.settable(card.target, card)
            options = check_options(card.target, spec.options, settable, lambda key: self.where, what)
        except UserError as error:
            raise self.not_here(error.what) from None
        return spec.model_copy(update={**code, "options": options})

    def check_code(self, what: str, said: str, present: str, counts_as: Mapping[str, str]) -> None:
        """A record names code by what it counts as, or by where it lay when that was the same place as now."""
        if said not in (present, counts_as.get(present)):
            raise self.refused(f"the {what} is not that of the card: '{said}'")
