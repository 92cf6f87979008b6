"""The stages of a method and their loss terms, every name in them looked up."""

from collections.abc import Collection
from typing import Any

from kdbench.cards import StageCard, StageFields, TermCard, TermFields
from kdbench.errors import UserError, did_you_mean
from kdbench.recipe.method_specs import SourceSpec, StageSpec, TermSpec
from kdbench.recipe.named import named_spec
from kdbench.registry import Registry
from kdbench.schedules import share
from kdbench.signature import parameters
from kdbench.told import asks_for_modules
from kdbench.tree import Tree

# Input sets that the data give: `second` are the images of `data` in other views; `target` is for recipes with one.
SHARED_INPUTS = ("data", "second", "target")

# Keys of a stage that name a card, and its kind.
PARTS = {
    "optimizer": "optimizers",
    "schedule": "schedules",
    "teacher_optimizer": "optimizers",
    "teacher_schedule": "schedules",
    "source": "sources",
    "begins": "operations",
}
# The same with those of a term.
NAMED_KINDS = PARTS | {"connector": "connectors", "weight_schedule": "schedules"}


def stage_spec(
    card: StageCard, tree: Tree, protocol: Tree, registry: Registry, what: str, modules: Collection[str]
) -> StageSpec:
    """A stage of a method.

    Args:
        tree: of the stage. protocol: of the protocol, whose optimizer and schedule a stage has unless it names others;
            of one that it names too, it changes only what it says.
        modules: names of the method's.
    """
    if not card.losses:
        raise UserError(f"{what} has no losses", where=tree.origin(()))
    parts: dict[str, Any] = {}
    for part, kind in PARTS.items():
        given = [one.at(part) for one in (protocol, tree) if one.data.get(part) is not None]
        if given:
            parts[part] = named_spec(kind, given[0].merged(given[-1]), registry)
    losses = {
        name: _term(
            term, _smoothed(tree.at("losses", name), protocol, registry), registry, f"loss '{name}' in {what}", modules
        )
        for name, term in card.losses.items()
    }
    _check(card, parts.get("source"), losses, tree, what)
    known = ["student", "connectors", "teacher", *modules]
    if strange := [name for name in card.trains if name not in known]:
        raise UserError(
            f"{what} trains '{strange[0]}', which the method does not have",
            where=tree.origin(("trains",)),
            hint=did_you_mean(strange[0], known),
        )
    same = {name: getattr(card, name) for name in StageFields.model_fields}
    return StageSpec(share=share(card.share) if card.share else None, losses=losses, **parts, **same)


def _smoothed(term: Tree, protocol: Tree, registry: Registry) -> Tree:
    """A term with the protocol's label smoothing, where its loss has that option and it says nothing of it."""
    option = "label_smoothing"
    if protocol.data.get(option) is None or option in term.data or not isinstance(term.data.get("loss"), str):
        return term
    card = registry.card("losses", term.data["loss"], term.origin(("loss",)))
    return term.put((option,), protocol.at(option)) if option in registry.settable(card) else term


def check_asked(target: str, modules: Collection[str], what: str, where: str) -> None:
    """Every module that code asks for by name is one of the method's."""
    for name in asks_for_modules(target):
        if name not in modules:
            hint = did_you_mean(name, modules) if modules else f"add it: 'modules: {{{name}: CONNECTOR}}'"
            raise UserError(f"{what} needs the module '{name}', which the method does not have", where=where, hint=hint)


