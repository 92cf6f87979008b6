"""Images on their way to a teacher's decision boundary, as PNG. The same values give the same bytes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import Tensor

from kdbench.drawing import COLOURS, DPI, LINES, save, style


@dataclass(frozen=True)
class Crossing:
    """An image, the boundary sample that an attack made of it, and what networks say on the line through both.

    Attributes:
        image, moved: [H, W, C], pixel values on the scale of [0, 1].
        base, target: names of the two classes.
        at: [M], places on the line: 0 is the image, 1 the boundary sample.
        scores: network -> the base and the target class's logits at these places, [M] each.
    """

    image: Tensor
    moved: Tensor
    base: str
    target: str
    at: Tensor
    scores: Mapping[str, tuple[Tensor, Tensor]]


def boundary_picture(crossings: Sequence[Crossing], file: str | Path) -> Path:
    """Draw a row for each image.

    Itself, its boundary sample, their difference enlarged, and each network's two scores on the straight line through
    both, where the teacher's meet at the boundary sample.

    Args:
        crossings: one at least.
    """
    networks = list(crossings[0].scores)
    with style():
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        widths = [1.0, 1.0, 1.0, *[1.7] * len(networks)]
        figure = Figure(figsize=(1.55 * sum(widths), 1.75 * len(crossings)), dpi=DPI, layout="constrained")
        FigureCanvasAgg(figure)
        grid = figure.subplots(len(crossings), len(widths), squeeze=False, gridspec_kw={"width_ratios": widths})
        for axes, crossing in zip(grid, crossings, strict=True):
            image, moved = np.asarray(crossing.image), np.asarray(crossing.moved)
            difference = moved - image
            largest = float(np.abs(difference).max())
            factor = 0.5 / largest if largest > 0 else 1.0
            pictures = (
                (image, crossing.base),
                (moved, f"boundary with {crossing.target}"),
                (0.5 + factor * difference, f"difference × {factor:.0f}, L2 {np.linalg.norm(difference):.2f}"),
            )
            for axis, (shown, title) in zip(axes, pictures, strict=False):
                shown = np.clip(shown, 0, 1)
                grey = shown.shape[2] == 1
                axis.imshow(shown[:, :, 0] if grey else shown, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
                axis.set_title(title, fontsize=7.5, fontweight="normal")
                axis.set_axis_off()
            for axis, network in zip(axes[len(pictures) :], networks, strict=True):
                classes = (crossing.base, crossing.target)
                for scores, name, colour, line in zip(
                    crossing.scores[network], classes, COLOURS[1:], LINES, strict=False
                ):
                    axis.plot(np.asarray(crossing.at), np.asarray(scores), color=colour, linestyle=line, label=name)
                axis.axvline(1.0, color="#888888", linewidth=0.8, linestyle=":")
                axis.set_title(f"scores: {network}", fontsize=7.5, fontweight="normal")
                axis.set_xticks([0, 1], ["image", "boundary\nsample"])
                axis.tick_params(labelsize=7)
                axis.legend(fontsize=7, frameon=False, loc="best", handlelength=2.0)
        return save(figure, file)
