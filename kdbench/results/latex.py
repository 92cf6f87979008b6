"""What LaTeX needs of a table: grids that fit a page's width, and any text in its letters.

LaTeX itself finds widths and page breaks: a grid is a float as wide as the text, whose first column takes what the
numbers leave, and a grid of many rows breaks over pages (`xltabular`). The notes are text below.
"""

import re
import textwrap
import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Literal

from kdbench.results.layout import Grid

# Rows of one float, numbers side by side of which each may be a mean with its deviation, and characters of a title.
ROWS = 40
ACROSS = 6
ACROSS_SPREADS = 3
TITLE = 11

# For articles of one column; of two, across both (`table*`), or in one of them.
LatexForm = Literal["page", "wide", "column"]


def escape(value: str) -> str:
    """Any text for text mode.

    Letters stay as they are where LaTeX's standard fonts have them; a character that they lack becomes its code point.
    """
    return "".join(_escaped(c) for c in unicodedata.normalize("NFC", value))


def heading(title: str) -> str:
    """A column's title, on several lines where it is long."""
    lines = [escape(line) for line in textwrap.wrap(title, TITLE, break_long_words=False, break_on_hyphens=False)]
    if len(lines) < 2:
        return "".join(lines)
    return "\\begin{tabular}[b]{@{}r@{}}" + r" \\ ".join(lines) + "\\end{tabular}"


def label_of(title: str) -> str:
    plain = unicodedata.normalize("NFKD", title).encode("ascii", "ignore").decode().lower()
    return "tab:" + (re.sub(r"[^a-z0-9]+", "-", plain).strip("-") or "comparison")


def for_page(grids: Iterable[Grid], form: LatexForm) -> Iterator[Grid]:
    """The grids, those with many columns in several parts that repeat the first column.

    Rows that say nothing in a part are left out of it. In two columns long grids are several floats, since none can
    break there.
    """
    for grid in grids:
        spreads = {i for row in grid.rows for i, entry in enumerate(row) if "±" in entry.text}
        across = ACROSS_SPREADS if len(spreads) > 1 else ACROSS
        across = across // 2 if form == "column" else across
        starts = range(1, len(grid.header), across)
        for start in starts:
            shown = [0, *range(start, min(start + across, len(grid.header)))]
            kept = [n for n, row in enumerate(grid.rows) if n in grid.headings or any(row[i].text for i in shown[1:])]
            rows = tuple(tuple(grid.rows[n][i] for i in shown) for n in kept)
            rules = frozenset(kept.index(n) for n in grid.rules if n in kept) - {0}
            headings = frozenset(kept.index(n) for n in grid.headings)
            caption = grid.caption + (" (continued)" if start > 1 else "")
            whole = Grid(caption, tuple(grid.header[i] for i in shown), rows, rules, headings)
            yield from [whole] if form == "page" else _floats(whole)


def _floats(grid: Grid) -> Iterator[Grid]:
    """A grid in parts of as many rows as a float takes."""
    for first in range(0, len(grid.rows), ROWS):
        rules, headings = (
            frozenset(n - first for n in at if first <= n < first + ROWS) for at in (grid.rules, grid.headings)
        )
        caption = grid.caption + (" (continued)" if first else "")
        yield replace(grid, caption=caption, rows=grid.rows[first : first + ROWS], rules=rules - {0}, headings=headings)


# Letters and signs beyond ASCII that LaTeX knows by itself, but for those that its standard fonts lack.
_KNOWN = {chr(n) for n in range(0xA1, 0x180)} - set("«»ÐÞðþĄąĐđĘęĦħĮįĸĿŀŉŊŋŦŧŲųſ") | set("–—‘’“”†‡•…‰€™")
_SPECIAL = {c: f"\\{c}" for c in "{}$&#%_"} | {
    "\\": r"\textbackslash{}",
    "^": r"\textasciicircum{}",
    "~": r"\textasciitilde{}",
    "`": r"\textasciigrave{}",
    '"': "''",
    "\n": " ",
    "\t": " ",
    "\u00a0": "~",
}
_SIGNS = "−±×÷·→←↔⇒≤≥≠≈∞∈√∑²³"
_COMMANDS = (
    r"- \pm \times \div \cdot \rightarrow \leftarrow \leftrightarrow \Rightarrow \leq \geq \neq \approx \infty "
    r"\in \surd \sum ^2 ^3"
)
_MATH = {c: f"${command}$" for c, command in zip(_SIGNS, _COMMANDS.split(" "), strict=True)} | {
    c: f"${c}$" for c in "<>|"
}
# Those whose capitals LaTeX has no command for look like Latin ones.
_GREEK = re.compile(
    "GREEK (?:SMALL LETTER (?!OMICRON|FINAL)"
    "|CAPITAL LETTER (?=GAMMA|DELTA|THETA|LAM|XI|PI|SIGMA|UPSILON|PHI|PSI|OMEGA))(\\w+)"
)


def _escaped(c: str) -> str:
    if found := _SPECIAL.get(c) or _MATH.get(c):
        return found
    if " " <= c <= "~" or c in _KNOWN:
        return c
    if greek := _GREEK.fullmatch(unicodedata.name(c, "")):
        name = greek[1].lower().replace("lamda", "lambda")
        return f"$\\{name if c.islower() else name.capitalize()}$"
    compatible = unicodedata.normalize("NFKD", c)
    if compatible.isascii() and compatible.isprintable():
        return "".join(map(_escaped, compatible))
    return f"[U+{ord(c):04X}]" if unicodedata.category(c) not in ("Cc", "Cf", "Mn") else ""
