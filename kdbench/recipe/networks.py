"""The networks of a cell: models with their options and weights, and teachers, whose own recipes may train them."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kdbench.cards import DatasetCard, TeacherCard, Weights
from kdbench.errors import UserError, counted
from kdbench.files import find_weights, sha256_of, weight_folders
from kdbench.names import own_name
from kdbench.recipe.beside import origin_of
from kdbench.recipe.choices import StudentChoice, TeacherChoice
from kdbench.recipe.loading import find
from kdbench.recipe.model_specs import ModelSpec, WeightsSpec
from kdbench.recipe.named import named_spec
from kdbench.recipe.several import several_teachers
from kdbench.recipe.specs import CellSpec, TeacherSpec
from kdbench.registry import Registry
from kdbench.signature import written
from kdbench.tree import Tree

# (a teacher's own recipe, where it is named, folder of the data) -> the one cell that it plans.
TeacherCell = Callable[[str, str, str | None], CellSpec]

_MODEL_KEYS = ("name", "hooks", "image_size", "weights", "entry", "start")


def student_spec(choice: StudentChoice, tree: Tree, registry: Registry) -> ModelSpec:
    """The student that a recipe chooses; `tree`: of the choice."""
    model = model_spec(tree, registry, choice.hooks, choice.image_size)
    if choice.weights is not None:
        sha256 = _file_hash(_existing(choice.weights, tree.origin(("weights",))))
        given = {"weights": choice.weights, "weights_sha256": sha256, "entry": choice.entry}
        return model.model_copy(update=given)
    if choice.start is not None:
        return model.model_copy(update={"start": _start(choice.start, model, tree.origin(("start",)), registry)})
    return model


def model_spec(
    tree: Tree, registry: Registry, hooks: dict[str, str] | None = None, image_size: int | None = None
) -> ModelSpec:
    """A model with the options that stand beside its name, and its card's hook points where none are given."""
    card = registry.card("models", tree.data["name"], tree.origin(("name",)))
    where = registry.tree("models", tree.data["name"]).origin(("hooks",))
    points: Any = "derived" if card.hooks == "derived" else registry.card("hooks", card.hooks, where).points
    spec: ModelSpec = named_spec(
        "models", tree, registry, own=_MODEL_KEYS, hooks=hooks or points, image_size=image_size
    )
    return spec


def _start(teacher: str, model: ModelSpec, where: str, registry: Registry) -> WeightsSpec:
    """The weights of a teacher card, for a student of the same model."""
    card: TeacherCard = registry.card("teachers", teacher, where)
    if card.weights is None:
        what = f"the teacher '{teacher}' has no weight file (a recipe trains it): no student can start from it"
        raise UserError(what, where)
    theirs = _teacher_model(registry.tree("teachers", teacher).at("model"), registry, hooks=card.model.hooks)
    if (theirs.name, theirs.options) != (model.name, model.options):
        raise UserError(f"'{teacher}' has the weights of '{theirs.name}', not of '{model.name}'", where=where)
    return weights_spec(teacher, card.weights)


def weights_spec(teacher: str, weights: Weights) -> WeightsSpec:
    """The weights of a teacher card. The function that turns the file's state dict into ours counts under the card's
    key, a user's own by its content."""
    counts_as = {} if weights.layout is None else {weights.layout: own_name(weights.layout) or f"{teacher}.layout"}
    return WeightsSpec(**weights.model_dump(), counts_as=counts_as)


def teacher_spec(
    choice: TeacherChoice, tree: Tree, registry: Registry, trained: TeacherCell, weights_must_exist: bool
) -> TeacherSpec:
    """The teacher that a recipe chooses: one of a card, or one with the user's own weights.

    Args:
        tree: of the recipe. trained: gives the cell that trains a teacher by its own recipe.
    """
    if choice.several is not None:
        members = []
        for number, one in enumerate(choice.several):
            own_tree = Tree(tree.data | {"teacher": tree.data["teacher"]["several"][number]}, tree.origins)
            members.append(teacher_spec(one, own_tree, registry, trained, weights_must_exist))
        return several_teachers(members, tree.origin(("teacher",)))
    if choice.untrained:
        own = registry.card("datasets", tree.data["data"]["name"]).normalization
        model = _teacher_model(tree.at("teacher", "model"), registry, choice.image_size, choice.own_hooks)
        return TeacherSpec(name=model.name, model=model, normalization=choice.normalization or own)
    if choice.name is None:
        return _own_teacher(choice, tree, registry)
    name, where = choice.name, tree.origin(("teacher", "name"))
    card: TeacherCard = registry.card("teachers", name, where)
    data = tree.data["data"]["name"]
    theirs: DatasetCard = registry.card("datasets", card.data.name, registry.tree("teachers", name).origin(("data",)))
    foreign = (card.data.name, theirs.classes) != (data, registry.card("datasets", data).classes)
    if foreign and not card.transfers:
        what = f"the teacher '{name}' was trained on the classes of '{card.data.name}', not of '{data}'"
        raise UserError(what, where, "choose a teacher for this data ('kdbench ls teachers')")
    size = choice.image_size or card.image_size
    model = _teacher_model(
        registry.tree("teachers", name).at("model"), registry, size, choice.hooks or card.model.hooks
    )
    weights = None if choice.trained else card.weights
    trained_by = None
    if weights is None:
        trained_by = _training(name, card, model, tree, registry, trained)
        model = model.model_copy(update={"image_size": size or trained_by.student.image_size})
    elif weights.url is None and weights_must_exist:
        _existing(weights.file, where)
    own = trained_by.protocol.normalization if trained_by is not None else theirs.normalization
    return TeacherSpec(
        name=name,
        model=model,
        normalization=choice.normalization or card.normalization or own,
        weights=weights_spec(name, weights) if weights is not None else None,
        trained_by=trained_by,
        accuracy=card.accuracy if weights is not None and not foreign else None,
        resize=card.resize,
        classes=theirs.classes if foreign else None,
        known_classes=trained_by.data.only_classes if trained_by is not None else None,
    )


