"""Charts as SVG text: lines with bands, and points with whiskers. Nothing but shapes and words, so that a page that
holds them needs no other file. The same values give the same text."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from kdbench.drawing import MARKERS
from kdbench.results.curves import MARKS_ON_CURVE, Look

WIDTH, HEIGHT = 440, 290
LEFT, RIGHT, TOP, BOTTOM = 52, 14, 12, 42
MARKER_SIZE = 4.2
# A chart's x axis is logarithmic from this ratio of its largest to its smallest value.
LOG_FROM = 20.0


@dataclass(frozen=True)
class Line:
    """`y`: mean at each `x`; `spread`: deviation at each, or None with one seed."""

    look: Look
    label: str
    x: Sequence[float]
    y: Sequence[float]
    spread: Sequence[float] | None = None


@dataclass(frozen=True)
class Point:
    """`spread`: half length of the whisker, None for none. `words`: what a reader who points at it is told. `href`:
    where it leads."""

    look: Look
    x: float
    y: float
    spread: float | None
    words: str
    href: str | None = None


@dataclass(frozen=True)
class Axis:
    """Values from `low` to `high` on pixels from `start` to `end`."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def at(self, value: float) -> float:
        low, high, v = (math.log(x) for x in (self.low, self.high, value)) if self.log else (self.low, self.high, value)
        return self.start + (v - low) / (high - low) * (self.end - self.start)

    def ticks(self, count: int = 5) -> list[float]:
        """Round values inside, about `count` of them."""
        if self.log:
            decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            steps = (1, 2, 5) if self.high / self.low < 1000 else (1,)
            found = [step * 10.0**decade for decade in decades for step in steps]
            return [tick for tick in found if self.low <= tick <= self.high]
        rough = (self.high - self.low) / count
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= 0.7 * rough)
        first = math.ceil(self.low / step - 1e-9)
        return [k * step for k in range(first, math.floor(self.high / step + 1e-9) + 1)]

    def texts(self, ticks: Sequence[float]) -> list[str]:
        """Ticks in words: alike on a linear axis, each in its own unit on a logarithmic one."""
        return [text for tick in ticks for text in _numbers([tick])] if self.log else _numbers(ticks)


def lines(
    drawn: Sequence[Line],
    title: str,
    labels: tuple[str, str],
    x_range: tuple[float, float] | None = None,
    y_range: tuple[float, float] | None = None,
) -> str:
    """A panel of lines with bands of ± their spread.

    Args:
        drawn: at least one line with at least one value.
        title: what the panel shows, read out to who cannot see it.
        labels: of the x and the y axis.
        x_range, y_range: what to show of it; everything by default.
    """
    if y_range is None:
        ends = [v + sign * s for line in drawn for v, s in zip(line.y, _spread(line), strict=True) for sign in (-1, 1)]
        y_range = _with_room(ends)
    x_range = x_range or _with_room([x for line in drawn for x in line.x], 0.01)
    x, y = _axes(x_range, y_range)
    inside = []
    for line in drawn:
        if line.spread is not None:
            upper = [(x.at(a), y.at(b + s)) for a, b, s in zip(line.x, line.y, line.spread, strict=True)]
            lower = [(x.at(a), y.at(b - s)) for a, b, s in zip(line.x, line.y, line.spread, strict=True)]
            corners = " ".join(map(_pair, [*upper, *reversed(lower)]))
            inside.append(f'<polygon points="{corners}" fill="{line.look.colour}" opacity="0.13"/>')
    for line in drawn:
        places = [(x.at(a), y.at(b)) for a, b in zip(line.x, line.y, strict=True)]
        every = max(1, math.ceil(len(places) / MARKS_ON_CURVE))
        # Markers begin at different places, so that they do not lie on each other.
        start = (MARKERS.index(line.look.marker) * every) // len(MARKERS)
        inside.append(
            f'<g><title>{escape(line.label)}</title><polyline points="{" ".join(map(_pair, places))}" fill="none" '
            f'stroke="{line.look.colour}" stroke-width="1.7"{_dashes(line.look)}/>'
            + "".join(_marker(line.look, *place) for place in places[start::every])
            + "</g>"
        )
    return _panel(title, labels, x, y, "".join(inside))


