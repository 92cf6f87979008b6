"""`kdbench ls`: the cards and recipes of this installation."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from kdbench.cards import KINDS, MethodCard
from kdbench.cli.console import page, plain_table
from kdbench.cli.options import RegistryOption
from kdbench.errors import UserError, did_you_mean
from kdbench.recipe.loading import find, recipe_names
from kdbench.registry import Registry

EXAMPLES = """
kdbench ls
kdbench ls methods --json
kdbench ls teachers --registry my_cards
"""
ALIASES = {"data": "datasets"}


def command(
    kind: Annotated[
        str | None,
        typer.Argument(metavar="KIND", help="methods, models, losses, data, teachers, recipes, protocols, …"),
    ] = None,
    registry: RegistryOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print a list for programs.")] = False,
) -> None:
    """List the cards of a KIND, or all kinds. Methods are grouped by what they take from the teacher."""
    cards = Registry(registry or ())
    console = page()
    if kind is None:
        table = plain_table("kind", "cards", "for example")
        for name in KINDS:
            table.add_row(name, str(len(cards.keys(name))), ", ".join(cards.names(name)[:5]))
        table.add_row("recipes", str(len(recipe_names())), ", ".join(recipe_names()[:5]))
        console.print(table)
        return
    kind = ALIASES.get(kind, kind)
    if kind == "recipes":
        rows = [{"recipe": name, "what it shows": headline(name)} for name in recipe_names()]
    elif kind in KINDS:
        rows = [_row(cards, kind, key) for key in cards.keys(kind)]
    else:
        raise UserError(
            f"unknown kind '{kind}'", where="kdbench ls", hint=did_you_mean(kind, [*KINDS, *ALIASES, "recipes"])
        )
    if as_json:
        print(json.dumps(rows, indent=1, ensure_ascii=False))
        return
    table = plain_table(*(title for title in rows[0] if title != "family"))
    for column in table.columns:
        column.no_wrap = kind == "methods"
    for family in FAMILIES if kind == "methods" else [""]:
        own = [row for row in rows if row.get("family", "") == family]
        if own and family:
            table.add_row(family, style="bold")
        for row in own:
            table.add_row(*(text for title, text in row.items() if title != "family"))
        table.add_section()
    console.print(table)


# Of methods, by what reaches the student from its teacher.
FAMILIES = (
    "labels alone",
    "logits",
    "feature maps",
    "pooled features",
    "logits and features",
    "own batches, routes, domains",
)


def family(cards: Registry, name: str) -> str:
    """A method's family, by what the loss terms of its stages read of the teacher."""
    card: MethodCard = cards.card("methods", name)
    terms = [term for stage in card.stages.values() for term in stage.losses.values()]
    if card.starts_from or any(stage.source or stage.anchors or stage.begins for stage in card.stages.values()):
        return FAMILIES[5]
    if any(term.input not in ("data", "second") or term.against or term.of == "teacher" for term in terms):
        return FAMILIES[5]
    origin = cards.tree("methods", name).origin
    places = [origin(("stages", key, "losses", one)) for key, of in card.stages.items() for one in of.losses]
    named = [cards.card("losses", term.loss, where) for term, where in zip(terms, places, strict=True)]
    taught = [term for term, loss in zip(terms, named, strict=True) if "teacher" in loss.inputs]
    read = [term.teacher or term.hook or "logits" for term in taught]
    points = {point for at in read for point in ([at] if isinstance(at, str) else at)}
    if "logits" in points:
        return FAMILIES[1 if len(points) == 1 else 4]
    return FAMILIES[0] if not points else FAMILIES[3 if points == {"pooled"} else 2]


def _row(cards: Registry, kind: str, key: str) -> dict[str, str]:
    """What is listed of a card."""
    example = cards.trees[kind][key].data.get("examples", [key])[0] if "{" in key else key
    tree = cards.tree(kind, example)
    data = tree.data
    paper = str(data.get("paper", ""))
    shown = {kind: key.replace("{", "<").replace("}", ">"), "what it is": about(data), "paper": paper}
    if kind != "methods":
        return shown
    found = cards.card("papers", paper, tree.origin(("paper",))) if paper else None
    first, *others = (found.authors if found else "").split(", ")
    cited = f"{first.split()[-1]}{' et al.' if others else ''} {found.year}" if found else ""
    return shown | {"paper": cited, "family": family(cards, key)}


def headline(name: str) -> str:
    """First comment line of a recipe."""
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
