"""Images on their way to a teacher's decision boundary, as PNG. The same values give the same bytes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from kdbench.drawing import COLOURS, DPI, LINES, save, style


class Way(Protocol):
    """What is drawn of one image, as `analysis.Look` is. Arrays or tensors: image and moved [H, W, C]
    of pixel values on the scale of [0, 1]; at [M]; scores: network -> the base and the target class's logits, [M] each.
    """

    @property
    def image(self) -> Any: ...
    @property
    def moved(self) -> Any: ...
    @property
    def base(self) -> str: ...
    @property
    def target(self) -> str: ...
    @property
    def at(self) -> Any: ...
    @property
    def scores(self) -> Any: ...


def boundary_picture(ways: Sequence[Way], file: str | Path) -> Path:
    """A row for each image: itself, its boundary sample, their difference enlarged, and each network's two scores on
    the straight line through both, where the teacher's meet at the boundary sample.

    Raises:
        ValueError: nothing to draw.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    if not ways:
        raise ValueError("no way to draw")
    networks = list(ways[0].scores)
    with style():
        widths = [1.0, 1.0, 1.0, *[1.7] * len(networks)]
        figure = Figure(figsize=(1.55 * sum(widths), 1.75 * len(ways)), dpi=DPI, layout="constrained")
        FigureCanvasAgg(figure)
        grid = figure.subplots(len(ways), len(widths), squeeze=False, gridspec_kw={"width_ratios": widths})
        for axes, way in zip(grid, ways, strict=True):
            image, moved = np.asarray(way.image), np.asarray(way.moved)
            difference = moved - image
            largest = float(np.abs(difference).max())
            factor = 0.5 / largest if largest > 0 else 1.0
            pictures = (
                (image, way.base),
                (moved, f"boundary with {way.target}"),
                (0.5 + factor * difference, f"difference × {factor:.0f}, L2 {np.linalg.norm(difference):.2f}"),
            )
            for axis, (shown, title) in zip(axes, pictures, strict=False):
                shown = np.clip(shown, 0, 1)
                grey = shown.shape[2] == 1
                axis.imshow(shown[:, :, 0] if grey else shown, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
                axis.set_title(title, fontsize=7.5, fontweight="normal")
                axis.set_axis_off()
            for axis, network in zip(axes[len(pictures) :], networks, strict=True):
                for scores, name, colour, line in zip(
                    way.scores[network], (way.base, way.target), COLOURS[1:], LINES, strict=False
                ):
                    axis.plot(np.asarray(way.at), np.asarray(scores), color=colour, linestyle=line, label=name)
                axis.axvline(1.0, color="#888888", linewidth=0.8, linestyle=":")
                axis.set_title(f"scores: {network}", fontsize=7.5, fontweight="normal")
                axis.set_xticks([0, 1], ["image", "boundary\nsample"])
                axis.tick_params(labelsize=7)
                axis.legend(fontsize=7, frameon=False, loc="best", handlelength=2.0)
        return save(figure, file)
