r"""Tables as LaTeX that compiles as it stands, in UTF-8.

LaTeX itself finds widths and page breaks: a grid is a float as wide as the text, whose first column takes what the
numbers leave, and a grid of many rows breaks over pages (`xltabular`). The notes are text below.
"""

from __future__ import annotations

import re
import textwrap
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Literal

from kdbench.results.contents import Note, Table
from kdbench.results.layout import Grid, Text, layout

PACKAGES = r"% UTF-8; needs \usepackage{booktabs,xltabular}"
# Rows of one float, numbers side by side of which each may be a mean with its deviation, and characters of a title.
ROWS = 40
ACROSS = 6
ACROSS_SPREADS = 3
TITLE = 11


Form = Literal["page", "wide", "column"]


def latex(table: Table, form: Form = "page", label: str | None = None) -> str:
    """Every grid as a table of its own, then the notes.

    Args:
        form: for articles of one column; of two, across both (`table*`) or in one of them with fewer numbers side by
            side. In two columns long grids are several floats, since none can break there.
        label: by which the text refers to it; of the title where absent.
    """
    title = table.title or "Comparison"
    plain = unicodedata.normalize("NFKD", title).encode("ascii", "ignore").decode().lower()
    label = label or "tab:" + (re.sub(r"[^a-z0-9]+", "-", plain).strip("-") or "comparison")
    lines = [PACKAGES]
    for n, (caption, grid) in enumerate(_parts(layout(table), form)):
        lines += _environment(grid, escape(f"{title}. {caption}."), f"{label}-{n}" if n else label, form)
    return "\n".join([*lines, *_notes(table.notes, label)]) + "\n"


def escape(value: str) -> str:
    """Any text for text mode. Letters stay as they are where LaTeX's standard fonts have them; a character that they
    lack becomes its code point."""
    return "".join(_escaped(c) for c in unicodedata.normalize("NFC", value))


def _parts(grids: Iterable[Grid], form: Form) -> Iterator[tuple[str, Grid]]:
    """Captions and grids, those with many columns in several parts that repeat the first column. Rows that say nothing
    in a part are left out of it."""
    for grid in grids:
        across = ACROSS_SPREADS if any("±" in row[-1].text for row in grid.rows) else ACROSS
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
            yield from [(caption, whole)] if form == "page" else _floats(whole)


def _floats(grid: Grid) -> Iterator[tuple[str, Grid]]:
    """A grid in parts of as many rows as a float takes."""
    for first in range(0, len(grid.rows), ROWS):
        rules, headings = (
            frozenset(n - first for n in at if first <= n < first + ROWS) for at in (grid.rules, grid.headings)
        )
        part = replace(grid, rows=grid.rows[first : first + ROWS], rules=rules - {0}, headings=headings)
        yield grid.caption + (" (continued)" if first else ""), part


def _environment(grid: Grid, caption: str, label: str, form: Form) -> list[str]:
    numbers = "r" * (len(grid.header) - 1)
    head = ["\\toprule", " & ".join(map(_title, grid.header)) + r" \\", "\\midrule"]
    caption = f"\\caption{{{caption}}}\\label{{{label}}}"
    size = "\\small\\setlength{\\tabcolsep}{3pt}\\setlength{\\belowcaptionskip}{4pt}"
    first = ">{\\raggedright\\hangindent1em\\arraybackslash}"
    if form == "page" and len(grid.rows) > ROWS:
        begin = f"\\begin{{xltabular}}{{\\linewidth}}{{{first}X{numbers}}}"
        repeated = [*head, "\\endfirsthead", *head, "\\endhead", "\\bottomrule", "\\endlastfoot"]
        return ["", f"{{{size}", begin, caption + r" \\", *repeated, *_rows(grid), "\\end{xltabular}}"]
    begin = f"\\begin{{tabularx}}{{\\linewidth}}{{{first}X{numbers}}}"
    inside = [begin, *head, *_rows(grid), "\\bottomrule", "\\end{tabularx}"]
    environment = "table*" if form == "wide" else "table"
    return ["", f"\\begin{{{environment}}}[tbp]", f"\\centering{size}", caption, *inside, f"\\end{{{environment}}}"]


def _rows(grid: Grid) -> Iterator[str]:
    for n, row in enumerate(grid.rows):
        if n in grid.rules:
            yield "\\midrule"
        if n in grid.headings:
            yield f"\\multicolumn{{{len(row)}}}{{l}}{{\\emph{{{escape(row[0].text)}}}}} \\\\"
        else:
            # A long name breaks at its underscores.
            first, *others = map(_entry, row)
            yield " & ".join([first.replace("\\_", "\\_\\allowbreak{}"), *others]) + r" \\"


def _title(title: str) -> str:
    """A column's title, on several lines where it is long."""
    lines = [escape(line) for line in textwrap.wrap(title, TITLE, break_long_words=False, break_on_hyphens=False)]
    if len(lines) < 2:
        return "".join(lines)
    return "\\begin{tabular}[b]{@{}r@{}}" + r" \\ ".join(lines) + "\\end{tabular}"


def _entry(cell: Text) -> str:
    shown = escape(cell.text)
    if cell.bold:
        shown = f"\\textbf{{\\boldmath {shown}}}"
    elif cell.underline:
        shown = f"\\underline{{{shown}}}"
    # A row that began with a bracket would be taken for the length argument of the line break above it.
    shown = f"{{{shown}}}" if shown.startswith("[") else shown
    return shown + escape(cell.tail) + (f"\\textsuperscript{{{','.join(cell.marks)}}}" if cell.marks else "")


def _notes(notes: Sequence[Note], label: str) -> Iterator[str]:
    yield from (
        "",
        "{\\footnotesize\\raggedright\\noindent",
        f"Notes on Table~\\ref{{{label}}}:",
        "\\begin{itemize}\\itemsep0pt",
    )
    for note in notes:
        mark = f"[\\textsuperscript{{{note.mark}}}] " if note.mark else " "
        yield f"\\item{mark}" + (f"\\textbf{{{escape(note.text)}}}" if note.warning else escape(note.text))
    yield from ("\\end{itemize}", "}")


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
