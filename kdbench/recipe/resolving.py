"""From one combination of a comparison to a resolved cell: every name looked up, every option typed."""

from __future__ import annotations

import functools
import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kdbench.cards import (
    POINT_GROUPS,
    DatasetCard,
    MethodCard,
    Named,
    Normalization,
    ProtocolCard,
    StageCard,
    TeacherCard,
    TermCard,
    Weights,
)
from kdbench.errors import UserError, did_you_mean
from kdbench.files import find_weights, sha256_of, weight_folders
from kdbench.recipe.anchoring import check_route, expanded
from kdbench.recipe.loading import typed
from kdbench.recipe.schema import (
    CellSpec,
    DataSpec,
    LossSpec,
    MethodSpec,
    ModelSpec,
    OperationSpec,
    ProtocolSpec,
    Recipe,
    SourceSpec,
    StageSpec,
    TargetSpec,
    TeacherSpec,
    TermSpec,
)
from kdbench.registry import Registry, written_out
from kdbench.schedules import share
from kdbench.signature import check_options, own_code_sha256
from kdbench.tree import Tree
from kdbench.validation import validated

# Teachers' recipes that are being planned, to notice a circle.
_open: list[str] = []

# Input sets that the data give; the second one in recipes that name a target domain.
SHARED_INPUTS = ("data", "target")

# Keys of a method mapping in a recipe that are no parameters of the method.
_METHOD_KEYS = ("name", "label", "stages")


@dataclass(frozen=True)
class Variant:
    """A recipe's tree for one combination of compared values.

    `shared`: keys below `method` that were given for all compared methods; a method that lacks one ignores it.
    `own`: keys that stand beside this method's name in the comparison.
    """

    tree: Tree
    axes: dict[str, Any]
    shared: frozenset[str] = frozenset()
    own: frozenset[str] = frozenset()


def resolve(
    variant: Variant, seed: int, registry: Registry, weights_must_exist: bool = True
) -> tuple[CellSpec, set[str]]:
    """The cell of a variant and a seed, and the parts of the recipe that mean nothing to it."""
    tree = variant.tree
    recipe = typed(tree)
    data = _data(recipe, tree, registry)
    target = _target(recipe, data, tree, registry)
    card, protocol_tree = _protocol(recipe, tree, registry)
    protocol = ProtocolSpec(
        name=recipe.protocol["name"],
        batch_size=card.batch_size,
        last_batch=card.last_batch,
        augmentation=card.augmentation,
        normalization=card.normalization or data.normalization,
        epochs=card.epochs,
        steps=card.steps,
    )
    _check_channels(protocol.normalization, data, tree.origin(("protocol",)))
    if card.augmentation.mode == "reflect" and card.augmentation.padding >= data.image_size:
        raise UserError(
            f"reflect padding of {card.augmentation.padding} does not fit images of {data.image_size} pixels",
            where=protocol_tree.origin(("augmentation", "padding")),
            hint="it must be smaller than the image",
        )
    resident = [d.name for d in (data, target) if d is not None and not d.streamed]
    if card.augmentation.resized_crop and resident:
        raise UserError(
            f"'resized_crop' crops pictures of any size while they are read; those of '{resident[0]}' lie in memory",
            where=protocol_tree.origin(("augmentation", "resized_crop")),
            hint="use 'padding', or a data card with 'streamed: true'",
        )
    method, foreign, method_tree = resolve_method(variant, card, protocol_tree, registry)
    _check_target(method, target, method_tree)
    student = model_spec(
        tree.at("student"), registry, recipe.student.hooks, recipe.student.weights, recipe.student.start
    )
    teacher = None
    if _needs_teacher(method):
        if recipe.teacher is None:
            raise UserError(
                f"the method '{method.name}' needs a teacher",
                where=tree.origin(()),
                hint="add 'teacher:' with the key of a teacher card ('kdbench ls teachers')",
            )
        teacher = teacher_spec(tree, registry, weights_must_exist)
        _check_channels(teacher.normalization, data, tree.origin(("teacher",)))
        if method.starts_from == "teacher":
            # Its weights mean what they do for images that are normalized as its own were.
            protocol = protocol.model_copy(update={"normalization": teacher.normalization})
    else:
        foreign = foreign | {"teacher"}
    check_route(method, teacher, data, tree.origin(("teacher",)))
    for stage_name, stage in method.stages.items():
        for term_name, term in stage.losses.items():
            place = f"method '{method.name}', stage '{stage_name}', loss '{term_name}'"
            where = _hook_origin(method_tree.at("stages", stage_name, "losses", term_name))
            if {"student", "other"} & {*term.loss.inputs}:
                own = teacher.model if teacher is not None and term.of == "teacher" else student
                _check_point(term.student, own, place, where)
            if teacher is not None and "teacher" in term.loss.inputs:
                _check_point(term.teacher, teacher.model, place, where)
                if teacher.classes is not None and term.teacher == "logits" and term.connector is None:
                    raise UserError(
                        f"{place}: the logits of '{teacher.name}' are of its own {teacher.classes} classes, not of the "
                        f"{data.classes} of '{data.name}'",
                        where=where,
                        hint="it can teach its features, or logits through a connector: methods like at, hint, "
                        "ab_transfer",
                    )
    return CellSpec(
        data=data,
        target=target,
        teacher=teacher,
        student=student,
        method=method,
        protocol=protocol,
        seed=seed,
        evaluations=recipe.evaluations,
        compute=recipe.compute,
        route=recipe.route,
    ), foreign


