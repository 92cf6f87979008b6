"""From one combination of a comparison to a resolved cell: every name looked up, every option typed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from kdbench.cards import POINT_GROUPS, ProtocolCard
from kdbench.errors import UserError
from kdbench.recipe.anchoring import check_route
from kdbench.recipe.datasets import check_channels, data_spec, target_spec
from kdbench.recipe.loading import typed
from kdbench.recipe.methods import check_target, needs_teacher, resolve_method
from kdbench.recipe.networks import model_spec, teacher_spec
from kdbench.recipe.schema import Recipe
from kdbench.recipe.specs import CellSpec, ModelSpec, ProtocolSpec
from kdbench.registry import Registry
from kdbench.tree import Tree
from kdbench.validation import validated


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
    data = data_spec(recipe, tree, registry)
    target = target_spec(recipe, data, tree, registry)
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
    check_channels(protocol.normalization, data, tree.origin(("protocol",)))
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
    check_target(method, target, method_tree)
    student = model_spec(
        tree.at("student"), registry, recipe.student.hooks, recipe.student.weights, recipe.student.start
    )
    teacher = None
    if needs_teacher(method):
        if recipe.teacher is None:
            raise UserError(
                f"the method '{method.name}' needs a teacher",
                where=tree.origin(()),
                hint="add 'teacher:' with the key of a teacher card ('kdbench ls teachers')",
            )
        teacher = teacher_spec(tree, registry, weights_must_exist)
        check_channels(teacher.normalization, data, tree.origin(("teacher",)))
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
