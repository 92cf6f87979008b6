"""Tables as files: Markdown, LaTeX (booktabs) and CSV. Byte for byte the same from the same records, in any order."""

from __future__ import annotations

import csv
import io
import itertools
import math
import re
import textwrap
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from kdbench.record import Record
from kdbench.results.comparison import in_order, text
from kdbench.results.layout import Grid, Text, layout
from kdbench.results.notes import Note
from kdbench.results.tables import Table, flat

# What an article's page holds: ems of its \small and \footnotesize across, and lines of \small down beside the caption.
TEXT_WIDTH = 37.5
SMALLER_WIDTH = 40.5
PAGE_LINES = 46
PAGE_ROWS = 36
STRETCH = 1.12
# Entries of the first column are broken at this many ems, titles of the others at this many characters.
FIRST_WIDTH = 15.0
TITLE_LENGTH = 14


def markdown(table: Table) -> str:
    """GitHub Markdown: every grid, then the notes as a list. Ends with a newline."""
    parts = [f"**{_md(table.title)}**" if table.title else ""]
    for i, grid in enumerate(layout(table)):
        if i:
            parts.append(f"{_md(grid.caption)}:")
        lines = [_md_row(map(_md, grid.header)), "|:--" + "|--:" * (len(grid.header) - 1) + "|"]
        for n, row in enumerate(grid.rows):
            heading = [f"*{_md(row[0].text)}*", *("" for _ in row[1:])]
            lines.append(_md_row(heading if n in grid.headings else map(_md_text, row)))
        parts.append("\n".join(lines))
    notes = [f"- {f'<sup>{note.mark}</sup> ' if note.mark else ''}{_md_note(note)}" for note in table.notes]
    return "\n\n".join(part for part in [*parts, "\n".join(notes)] if part) + "\n"


def table_csv(table: Table) -> str:
    """One line for every method and column of a table, with full precision. Ends with a newline."""
    return _csv(flat(table))


def records_csv(records: Iterable[Record]) -> str:
    """The long form: one line for every record, whatever a table would leave out. Ends with a newline."""
    rows = []
    for record in in_order(records):
        cell, test, validation = record.cell, record.result.test, record.result.validation
        teacher, compute, data = record.teacher, record.compute, record.data
        rows.append(
            {
                "recipe": record.recipe,
                "method": cell.method,
                "label": cell.label,
                "student": cell.student,
                "teacher": cell.teacher,
                "data": cell.data,
                "protocol": cell.protocol,
                "seed": cell.seed,
                **{f"axis.{path}": text(value) for path, value in cell.axes.items()},
                "last": test.last,
                "best": test.best,
                "best_step": test.best_step,
                "validation_last": validation.last if validation else None,
                "validation_best": validation.best if validation else None,
                **record.result.numbers(),
                **{f"also.{name}": value for name, value in record.result.also().items()},
                "steps": record.budget.steps,
                "epochs": record.budget.epochs,
                "extra_epochs": record.budget.extra_epochs,
                "teacher_accuracy": teacher.accuracy if teacher else None,
                "teacher_sha256": teacher.sha256 if teacher else None,
                "train_images": data.train,
                "validation_images": data.validation,
                "test_images": data.test,
                "data_fingerprint": data.fingerprint,
                "parameters": record.models.student.parameters,
                "flops": record.models.student.flops,
                "device": compute.device,
                "device_name": compute.device_name,
                "threads": compute.threads,
                "precision": compute.precision,
                "seconds": compute.seconds,
                "training_seconds": compute.training_seconds,
                "images_per_second": compute.images_per_second,
                "python": compute.python,
                "torch": compute.torch,
                "kdbench": record.kdbench,
                "commit": record.git.commit if record.git else None,
                "dirty": record.git.dirty if record.git else None,
                "status": record.status,
                "identity": record.identity,
            }
        )
    return _csv(rows)


