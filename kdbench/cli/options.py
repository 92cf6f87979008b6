"""Arguments that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

RecipeArgument = Annotated[
    str, typer.Argument(metavar="RECIPE", help="A recipe file, or the name of a shipped recipe.")
]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[KEY.PATH=VALUE]...", help="Overrides of the recipe.")]
RegistryOption = Annotated[
    list[Path] | None,
    typer.Option(
        help="Folder with further cards and their Python files: it is code, and is trusted as code (repeatable)."
    ),
]
