"""The plots of a report as files for papers and slides, drawn with matplotlib (extra `plot`)."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from proxytune.errors import InputError
from proxytune.validation import choice
from proxytune.view.plots import Plot
from proxytune.view.report import Report

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["figure", "write_figures"]

Form = Literal["png", "svg", "pdf"]
FORMS: tuple[Form, ...] = ("png", "svg", "pdf")


def figure(plot: Plot, title: str = "") -> Figure:
    """A plot as a matplotlib figure: points with their intervals, one colour for each run.

    Raises:
        InputError: If matplotlib is not installed.
    """
    try:
        # A figure of its own instead of pyplot: no display is asked for, and none of its state is changed.
        from matplotlib.figure import Figure
    except ImportError:
        raise InputError.of(
            "figures", expected="matplotlib", got="none", remedy="Install it: pip install '.[plot]' in the checkout."
        ) from None
    made = Figure(figsize=(6.4, 3.6), layout="constrained")
    axes = made.subplots()
    scale = 100.0 if plot.percent else 1.0
    for one in plot.series:
        points = [(x, y) for x, y in one.points if math.isfinite(x) and math.isfinite(y.value)]
        if not points:
            continue
        values = [scale * y.value for _, y in points]
        below, above = ([_reach(scale * (end - y.value)) for end, y in ends] for ends in (
            [(2 * y.value - y.low, y) for _, y in points], [(y.high, y) for _, y in points],
        ))  # fmt: skip
        joined = "none" if plot.ticks else "-"
        axes.errorbar(
            [x for x, _ in points], values, yerr=[below, above], fmt="o", linestyle=joined, markersize=4, capsize=2,
            label=one.name,
        )  # fmt: skip
    if plot.ticks:
        axes.set_xticks(range(len(plot.ticks)), plot.ticks, rotation=30, ha="right")
    if plot.log_x:
        axes.set_xscale("log")
        places = sorted({x for one in plot.series for x, _ in one.points})
        axes.set_xticks(places, [f"{x:g}" for x in places])  # not powers of ten
        axes.set_xticks([], minor=True)
    if plot.diagonal:
        axes.plot([0, 1], [0, scale], color="#999999", linewidth=1, linestyle=":")
    axes.set(xlabel=plot.x, ylabel=f"{plot.y}, %" if plot.percent else plot.y, title=title)
    if len(plot.series) > 1:
        axes.legend(fontsize="small")
    return made


def _reach(length: float) -> float:
    """How far an interval reaches; 0 where nothing is known of its end."""
    return max(0.0, length) if math.isfinite(length) else 0.0


def write_figures(report: Report, folder: str | Path, form: Form = "png") -> list[Path]:
    """Write every plot of a report to a folder, one file each, named by its diagnosis. Returns the files.

    Raises:
        InputError: If the form is none of png, svg and pdf, the folder cannot be made, or matplotlib is missing.
    """
    choice("form", form, FORMS)
    place = Path(folder)
    try:
        place.mkdir(parents=True, exist_ok=True)
    except OSError as failure:
        raise InputError.of("folder", expected="a folder", got=str(failure), remedy="Give another one.") from None
    files = []
    for part in report.parts:
        if part.plot is not None:
            file = place / f"{re.sub('[^a-z0-9]+', '-', part.title.lower()).strip('-')}.{form}"
            figure(part.plot, part.title).savefig(file, dpi=150)
            files.append(file)
    return files
