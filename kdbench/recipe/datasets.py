"""The data of a cell, and the target domain: their cards with what the recipe chooses of them."""

import os
from pathlib import Path
from typing import Any

from kdbench.errors import UserError, counted
from kdbench.files import expanded, home
from kdbench.image_cards import Normalization
from kdbench.recipe.choices import Recipe
from kdbench.recipe.model_specs import DataSpec
from kdbench.recipe.named import spec_of
from kdbench.recipe.timeline import validation_images
from kdbench.registry import Registry
from kdbench.tree import Tree


def with_folders(tree: Tree, registry: Registry) -> Tree:
    """A recipe whose data are named by cards: a folder of pictures gets one, made from what is in it."""
    for key in ("data", "target"):
        choice = tree.data.get(key)
        name = choice.get("name") if isinstance(choice, dict) else None
        if not isinstance(name, str) or "root" in choice:
            continue
        # A card that was made of the folder itself, when this recipe was read before, says nothing against it.
        if name in registry.trees["datasets"] and name not in registry.notes:
            continue
        if not (any(mark in name for mark in ("/", os.sep)) or name.startswith((".", "~")) or os.path.isdir(name)):
            continue
        where = tree.origin((key, "name"))
        folder = expanded(name, where)
        given = {**choice, "name": _card_of(folder, where, registry), "root": str(folder.resolve().parent)}
        tree = Tree({**tree.data, key: given}, {**tree.origins, (key, "root"): where})
    return tree


def _card_of(folder: Path, where: str, registry: Registry) -> str:
    """The name of a card for a folder of pictures, which is added to the registry."""
    from kdbench.data.survey import folder_name, survey

    try:
        seen, name = survey(folder, home() / "cache"), folder_name(folder)
    except UserError as error:
        raise UserError(f"{error.where}: {error.what}" if error.where else error.what, where, error.hint) from None
    cards = registry.trees["datasets"]
    card = Tree.of(seen.card(folder.resolve().name), str(folder.resolve()))
    if name in cards and cards[name].data != card.data:
        name = f"my_{name}"
    if name in cards and cards[name].data != card.data:
        raise UserError(f"there are several data sets called '{name}'", where=where, hint="rename the folder")
    cards.setdefault(name, card)
    registry.notes[name] = [f"data {folder}: {'; '.join(seen.sentences())}"]
    return name


def data_spec(recipe: Recipe, tree: Tree, registry: Registry) -> DataSpec:
    """The data that a recipe chooses. UserError for classes that there are not, or too few images."""
    choice = recipe.data
    card = registry.card("datasets", choice.name, tree.origin(("data",)))
    if bad := [label for label in choice.only_classes or () if label >= card.classes]:
        hint = f"its labels are 0 to {card.classes - 1}"
        raise UserError(f"'{choice.name}' has no class {bad[0]}", tree.origin(("data", "only_classes")), hint)
    # All classes are no choice among them.
    only = sorted(chosen) if 0 < len(chosen := set(choice.only_classes or ())) < card.classes else None
    data = spec_of_card(registry=registry, **choice.model_dump() | {"only_classes": only})
    origins = (tree.origin(("data", key)) for key in ("validation", "per_class"))
    check_parts(data, *origins)
    return data


def check_parts(data: DataSpec, where: str, where_chosen: str) -> None:
    """Raises UserError for a validation part that cannot be, or that leaves too few images to train on.

    Args:
        where: where the size of the part stands.
        where_chosen: where the number of training images stands.
    """
    size, held_out = data.validation, validation_images(data)
    if not isinstance(size, int) and size >= 1:
        what = f"the size of a validation part is a share below 1 or a whole number of images, not {size}"
        raise UserError(what, where)
    left = data.train - held_out
    if left < data.classes or (data.per_class or 0) * data.classes > left:
        here = f"{counted(data.train, 'training image')} of {counted(data.classes, 'class')}"
        what = f"'{data.name}' has {here}: too few for this choice"
        most = f"'per_class' can be {left // data.classes} at most" if left >= data.classes else ""
        kept = f"after the validation split {max(left, 0)} of them are left" if held_out else ""
        raise UserError(what, where_chosen if most else where, "; ".join(filter(None, (kept, most))))
    if size > 0 and held_out < data.classes:
        known = f"the {counted(data.classes, 'class')} of '{data.name}'"
        what = f"{counted(held_out, 'image')} for validation: too few for {known}"
        raise UserError(what, where, "give a share below 1, as 0.2, or a larger number of images")


def target_spec(recipe: Recipe, data: DataSpec, tree: Tree, registry: Registry) -> DataSpec | None:
    """The target domain. UserError for one of other classes, channels or image size than the source."""
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
    return spec_of_card(choice.name, registry, root=choice.root)


def _sizes(classes: int, channels: int, size: int) -> str:
    return f"{counted(classes, 'class')} of {channels}×{size}×{size}"


def spec_of_card(name: str, registry: Registry, **more: Any) -> DataSpec:
    spec: DataSpec = spec_of("datasets", name, registry, registry.card("datasets", name).args, **more)
    return spec


def check_channels(normalization: Normalization, data: DataSpec, where: str, hint: str = "") -> None:
    """Raises UserError for a normalization of another number of channels."""
    if len(normalization.mean) != data.channels or len(normalization.std) != data.channels:
        what = (
            f"normalization of {counted(len(normalization.mean), 'channel')} for the {data.channels} of '{data.name}'"
        )
        raise UserError(what, where, hint)
