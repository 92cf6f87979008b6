"""`kdbench schema`: the JSON schema of recipes, for editors."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from kdbench.cli.options import RegistryOption
from kdbench.files import write_text
from kdbench.recipe.choices import Recipe
from kdbench.registry import Registry

EXAMPLES = """
kdbench schema
kdbench schema recipe.schema.json
"""


def command(
    file: Annotated[Path | None, typer.Argument(metavar="FILE", help="File to write (default: print it).")] = None,
    registry: RegistryOption = None,
) -> None:
    """Write the JSON schema of recipes, with the names of all cards, so that an editor completes and checks them."""
    text = json.dumps(recipe_schema(registry or []), indent=1) + "\n"
    if file is None:
        print(text, end="")
    else:
        write_text(file, text)
        print(f"{file}\n  first line of a recipe:  # yaml-language-server: $schema={file}")


def recipe_schema(registry: list[Path]) -> dict[str, Any]:
    """The schema: the typed recipe's own, with short forms and card names."""
    cards = Registry(registry)
    schema = Recipe.model_json_schema()
    properties = schema["properties"]
    for key, kind in (
        ("data", "datasets"),
        ("target", "datasets"),
        ("teacher", "teachers"),
        ("student", "models"),
        ("protocol", "protocols"),
        ("method", "methods"),
    ):
        names = {"anyOf": [{"enum": cards.names(kind)}, {"type": "string"}]}
        properties[key] = {"anyOf": [names, {k: v for k, v in properties[key].items() if k != "default"}]}
    modes = {"enum": ["auto", "reference"]}
    properties["compute"] = {"anyOf": [modes, {k: v for k, v in properties["compute"].items() if k != "default"}]}
    properties["include"] = {
        "description": "recipe file or name to build on",
        "anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}],
    }
    methods = {"items": {"anyOf": [{"enum": cards.names("methods")}, {"type": "object"}]}, "type": "array"}
    properties["compare"] = {**properties["compare"], "properties": {"method": methods}}
    # A recipe with an include takes the rest from there, also of a mapping of which it says only a part.
    for part in (schema, *(schema["$defs"][name] for name in ("DataChoice", "TargetChoice", "StudentChoice"))):
        part.pop("required", None)
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}