def _training(
    name: str, card: TeacherCard, model: ModelSpec, tree: Tree, registry: Registry, trained: TeacherCell
) -> CellSpec:
    """The cell that trains a card's teacher."""
    if card.recipe is None:
        raise UserError(
            f"the teacher '{name}' has no recipe, so it cannot be trained", where=tree.origin(("teacher", "trained"))
        )
    origin = registry.tree("teachers", name).origin(("recipe",))
    folder = Path(origin.rpartition(":")[0]).parent
    places = (folder, folder / "recipes", folder.parent / "recipes")
    named = [folder / card.recipe, *(place / f"{card.recipe}.yaml" for place in places)]
    beside = [file for file in named if file.is_file()]
    recipe = str(beside[0]) if beside else card.recipe
    try:
        find(recipe)
    except UserError as error:
        hint = f"put it beside the card, or into a folder 'recipes' there; {error.hint}"
        raise UserError(f"teacher '{name}': {error.what}", origin, hint) from None
    cell = trained(recipe, origin, tree.data["data"].get("root"))
    if cell.method.predicts is not None:
        raise UserError(
            f"teacher '{name}': students of the method '{cell.method.name}' answer through modules of the method, and "
            "cannot teach",
            where=origin,
        )
    if (cell.student.name, cell.student.options) != (model.name, model.options):
        raise UserError(f"teacher '{name}': its recipe trains '{cell.student.name}', not '{model.name}'", where=origin)
    return cell


def _own_teacher(choice: TeacherChoice, tree: Tree, registry: Registry) -> TeacherSpec:
    """A teacher that the recipe itself describes: a model and the user's own weights."""
    assert choice.weights is not None
    where = tree.origin(("teacher", "weights"))
    file = _existing(choice.weights, where)
    digest = _file_hash(file)
    data = tree.data["data"]["name"]
    card: DatasetCard = registry.card("datasets", data)
    training = origin_of(file)
    if training is not None and choice.classes is None and not training.knows(data, card.classes):
        raise UserError(
            f"these weights know the {counted(training.data.classes, 'class')} of '{training.data.name}', by the "
            f"record beside them, not the {card.classes} of '{data}'",
            where=where,
            hint=f"'classes: {training.data.classes}' beside them lets their features teach; where the classes are the "
            f"same, a teacher card with 'data: {data}' says so",
        )
    size = choice.image_size
    if size is None and choice.classes is None and training is not None and training.image_size != card.image_size:
        size = training.image_size
    model = _teacher_model(tree.at("teacher", "model"), registry, size, choice.own_hooks)
    return TeacherSpec(
        name=f"{model.name} ({file.name})",
        model=model,
        normalization=choice.normalization or (training or card).normalization,
        weights=WeightsSpec(file=str(file), sha256=digest, entry=choice.entry),
        accuracy=choice.accuracy,
        resize=choice.resize,
        classes=choice.classes,
        known_classes=training.data.only_classes if training is not None else None,
    )


def _teacher_model(
    tree: Tree, registry: Registry, image_size: int | None = None, hooks: dict[str, str] | None = None
) -> ModelSpec:
    for key in ("weights", "entry", "start", "image_size"):
        if key in tree.data:
            hint = f"move '{key}' one level up"
            raise UserError(f"write a teacher's '{key}' next to its 'model', not inside it", tree.origin((key,)), hint)
    return model_spec(tree, registry, hooks, image_size)


def _existing(weights: str, where: str) -> Path:
    file = find_weights(weights, where)
    if file is None:
        tried = ", ".join(str(folder) for folder in weight_folders())
        hint = f"looked for it as a path and in {tried}; set KDBENCH_WEIGHTS to the folder that holds it"
        raise UserError(f"there is no weight file '{weights}'", where, hint)
    return file


def _file_hash(file: Path) -> str:
    """sha256 of the user's weights. UserError where a cell's record beside them names another one."""
    return _hash_of(file, written(file))


@functools.cache
def _hash_of(file: Path, of: tuple[int, int]) -> str:
    origin_of(file)
    return sha256_of(file)