def latex(table: Table) -> str:
    r"""LaTeX that compiles as it stands in an article with \usepackage{booktabs}; plain ASCII, nothing else needed.

    Grids wider than the text are cut into panels that repeat the first column; what is longer than a page goes into
    several floats, with the notes below the first grid.
    """
    title = table.title or "Comparison"
    slug = re.sub(r"[^a-z0-9]+", "-", _ascii(table.title).lower()).strip("-") or "comparison"
    first, *others = [_grid_blocks(grid) for grid in layout(table)]
    notes = _notes(first[0].caption, table.notes)
    rest = list(itertools.chain(*others))
    floats = [[*first, *rest, *notes]]
    if sum(block.height for block in floats[0]) > PAGE_LINES:
        floats = _floats([*first, *notes, *rest])
    lines = ["% needs \\usepackage{booktabs}"]
    for number, blocks in enumerate(floats):
        caption = blocks[0].caption
        continued = " (continued)" if number and caption == floats[number - 1][-1].caption else ""
        shown = escape(f"{title}. {caption}{continued}.")
        lines += [
            "\\begin{table}[tbp]",
            "\\centering\\small\\setlength{\\tabcolsep}{3pt}",
            f"\\caption{{{shown}}}",
            f"\\label{{tab:{slug}{f'-{number}' if number else ''}}}",
        ]
        for i, block in enumerate(blocks):
            if i and block.caption not in (blocks[i - 1].caption, caption):
                lines += ["", "\\medskip", escape(block.caption)]
            lines += ["", "\\smallskip"] if i else []
            lines += block.lines
        lines.append("\\end{table}")
    return "\n".join(lines) + "\n"


def _floats(blocks: Iterable[_Block]) -> list[list[_Block]]:
    """Blocks by float: a new one for each caption, and where a page is full."""
    floats: list[list[_Block]] = []
    for block in blocks:
        if (
            not floats
            or block.caption != floats[-1][-1].caption
            or sum(other.height for other in floats[-1]) + block.height > PAGE_LINES
        ):
            floats.append([])
        floats[-1].append(block)
    return floats


@dataclass(frozen=True)
class _Block:
    """Part of a float. `height`: in lines of text, about."""

    caption: str
    lines: list[str]
    height: float


def _grid_blocks(grid: Grid) -> list[_Block]:
    """The grid in tabulars that fit the page, all of one font size."""
    panels = [panel for page in _pages(grid) for panel in _panels(page)]
    wide = any(_grid_width(panel) > TEXT_WIDTH for panel in panels)
    return [_Block(grid.caption, _tabular(panel, "\\footnotesize" if wide else ""), _height(panel)) for panel in panels]


def _notes(caption: str, notes: Sequence[Note]) -> list[_Block]:
    """The notes as running text, in several pieces where they are longer than a page."""
    pieces: list[list[Note]] = [[]]
    for note in notes:
        if pieces[-1] and _note_lines([*pieces[-1], note]) > PAGE_LINES - 6:
            pieces.append([])
        pieces[-1].append(note)
    blocks = []
    for piece in pieces:
        shown = [f"{_superscript((note.mark,)) if note.mark else ''}{_latex_note(note)}." for note in piece]
        lines = ["\\begin{minipage}{\\linewidth}\\raggedright\\footnotesize", *shown, "\\end{minipage}"]
        blocks.append(_Block(caption, lines, _note_lines(piece)))
    return blocks


def _note_lines(notes: Sequence[Note]) -> float:
    return sum(len(note.text) + 2 for note in notes) / 90


def escape(value: str) -> str:
    """Any text as ASCII LaTeX for text mode. A character that LaTeX's standard fonts lack becomes its code point."""
    return "".join(_escape_character(c) for c in unicodedata.normalize("NFC", value))


