"""`kdbench show`: one card, with the options of its target, or one recipe."""

from __future__ import annotations

import itertools
from typing import Annotated, Any

import typer

from kdbench.cards import KINDS
from kdbench.cli.console import page, plain_table, print_yaml
from kdbench.cli.ls import ALIASES
from kdbench.cli.options import RegistryOption
from kdbench.errors import UserError, did_you_mean
from kdbench.models.points import LOGITS
from kdbench.reading import read_text
from kdbench.recipe.datasets import spec_of_card
from kdbench.recipe.loading import dump, find, recipe_names
from kdbench.recipe.methods import settings_of
from kdbench.recipe.networks import model_spec
from kdbench.registry import Registry
from kdbench.signature import REQUIRED
from kdbench.tree import Tree

EXAMPLES = """
kdbench show methods ab
kdbench show losses kd
kdbench show recipes ab_wrn
"""


def command(
    kind: Annotated[
        str, typer.Argument(metavar="KIND", help="Kind of card, or 'recipes'. Optional if the name is unique.")
    ],
    name: Annotated[str | None, typer.Argument(metavar="NAME", help="Key of the card.")] = None,
    registry: RegistryOption = None,
) -> None:
    """Show a card with its includes resolved, its file and line, the options it accepts, and its paper."""
    cards = Registry(registry or ())
    console = page()
    kind = ALIASES.get(kind, kind)
    if name is None:
        if kind in (*KINDS, "recipes"):
            raise UserError(f"which of the {kind}?", "kdbench show", f"'kdbench ls {kind}' lists them")
        kind, name = _kind_of(kind, cards), kind
    if kind == "recipes":
        print_yaml(read_text(find(name)))
        return
    if kind not in KINDS:
        raise UserError(f"unknown kind '{kind}'", where="kdbench show", hint=did_you_mean(kind, [*KINDS, "recipes"]))
    card = cards.card(kind, name)
    tree = cards.tree(kind, name)
    console.print(f"# {tree.origin(())}", style="dim")
    print_yaml(dump({name: tree.data}))
    if hasattr(card, "target"):
        table = plain_table("option", "type", "default")
        # What the card or its name sets is the default of what is left to a recipe.
        given = getattr(card, "args", {}) | cards.fields(kind, name)
        for option in cards.settable(card).values():
            table.add_row(option.name, option.annotation, _value(given.get(option.name, option.default)))
        if table.row_count:
            console.print(table)
    if kind == "methods":
        table = plain_table("setting", "value", "short name")
        for path, (short, value) in settings_of(name, cards).items():
            table.add_row(path, _value(value), f"method.{short}" if short else "")
        console.print(table)
    if kind == "models" and (points := _hook_points(cards, name)):
        console.print(f"hook points: {', '.join([*points, LOGITS])}")
        console.print(f"hooks: {{{', '.join(f'{point}: {place}' for point, place in points.items() if place)}}}")
    paper = getattr(card, "paper", None)
    if paper:
        entry = cards.card("papers", paper, tree.origin(("paper",)))
        console.print(f"{entry.authors}: {entry.title}. {entry.venue} {entry.year}.")


def _kind_of(name: str, cards: Registry) -> str:
    """The kind of the one card of this name; "recipes" where there is none, and a recipe."""
    names = {kind: cards.names(kind) for kind in KINDS}
    found = [kind for kind in KINDS if name in names[kind]]
    if len(found) == 1:
        return found[0]
    if found:
        what, hint = f"several kinds have a card '{name}': {', '.join(found)}", "name the kind first"
        raise UserError(what, "kdbench show", f"{hint}: kdbench show {found[0]} {name}")
    if name in recipe_names():
        return "recipes"
    near = did_you_mean(name, {*recipe_names(), *itertools.chain(*names.values())})
    raise UserError(f"there is no card or recipe '{name}'", "kdbench show", near)


def _value(value: Any) -> str:
    return "required" if value is REQUIRED else repr(value)


def _hook_points(cards: Registry, name: str) -> dict[str, str]:
    """The hook points of a model, in order, and how a recipe writes their places; none where it cannot be built as it
    stands, without options. Patches are found by running the network alone."""
    card = cards.card("models", name)
    if card.hooks != "derived":
        points = cards.card("hooks", card.hooks, cards.tree("models", name).origin(("hooks",))).points
        return dict(points)
    from kdbench.engine.networks.build import build_extractor, build_model

    # They are found by running the network, on images that any of them takes.
    largest = max(cards.names("datasets"), key=lambda data: cards.card("datasets", data).image_size)
    try:
        data, spec = spec_of_card(largest, cards), model_spec(Tree.of({"name": name}, "kdbench show"), cards)
        places = build_extractor(build_model(spec, data), spec, data).places
    except UserError:
        return {}
    return {point: "" if place.grid else str(place) for point, place in places.items()}