def _data(recipe: Recipe, tree: Tree, registry: Registry) -> DataSpec:
    choice = recipe.data
    where = tree.origin(("data",))
    card = registry.card("datasets", choice.name, where)
    held_out = choice.validation * card.train if choice.validation < 1 else choice.validation
    left = card.train - held_out
    if not isinstance(choice.validation, int) and choice.validation >= 1:
        raise UserError(
            f"'data.validation' is a share below 1 or a whole number of images, not {choice.validation}",
            where=tree.origin(("data", "validation")),
        )
    if left < card.classes or (choice.per_class or 0) * card.classes > left:
        raise UserError(
            f"'{choice.name}' has {card.train} training images of {card.classes} classes: too few for this",
            where=tree.origin(("data", "per_class" if choice.per_class else "validation")),
            hint=f"after the validation split {left:.0f} images are left",
        )
    if bad := [label for label in choice.only_classes or () if label >= card.classes]:
        raise UserError(
            f"'{choice.name}' has no class {bad[0]}",
            where=tree.origin(("data", "only_classes")),
            hint=f"its labels are 0 to {card.classes - 1}",
        )
    return _data_spec(
        choice.name,
        card,
        fraction=choice.fraction,
        per_class=choice.per_class,
        # All classes are no choice among them.
        only_classes=sorted(chosen) if 0 < len(chosen := set(choice.only_classes or ())) < card.classes else None,
        validation=choice.validation,
        split_seed=choice.split_seed,
        root=choice.root,
    )


def _target(recipe: Recipe, data: DataSpec, tree: Tree, registry: Registry) -> DataSpec | None:
    """The target domain, of the classes and the image size of the source."""
    choice = recipe.target
    if choice is None:
        return None
    where = tree.origin(("target",))
    card = registry.card("datasets", choice.name, where)
    found, expected = ((d.classes, d.channels, d.image_size) for d in (card, data))
    if found != expected:
        raise UserError(
            f"the target '{choice.name}' has {_sizes(*found)}, the source '{data.name}' {_sizes(*expected)}",
            where=where,
            hint="domains share classes, channels and image size: a data card's options bring images to a size "
            "('kdbench show datasets mnist_8')",
        )
    return _data_spec(choice.name, card, root=choice.root)


def _sizes(classes: int, channels: int, size: int) -> str:
    return f"{classes} classes of {channels}×{size}×{size}"


def _data_spec(name: str, card: DatasetCard, **more: Any) -> DataSpec:
    return DataSpec(
        name=name,
        target=card.target,
        options=card.args,
        source_sha256=own_code_sha256(card.target),
        classes=card.classes,
        channels=card.channels,
        image_size=card.image_size,
        train=card.train,
        test=card.test,
        normalization=card.normalization,
        streamed=card.streamed,
        **more,
    )


def _protocol(recipe: Recipe, tree: Tree, registry: Registry) -> tuple[ProtocolCard, Tree]:
    """The protocol's card with the recipe's own fields laid over it, and its tree."""
    given = tree.at("protocol")
    name = given.data.get("name")
    if not isinstance(name, str):
        raise UserError("no protocol is named", where=tree.origin(("protocol",)), hint="add 'protocol: ab_official'")
    card = registry.tree("protocols", name, given.origin(("name",)))
    own = Tree({k: v for k, v in given.data.items() if k != "name"}, given.origins)
    for budget in ("epochs", "steps"):
        if getattr(recipe, budget) is not None:
            own = own.merged(Tree({budget: tree.data[budget]}, {(budget,): tree.origin((budget,))}))
    if "epochs" in own.data or "steps" in own.data:
        card = Tree({k: v for k, v in card.data.items() if k not in ("epochs", "steps")}, card.origins)
    merged = card.merged(own)
    return validated(ProtocolCard, merged, f"protocol '{name}'"), merged


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


