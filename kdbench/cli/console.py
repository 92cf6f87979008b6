"""What commands print: tables, YAML, and lines of progress."""

import sys
from collections.abc import Iterable

from rich.console import Console
from rich.measure import Measurement
from rich.table import Table


def tell(text: str) -> None:
    """Print a line of progress, beside the output."""
    print(text, file=sys.stderr, flush=True)


def page() -> Console:
    """The terminal; in a log or pipe, which has no width to fit into, a wide page.

    Names, labels and titles are the users': a `[b]` in them is text, not markup.
    """
    return Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else 160)


def plain_table(*columns: str, right: Iterable[str] = ()) -> Table:
    """An empty table of plain rows. `right`: columns of numbers."""
    table = Table(box=None, header_style="bold")
    for column in columns:
        table.add_column(column, justify="right" if column in right else "left")
    return table


def show(console: Console, table: Table) -> None:
    """Print a table. Where it is too wide, its last columns are left out, rather than digits of all of them."""
    left_out: list[str] = []
    while len(table.columns) > 2 and _width(console, table) > console.width:
        left_out.insert(0, str(table.columns.pop().header))
    console.print(table)
    if left_out:
        console.print(f"  no room here for: {', '.join(left_out)}", style="dim")


def _width(console: Console, table: Table) -> int:
    return Measurement.get(console, console.options.update(width=10_000, max_width=10_000), table).maximum


def print_yaml(text: str) -> None:
    """YAML in colours on a terminal, as it is elsewhere."""
    if sys.stdout.isatty():
        from rich.syntax import Syntax

        Console().print(Syntax(text, "yaml", background_color="default", word_wrap=True))
    else:
        print(text, end="")
