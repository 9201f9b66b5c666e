"""Small plots as SVG, without a script or a style of their own: classes alone, which the page's sheet colours."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

from proxytune.stats.bootstrap import Interval

__all__ = ["Plot", "Series", "svg"]

WIDTH, HEIGHT = 640, 260
LEFT, RIGHT, TOP, BOTTOM = 56, 12, 28, 42
COLOURS = 6
"""How many series have a colour of their own."""


@dataclass(frozen=True)
class Series:
    """Points of one run: x, and y with its interval."""

    name: str
    points: tuple[tuple[float, Interval], ...]


@dataclass(frozen=True, kw_only=True)
class Plot:
    """What a plot shows.

    Attributes:
        x: What the horizontal axis is.
        y: What the vertical axis is.
        series: One for each run.
        log_x: Whether x is drawn in its logarithm.
        percent: Whether y is a share, written in percent.
        ticks: Names of x = 0, 1, …: then nothing joins the points.
        diagonal: Whether to draw y = x.
    """

    x: str
    y: str
    series: tuple[Series, ...]
    log_x: bool = False
    percent: bool = False
    ticks: tuple[str, ...] = ()
    diagonal: bool = False


def svg(plot: Plot) -> str:
    """The plot as one `<svg>` element; values that are not finite are left out. Empty if there is no point."""
    series = [
        (i % COLOURS, [(x, y) for x, y in one.points if all(map(math.isfinite, (x, y.value)))])
        for i, one in enumerate(plot.series)
    ]
    points = [point for _, mine in series for point in mine]
    if not points:
        return ""
    xs = [float(i) for i in range(len(plot.ticks))] or [x for x, _ in points]
    ends = [end for _, y in points for end in (y.value, y.low, y.high) if math.isfinite(end)]
    low, high = min(0.0, *ends), max(ends)
    if plot.diagonal:
        xs, high = [*xs, 0.0, 1.0], max(high, 1.0)
    marks = _round_marks(low, high if high > low else low + 1)
    low, high = min(low, marks[0]), max(high, marks[-1])

    def place(x: float) -> float:
        start, end = min(xs), max(xs)
        if plot.ticks:
            return LEFT + (x + 0.5) / len(plot.ticks) * (WIDTH - LEFT - RIGHT)
        if plot.log_x:
            x, start, end = (math.log(max(one, 1e-9)) for one in (x, start, end))
        return LEFT + 12 + (x - start) / ((end - start) or 1.0) * (WIDTH - LEFT - RIGHT - 24)

    def level(y: float) -> float:
        y = min(max(y, low), high)
        return HEIGHT - BOTTOM - (y - low) / (high - low) * (HEIGHT - TOP - BOTTOM)

    out = []
    for mark in marks:
        at = level(mark)
        shown = f"{100 * mark:.4g} %" if plot.percent else f"{mark:.4g}"
        out.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>')
        out.append(f'<text class="mark" text-anchor="end" x="{LEFT - 6}" y="{at + 4:.1f}">{shown}</text>')
    out.append(f'<text class="mark" x="6" y="16">{escape(plot.y)}</text>')
    out += [_label(place(i), name) for i, name in enumerate(plot.ticks)]
    if not plot.ticks:
        for x in _thinned(sorted({x for x, _ in points}), place):
            out.append(_label(place(x), f"{x:.3g}"))
    if plot.diagonal:
        out.append(
            f'<line class="diagonal" x1="{place(0):.1f}" y1="{level(0):.1f}" x2="{place(1):.1f}" y2="{level(1):.1f}"/>'
        )
    for number, (colour, mine) in enumerate(series):
        shift = 7.0 * (number - (len(series) - 1) / 2) if plot.ticks else 0.0
        spots = [(place(x) + shift, y) for x, y in sorted(mine, key=lambda point: point[0])]
        if len(spots) > 1 and not plot.ticks:
            line = " ".join(f"{x:.1f},{level(y.value):.1f}" for x, y in spots)
            out.append(f'<polyline class="run{colour}" points="{line}"/>')
        for at, y in spots:
            whisker = [level(one if math.isfinite(one) else high) for one in (y.low, y.high)]
            start, end = (f"{one:.1f}" for one in whisker)
            out.append(f'<line class="run{colour}" x1="{at:.1f}" x2="{at:.1f}" y1="{start}" y2="{end}"/>')
            out.append(f'<circle class="run{colour}" cx="{at:.1f}" cy="{level(y.value):.1f}" r="3.2"/>')
    middle = (LEFT + WIDTH - RIGHT) / 2
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(plot.y)} by {escape(plot.x)}">'
        + "".join(out)
        + f'<text class="mark" text-anchor="middle" x="{middle:.0f}" y="{HEIGHT - 4}">{escape(plot.x)}</text></svg>'
    )


def _label(x: float, text: str) -> str:
    return f'<text class="mark" text-anchor="middle" x="{x:.1f}" y="{HEIGHT - BOTTOM + 16}">{escape(text)}</text>'


def _thinned(xs: Sequence[float], place: Callable[[float], float]) -> list[float]:
    """The xs whose labels do not overlap."""
    kept: list[float] = []
    for x in xs:
        if not kept or place(x) - place(kept[-1]) > 40:
            kept.append(x)
    return kept


def _round_marks(low: float, high: float) -> list[float]:
    """Three to six round numbers that cover a range."""
    raw = (high - low) / 4
    power = 10 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]