def _check_target(method: MethodSpec, target: DataSpec | None, tree: Tree) -> None:
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
            target=loss.target,
            options=options,
            source_sha256=own_code_sha256(loss.target),
            inputs=loss.inputs,
            metrics=loss.metrics,
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
    target, options = registry.options(kind, named.name, given)
    if kind == "schedules":
        # Schedules are plain Python: trying one now tells a malformed share before anything is trained.
        module, _, name = target.partition(":")
        try:
            getattr(importlib.import_module(module), name)(**options)
        except ValueError as error:
            shares = [key for key, value in options.items() if isinstance(value, list | str)]
            raise UserError(f"schedule '{named.name}': {error}", where=tree.origin(tuple(shares[:1]))) from None
    return TargetSpec(name=named.name, target=target, options=options, source_sha256=own_code_sha256(target))


def model_spec(
    tree: Tree,
    registry: Registry,
    hooks: dict[str, str] | None = None,
    weights: str | None = None,
    start: str | None = None,
) -> ModelSpec:
    name = tree.data["name"]
    target, options = registry.options(
        "models", name, tree, ignore=("name", "hooks", "weights", "start"), also_known=("hooks", "weights", "start")
    )
    card = registry.card("models", name)
    points: Any = "derived" if card.hooks == "derived" else registry.card("hooks", card.hooks).points
    sha256 = None
    if weights is not None:
        sha256 = _file_hash(_existing(weights, tree.origin(("weights",))))
    return ModelSpec(
        name=name,
        target=target,
        options=options,
        source_sha256=own_code_sha256(target),
        hooks=hooks or points,
        weights=weights,
        weights_sha256=sha256,
        start=_start(start, name, options, tree.origin(("start",)), registry) if start is not None else None,
    )


def _start(teacher: str, model: str, options: dict[str, Any], where: str, registry: Registry) -> Weights:
    """The weights of a teacher card, for a student of the same model."""
    card: TeacherCard = registry.card("teachers", teacher, where)
    if card.weights is None:
        raise UserError(f"the teacher '{teacher}' is trained by a recipe: no student can start from it", where=where)
    theirs = _teacher_model(registry.tree("teachers", teacher).at("model"), registry)
    if (theirs.name, theirs.options) != (model, options):
        raise UserError(f"'{teacher}' has the weights of '{theirs.name}', not of '{model}'", where=where)
    return card.weights


def teacher_spec(tree: Tree, registry: Registry, weights_must_exist: bool = True) -> TeacherSpec:
    """The teacher that a recipe's tree names or describes."""
    given = tree.at("teacher")
    if given.data.get("name") is None:
        return _own_teacher(tree, given, registry)
    own = given.data.get("normalization")
    name = given.data["name"]
    where = given.origin(("name",))
    card: TeacherCard = registry.card("teachers", name, where)
    card_tree = registry.tree("teachers", name)
    data = tree.data["data"]["name"]
    known = _classes(card.data.name, registry)
    foreign = known != _classes(data, registry)
    if foreign and not card.transfers:
        raise UserError(
            f"the teacher '{name}' knows the classes of '{card.data.name}', not of '{data}'",
            where=where,
            hint="choose a teacher of this data ('kdbench ls teachers')",
        )
    model = _teacher_model(card_tree.at("model"), registry)
    normalization = card.normalization or registry.card("datasets", card.data.name).normalization
    trained_by = None
    if card.recipe is not None:
        origin = card_tree.origin(("recipe",))
        beside = Path(origin.rpartition(":")[0]).parent / card.recipe
        trained_by = _training_of(
            str(beside) if beside.is_file() else card.recipe, origin, registry, data_root=tree.data["data"].get("root")
        )
        if trained_by.student.name != model.name or trained_by.student.options != model.options:
            raise UserError(
                f"teacher '{name}': its recipe trains '{trained_by.student.name}', not '{model.name}'", where=origin
            )
        normalization = card.normalization or trained_by.protocol.normalization
    elif card.weights is not None and card.weights.url is None and weights_must_exist:
        _existing(card.weights.file, where)
    return TeacherSpec(
        name=name,
        model=model,
        normalization=validated(Normalization, given.at("normalization"), "teacher") if own else normalization,
        weights=card.weights,
        trained_by=trained_by,
        accuracy=None if foreign else card.accuracy,
        classes=known[1] if foreign else None,
        known_classes=trained_by.data.only_classes if trained_by is not None else None,
    )


