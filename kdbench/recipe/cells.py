"""One cell of a recipe: every name looked up, every option typed, what cannot go together refused."""

from typing import Any

from kdbench.cards import ProtocolCard
from kdbench.errors import UserError, counted
from kdbench.image_cards import AugmentationCard, AugmentationFields
from kdbench.models.points import IMAGES, POINT_GROUPS, TRANSFORMERS, any_gradient, numbered, place_of_gradient
from kdbench.recipe.anchoring import check_route
from kdbench.recipe.choices import Recipe
from kdbench.recipe.datasets import check_channels, data_spec, target_spec, with_folders
from kdbench.recipe.loading import typed_recipe
from kdbench.recipe.method_specs import SourceSpec, TermSpec
from kdbench.recipe.methods import check_target, check_trains_teacher, method_spec, needs_teacher
from kdbench.recipe.model_specs import DataSpec, ModelSpec
from kdbench.recipe.named import named_spec
from kdbench.recipe.networks import TeacherCell, student_spec, teacher_spec
from kdbench.recipe.specs import AugmentationSpec, CellSpec, ProtocolSpec
from kdbench.recipe.variants import Variant
from kdbench.registry import Registry
from kdbench.tree import Tree
from kdbench.validation import validated


def cell_spec(
    variant: Variant, seed: int, registry: Registry, trained: TeacherCell, weights_must_exist: bool
) -> tuple[CellSpec, set[str], Tree]:
    """The cell of a variant and a seed, the parts of the recipe that mean nothing to it, and the tree of its method.

    Args:
        trained: gives the cell that trains a teacher by its own recipe.
    """
    tree = with_folders(variant.tree, registry)
    recipe = typed_recipe(tree)
    data = data_spec(recipe, tree, registry)
    target = target_spec(recipe, data, tree, registry)
    protocol, protocol_tree = _protocol(recipe, tree, data, registry)
    method, foreign, method_tree = method_spec(variant, protocol_tree, registry)
    check_target(method, target, method_tree)
    student = student_spec(recipe.student, tree.at("student"), registry).seen_with(data)
    teacher = None
    if not needs_teacher(method):
        foreign = foreign | {"teacher"}
    elif recipe.teacher is None:
        hint = "add 'teacher:' with the key of a teacher card ('kdbench ls teachers')"
        raise UserError(f"the method '{method.name}' needs a teacher", tree.origin(()), hint)
    else:
        teacher = teacher_spec(recipe.teacher, tree, registry, trained, weights_must_exist)
        teacher = teacher.model_copy(update={"model": teacher.model.seen_with(data)})
        check_channels(teacher.normalization, data, tree.origin(("teacher",)))
        if teacher.untrained:
            check_trains_teacher(method, tree.origin(("teacher",)))
        if method.starts_from == "teacher":
            if teacher.members:
                what = f"a student of the method '{method.name}' starts from its teacher, and this recipe has several"
                raise UserError(what, tree.origin(("teacher",)), "name one teacher")
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
    _check_points(spec, method_tree, _with_own_hooks(recipe, spec))
    _check_mixed(spec, protocol_tree, registry)
    if protocol.ema is not None:
        _check_average(spec, protocol_tree.origin(("ema",)))
    _check_sizes(spec, tree.origin(("teacher",)))
    return spec, foreign, method_tree


