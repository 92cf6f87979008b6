"""A route: checkpoints that a training leaves along its way, and which of them are anchors. Pure arithmetic."""

import math
from collections.abc import Callable, Sequence

from kdbench.recipe.method_specs import AnchorSpec

# What says which checkpoints lie in a cell's folder `files.ROUTE`.
INDEX = "index.json"


def points(route: int | None, total: int) -> tuple[int, ...]:
    """The steps after which a cell of `total` steps keeps its student: `route` even ones, the last step included."""
    return tuple(sorted({max(math.floor(i * total / route + 0.5), 1) for i in range(1, route + 1)})) if route else ()


def equal(checkpoints: int, n: int, at: int) -> int:
    """Equal intervals (Jin et al., ICCV 2019, EEI-n): position of anchor `at` (from 0) of `n` among the checkpoints.

    Anchor k (from 1) is the checkpoint k/n of the way, to the nearest (halves up): the last is the converged teacher.
    """
    return max(math.floor((at + 1) * checkpoints / n + 0.5), 1) - 1


def greedy(divergences: Sequence[float], present: int, delta: float) -> int:
    """Greedy search (the same paper): position of the anchor after `present`.

    Args:
        divergences: H, of each checkpoint from the student as `present` left it, all >= 0.
        delta: growth that is allowed.

    Returns:
        the first j after `present` with (H_j - H_present) / H_present > delta, or the last one where there is none.
    """
    allowed = delta * divergences[present]
    later = range(present + 1, len(divergences))
    return next((j for j in later if divergences[j] - divergences[present] > allowed), len(divergences) - 1)


def position(anchor: AnchorSpec, checkpoints: int, present: int, divergences: Callable[[], Sequence[float]]) -> int:
    """Position of an anchor among the checkpoints.

    Args:
        present: position of the anchor before. divergences: gives H of every checkpoint; asked only where they decide.
    """
    if anchor.choose == "equal":
        return equal(checkpoints, anchor.n, anchor.at)
    if anchor.choose == "converged" or anchor.last:
        return checkpoints - 1
    if anchor.at == 0:
        return 0
    assert anchor.delta is not None
    return greedy(divergences(), present, anchor.delta)