def teacher_alone(name: str, registry: Registry, where: str) -> tuple[TeacherSpec, DataSpec]:
    """A teacher of a card and the data that it knows, without a recipe."""
    card: TeacherCard = registry.card("teachers", name, where)
    tree = Tree.of({"teacher": {"name": name}, "data": {"name": card.data.name}}, where)
    return teacher_spec(tree, registry), _data_spec(card.data.name, registry.card("datasets", card.data.name))


def _own_teacher(tree: Tree, given: Tree, registry: Registry) -> TeacherSpec:
    """A teacher that the recipe itself describes: a model and the user's own weights."""
    choice = typed(tree).teacher
    assert choice is not None and choice.weights is not None and choice.model is not None
    file = _existing(choice.weights, given.origin(("weights",)))
    digest = _file_hash(file)
    weights = {"file": str(file), "sha256": digest}
    normalization = choice.normalization or registry.card("datasets", tree.data["data"]["name"]).normalization
    model = _teacher_model(given.at("model"), registry)
    return TeacherSpec.model_validate(
        {"name": file.stem, "model": model, "normalization": normalization, "weights": weights}
    )


def _teacher_model(tree: Tree, registry: Registry) -> ModelSpec:
    for key in ("weights", "start"):
        if key in tree.data:
            raise UserError(
                "a teacher's 'weights' stand beside its 'model', not inside",
                where=tree.origin((key,)),
                hint="move 'weights' one level up",
            )
    return model_spec(tree, registry, hooks=tree.data.get("hooks"))


@functools.cache
def _training_of(recipe: str, where: str, registry: Registry, data_root: str | None) -> CellSpec:
    """The one cell of a teacher's own recipe."""
    from kdbench.recipe.planning import plan

    if recipe in _open:
        raise UserError(f"the recipe '{recipe}' trains a teacher that it needs itself", where=where)
    overrides = () if data_root is None else (f"data.root={data_root}",)
    _open.append(recipe)
    try:
        cells = plan(recipe, registry, overrides).cells
    finally:
        _open.remove(recipe)
    if len(cells) != 1:
        raise UserError(f"a teacher's recipe has one cell; '{recipe}' has {len(cells)}", where=where)
    return cells[0].spec


def _existing(weights: str, where: str) -> Path:
    file = find_weights(weights)
    if file is None:
        tried = ", ".join(str(folder) for folder in weight_folders())
        raise UserError(
            f"there is no weight file '{weights}'",
            where=where,
            hint=f"tried it as a path and in {tried}; set KDBENCH_WEIGHTS to the folder that holds it",
        )
    return file


@functools.cache
def _file_hash(file: Path) -> str:
    return sha256_of(file)


def _classes(data: str, registry: Registry) -> tuple[str, int]:
    card = registry.card("datasets", data)
    return data, card.classes


def _needs_teacher(method: MethodSpec) -> bool:
    stages = method.stages.values()
    made = [made for stage in stages for made in (stage.source, stage.begins) if made is not None]
    terms = [term for stage in stages for term in stage.losses.values()]
    return (
        method.starts_from == "teacher"
        or any(one.teacher for one in made)
        or any("teacher" in term.loss.inputs or term.of == "teacher" for term in terms)
    )


def _hook_origin(term: Tree) -> str:
    """Where a term says its hook points."""
    key = next((key for key in ("hook", "student", "teacher") if key in term.data), None)
    return term.origin((key,) if key else ())


def _check_point(point: str, model: ModelSpec, place: str, where: str) -> None:
    """A hook point that a hooks card lacks is told now; derived points are known only once the model is built."""
    if point == "logits" or model.hooks == "derived":
        return
    if point not in {*model.hooks, *POINT_GROUPS}:
        raise UserError(
            f"{place}: '{model.name}' has no hook point '{point}'",
            where=where,
            hint="it has: " + ", ".join([*model.hooks, *POINT_GROUPS, "logits"]),
        )


def _check_channels(normalization: Any, data: DataSpec, where: str) -> None:
    if len(normalization.mean) != data.channels or len(normalization.std) != data.channels:
        raise UserError(
            f"normalization of {len(normalization.mean)} channels for the {data.channels} channels of '{data.name}'",
            where=where,
        )


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