def _protocol(recipe: Recipe, tree: Tree, data: DataSpec, registry: Registry) -> tuple[ProtocolSpec, Tree]:
    """The protocol's card with the recipe's own fields laid over it, and its tree."""
    given = tree.at("protocol")
    name = given.data.get("name")
    if not isinstance(name, str):
        raise UserError("the recipe names no protocol", tree.origin(("protocol",)), "add 'protocol: ab_official'")
    merged = registry.tree("protocols", name, given.origin(("name",)))
    own = given.without("name")
    for budget in ("epochs", "steps"):
        if getattr(recipe, budget) is not None:
            own = own.put((budget,), tree.at(budget))
    if "epochs" in own.data or "steps" in own.data:
        merged = merged.without("epochs", "steps")
    merged = merged.merged(own)
    card = validated(ProtocolCard, merged, f"protocol '{name}'", ("protocol",))
    normalization = card.normalization or data.normalization
    hint = "'protocol.normalization=null' takes that of the data card"
    check_channels(normalization, data, tree.origin(("protocol",)), hint)
    views: dict[str, Any] = {
        part: _augmentation(chosen, merged.at(part) if part in merged.data else Tree.of({}, name), data, registry)
        for part in ("augmentation", "second")
        if (chosen := getattr(card, part)) is not None
    }
    fields = ProtocolSpec.model_fields.keys() - {"name", "normalization", *views}
    same = {key: getattr(card, key) for key in fields}
    return ProtocolSpec(name=name, normalization=normalization, **views, **same), merged


def _augmentation(card: AugmentationCard, tree: Tree, data: DataSpec, registry: Registry) -> AugmentationSpec:
    """An augmentation, its transforms looked up."""
    if card.mode == "reflect" and card.padding >= data.image_size:
        what = f"reflect padding of {card.padding} does not fit images of {data.image_size} pixels"
        raise UserError(what, tree.origin(("padding",)), "it must be smaller than the image")
    places = [tree.at("transforms", i) for i in range(len(card.transforms or ()))]
    transforms = [named_spec("transforms", place, registry) for place in places]
    same = {key: getattr(card, key) for key in AugmentationFields.model_fields}
    return AugmentationSpec(transforms=transforms or None, **same)


def _check_mixed(spec: CellSpec, protocol: Tree, registry: Registry) -> None:
    """Losses with labels take shares of the classes, where Mixup or CutMix make them of labels."""
    views = {"data": ("augmentation", spec.protocol.augmentation)}
    views["second"] = ("second", spec.protocol.second) if spec.protocol.second else views["data"]
    mixed = {name: (part, "mix") for name, (part, chosen) in views.items() if chosen.mix is not None}
    if not mixed:
        return
    for stage, name, term in spec.method.named_terms:
        source = spec.method.stages[stage].source
        what = f"method '{spec.method.name}', stage '{stage}'"
        if source is not None:
            what = f"{what}: the batch source '{source.name}' works on images of one class each"
            raise UserError(what, protocol.origin(next(iter(mixed.values()))), "train this method without 'mix'")
        takes = "labels" not in term.loss.inputs or registry.card("losses", term.loss.name).soft_labels
        if term.input in mixed and not takes:
            raise UserError(
                f"{what}, loss '{name}': '{term.loss.name}' needs one class for each image, and Mixup and CutMix "
                "give several",
                where=protocol.origin(mixed[term.input]),
                hint="train this method without 'mix' ('protocol.augmentation.mix=null'); a loss whose labels may be "
                "shares of classes says 'soft_labels: true' on its card",
            )


def _check_average(spec: CellSpec, where: str) -> None:
    """A moving average is one of a network whose modules stay as they are, and nothing else is tested in its place."""
    changing = next((stage.begins.name for stage in spec.method.stages.values() if stage.begins), None)
    for problem, what in (
        (changing, f"'{changing}' changes the student itself, which its average would not follow"),
        (spec.method.predicts, "the student answers through modules of the method, which are not averaged"),
        (spec.route, "a route keeps the weights themselves, and 'ema' tests their average"),
    ):
        if problem:
            raise UserError(f"method '{spec.method.name}': {what}", where, "leave 'ema' out: 'protocol.ema=null'")


def _with_own_hooks(recipe: Recipe, spec: CellSpec) -> list[ModelSpec]:
    """The networks whose hook points the recipe names itself."""
    given = [spec.student] if recipe.student.hooks is not None else []
    if spec.teacher is not None and recipe.teacher is not None and recipe.teacher.own_hooks is not None:
        given.append(spec.teacher.model)
    return given