def _term(term: TermCard, tree: Tree, registry: Registry, what: str, modules: Collection[str]) -> TermSpec:
    loss = named_spec("losses", tree, registry, own=("loss", *TermCard.model_fields), what=what)
    check_asked(loss.target, modules, what, tree.origin(("loss",)))
    if term.hook is not None and (term.student or term.teacher):
        raise UserError(
            f"{what}: 'hook' is for both networks; do not combine it with 'student' or 'teacher'",
            where=tree.origin(("hook",)),
            hint="keep either 'hook', or 'student' and 'teacher'",
        )
    through = term.connector.name if term.connector is not None and term.connector.name in modules else None
    if term.connector is not None and through is None and not {"student", "teacher"} <= {*loss.inputs}:
        raise UserError(f"{what}: a connector needs a loss of student and teacher", where=tree.origin(("connector",)))
    if through is not None and term.connector is not None and term.connector.options:
        raise UserError(
            f"{what}: '{through}' is a module of the method: write its options there", tree.origin(("connector",))
        )
    # Those of a module are taken once, when it is built.
    settable = registry.settable(registry.card("losses", loss.name))
    known = [option for option in settable if option in parameters(loss.target, called=True)]
    if strange := [option for option in term.schedules if option not in known]:
        raise UserError(
            f"{what} has no option '{strange[0]}' with a schedule",
            where=tree.origin(("schedules", strange[0])),
            hint=did_you_mean(strange[0], known),
        )
    own = term.connector is not None and through is None
    schedule: Any = None
    if isinstance(term.weight_schedule, list):
        several = range(len(term.weight_schedule))
        schedule = [named_spec("schedules", tree.at("weight_schedule", i), registry) for i in several]
    elif term.weight_schedule is not None:
        schedule = named_spec("schedules", tree.at("weight_schedule"), registry)
    return TermSpec(
        loss=loss,
        student=term.hook or term.student or "logits",
        teacher=term.hook or term.teacher or "logits",
        connector=named_spec("connectors", tree.at("connector"), registry) if own else None,
        through=through,
        weight_schedule=schedule,
        schedules={
            option: named_spec("schedules", tree.at("schedules", option), registry) for option in term.schedules
        },
        **{name: getattr(term, name) for name in TermFields.model_fields},
    )


def _check(card: StageCard, source: SourceSpec | None, losses: dict[str, TermSpec], tree: Tree, what: str) -> None:
    """Terms take input sets that there are, and train what the stage trains."""
    given = [*SHARED_INPUTS, *(source.gives if source else ())]
    for name, term in losses.items():
        _check_term(term, card, given, tree.at("losses", name), f"loss '{name}' in {what}")
    if "teacher" in card.trains and all(term.of != "teacher" for term in losses.values()):
        hint = "add 'of: teacher' to one, or leave 'teacher' out of 'trains'"
        raise UserError(f"{what} trains the teacher, but no loss has 'of: teacher'", tree.origin(("trains",)), hint)
    if card.alternating and ("teacher" not in card.trains or source is not None):
        raise UserError(
            f"{what} alternates "
            + ("with a batch source" if source is not None else "with the teacher, which it does not train"),
            where=tree.origin(("alternating",)),
            hint="'alternating' is for stages that train the teacher on the data's own input sets",
        )
    if unknown := [name for name in card.batch_norm if name not in given]:
        raise _no_input_set(unknown[0], given, what, tree.origin(("batch_norm", unknown[0])))


def _check_term(term: TermSpec, card: StageCard, given: list[str], tree: Tree, what: str) -> None:
    for key, name in (("input", term.input), ("against", term.against)):
        if name is not None and name not in given:
            raise _no_input_set(name, given, what, tree.origin((key,)))
    if "other" in term.loss.inputs and term.against is None:
        hint = "name it with 'against'"
        raise UserError(f"{what}: the loss '{term.loss.name}' needs a second input set", tree.origin(("loss",)), hint)
    if "other" not in term.loss.inputs and term.against is not None:
        hint = "leave 'against' out"
        raise UserError(
            f"{what}: the loss '{term.loss.name}' takes no second input set", tree.origin(("against",)), hint
        )
    if term.of == "teacher" and "teacher" not in card.trains:
        hint = "add 'teacher' to the stage's 'trains'"
        raise UserError(
            f"{what} has 'of: teacher', but this stage does not train the teacher", tree.origin(("of",)), hint
        )


def _no_input_set(name: str, given: list[str], what: str, where: str) -> UserError:
    return UserError(f"{what}: there is no input set '{name}'", where=where, hint=did_you_mean(name, given))
