"""The plots of a report as files: drawn without a display, with the points and intervals that they were given."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from proxytune.errors import InputError
from proxytune.stats.bootstrap import Interval
from proxytune.view.figures import figure, write_figures
from proxytune.view.plots import Plot, Series

NAN = float("nan")
CURVE = Plot(
    x="samples",
    y="right",
    percent=True,
    log_x=True,
    series=(
        Series("a", ((1.0, Interval(0.2, 0.1, 0.4)), (8.0, Interval(0.5, NAN, 0.6)))),
        Series("b", ((1.0, Interval(NAN, NAN, NAN)), (8.0, Interval(0.3, 0.3, 0.3)))),
    ),
)
BARS = Plot(x="run", y="nats", ticks=("a", "b"), series=(Series("", ((0.0, Interval(1.0, 0.5, 2.0)),)),), diagonal=True)


def test_points_and_intervals_are_those_given() -> None:
    (axes,) = figure(CURVE, "Coverage").axes
    assert (axes.get_xlabel(), axes.get_ylabel(), axes.get_title()) == ("samples", "right, %", "Coverage")
    assert axes.get_xscale() == "log"
    assert [label.get_text() for label in axes.get_xticklabels()] == ["1", "8"]
    first, second = axes.containers
    assert first[0].get_xydata().tolist() == [[1.0, 20.0], [8.0, 50.0]]
    assert second[0].get_xydata().tolist() == [[8.0, 30.0]]
    spans = [[tuple(round(y, 6) for _, y in line) for line in bars.get_segments()] for bars in first[2]]
    assert spans == [[(10.0, 40.0), (50.0, 60.0)]]
    assert "pyplot" not in " ".join(name for name in sys.modules if name == "matplotlib.pyplot")


def test_every_plot_of_a_report_is_written(tmp_path: Path) -> None:
    parts = [
        SimpleNamespace(title=title, plot=plot) for title, plot in (("pass@k: a, b", CURVE), ("x", None), ("y", BARS))
    ]
    report: Any = SimpleNamespace(parts=parts)
    for form, begins in (("png", b"\x89PNG"), ("svg", b"<?xml")):
        files = write_figures(report, tmp_path / "new" / form, form)  # type: ignore[arg-type]
        assert [file.name for file in files] == [f"pass-k-a-b.{form}", f"y.{form}"]
        assert all(file.read_bytes().startswith(begins) for file in files)
    with pytest.raises(InputError, match="form"):
        write_figures(report, tmp_path, "jpg")  # type: ignore[arg-type]


def test_a_missing_matplotlib_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(InputError, match="expected matplotlib"):
        figure(BARS)