def _check_points(spec: CellSpec, method: Tree, given: list[ModelSpec]) -> None:
    """Hook points that a hooks card lacks are told now; derived ones are known only once the model is built.

    Args:
        given: networks whose hook points the recipe names itself.
    """
    teacher = spec.teacher
    for stage, name, term in spec.method.named_terms:
        what = f"method '{spec.method.name}', stage '{stage}', loss '{name}'"
        tree = method.at("stages", stage, "losses", name)
        where = tree.origin(next(((key,) for key in ("hook", "student", "teacher") if key in tree.data), ()))
        _check_gradients(term, spec.method.stages[stage].source, what, where)
        if {"student", "other"} & {*term.loss.inputs}:
            own = teacher.model if teacher is not None and term.of == "teacher" else spec.student
            for point in term.points("student"):
                _check_point(point, own, given, what, where)
        if teacher is None or "teacher" not in term.loss.inputs:
            continue
        for point in term.points("teacher"):
            _check_point(point, teacher.model, given, what, where)
        plain = term.teacher == "logits" and term.connector is None and not term.through
        if teacher.classes is not None and (plain or any_gradient(term.points("teacher"))):
            raise UserError(
                f"{what}: the logits of '{teacher.name}' are of its own {counted(teacher.classes, 'class')}, not of "
                f"the {spec.data.classes} of '{spec.data.name}'",
                where=where,
                hint="it can teach its features, or logits through a connector: methods like at, hint, ab_transfer",
            )


def _check_gradients(term: TermSpec, source: SourceSpec | None, what: str, where: str) -> None:
    """Raises UserError for gradients on images without labels, and behind features: losses take them first."""
    for points in (term.points("student"), term.points("teacher")):
        gradients = [place_of_gradient(point) is not None for point in points]
        if gradients != sorted(gradients, reverse=True):
            hint = "name them first, as in [layer2.gradient, layer2]"
            raise UserError(f"{what}: its gradients stand behind other hook points", where, hint)
        unlabelled = {"target"} - {*(source.gives if source else [])}
        if any(gradients) and (on := unlabelled & {term.input, term.against}):
            whose = f"images of the input set '{on.pop()}' have no labels"
            raise UserError(f"{what}: gradients are of the logit of an image's label, and {whose}", where)


def _check_sizes(spec: CellSpec, where: str) -> None:
    if spec.teacher is None:
        return
    own, taught = spec.student.takes(spec.data).image_size, spec.teacher.knows(spec.data).image_size
    for name, stage in spec.method.stages.items():
        if stage.source is not None and stage.source.teacher and own != taught:
            raise UserError(
                f"method '{spec.method.name}', stage '{name}': '{stage.source.name}' makes images for its teacher, "
                f"which takes {taught}×{taught} pixels; the student takes {own}×{own}",
                where=where,
                hint="give both networks one 'image_size'",
            )


def _check_point(point: str, model: ModelSpec, given: list[ModelSpec], what: str, where: str) -> None:
    place = place_of_gradient(point)
    if place == IMAGES:
        return
    point = point if place is None else place
    if model.hooks == "derived" or (numbered(point)[0] and numbered(point)[1] in POINT_GROUPS):
        return
    if point not in (*model.hooks, *POINT_GROUPS, "logits"):
        groups = [group for group, member in POINT_GROUPS.items() if any(map(member.fullmatch, model.hooks))]
        hint = "it has: " + ", ".join([*model.hooks, *groups, "logits"])
        if model in given:
            hint += (
                f"; the recipe's 'hooks' stand in place of all of its own: name '{point}' there too, at the place that "
                f"'kdbench show models {model.name}' tells"
            )
        elif point.endswith("patches"):
            hint += f"; {TRANSFORMERS}"
        raise UserError(f"{what}: '{model.name}' has no hook point '{point}'", where=where, hint=hint)
