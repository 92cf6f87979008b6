"""Where commands print their tables."""

from __future__ import annotations

import sys

from rich.console import Console
from rich.syntax import Syntax


def console() -> Console:
    """The terminal; in a log or pipe, which has no width to fit into, a wide page."""
    return Console(highlight=False, width=None if sys.stdout.isatty() else 160)


def print_yaml(text: str) -> None:
    """YAML in colours on a terminal, as it is elsewhere."""
    if sys.stdout.isatty():
        Console().print(Syntax(text, "yaml", background_color="default", word_wrap=True))
    else:
        print(text, end="")
