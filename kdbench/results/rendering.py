"""Jinja templates of tables, one for each form, with that form's escapes. All show the same grids of text."""

import re
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from kdbench.results import latex

# LaTeX is full of braces and percent signs.
_MARKS: dict[str, Any] = {
    f"{what}_{end}_string": mark
    for what, marks in {"block": ("<%", "%>"), "variable": ("<<", ">>"), "comment": ("<#", "#>")}.items()
    for end, mark in zip(("start", "end"), marks, strict=True)
}


def rendered(template: str, **values: Any) -> str:
    """A template with its values."""
    return _environment(Path(template).suffix).get_template(template).render(values)


def markdown_escaped(text: str) -> str:
    """Text as it is, on GitHub too, which takes $ for formulas and ~ for what is struck out."""
    return re.sub(r"([\\`*_|<>\[\]$~]|&(?=#?\w+;))", r"\\\1", text.replace("\n", " "))


def sort_value(text: str) -> float | None:
    """The number by which an entry is sorted: its first, whatever stands around it; None where there is none."""
    found = re.search(r"[−+-]?\d[\d,]*(?:\.\d+)?(?:e[+-]?\d+)?", text)
    return None if found is None else float(found[0].replace(",", "").replace("−", "-"))


@cache
def _environment(suffix: str) -> Environment:
    made = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        undefined=StrictUndefined,
        autoescape=suffix == ".html",
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        **(_MARKS if suffix == ".tex" else {}),
    )
    made.filters |= {"md": markdown_escaped, "tex": latex.escape, "tex_title": latex.heading, "sort_value": sort_value}
    return made
