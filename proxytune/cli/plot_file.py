"""What `--plot` is given: a file that matplotlib can write, told before anything is measured."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from proxytune.errors import InputError

__all__ = ["PLOT_KINDS", "refuse_plot"]

PLOT_KINDS = ("eps", "jpeg", "jpg", "pdf", "pgf", "png", "ps", "raw", "rgba", "svg", "svgz", "tif", "tiff", "webp")
"""What every supported matplotlib can write, by the ends of file names; asking it would mean importing it."""


def refuse_plot(path: Path) -> None:
    """Refuse what cannot be drawn, with nothing heavy imported: matplotlib alone takes a second."""
    if importlib.util.find_spec("matplotlib") is None:
        raise InputError.of(
            "--plot",
            expected="matplotlib, which draws it",
            got="an environment without it",
            remedy="Run pip install matplotlib, or pip install '.[plot]' in the checkout of proxytune.",
        )
    if path.suffix.removeprefix(".").lower() not in PLOT_KINDS:
        raise InputError.of(
            "--plot",
            expected=f"a file name that ends in one of {', '.join(PLOT_KINDS)}",
            got=repr(str(path)),
            remedy="Pass e.g. --plot out.png.",
        )
    if not path.resolve().parent.is_dir():
        raise InputError.of(
            "--plot", expected="a folder that exists", got=repr(str(path.parent)), remedy="Make it first."
        )
