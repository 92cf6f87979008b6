"""The look of every plot, and how one is saved: for tables and for single methods alike."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from kdbench.files import atomic

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLOURS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F7F7F", "#8C2D04", "#3B0F70")
MARKERS = "osD^vP*X<>"
LINES = ("-", (0, (5, 1.5)), (0, (1.5, 1.2)), (0, (5, 1.5, 1.2, 1.5)), (0, (8, 2)), (0, (3, 1, 1, 1, 1, 1)))
DPI = 160


@contextmanager
def style() -> Iterator[None]:
    """Our own look, whatever the user's matplotlibrc says."""
    import matplotlib

    with matplotlib.rc_context():
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
            }
        )
        yield


def save(figure: Figure, file: str | Path) -> Path:
    """Lay the figure out and write the PNG atomically, without a date or a version in it."""
    # The solver of the layout takes its variables in the order of their addresses in memory, so that its sums end in
    # one digit or another; where an edge then lies on half a pixel, pixels differ.
    if (engine := figure.get_layout_engine()) is not None:
        engine.execute(figure)
        figure.set_layout_engine("none")
    for axis in figure.axes:
        left, bottom, width, height = (float(np.float32(part)) for part in axis.get_position(original=True).bounds)
        axis.set_position((left, bottom, width, height))
    file = Path(file)
    with atomic(file) as temporary:
        figure.savefig(temporary, format="png", metadata={"Software": None})
    return file