def points(drawn: Sequence[Point], title: str, labels: tuple[str, str], whole_numbers: bool = False) -> str:
    """A panel of points with whiskers. The x axis is logarithmic where its values differ widely.

    Args:
        drawn: at least one point; every x above 0.
        title: what the panel shows.
        labels: of the x and the y axis.
        whole_numbers: whether x counts something, which keeps the axis from saying that half of one is possible.
    """
    values = [point.x for point in drawn]
    log = max(values) / min(values) >= LOG_FROM
    if log:
        x_range = (min(values) / 1.3, max(values) * 1.3)
    else:
        low, high = _with_room(values, 0.08)
        x_range = (max(low, 0.0), high)
    ends = [point.y + sign * (point.spread or 0) for point in drawn for sign in (-1, 1)]
    x, y = _axes(x_range, _with_room(ends), log)
    inside = []
    for point in drawn:
        px, py = x.at(point.x), y.at(point.y)
        whisker = ""
        if point.spread:
            top, bottom = y.at(point.y + point.spread), y.at(point.y - point.spread)
            whisker = (
                f'<path d="M{px:.1f} {top:.1f}V{bottom:.1f}" stroke="{point.look.colour}" stroke-width="1.2" '
                'fill="none" opacity="0.6"/>'
            )
        shape = f"<g><title>{escape(point.words)}</title>{whisker}{_marker(point.look, px, py, 5.5)}</g>"
        if point.href is not None:
            shape = f'<a href="{escape(point.href)}" aria-label="{escape(point.words)}">{shape}</a>'
        inside.append(shape)
    return _panel(title, labels, x, y, "".join(inside), whole_numbers)


def swatch(look: Look) -> str:
    """A method's line and marker, for a legend."""
    return (
        '<svg class="swatch" viewBox="0 0 44 14" width="44" height="14" aria-hidden="true">'
        f'<path d="M2 7H42" stroke="{look.colour}" stroke-width="1.7" fill="none"{_dashes(look)}/>'
        f"{_marker(look, 22, 7)}</svg>"
    )


def _panel(title: str, labels: tuple[str, str], x: Axis, y: Axis, inside: str, whole_numbers: bool = False) -> str:
    """Axes, ticks and words around what is drawn; what lies outside the axes is cut off."""
    across, down = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM
    parts = [
        f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="group" aria-label="{escape(title)}" '
        'xmlns="http://www.w3.org/2000/svg">'
    ]
    y_ticks = y.ticks()
    for tick, text in zip(y_ticks, y.texts(y_ticks), strict=True):
        at = y.at(tick)
        parts.append(f'<path class="grid" d="M{LEFT} {at:.1f}H{WIDTH - RIGHT}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{at + 4:.1f}" text-anchor="end">{text}</text>')
    x_ticks = [tick for tick in x.ticks() if not whole_numbers or tick == int(tick)]
    for tick, text in zip(x_ticks, x.texts(x_ticks), strict=True):
        at = x.at(tick)
        parts.append(f'<path class="grid" d="M{at:.1f} {TOP}V{HEIGHT - BOTTOM}"/>')
        parts.append(f'<text x="{at:.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{text}</text>')
    parts.append(f'<path class="axis" d="M{LEFT} {TOP}V{HEIGHT - BOTTOM}H{WIDTH - RIGHT}"/>')
    middle_x, middle_y = LEFT + across / 2, TOP + down / 2
    scale = " (logarithmic)" if x.log else ""
    parts.append(
        f'<text x="{middle_x:.0f}" y="{HEIGHT - 8}" text-anchor="middle">{escape(labels[0])}{scale}</text>'
        f'<text transform="translate(13 {middle_y:.0f}) rotate(-90)" text-anchor="middle">{escape(labels[1])}</text>'
    )
    # A nested svg cuts off what leaves it, which is how a part of a curve is enlarged.
    parts.append(
        f'<svg x="{LEFT}" y="{TOP}" width="{across}" height="{down}" viewBox="{LEFT} {TOP} {across} {down}">'
        f"{inside}</svg>"
    )
    return "".join(parts) + "</svg>"


