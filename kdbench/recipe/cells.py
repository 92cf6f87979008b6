"""One cell of a recipe: every name looked up, every option typed, what cannot go together refused."""

from __future__ import annotations

from kdbench.cards import ProtocolCard
from kdbench.errors import UserError
from kdbench.models.points import POINT_GROUPS
from kdbench.recipe.anchoring import check_route
from kdbench.recipe.choices import Recipe
from kdbench.recipe.datasets import check_channels, data_spec, target_spec, with_folders
from kdbench.recipe.loading import typed
from kdbench.recipe.methods import check_target, check_trains_teacher, method_spec, needs_teacher, terms_of
from kdbench.recipe.networks import TeacherCell, student_spec, teacher_spec
from kdbench.recipe.specs import CellSpec, DataSpec, ModelSpec, ProtocolSpec
from kdbench.recipe.variants import Variant
from kdbench.registry import Registry
from kdbench.tree import Tree
from kdbench.validation import validated


def cell_spec(
    variant: Variant, seed: int, registry: Registry, trained: TeacherCell, weights_must_exist: bool = True
) -> tuple[CellSpec, set[str]]:
    """The cell of a variant and a seed, and the parts of the recipe that mean nothing to it.

    Args:
        trained: gives the cell that trains a teacher by its own recipe.
    """
    tree = with_folders(variant.tree, registry)
    recipe = typed(tree)
    data = data_spec(recipe, tree, registry)
    target = target_spec(recipe, data, tree, registry)
    protocol, protocol_tree = _protocol(recipe, tree, data, target, registry)
    method, foreign, method_tree = method_spec(variant, protocol_tree, registry)
    check_target(method, target, method_tree)
    student = student_spec(recipe.student, tree.at("student"), registry)
    teacher = None
    if not needs_teacher(method):
        foreign = foreign | {"teacher"}
    elif recipe.teacher is None:
        raise UserError(
            f"the method '{method.name}' needs a teacher",
            where=tree.origin(()),
            hint="add 'teacher:' with the key of a teacher card ('kdbench ls teachers')",
        )
    else:
        teacher = teacher_spec(recipe.teacher, tree, registry, trained, weights_must_exist)
        check_channels(teacher.normalization, data, tree.origin(("teacher",)))
        if teacher.untrained:
            check_trains_teacher(method, tree.origin(("teacher",)))
        if method.starts_from == "teacher":
            # Its weights mean what they do for images that are normalized as its own were.
            protocol = protocol.model_copy(update={"normalization": teacher.normalization})
    check_route(method, teacher, data, tree.origin(("teacher",)))
    chosen = {key: getattr(recipe, key) for key in ("evaluations", "compute", "route", "keep")}
    spec = CellSpec(
        data=data,
        target=target,
        teacher=teacher,
        student=student,
        method=method,
        protocol=protocol,
        seed=seed,
        **chosen,
    )
    _check_points(spec, method_tree)
    return spec, foreign


def _protocol(
    recipe: Recipe, tree: Tree, data: DataSpec, target: DataSpec | None, registry: Registry
) -> tuple[ProtocolSpec, Tree]:
    """The protocol's card with the recipe's own fields laid over it, and its tree."""
    given = tree.at("protocol")
    name = given.data.get("name")
    if not isinstance(name, str):
        raise UserError("no protocol is named", where=tree.origin(("protocol",)), hint="add 'protocol: ab_official'")
    merged = registry.tree("protocols", name, given.origin(("name",)))
    own = given.without("name")
    for budget in ("epochs", "steps"):
        if getattr(recipe, budget) is not None:
            own = own.put((budget,), tree.at(budget))
    if "epochs" in own.data or "steps" in own.data:
        merged = merged.without("epochs", "steps")
    merged = merged.merged(own)
    card = validated(ProtocolCard, merged, f"protocol '{name}'")
    normalization = card.normalization or data.normalization
    check_channels(normalization, data, tree.origin(("protocol",)))
    augmentation = card.augmentation
    if augmentation.mode == "reflect" and augmentation.padding >= data.image_size:
        raise UserError(
            f"reflect padding of {augmentation.padding} does not fit images of {data.image_size} pixels",
            where=merged.origin(("augmentation", "padding")),
            hint="it must be smaller than the image",
        )
    resident = [part.name for part in (data, target) if part is not None and not part.streamed]
    if augmentation.resized_crop and resident:
        raise UserError(
            f"'resized_crop' crops pictures of any size while they are read; those of '{resident[0]}' are in memory",
            where=merged.origin(("augmentation", "resized_crop")),
            hint="use 'padding', or a data card with 'streamed: true'",
        )
    same = {key: getattr(card, key) for key in ProtocolSpec.model_fields if key not in ("name", "normalization")}
    return ProtocolSpec(name=name, normalization=normalization, **same), merged


def _check_points(spec: CellSpec, method: Tree) -> None:
    """Hook points that a hooks card lacks are told now; derived ones are known only once the model is built."""
    teacher = spec.teacher
    for stage, name, term in terms_of(spec.method):
        what = f"method '{spec.method.name}', stage '{stage}', loss '{name}'"
        tree = method.at("stages", stage, "losses", name)
        where = tree.origin(next(((key,) for key in ("hook", "student", "teacher") if key in tree.data), ()))
        if {"student", "other"} & {*term.loss.inputs}:
            own = teacher.model if teacher is not None and term.of == "teacher" else spec.student
            for point in term.points("student"):
                _check_point(point, own, what, where)
        if teacher is None or "teacher" not in term.loss.inputs:
            continue
        for point in term.points("teacher"):
            _check_point(point, teacher.model, what, where)
        if teacher.classes is not None and term.teacher == "logits" and term.connector is None and not term.through:
            raise UserError(
                f"{what}: the logits of '{teacher.name}' are of its own {teacher.classes} classes, not of the "
                f"{spec.data.classes} of '{spec.data.name}'",
                where=where,
                hint="it can teach its features, or logits through a connector: methods like at, hint, ab_transfer",
            )


def _check_point(point: str, model: ModelSpec, what: str, where: str) -> None:
    if model.hooks != "derived" and point not in (known := [*model.hooks, *POINT_GROUPS, "logits"]):
        raise UserError(
            f"{what}: '{model.name}' has no hook point '{point}'", where=where, hint="it has: " + ", ".join(known)
        )
