"""`kdbench data`: look at a folder of pictures, and write the data card for it."""

import json
from pathlib import Path
from shlex import quote
from typing import Annotated

import typer

from kdbench.cli.console import page, plain_table, show, tell
from kdbench.errors import UserError
from kdbench.files import home, write_text
from kdbench.recipe.loading import dump
from kdbench.registry import Registry
from kdbench.tree import Tree

EXAMPLES = """
kdbench data ~/pictures/birds
kdbench data tiny-imagenet-200 --out my_cards
"""


def command(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="A folder of pictures in folders of their classes.")],
    out: Annotated[Path, typer.Option(help="Registry folder for the card.")] = Path("cards"),
    force: Annotated[bool, typer.Option(help="Overwrite an existing card.")] = False,
) -> None:
    """Look at every picture in FOLDER, say what is there, and write its data card.

    FOLDER holds train/<class>/* and test/<class>/*, or only <class>/*; then a fifth is held out for testing.
    A recipe may also name the folder itself, without a card: 'data: path/to/folder'.
    """
    from kdbench.data.survey import folder_name, survey

    called = folder_name(folder)
    # As a recipe that names the folder calls it.
    name = f"my_{called}" if called in Registry().keys("datasets") else called
    file = out / "datasets" / f"{name}.yaml"
    if file.exists() and not force:
        raise UserError(f"'{file}' exists", where="kdbench data", hint="choose another folder (--out), or --force")
    seen = survey(folder, home() / "cache", all_of_them=True, tell=tell)
    table = plain_table("class", *seen.counts, right=tuple(seen.counts))
    classes = [*next(iter(seen.counts.values()))]
    for label in classes[:20]:
        table.add_row(label, *(str(by_class[label]) for by_class in seen.counts.values()))
    if more := classes[20:]:
        table.add_row(f"… {len(more)} more", *(str(sum(c[label] for label in more)) for c in seen.counts.values()))
    console = page()
    show(console, table)
    for sentence in seen.sentences():
        console.print(sentence)
    modes = ", ".join(f"{count} {mode}" for mode, count in seen.modes.items())
    mean, deviation = (" ".join(f"{value:.4f}" for value in part) for part in (seen.mean, seen.std))
    console.print(f"pixels: {modes}; mean {mean}, deviation {deviation}")
    text = dump({name: seen.card(called)})
    write_text(file, f"# kdbench data {folder}\n{text}")
    console.print(f"written: {file}")
    console.print(
        f"  use it:  data: {_in_yaml(name)}   and   kdbench run my.yaml --registry {quote(str(out))} "
        f"--data {quote(str(folder.resolve().parent))}",
        soft_wrap=True,
    )


def _in_yaml(name: str) -> str:
    """A name as a recipe holds it: in quotes where YAML would read something else, as of a folder called 2024."""
    try:
        plain = Tree.parse(name, "").data == name
    except UserError:
        plain = False
    return name if plain else json.dumps(name, ensure_ascii=False)