_SPECIAL = {
    "\\": r"\textbackslash{}",
    "{": r"\{",
    "}": r"\}",
    "$": r"\$",
    "&": r"\&",
    "#": r"\#",
    "%": r"\%",
    "_": r"\_",
    "^": r"\textasciicircum{}",
    "~": r"\textasciitilde{}",
    "<": "$<$",
    ">": "$>$",
    "|": "$|$",
    '"': "''",
    "`": r"\textasciigrave{}",
    "\n": " ",
    "\t": " ",
    "\u00a0": "~",
    "\u2009": r"\,",
    "\u202f": r"\,",
    "−": "$-$",
    "±": r"$\pm$",
    "×": r"$\times$",
    "÷": r"$\div$",
    "·": r"$\cdot$",
    "→": r"$\rightarrow$",
    "←": r"$\leftarrow$",
    "↔": r"$\leftrightarrow$",
    "⇒": r"$\Rightarrow$",
    "≤": r"$\leq$",
    "≥": r"$\geq$",
    "≠": r"$\neq$",
    "≈": r"$\approx$",
    "∞": r"$\infty$",
    "∈": r"$\in$",
    "√": r"$\surd$",
    "∑": r"$\sum$",
    "–": "--",
    "—": "---",
    "…": r"\ldots{}",
    "‘": "`",
    "’": "'",
    "“": "``",
    "”": "''",
    "„": ",,",
    "°": r"$^\circ$",
    "²": "$^2$",
    "³": "$^3$",
    "¹": "$^1$",
    "½": "$1/2$",
    "µ": r"$\mu$",
    "†": r"\dag{}",
    "‡": r"\ddag{}",
    "§": r"\S{}",
    "©": r"\copyright{}",
    "ß": r"\ss{}",
    "æ": r"\ae{}",
    "Æ": r"\AE{}",
    "ø": r"\o{}",
    "Ø": r"\O{}",
    "œ": r"\oe{}",
    "Œ": r"\OE{}",
    "ł": r"\l{}",
    "Ł": r"\L{}",
    "ı": r"\i{}",
    "å": r"\aa{}",
    "Å": r"\AA{}",
}
_ACCENTS = {
    "\u0300": "`",
    "\u0301": "'",
    "\u0302": "^",
    "\u0303": "~",
    "\u0308": '"',
    "\u0304": "=",
    "\u0307": ".",
    "\u030c": "v",
    "\u0306": "u",
    "\u030b": "H",
    "\u0327": "c",
    "\u0323": "d",
    "\u0331": "b",
}
_GREEK = {
    "α": "alpha",
    "β": "beta",
    "γ": "gamma",
    "δ": "delta",
    "ε": "epsilon",
    "ζ": "zeta",
    "η": "eta",
    "θ": "theta",
    "ι": "iota",
    "κ": "kappa",
    "λ": "lambda",
    "μ": "mu",
    "ν": "nu",
    "ξ": "xi",
    "π": "pi",
    "ρ": "rho",
    "σ": "sigma",
    "τ": "tau",
    "υ": "upsilon",
    "φ": "phi",
    "χ": "chi",
    "ψ": "psi",
    "ω": "omega",
    "Γ": "Gamma",
    "Δ": "Delta",
    "Θ": "Theta",
    "Λ": "Lambda",
    "Ξ": "Xi",
    "Π": "Pi",
    "Σ": "Sigma",
    "Φ": "Phi",
    "Ψ": "Psi",
    "Ω": "Omega",
}


def _escape_character(c: str) -> str:
    if c in _SPECIAL:
        return _SPECIAL[c]
    if " " <= c <= "~":
        return c
    if c in _GREEK:
        return f"$\\{_GREEK[c]}$"
    parts = unicodedata.normalize("NFD", c)
    if len(parts) == 2 and parts[0].isascii() and parts[0].isalpha() and parts[1] in _ACCENTS:
        base = {"i": "\\i", "j": "\\j"}.get(parts[0], parts[0])
        return f"\\{_ACCENTS[parts[1]]}{{{base}}}"
    compatible = unicodedata.normalize("NFKD", c)
    if compatible.isascii() and compatible.isprintable():
        return "".join(map(_escape_character, compatible))
    return f"[U+{ord(c):04X}]" if unicodedata.category(c) not in ("Cc", "Cf", "Mn") else ""


