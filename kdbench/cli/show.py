"""`kdbench show`: one card, with the options of its target, or one recipe."""

from typing import Annotated

import typer

from kdbench.cli.options import RegistryOption
from kdbench.errors import UserError, did_you_mean

EXAMPLES = "Examples:  kdbench show methods ab   ·   kdbench show losses kd   ·   kdbench show recipes ab_wrn"


def command(
    kind: Annotated[str, typer.Argument(help="Kind of card, or 'recipes'. Optional if the name is unique.")],
    name: Annotated[str | None, typer.Argument(help="Key of the card.")] = None,
    registry: RegistryOption = None,
) -> None:
    """Show a card with its includes resolved, its file and line, the options it accepts, and its paper."""
    from rich.markup import escape

    from kdbench.cards import KINDS
    from kdbench.cli.console import page, plain_table, print_yaml
    from kdbench.cli.ls import ALIASES
    from kdbench.reading import read_text
    from kdbench.recipe.loading import dump, find
    from kdbench.registry import Registry
    from kdbench.signature import REQUIRED

    cards = Registry(registry or ())
    console = page()
    kind = ALIASES.get(kind, kind)
    if kind == "recipes" and name:
        print_yaml(read_text(find(name)))
        return
    if name is None:
        found = [k for k in KINDS if kind in cards.names(k)]
        if len(found) != 1:
            what = f"several kinds have a card '{kind}': {', '.join(found)}" if found else f"there is no card '{kind}'"
            near = did_you_mean(kind, sorted({n for k in KINDS for n in cards.names(k)}))
            hint = f"name the kind first: kdbench show {found[0]} {kind}" if found else near
            raise UserError(what, where="kdbench show", hint=hint)
        kind, name = found[0], kind
    if kind not in KINDS:
        raise UserError(f"unknown kind '{kind}'", where="kdbench show", hint=did_you_mean(kind, [*KINDS, "recipes"]))
    card = cards.card(kind, name)
    tree = cards.tree(kind, name)
    console.print(f"[dim]# {tree.origin(())}[/dim]", highlight=False)
    print_yaml(dump({name: tree.data}))
    if hasattr(card, "target"):
        table = plain_table("option", "type", "default")
        for option in cards.settable(card.target, card).values():
            table.add_row(
                option.name,
                escape(option.annotation),
                "required" if option.default is REQUIRED else repr(option.default),
            )
        if table.row_count:
            console.print(table)
    paper = getattr(card, "paper", None)
    if paper:
        entry = cards.card("papers", paper)
        console.print(f"{entry.authors}: {entry.title}. {entry.venue} {entry.year}.", highlight=False)
