"""`kdbench ls`: the cards and recipes of this installation."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from kdbench.cli.options import RegistryOption
from kdbench.errors import UserError, did_you_mean

EXAMPLES = "Examples:  kdbench ls   ·   kdbench ls methods   ·   kdbench ls teachers --registry my_cards"
ALIASES = {"data": "datasets"}


def command(
    kind: Annotated[
        str | None, typer.Argument(help="methods, models, losses, data, teachers, recipes, protocols, …")
    ] = None,
    registry: RegistryOption = None,
) -> None:
    """List the cards of a KIND, or all kinds with the number of their cards."""
    from kdbench.cards import KINDS
    from kdbench.cli.console import console as page
    from kdbench.cli.console import listing
    from kdbench.recipe.loading import recipe_names
    from kdbench.registry import Registry

    cards = Registry(registry or ())
    console = page()
    if kind is None:
        table = listing("kind", "cards", "for example")
        for name in KINDS:
            table.add_row(name, str(len(cards.keys(name))), ", ".join(cards.names(name)[:5]))
        table.add_row("recipes", str(len(recipe_names())), ", ".join(recipe_names()[:5]))
        console.print(table)
        return
    kind = ALIASES.get(kind, kind)
    if kind == "recipes":
        table = listing("recipe", "what it shows")
        for name in recipe_names():
            table.add_row(name, headline(name))
    elif kind in KINDS:
        table = listing(kind, "what it is", "paper")
        for key in cards.keys(kind):
            data = cards.tree(kind, cards.trees[kind][key].data.get("examples", [key])[0] if "{" in key else key).data
            shown = key.replace("{", "<").replace("}", ">")
            table.add_row(shown, about(data), str(data.get("paper", "")))
    else:
        raise UserError(
            f"unknown kind '{kind}'", where="kdbench ls", hint=did_you_mean(kind, [*KINDS, *ALIASES, "recipes"])
        )
    console.print(table)


def headline(name: str) -> str:
    """First comment line of a recipe."""
    from kdbench.recipe.loading import find

    first = find(name).read_text(encoding="utf-8").splitlines()[0]
    return first.removeprefix("#").strip()


def about(data: dict[str, Any]) -> str:
    """One line on a card."""
    for key in ("title", "follows", "note", "target"):
        if data.get(key):
            text = str(data[key]).split("\n")[0]
            return text if len(text) <= 90 else text[:87] + "…"
    if "weights" in data:
        return f"{data['model']['name']}, {data.get('accuracy', '?')} % on {data['data']['name']}"
    if "points" in data:
        return ", ".join(data["points"])
    return ""
