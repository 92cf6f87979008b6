"""Rebuilds the cell of a record from the cards of this installation.

A record is data, whoever wrote it. Its names are looked up, the code is that of the cards found, options pass the
signature of that code, and what cards say otherwise must be what the record says. Anything else is refused.
"""

from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import ValidationError

from kdbench.cards import LossCard, Weights
from kdbench.errors import UserError
from kdbench.reading import fault
from kdbench.recipe.coded import Spec, TargetSpec
from kdbench.recipe.method_specs import LossSpec, ModuleSpec
from kdbench.recipe.model_specs import DataSpec, ModelSpec, WeightsSpec
from kdbench.recipe.named import repeated
from kdbench.recipe.networks import weights_spec
from kdbench.recipe.several import several_teachers
from kdbench.recipe.specs import CellSpec, TeacherSpec
from kdbench.recipe.stages import NAMED_KINDS
from kdbench.registry import Registry, singular
from kdbench.signature import check_options

T = TypeVar("T", CellSpec, ModelSpec, DataSpec)


class NotHere(UserError):
    """What a record names is not, or not in that form, in this installation. Other refusals are of records that no
    version of kdbench wrote."""


# Fields of specs that hold a card's thing, and the card's kind.
_KINDS = NAMED_KINDS | {
    "data": "datasets",
    "loss": "losses",
    "model": "models",
    "modules": "connectors",
    "predicts": "connectors",
    "schedules": "schedules",
    "student": "models",
    "target": "datasets",
    "transforms": "transforms",
}

_COMMIT = "check out the commit that the record names, where its cards are"
_OWN = (
    "if it is your own card, pass its registry folder with --registry (registries=[…] in Python); for a folder of "
    "pictures 'kdbench data FOLDER' writes one"
)


def cell_of(spec: Any, registry: Registry, where: str) -> CellSpec:
    """The cell of a record's `spec`.

    Args:
        where: the record, for messages.

    Raises:
        UserError: it is of a form that this version does not know, names what no card here is called, or says of a card
            what that card does not say.
    """
    cell: CellSpec = _Reader(registry, where).built(_parsed(CellSpec, spec, where))
    return cell


def student_of(spec: Any, registry: Registry, where: str) -> tuple[ModelSpec, DataSpec]:
    """The student of a record's `spec`, and the data it is for, which give it its sizes: nothing here reads them.

    Raises:
        UserError: as of `cell_of`.
    """
    plain = spec if isinstance(spec, Mapping) else {}
    student = _parsed(ModelSpec, plain.get("student"), where)
    model: ModelSpec = _Reader(registry, where).built(student, "student")
    return model, _parsed(DataSpec, plain.get("data"), where)


def _parsed(kind: type[T], plain: Any, where: str) -> T:
    try:
        return kind.model_validate(plain)
    except ValidationError as error:
        what = f"this record's recipe has a form that this version cannot read: {fault(error)}"
        raise NotHere(what, where, "check out the commit that the record names") from None


