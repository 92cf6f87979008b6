"""`kdbench cp`: a shipped recipe as a file of one's own."""

import re
from pathlib import Path
from typing import Annotated

import typer

from kdbench.errors import UserError
from kdbench.files import write_text
from kdbench.reading import read_text
from kdbench.recipe.loading import find

EXAMPLES = """
kdbench cp quickstart my.yaml
kdbench cp ab_wrn .
"""


def command(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="Name of a shipped recipe ('kdbench ls recipes').")],
    destination: Annotated[Path, typer.Argument(metavar="DESTINATION", help="File or folder.")] = Path("."),
    force: Annotated[bool, typer.Option(help="Overwrite an existing file.")] = False,
) -> None:
    """Copy a shipped recipe so that you can edit it."""
    source = find(recipe)
    target = destination / source.name if destination.is_dir() else destination
    if target.exists() and not force:
        raise UserError(f"'{target}' exists", where="kdbench cp", hint="choose another name, or --force")

    def with_folder(found: re.Match[str]) -> str:
        return found[1] + str((source.parent / found[2]).resolve())

    # An editor would look for the schema beside the copy.
    write_text(target, re.sub(r"(?m)^(# yaml-language-server: \$schema=)(.+)$", with_folder, read_text(source)))
    print(f"{target}\n  run it:  kdbench run {target}")