def _ascii(value: str) -> str:
    return unicodedata.normalize("NFKD", value).encode("ascii", "ignore").decode()


def _pages(grid: Grid) -> Iterable[Grid]:
    """The grid in pieces that fit a page, cut at its rules where it has any, so that headings stay with their rows."""
    blocks = sorted({0, *grid.rules, len(grid.rows)})
    pieces: list[list[int]] = [[]]
    for begin, end in itertools.pairwise(blocks):
        if pieces[-1] and end - begin <= PAGE_ROWS < len(pieces[-1]) + end - begin:
            pieces.append([])
        for row in range(begin, end):
            if len(pieces[-1]) >= PAGE_ROWS:
                pieces.append([])
            pieces[-1].append(row)
    return [_part(grid, piece, range(len(grid.header))) for piece in pieces]


def _panels(grid: Grid) -> Iterable[Grid]:
    """The grid in pieces that fit the width of the text. Rows that say nothing in a piece are left out of it."""
    widths = [_column_width(grid, i) for i in range(len(grid.header))]
    chunks: list[list[int]] = [[0]]
    for i in range(1, len(grid.header)):
        if len(chunks[-1]) > 1 and sum(widths[j] for j in chunks[-1]) + widths[i] > SMALLER_WIDTH:
            chunks.append([0])
        chunks[-1].append(i)
    for chunk in chunks:
        rows = [n for n, row in enumerate(grid.rows) if n in grid.headings or any(row[i].text for i in chunk[1:])]
        yield _part(grid, rows, chunk)


def _grid_width(grid: Grid) -> float:
    return sum(_column_width(grid, i) for i in range(len(grid.header)))


def _column_width(grid: Grid, i: int) -> float:
    """Width of a column and the space beside it, in ems, about."""
    entries = [
        _width(row[i].text) * (1.15 if row[i].bold else 1) + _width(row[i].tail) + 0.4 * len(row[i].marks)
        for n, row in enumerate(grid.rows)
        if n not in grid.headings
    ]
    titles = _header_lines(grid.header[i]) if i else [grid.header[0]]
    width = max([*map(_width, titles), *entries])
    return (width if i else min(width, FIRST_WIDTH)) + 0.72


def _part(grid: Grid, rows: Sequence[int], columns: Sequence[int]) -> Grid:
    """Some rows and columns of a grid. A rule stays above the first row that follows it."""
    above = [sum(rule <= row for rule in grid.rules) for row in rows]
    return Grid(
        grid.caption,
        tuple(grid.header[i] for i in columns),
        tuple(tuple(grid.rows[n][i] for i in columns) for n in rows),
        frozenset(k for k in range(1, len(rows)) if above[k] > above[k - 1]),
        frozenset(k for k, n in enumerate(rows) if n in grid.headings),
    )


def _width(value: str) -> float:
    """Width of a text in ems of Computer Modern, about."""
    return sum(
        0.8 if c in "+−±→×mw<>%" else 0.76 if c.isupper() else 0.3 if c in " .,:;()[]ijltf'|" else 0.5 for c in value
    )


def _header_lines(title: str) -> list[str]:
    """A column's title, on lines of about equal length where it is long."""

    def lines(length: int) -> list[str]:
        return textwrap.wrap(title, length, break_long_words=False, break_on_hyphens=False) or [""]

    few = max(len(lines(TITLE_LENGTH)), min(2, len(title.split())) if len(title) > 8 else 1)
    return next(shown for length in range(1, len(title) + 2) if len(shown := lines(length)) <= few)