class _Reader:
    """Rebuilds the parts of one record."""

    def __init__(self, registry: Registry, where: str) -> None:
        self.registry, self.where = registry, where

    def refused(self, what: str) -> UserError:
        hint = "no version of kdbench writes this: leave the folder out, or get a fresh copy of it"
        return UserError(f"this record is refused: {what}", where=self.where, hint=hint)

    def not_here(self, what: str, hint: str = _COMMIT) -> NotHere:
        return NotHere(f"this record cannot be built here: {what}", where=self.where, hint=hint)

    def built(self, said: Any, field: str = "") -> Any:
        """What a field of a record's spec says, with every card in it looked up."""
        if isinstance(said, list):
            return [self.built(one, field) for one in said]
        if isinstance(said, dict):
            return {key: self.built(one, field) for key, one in said.items()}
        if isinstance(said, TargetSpec):
            return self.thing(_KINDS[field], said)
        if isinstance(said, TeacherSpec) and (not said.name or any(mark in said.name for mark in "/\\\0")):
            # Folders are called after it.
            raise self.refused(f"a teacher cannot be called '{said.name}'")
        if isinstance(said, TeacherSpec) and said.members:
            built = several_teachers([self.built(one, field) for one in said.members], self.where)
            if said.name != built.name:
                raise self.refused(f"'{said.name}' are other teachers than {built.name}")
            return built
        if isinstance(said, WeightsSpec):
            return self.weights(said, may_be_own=True)
        if isinstance(said, Spec):
            return said.model_copy(
                update={name: self.built(getattr(said, name), name) for name in type(said).model_fields}
            )
        return said

    def thing(self, kind: str, spec: TargetSpec) -> TargetSpec:
        """A named thing from its card."""
        what = f"the {singular(kind)} '{spec.name}'"
        try:
            card = self.registry.card(kind, spec.name, self.where)
        except UserError as error:
            raise self.not_here(error.what, _OWN) from None
        code = self.registry.code(kind, spec.name)
        if spec.source_sha256 != code["source_sha256"]:
            raise self.not_here(
                f"the code of {what} is not that of the record (sha256 of its file, and of those that it imports)",
                "restore the files as they were when the cell was trained",
            )
        if spec.source_sha256 is None or spec.target.partition(":")[2] != card.target.partition(":")[2]:
            self.check_code(f"code of {what}", spec.target, card.target, code["counts_as"])
        if spec.version != code["version"]:
            raise self.not_here(f"{what} has version {code['version']} here, and {spec.version} in the record")
        more: dict[str, Any] = {}
        if isinstance(spec, LossSpec):
            # How a loss runs on a GPU is no number of the record's: today's card says it.
            more = self.metrics(spec, card, code["counts_as"]) | {"by_step": card.by_step}
        for field, value in repeated(kind, card).items():
            if field not in more and getattr(spec, field) != value:
                raise self.not_here(f"'{field}' of {what} is not what its card says")
        if not isinstance(spec, DataSpec):
            try:
                settable = self.registry.settable(card)
                more["options"] = check_options(spec.options, settable, lambda key: self.where, what)
            except UserError as error:
                raise self.not_here(error.what) from None
        elif spec.options != card.args:
            raise self.not_here(f"the options of {what} are not those of its card")
        if isinstance(spec, ModelSpec) and spec.start is not None:
            more["start"] = self.weights(spec.start)
        if isinstance(spec, ModuleSpec) and spec.optimizer is not None:
            more["optimizer"] = self.thing("optimizers", spec.optimizer)
        return spec.model_copy(update={**code, **more})

    def metrics(self, loss: LossSpec, card: LossCard, counts_as: Mapping[str, str]) -> dict[str, Any]:
        if loss.metrics.keys() != card.metrics.keys():
            raise self.not_here(f"the metrics of the loss '{loss.name}' are not those of its card")
        for name, target in loss.metrics.items():
            self.check_code(f"metric '{name}' of the loss '{loss.name}'", target, card.metrics[name], counts_as)
        return {name: getattr(card, name) for name in ("metrics", "references", "shares")}

    def weights(self, weights: WeightsSpec, may_be_own: bool = False) -> WeightsSpec:
        """Those of a teacher card that has a file of this sha256 and reads it in this way.

        Args:
            may_be_own: whether it may be a user's own file, as a teacher's may.
        """
        for key in self.registry.keys("teachers"):
            plain = self.registry.tree("teachers", key).data.get("weights")
            if isinstance(plain, dict) and plain.get("sha256") == weights.sha256:
                card: Weights = self.registry.card("teachers", key).weights
                built = weights_spec(key, card)
                if weights.layout in (card.layout, *built.counts_as.values()):
                    return built
        if not may_be_own or weights.layout is not None or weights.url is not None:
            raise self.not_here(f"no teacher card here has the weights '{weights.file}'", _OWN)
        return weights

    def check_code(self, what: str, said: str, present: str, counts_as: Mapping[str, str]) -> None:
        """A record names code by what it counts as, or by where it lay when that was the same place as now."""
        if said not in (present, counts_as.get(present)):
            raise self.refused(f"the {what} is not that of the card: '{said}'")
