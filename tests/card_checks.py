"""Checks cards as thoroughly as using them does, without importing torch."""

from functools import reduce
from pathlib import Path
from typing import Any

from kdbench.cards import MethodCard
from kdbench.errors import UserError, did_you_mean
from kdbench.recipe.loading import find, load
from kdbench.recipe.methods import method_spec
from kdbench.recipe.named import named_spec
from kdbench.recipe.networks import model_spec
from kdbench.recipe.planning import teacher_of_card
from kdbench.recipe.stages import NAMED_KINDS
from kdbench.recipe.variants import Variant
from kdbench.registry import Registry
from kdbench.tree import Tree
from kdbench.validation import fields_at

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
        for parameter, path in card.parameters.items():
            _check_parameter(tree, parameter, path, registry)
    elif kind == "studies":
        for profile, recipes in card.profiles.items():
            for index, recipe in enumerate(recipes):
                origin = tree.origin(("profiles", profile, index))
                try:
                    load(find(recipe, Path(origin.rpartition(":")[0]).parent))
                except UserError as error:
                    raise UserError(error.what, where=error.where or origin, hint=error.hint) from None
    elif kind in ("datasets", "losses", "connectors", "sources", "operations"):
        known = registry.settable(card.target, card)
        for option in getattr(card, "args", {}):
            if option not in known:
                what = f"unknown key '{option}' in 'args'"
                raise UserError(what, tree.origin(("args", option)), did_you_mean(option, known))


def _check_parameter(tree: Tree, name: str, path: str, registry: Registry) -> None:
    """A short name must point at a key that exists: of a stage, of a loss term, or an option of what is named there."""
    *parents, last = path.split(".")
    known: list[str] = []
    inside: Any = reduce(lambda at, key: at.get(key) if isinstance(at, dict) else None, parents, tree.data)
    if isinstance(inside, dict) and parents:
        known = fields_at(MethodCard, tuple(parents)) or list(inside)
        kinds = NAMED_KINDS | {"predicts": "connectors"}
        kind = {"losses": "losses", "modules": "connectors"}.get(["", *parents][-2], kinds.get(parents[-1]))
        if kind is not None:
            card = registry.card(kind, inside["loss" if kind == "losses" else "name"])
            known += registry.settable(card.target, card)
    if last not in known:
        where = tree.origin(("parameters", name))
        raise UserError(
            f"the parameter '{name}' points to nothing: {path}", where=where, hint=did_you_mean(last, known)
        )