def _height(grid: Grid) -> float:
    """Height of a tabular with the space around it, in lines."""
    rows = sum(math.ceil(_width(row[0].text) / FIRST_WIDTH) for row in grid.rows)
    titles = max(len(_header_lines(title)) for title in grid.header[1:])
    return STRETCH * (rows + titles) + 0.4 * len(grid.rules) + 2.2


def _tabular(grid: Grid, size: str) -> list[str]:
    columns = len(grid.header) - 1
    titles = [_header_lines(title) for title in grid.header[1:]]
    depth = max(map(len, titles))
    # Rows a little apart, or the line below a second best would touch the number below it.
    lines = [
        f"{{{size}\\renewcommand{{\\arraystretch}}{{{STRETCH}}}\\begin{{tabular}}{{l{'r' * columns}}}",
        "\\toprule",
    ]
    for level in range(depth):
        first = escape(grid.header[0]) if level == depth - 1 else ""
        # Shorter titles stand on the last line, next to their numbers.
        shown = [escape(title[level - depth + len(title)]) if level >= depth - len(title) else "" for title in titles]
        lines.append(" & ".join([first, *shown]) + r" \\")
    lines.append("\\midrule")
    for i, row in enumerate(grid.rows):
        if i in grid.rules:
            lines.append("\\midrule")
        if i in grid.headings:
            lines.append(f"\\multicolumn{{{columns + 1}}}{{l}}{{\\emph{{{escape(row[0].text)}}}}} \\\\")
        else:
            first = _latex_text(row[0])
            if _width(row[0].text) > FIRST_WIDTH:
                width = FIRST_WIDTH * (8 if size else 9)
                first = f"\\parbox[t]{{{width:g}pt}}{{\\raggedright\\hangindent1em {first}\\strut}}"
            lines.append(" & ".join([first, *map(_latex_text, row[1:])]) + r" \\")
    return [*lines, "\\bottomrule", "\\end{tabular}}"]


def _latex_text(cell: Text) -> str:
    shown = escape(cell.text)
    if cell.bold:
        shown = f"\\textbf{{\\boldmath {shown}}}"
    elif cell.underline:
        shown = f"\\underline{{{shown}}}"
    # A row that began with a bracket would be taken for the length argument of the line break above it.
    shown = f"{{{shown}}}" if shown.startswith("[") else shown
    return shown + escape(cell.tail) + _superscript(cell.marks)


def _superscript(marks: Sequence[str]) -> str:
    return f"$^{{\\mathrm{{{','.join(marks)}}}}}$" if marks else ""


def _latex_note(note: Note) -> str:
    return f"\\textbf{{{escape(note.text)}}}" if note.warning else escape(note.text)


def _md(value: str) -> str:
    return re.sub(r"([\\`*_|<>\[\]])", r"\\\1", value.replace("\n", " "))


def _md_row(entries: Iterable[str]) -> str:
    return "| " + " | ".join(entries) + " |"


def _md_text(cell: Text) -> str:
    shown = _md(cell.text)
    if cell.bold:
        shown = f"**{shown}**"
    elif cell.underline:
        shown = f"<u>{shown}</u>"
    return shown + _md(cell.tail) + (f"<sup>{','.join(cell.marks)}</sup>" if cell.marks else "")


def _md_note(note: Note) -> str:
    return f"**{_md(note.text)}**" if note.warning else _md(note.text)


def _csv(rows: Sequence[dict[str, Any]]) -> str:
    """Columns in order of first appearance; a missing value is empty."""
    fields = list(dict.fromkeys(field for row in rows for field in row))
    # Columns of one kind (axis.…, agreement.…, also.…) stay together although rows bring them at different times.
    kinds = list(dict.fromkeys(field.partition(".")[0] for field in fields))
    fields.sort(key=lambda field: kinds.index(field.partition(".")[0]))
    stream = io.StringIO()
    writer = csv.DictWriter(stream, fields, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return stream.getvalue()