def _axes(x_range: tuple[float, float], y_range: tuple[float, float], log: bool = False) -> tuple[Axis, Axis]:
    return Axis(*x_range, LEFT, WIDTH - RIGHT, log), Axis(*y_range, HEIGHT - BOTTOM, TOP)


def _with_room(values: Sequence[float], share: float = 0.05) -> tuple[float, float]:
    """Limits around values, with some room, also where they are all equal."""
    low, high = min(values), max(values)
    room = share * (high - low) or 0.05 * abs(high) or 0.5
    return low - room, high + room


def _spread(line: Line) -> Sequence[float]:
    return line.spread if line.spread is not None else [0.0] * len(line.y)


def _numbers(ticks: Sequence[float]) -> list[str]:
    """Numbers with as many decimals as they have together; large ones in thousands or millions."""
    largest = max((abs(tick) for tick in ticks), default=0)
    unit, suffix = (1e6, " M") if largest >= 1e6 else (1e3, " k") if largest >= 1e4 else (1.0, "")
    scaled = [tick / unit for tick in ticks]
    fits = (d for d in range(12) if all(abs(round(v, d) - v) <= 1e-9 * max(1e-3, abs(v)) for v in scaled))
    decimals = next(fits, 12)
    texts = [f"{value:.{decimals}f}" for value in scaled]
    return ["0" if float(text) == 0 else text.replace("-", "−") + suffix for text in texts]


def _pair(place: tuple[float, float]) -> str:
    return f"{place[0]:.1f},{place[1]:.1f}"


def _dashes(look: Look) -> str:
    if look.line == "-":
        return ""
    return f' stroke-dasharray="{" ".join(f"{1.7 * part:.3g}" for part in look.line[1])}"'


def _marker(look: Look, x: float, y: float, size: float = MARKER_SIZE) -> str:
    """The shape that matplotlib calls by the same letter."""
    fill = f'fill="{look.colour}" stroke="#fff" stroke-width="0.6"'
    if look.marker == "o":
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{size:.1f}" {fill}/>'
    corners = " ".join(_pair((x + size * a, y + size * b)) for a, b in _CORNERS[look.marker])
    return f'<polygon points="{corners}" {fill}/>'


def _star(arms: int, inner: float, turn: float = 0.0) -> list[tuple[float, float]]:
    """Corners of a star whose first arm points up, or is turned from there."""
    radii = [1.25, inner] * arms
    angles = [math.pi * (k / arms) + turn for k in range(2 * arms)]
    return [(radius * math.sin(angle), -radius * math.cos(angle)) for radius, angle in zip(radii, angles, strict=True)]


_PLUS = [
    (-0.4, -1.2),
    (0.4, -1.2),
    (0.4, -0.4),
    (1.2, -0.4),
    (1.2, 0.4),
    (0.4, 0.4),
    (0.4, 1.2),
    (-0.4, 1.2),
    (-0.4, 0.4),
    (-1.2, 0.4),
    (-1.2, -0.4),
    (-0.4, -0.4),
]
_CORNERS = {
    "s": [(-0.9, -0.9), (0.9, -0.9), (0.9, 0.9), (-0.9, 0.9)],
    "D": [(0, -1.2), (1.2, 0), (0, 1.2), (-1.2, 0)],
    "^": [(0, -1.15), (1.1, 0.9), (-1.1, 0.9)],
    "v": [(0, 1.15), (1.1, -0.9), (-1.1, -0.9)],
    "<": [(-1.15, 0), (0.9, 1.1), (0.9, -1.1)],
    ">": [(1.15, 0), (-0.9, 1.1), (-0.9, -1.1)],
    "P": _PLUS,
    "X": [((a - b) * 0.7071, (a + b) * 0.7071) for a, b in _PLUS],
    "*": _star(5, 0.5),
}
