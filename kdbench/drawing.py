"""The look of every plot, and how one is saved as PNG or PDF or put into a page as SVG.

For tables and for single methods alike.
"""

from __future__ import annotations

import importlib
import io
import os
import re
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from html import escape
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Literal

import numpy as np

from kdbench.files import atomic

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F7F7F", "#8C2D04", "#3B0F70")
MARKERS = "osD^vP*X<>"
LINES = ("-", (0, (5, 1.5)), (0, (1.5, 1.2)), (0, (5, 1.5, 1.2, 1.5)), (0, (8, 2)), (0, (3, 1, 1, 1, 1, 1)))
DPI = 160
PictureForm = Literal["png", "pdf"]
# Colours in the palette of a plot, and the share of its pixels that this may change.
PALETTE = 128
MOST_CHANGED = 0.15


@contextmanager
def style() -> Iterator[None]:
    """Our own look, whatever the user's matplotlibrc says."""
    matplotlib = _library()
    with matplotlib.rc_context(), warnings.catch_warnings():
        # Letters that the font lacks are boxes, as the plot shows.
        warnings.filterwarnings("ignore", "Glyph .* missing from font")
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(
            {
                "font.size": 9,
                "axes.titlesize": 9,
                "axes.titleweight": "bold",
                "axes.labelsize": 9,
                "legend.fontsize": 9,
                "axes.spines.top": False,
                "axes.spines.right": False,
                "axes.grid": True,
                "grid.color": "#dddddd",
                "grid.linewidth": 0.6,
                "axes.axisbelow": True,
                "lines.linewidth": 1.5,
                "lines.markersize": 5,
                "axes.formatter.useoffset": False,
                "text.parse_math": False,
                "font.sans-serif": ["DejaVu Sans"],
                "svg.fonttype": "none",
                # Publishers refuse matplotlib's default, fonts of type 3.
                "pdf.fonttype": 42,
            }
        )
        yield


def panels(count: int, across: int, size: tuple[float, float], sharey: bool = False) -> tuple[Figure, list[Axes]]:
    """A figure with `count` axes, at most `across` in a row, each of `size` inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    across = min(across, count)
    down = -(-count // across)
    figure = Figure(figsize=(size[0] * across, size[1] * down), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    axes = list(figure.subplots(down, across, squeeze=False, sharey="row" if sharey else False).flat)
    for axis in axes[count:]:
        figure.delaxes(axis)
    return figure, axes[:count]


def save(figure: Figure, file: str | Path) -> Path:
    """Lay the figure out and write it atomically, as PDF if the file is called so, else as PNG.

    There is no date and no version in it.
    """
    _lay_out(figure)
    file = Path(file)
    if file.suffix == ".pdf":
        with atomic(file) as temporary:
            figure.savefig(temporary, format="pdf", metadata=dict.fromkeys(("Creator", "Producer", "CreationDate")))
    else:
        _save_pixels(figure, file)
    return file


def _save_pixels(figure: Figure, file: Path) -> None:
    from PIL import Image

    stream = io.BytesIO()
    figure.savefig(stream, format="png", metadata={"Software": None})
    drawn = Image.open(stream).convert("RGB")
    # A plot has few colours: with a palette its file is a third as large, and only shades at edges change. Photographs
    # need more.
    few = drawn.quantize(PALETTE, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)
    changed = (np.asarray(few.convert("RGB")) != np.asarray(drawn)).any(axis=-1).mean()
    with atomic(file) as temporary:
        picture = few if changed < MOST_CHANGED else drawn
        picture.save(temporary, format="PNG", optimize=True, dpi=(DPI, DPI))


def svg(figure: Figure, title: str, name: str) -> str:
    """The figure as an SVG element for a page: words as text, no date, no size of its own.

    Args:
        title: what it shows, read out to who cannot see it.
        name: different for each figure of a page, so that no id in it comes twice.
    """
    matplotlib = _library()
    _lay_out(figure)
    stream = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": name}):
        figure.savefig(stream, format="svg", metadata={"Date": None})
    found = re.search(r"<svg[^>]*?(viewBox=\"[^\"]*\")[^>]*>(.*</svg>)", stream.getvalue(), re.DOTALL)
    assert found is not None
    # Groups are numbered from 1 in every figure; other ids come from the name.
    inside = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|(?<=<g) id=\"[^\"]*\"", "", found[2], flags=re.DOTALL)
    # Hundredths of a point are fine enough, and a page may hold twenty charts. Words stand between the tags.
    inside = re.sub(r"<[^>]+>", lambda tag: re.sub(r"(\.\d\d)\d+| transform=\"rotate\(-0 .*?\"", r"\1", tag[0]), inside)
    inside = re.sub(r"\s+", " ", inside)
    return (
        f'<svg class="chart" role="img" aria-label="{escape(title)}" {found[1]} xmlns="http://www.w3.org/2000/svg" '
        f'xmlns:xlink="http://www.w3.org/1999/xlink">{inside}'
    )


def _library() -> ModuleType:
    """matplotlib, which cannot be imported where `$MPLBACKEND` names a backend that is not here, as a notebook's has it
    for the commands that are started in it. None is used here: plots are only written."""
    if "matplotlib" in sys.modules or (given := os.environ.pop("MPLBACKEND", None)) is None:
        return importlib.import_module("matplotlib")
    try:
        library = importlib.import_module("matplotlib")
    finally:
        os.environ["MPLBACKEND"] = given
    # The choice holds for who goes on in this process.
    with suppress(ValueError):
        library.rcParams["backend"] = given
    return library


def _lay_out(figure: Figure) -> None:
    # The solver of the layout takes its variables in the order of their addresses in memory, so that its sums end in
    # one digit or another; where an edge then lies on half a pixel, pixels differ.
    if (engine := figure.get_layout_engine()) is not None:
        engine.execute(figure)
        figure.set_layout_engine("none")
    for axis in figure.axes:
        left, bottom, width, height = (float(np.float32(part)) for part in axis.get_position(original=True).bounds)
        axis.set_position((left, bottom, width, height))
