"""Checks cards as thoroughly as using them does, without importing torch."""

from pathlib import Path

from kdbench.errors import UserError, did_you_mean
from kdbench.recipe.loading import find, load
from kdbench.recipe.methods import method_spec
from kdbench.recipe.named import named_spec
from kdbench.recipe.networks import model_spec
from kdbench.recipe.planning import teacher_of_card
from kdbench.recipe.variants import Variant
from kdbench.registry import Registry
from kdbench.tree import Tree

# A protocol in whose place any other could stand, for checking what a method says of optimizers and schedules.
_PROTOCOL = {"optimizer": {"name": "sgd", "lr": 0.1}, "schedule": {"name": "constant"}}


def check_card(registry: Registry, kind: str, name: str) -> None:
    """Raises UserError when a card could not be used."""
    card = registry.card(kind, name)
    tree = registry.tree(kind, name)
    where = tree.origin(())
    if getattr(card, "paper", None):
        registry.card("papers", card.paper, tree.origin(("paper",)))
    if kind == "models":
        model_spec(Tree.of({"name": name}, where), registry)
    elif kind == "protocols":
        for part in ("optimizer", "schedule"):
            named_spec(f"{part}s", tree.at(part), registry)
        for part in ("augmentation", "second"):
            for index in range(len((tree.data.get(part) or {}).get("transforms") or ())):
                named_spec("transforms", tree.at(part, "transforms", index), registry)
    elif kind == "teachers":
        for trained in {card.weights is None, card.recipe is not None}:
            teacher_of_card(name, registry, where, trained, weights_must_exist=False)
    elif kind == "methods":
        method_spec(Variant(Tree.of({"method": {"name": name}}, where), {}), Tree.of(_PROTOCOL, where), registry)
    elif kind == "studies":
        for profile, recipes in card.profiles.items():
            for index, recipe in enumerate(recipes):
                origin = tree.origin(("profiles", profile, index))
                try:
                    load(find(recipe, Path(origin.rpartition(":")[0]).parent))
                except UserError as error:
                    raise UserError(error.what, where=error.where or origin, hint=error.hint) from None
    elif kind in ("datasets", "losses", "connectors", "sources", "operations"):
        known = registry.settable(card)
        for option in getattr(card, "args", {}):
            if option not in known:
                what = f"unknown key '{option}' in 'args'"
                raise UserError(what, tree.origin(("args", option)), did_you_mean(option, known))
