"""The networks of a cell: models with their options and weights, and teachers, whose own recipes may train them."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

from kdbench.cards import DatasetCard, Normalization, TeacherCard, Weights
from kdbench.errors import UserError
from kdbench.files import find_weights, sha256_of, weight_folders
from kdbench.names import own_name
from kdbench.recipe.beside import training_of
from kdbench.recipe.datasets import spec_of_card
from kdbench.recipe.loading import typed
from kdbench.recipe.specs import CellSpec, DataSpec, ModelSpec, TeacherSpec, WeightsSpec
from kdbench.registry import Registry
from kdbench.tree import Tree
from kdbench.validation import validated

# Teachers' recipes that are being planned, to notice a circle.
_open: list[str] = []


def model_spec(
    tree: Tree,
    registry: Registry,
    hooks: dict[str, str] | None = None,
    weights: str | None = None,
    start: str | None = None,
) -> ModelSpec:
    name = tree.data["name"]
    options = registry.options(
        "models", name, tree, ignore=("name", "hooks", "weights", "start"), also_known=("hooks", "weights", "start")
    )
    card = registry.card("models", name)
    points: Any = "derived" if card.hooks == "derived" else registry.card("hooks", card.hooks).points
    sha256 = None
    if weights is not None:
        sha256 = _file_hash(_existing(weights, tree.origin(("weights",))))
    return ModelSpec(
        name=name,
        **registry.code("models", name),
        options=options,
        hooks=hooks or points,
        weights=weights,
        weights_sha256=sha256,
        start=_start(start, name, options, tree.origin(("start",)), registry) if start is not None else None,
    )


def _start(teacher: str, model: str, options: dict[str, Any], where: str, registry: Registry) -> WeightsSpec:
    """The weights of a teacher card, for a student of the same model."""
    card: TeacherCard = registry.card("teachers", teacher, where)
    if card.weights is None:
        raise UserError(f"the teacher '{teacher}' is trained by a recipe: no student can start from it", where=where)
    theirs = _teacher_model(registry.tree("teachers", teacher).at("model"), registry)
    if (theirs.name, theirs.options) != (model, options):
        raise UserError(f"'{teacher}' has the weights of '{theirs.name}', not of '{model}'", where=where)
    return weights_spec(teacher, card.weights)


def weights_spec(teacher: str, weights: Weights) -> WeightsSpec:
    """The weights of a teacher card. The function that turns the file's state dict into ours counts under the card's
    key, a user's own by its content."""
    counts_as = {} if weights.layout is None else {weights.layout: own_name(weights.layout) or f"{teacher}.layout"}
    return WeightsSpec(**weights.model_dump(), counts_as=counts_as)


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
    trained = bool(given.data.get("trained")) or card.weights is None
    trained_by = None
    if trained:
        if card.recipe is None:
            raise UserError(f"the teacher '{name}' has no recipe to be trained by", where=given.origin(("trained",)))
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
        weights=None if trained or card.weights is None else weights_spec(name, card.weights),
        trained_by=trained_by,
        accuracy=None if foreign or trained else card.accuracy,
        classes=known[1] if foreign else None,
        known_classes=trained_by.data.only_classes if trained_by is not None else None,
    )


def teacher_alone(name: str, registry: Registry, where: str) -> tuple[TeacherSpec, DataSpec]:
    """A teacher of a card and the data that it knows, without a recipe."""
    card: TeacherCard = registry.card("teachers", name, where)
    tree = Tree.of({"teacher": {"name": name}, "data": {"name": card.data.name}}, where)
    return teacher_spec(tree, registry), spec_of_card(card.data.name, registry)


def _own_teacher(tree: Tree, given: Tree, registry: Registry) -> TeacherSpec:
    """A teacher that the recipe itself describes: a model and the user's own weights."""
    choice = typed(tree).teacher
    assert choice is not None and choice.weights is not None and choice.model is not None
    file = _existing(choice.weights, given.origin(("weights",)))
    digest = _file_hash(file)
    weights = {"file": str(file), "sha256": digest}
    data = tree.data["data"]["name"]
    card: DatasetCard = registry.card("datasets", data)
    training = training_of(file)
    if training is not None and not training.knows(data, card.classes):
        raise UserError(
            f"these weights know the {training.spec.data.classes} classes of '{training.spec.data.name}', by the "
            f"record beside them, not the {card.classes} of '{data}'",
            where=given.origin(("weights",)),
            hint=f"where the classes are the same, a teacher card with 'data: {data}' says so",
        )
    own = training.normalization if training is not None else card.normalization
    return TeacherSpec.model_validate(
        {
            "name": file.stem,
            "model": _teacher_model(given.at("model"), registry),
            "normalization": choice.normalization or own,
            "weights": weights,
            "accuracy": choice.accuracy,
            "known_classes": training.spec.data.only_classes if training is not None else None,
        }
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
    """sha256 of the user's weights. UserError where a cell's record beside them names another one."""
    training_of(file)
    return sha256_of(file)


def _classes(data: str, registry: Registry) -> tuple[str, int]:
    card = registry.card("datasets", data)
    return data, card.classes
