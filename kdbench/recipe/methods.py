"""The method of a cell: its card with the recipe's changes, stages, losses, sources and operations resolved."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from kdbench.cards import MethodCard, Named, ProtocolCard, StageCard, TermCard
from kdbench.errors import UserError, did_you_mean
from kdbench.recipe.anchoring import expanded
from kdbench.recipe.specs import (
    DataSpec,
    LossSpec,
    MethodSpec,
    OperationSpec,
    SourceSpec,
    StageSpec,
    TargetSpec,
    TermSpec,
)
from kdbench.registry import Registry, written_out
from kdbench.schedules import share
from kdbench.signature import check_options
from kdbench.tree import Tree
from kdbench.validation import validated

if TYPE_CHECKING:
    from kdbench.recipe.resolving import Variant


# Input sets that the data give; the second one in recipes that name a target domain.
SHARED_INPUTS = ("data", "target")

# Keys of a method mapping in a recipe that are no parameters of the method.
_METHOD_KEYS = ("name", "label", "stages")


def resolve_method(
    variant: Variant, protocol: ProtocolCard, protocol_tree: Tree, registry: Registry
) -> tuple[MethodSpec, set[str], Tree]:
    """The resolved method, the shared keys that it does not have, and its tree."""
    given = variant.tree.at("method")
    name = given.data["name"]
    tree = registry.tree("methods", name, given.origin(("name",)))
    short = tree.data.get("parameters", {})
    # Settings of one method in a comparison are told apart by what they set.
    own = [f"{k} {v}" for k, v in given.data.items() if k in variant.own and k not in _METHOD_KEYS]
    label = given.data.get("label") or ", ".join([tree.data.get("title", name), *own])
    foreign: set[str] = set()
    for key, value in given.data.items():
        origin = given.origin((key,))
        if key in short:
            target = tuple(short[key].split("."))
            if not _exists(tree.data, target[:-1]):
                raise UserError(
                    f"method '{name}': the parameter '{key}' points to nothing: {short[key]}",
                    where=tree.origin(("parameters", key)),
                )
            tree = tree.put(target, Tree.of(value, origin))
            if f"method.{key}" in variant.axes:
                label = f"{label}, {key} {value}"
        elif key == "stages" and isinstance(value, dict):
            changes = written_out(given.at("stages"))
            known, absent = _applicable(changes, tree.data["stages"])
            if absent and key not in variant.shared:
                raise UserError(
                    f"method '{name}' has no {absent[0]}",
                    where=changes.origin(absent[1]),
                    hint=did_you_mean(str(absent[1][-1]), absent[2]),
                )
            if known.data:
                tree = tree.put(("stages",), known)
            else:
                foreign.add(key)
        elif key in variant.shared:
            foreign.add(key)
        elif key not in _METHOD_KEYS:
            raise UserError(
                f"unknown key '{key}' for method '{name}'",
                where=origin,
                hint=did_you_mean(key, [*short, "stages", "label"]),
            )
    card = validated(MethodCard, written_out(tree), f"method '{name}'")
    defaults = {
        "optimizer": (protocol.optimizer, protocol_tree.at("optimizer")),
        "schedule": (protocol.schedule, protocol_tree.at("schedule")),
    }
    stages = {
        stage_name: _stage(
            stage, tree.at("stages", stage_name), defaults, registry, f"stage '{stage_name}' of method '{name}'"
        )
        for stage_name, stage in card.stages.items()
    }
    stages, tree = expanded(stages, card.stages, tree)
    _check_shares(stages, tree, name)
    return MethodSpec(name=name, label=label, starts_from=card.starts_from, stages=stages), foreign, tree


def _applicable(over: Tree, stages: dict[str, Any]) -> tuple[Tree, tuple[str, tuple[str, ...], list[str]] | None]:
    """The part of an override of stages that a method has, and the first thing that it lacks: text, path, known names.

    A loss term that is new to a stage needs its 'loss'; one without is an override of a term that is not there.
    """
    known: dict[str, Any] = {}
    absent: tuple[str, tuple[str, ...], list[str]] | None = None
    for stage, changes in over.data.items():
        if stage not in stages:
            absent = absent or (f"stage '{stage}'", (stage,), list(stages))
            continue
        terms = changes.get("losses") if isinstance(changes, dict) else None
        if isinstance(terms, dict):
            own = stages[stage].get("losses", {})
            kept = {}
            for term, change in terms.items():
                if term in own or (isinstance(change, dict) and "loss" in change):
                    kept[term] = change
                else:
                    absent = absent or (f"loss '{term}' in stage '{stage}'", (stage, "losses", term), list(own))
            changes = {**changes, "losses": kept}
            if not kept and len(changes) == 1:
                continue
        known[stage] = changes
    return Tree(known, over.origins), absent


def _stage(
    card: StageCard, tree: Tree, defaults: dict[str, tuple[Named, Tree]], registry: Registry, what: str
) -> StageSpec:
    if not card.losses:
        raise UserError(f"{what} has no losses", where=tree.origin(()))
    resolved = {}
    for kind, (default, origin) in defaults.items():
        own: Named | None = getattr(card, kind)
        if own is None:
            resolved[kind] = _named(f"{kind}s", default, origin, registry)
        elif own.name == default.name:
            # A stage that names the protocol's own optimizer changes only what it says.
            merged = Named.model_validate(default.model_dump() | own.model_dump())
            resolved[kind] = _named(f"{kind}s", merged, origin.merged(tree.at(kind)), registry)
        else:
            resolved[kind] = _named(f"{kind}s", own, tree.at(kind), registry)
    losses = {
        name: _term(term, tree.at("losses", name), registry, f"loss '{name}' in {what}")
        for name, term in card.losses.items()
    }
    source = _source(card.source, tree.at("source"), registry) if card.source is not None else None
    begins = _operation(card.begins, tree.at("begins"), registry) if card.begins is not None else None
    _check_inputs(card, source, losses, tree, what)
    own_of_teacher = {
        kind: _named(f"{kind.removeprefix('teacher_')}s", named, tree.at(kind), registry)
        for kind in ("teacher_optimizer", "teacher_schedule")
        if (named := getattr(card, kind)) is not None
    }
    return StageSpec(
        share=share(card.share) if card.share else None,
        extra_epochs=card.extra_epochs,
        trains=card.trains,
        alternating=card.alternating,
        source=source,
        begins=begins,
        losses=losses,
        modes=card.modes,
        batch_norm=card.batch_norm,
        optimizer=resolved["optimizer"],
        schedule=resolved["schedule"],
        teacher_optimizer=own_of_teacher.get("teacher_optimizer"),
        teacher_schedule=own_of_teacher.get("teacher_schedule"),
    )


def _source(named: Named, tree: Tree, registry: Registry) -> SourceSpec:
    card = registry.card("sources", named.name, tree.origin(("name",)))
    target = _named("sources", named, tree, registry)
    return SourceSpec(**target.model_dump(), reads=card.reads, gives=card.gives, teacher=card.teacher)


def _operation(named: Named, tree: Tree, registry: Registry) -> OperationSpec:
    card = registry.card("operations", named.name, tree.origin(("name",)))
    return OperationSpec(**_named("operations", named, tree, registry).model_dump(), teacher=card.teacher)


def _check_inputs(
    card: StageCard, source: SourceSpec | None, losses: dict[str, TermSpec], tree: Tree, what: str
) -> None:
    """Terms take input sets that there are, and train what the stage trains."""
    given = [*SHARED_INPUTS, *(source.gives if source else ())]
    for name, term in losses.items():
        where = tree.at("losses", name)
        for key, at in (("input", term.input), ("against", term.against)):
            if at is not None and at not in given:
                raise UserError(
                    f"loss '{name}' in {what}: there is no input set '{at}'",
                    where=where.origin((key,)),
                    hint=did_you_mean(at, given),
                )
        if ("other" in term.loss.inputs) != (term.against is not None):
            raise UserError(
                f"loss '{name}' in {what}: the loss '{term.loss.name}' "
                + ("compares with another input set" if term.against is None else "compares with no other input set"),
                where=where.origin(("against",) if term.against else ("loss",)),
                hint="name it with 'against'" if term.against is None else "leave 'against' out",
            )
        if term.of == "teacher" and "teacher" not in card.trains:
            raise UserError(
                f"loss '{name}' in {what} is the teacher's own, which this stage does not train",
                where=where.origin(("of",)),
                hint="add 'teacher' to the stage's 'trains'",
            )
    if "teacher" in card.trains and all(term.of != "teacher" for term in losses.values()):
        raise UserError(
            f"{what} trains the teacher, but no loss is the teacher's own",
            where=tree.origin(("trains",)),
            hint="add 'of: teacher' to one, or leave 'teacher' out of 'trains'",
        )
    if card.alternating and ("teacher" not in card.trains or source is not None):
        raise UserError(
            f"{what} alternates "
            + ("with a batch source" if source is not None else "with the teacher, which it does not train"),
            where=tree.origin(("alternating",)),
            hint="'alternating' is for stages that train the teacher on the data's own input sets",
        )
    for name in card.batch_norm:
        if name not in given:
            raise UserError(
                f"{what}: there is no input set '{name}'",
                where=tree.origin(("batch_norm", name)),
                hint=did_you_mean(name, given),
            )


def check_target(method: MethodSpec, target: DataSpec | None, tree: Tree) -> None:
    """A method that reads the target domain needs a recipe that names one."""
    for stage_name, stage in method.stages.items():
        made = stage.source.gives if stage.source else []
        for term_name, term in stage.losses.items():
            if target is None and "target" not in made and "target" in (term.input, term.against):
                raise UserError(
                    f"the method '{method.name}' needs a target domain (loss '{term_name}' reads it)",
                    where=tree.at("stages", stage_name, "losses", term_name).origin(()),
                    hint="add 'target:' with the key of a data card to the recipe ('kdbench ls datasets')",
                )


def needs_teacher(method: MethodSpec) -> bool:
    stages = method.stages.values()
    made = [made for stage in stages for made in (stage.source, stage.begins) if made is not None]
    terms = [term for stage in stages for term in stage.losses.values()]
    return (
        method.starts_from == "teacher"
        or any(one.teacher for one in made)
        or any("teacher" in term.loss.inputs or term.of == "teacher" for term in terms)
    )


def _term(term: TermCard, tree: Tree, registry: Registry, what: str) -> TermSpec:
    loss = registry.card("losses", term.loss, tree.origin(("loss",)))
    own_keys = tuple(TermCard.model_fields)
    options = check_options(
        loss.target,
        term.options,
        registry.settable(loss.target, loss),
        lambda key: tree.origin((key,) if key else ()),
        what,
        own_keys,
    )
    if term.hook is not None and (term.student or term.teacher):
        raise UserError(
            f"{what}: 'hook' means both networks; beside it 'student' and 'teacher' say it twice",
            where=tree.origin(("hook",)),
            hint="keep either 'hook', or 'student' and 'teacher'",
        )
    connector: TargetSpec | None = None
    schedule: TargetSpec | list[TargetSpec] | None = None
    if term.connector is not None:
        if not {"student", "teacher"} <= set(loss.inputs):
            raise UserError(
                f"{what}: a connector needs a loss of student and teacher", where=tree.origin(("connector",))
            )
        connector = _named("connectors", term.connector, tree.at("connector"), registry)
    if isinstance(term.weight_schedule, list):
        schedule = [
            _named("schedules", one, Tree.of(one.model_dump(), tree.origin(("weight_schedule", i))), registry)
            for i, one in enumerate(term.weight_schedule)
        ]
    elif term.weight_schedule is not None:
        schedule = _named("schedules", term.weight_schedule, tree.at("weight_schedule"), registry)
    return TermSpec(
        loss=LossSpec(
            name=term.loss,
            **registry.code("losses", term.loss),
            options=options,
            inputs=loss.inputs,
            metrics=loss.metrics,
            references=loss.references,
        ),
        student=term.hook or term.student or "logits",
        teacher=term.hook or term.teacher or "logits",
        input=term.input,
        of=term.of,
        against=term.against,
        detach=term.detach,
        connector=connector,
        weight=term.weight,
        weight_schedule=schedule,
        layer_weights=term.layer_weights,
    )


def _named(kind: str, named: Named, tree: Tree, registry: Registry) -> TargetSpec:
    given = Tree(named.model_dump(), tree.origins | {(): tree.origin(())})
    options = registry.options(kind, named.name, given)
    code = registry.code(kind, named.name)
    if kind == "schedules":
        # Schedules are plain Python: trying one now tells a malformed share before anything is trained.
        module, _, name = code["target"].partition(":")
        try:
            getattr(importlib.import_module(module), name)(**options)
        except ValueError as error:
            shares = [key for key, value in options.items() if isinstance(value, list | str)]
            raise UserError(f"schedule '{named.name}': {error}", where=tree.origin(tuple(shares[:1]))) from None
    return TargetSpec(name=named.name, **code, options=options)


def _check_shares(stages: dict[str, StageSpec], tree: Tree, name: str) -> None:
    rest = [s for s, stage in stages.items() if stage.share is None and not stage.extra]
    both = [s for s, stage in stages.items() if stage.share is not None and stage.extra]
    total = sum(stage.share or 0.0 for stage in stages.values())
    where = tree.origin(("stages",))
    late = [
        s
        for i, s in enumerate(stages)
        if stages[s].extra and i and not all(stage.extra for stage in list(stages.values())[:i])
    ]
    if late:
        raise UserError(
            f"method '{name}', stage '{late[0]}': stages on top of the budget come first",
            where=where,
            hint="their steps are on top of the budget, so that the others stay paired with other methods",
        )
    if both:
        raise UserError(
            f"method '{name}', stage '{both[0]}': 'share' and 'extra_epochs' exclude each other", where=where
        )
    if len(rest) > 1:
        raise UserError(
            f"method '{name}': the stages {rest} all lack a share",
            where=where,
            hint="exactly one stage may leave it out and take the rest",
        )
    if total > 1 + 1e-9 or (rest and total >= 1) or (not rest and abs(total - 1) > 1e-9):
        raise UserError(
            f"method '{name}': the shares of its stages sum to {total:.0%}",
            where=where,
            hint="they sum to 100 %; one stage may leave its share out and take the rest",
        )


def _exists(data: Any, path: tuple[str, ...]) -> bool:
    for key in path:
        if not isinstance(data, dict) or key not in data:
            return False
        data = data[key]
    return isinstance(data, dict)
