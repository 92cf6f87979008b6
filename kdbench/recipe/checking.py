"""Cards checked as thoroughly as using them does, without torch: for tests, and for users who write cards."""

from __future__ import annotations

from pathlib import Path

from kdbench.cards import Anchors, MethodCard, Named, ProtocolCard, StageCard, TeacherCard, TermCard
from kdbench.errors import UserError, did_you_mean
from kdbench.recipe.loading import find, load
from kdbench.recipe.methods import resolve_method
from kdbench.recipe.networks import model_spec, teacher_spec
from kdbench.recipe.resolving import Variant
from kdbench.registry import Registry
from kdbench.tree import Tree
from kdbench.validation import validated

# A protocol in whose place any other could stand, for checking what a method says of optimizers and schedules.
_PROTOCOL = {"batch_size": 1, "optimizer": {"name": "sgd", "lr": 0.1}, "schedule": {"name": "constant"}, "steps": 1}


def check_card(registry: Registry, kind: str, name: str) -> None:
    """Raises UserError when a card could not be used."""
    card = registry.card(kind, name)
    tree = registry.tree(kind, name)
    where = tree.origin(())
    if getattr(card, "paper", None):
        registry.card("papers", card.paper, tree.origin(("paper",)))
    if kind == "models":
        model_spec(Tree.of({"name": name}, where), registry)
        if card.hooks != "derived":
            registry.card("hooks", card.hooks, tree.origin(("hooks",)))
    elif kind == "protocols":
        for part in ("optimizer", "schedule"):
            registry.options(f"{part}s", getattr(card, part).name, tree.at(part))
    elif kind == "teachers":
        assert isinstance(card, TeacherCard)
        for trained in {card.weights is None, card.recipe is not None}:
            choice = {"data": {"name": card.data.name}, "teacher": {"name": name, "trained": trained}}
            teacher_spec(Tree.of(choice, where), registry, weights_must_exist=False)
    elif kind == "methods":
        protocol = Tree.of(_PROTOCOL, where)
        given = Tree.of({"method": {"name": name}}, where)
        resolve_method(Variant(given, {}), validated(ProtocolCard, protocol, "protocol"), protocol, registry)
        assert isinstance(card, MethodCard)
        for parameter, path in card.parameters.items():
            _check_parameter(card, parameter, path, registry, tree.origin(("parameters", parameter)))
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
                raise UserError(
                    f"unknown key '{option}' in 'args'",
                    where=tree.origin(("args", option)),
                    hint=did_you_mean(option, known),
                )


def _check_parameter(card: MethodCard, name: str, path: str, registry: Registry, where: str) -> None:
    """A short name must point at a key that exists: of a stage, of a loss term, or an option of its loss."""
    parts = path.split(".")
    known: list[str] = []
    if len(parts) >= 3 and parts[0] == "stages" and parts[1] in card.stages:
        known = list(StageCard.model_fields)
        for key, kind in (("source", "sources"), ("begins", "operations")):
            named: Named | None = getattr(card.stages[parts[1]], key)
            if parts[2] == key and len(parts) == 4 and named is not None:
                target = registry.card(kind, named.name)
                options = list(registry.settable(target.target, target))
                if parts[3] not in options:
                    hint = did_you_mean(parts[3], options)
                    raise UserError(f"the parameter '{name}' points to nothing: {path}", where=where, hint=hint)
        if parts[2] == "anchors" and len(parts) == 4 and card.stages[parts[1]].anchors is not None:
            known, parts = list(Anchors.model_fields), parts[1:]
        if parts[2] == "losses" and len(parts) >= 5 and parts[3] in card.stages[parts[1]].losses:
            loss = registry.card("losses", card.stages[parts[1]].losses[parts[3]].loss)
            known = [*TermCard.model_fields, *registry.settable(loss.target, loss)]
            parts = parts[2:]
    if len(parts) < 3 or parts[2] not in known:
        raise UserError(
            f"the parameter '{name}' points to nothing: {path}", where=where, hint=did_you_mean(parts[-1], known)
        )
