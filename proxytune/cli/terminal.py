"""What the commands share about the terminal: two consoles, one form for errors, one bar, and silence for libraries."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING, Self, TextIO

from rich.console import Console
from rich.text import Text

if TYPE_CHECKING:
    from rich.progress import Task

__all__ = ["Bar", "errors", "is_terminal", "output", "quiet", "safe", "show_error", "show_note", "show_warning"]

NARROW = 60
"""Columns below which the bar says only numbers."""
WIDE = 100
"""Columns from which it says the rate too."""
EVERY = 30.0
"""Seconds between two lines of a bar where stderr is no terminal."""
silent = False
"""Whether bars say nothing (`--quiet`)."""


def output() -> Console:
    """A console on stdout, made anew to follow a redirected stream; it never reads text as markup."""
    return Console(markup=False, highlight=False, emoji=False)


def errors() -> Console:
    """A console on stderr that never reads a model's text as markup."""
    return Console(stderr=True, markup=False, highlight=False, emoji=False)


def is_terminal(stream: TextIO) -> bool:
    """Whether a person reads this stream."""
    return stream.isatty()


def safe(text: str) -> str:
    """Replace control characters by visible signs: a byte-level model can write sequences that control a terminal."""
    from proxytune.view.words import visible

    return visible(text)


def show_error(message: str) -> None:
    """Print an error as one line on stderr."""
    from proxytune.cli.wording import as_options

    errors().print(
        Text("error: ", style="bold red").append(as_options(" ".join(message.split())), style="not bold"),
        soft_wrap=True,
    )


def show_note(message: str) -> None:
    """Print a note as one line on stderr."""
    errors().print(Text("note: ", style="dim").append(message, style="not dim"), soft_wrap=True)


def show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """Print a warning as one line on stderr, without file and source line; stands in for `warnings.showwarning`."""
    from proxytune.cli.wording import as_options

    text = as_options(" ".join(str(message).split()))
    errors().print(Text("warning: ", style="yellow").append(text), soft_wrap=True)


class Bar:
    """A progress bar on stderr: what is being done, how much of it, and the time left.

    ```text
    proxy, α = 0.5                  ━━━━━━━╺━━━━ 1,794 of 3,059 answers, about 0:08 left
    ```

    Where stderr is no terminal, a line every `EVERY` seconds says the same; with `silent` nothing does.

    A context manager, which takes the bar away at its end. Printing is safe between `pause` and `go_on`.
    """

    def __init__(self, unit: str, *, left: str = "about", still: bool = False) -> None:
        """Prepare the bar, which shows "loading" until the first `show`.

        Args:
            unit: What is counted, in the plural.
            left: How the time left is to be taken: "at most" where the total is a limit.
            still: Whether to draw at each `show` only, and not between them, where times are measured.
        """
        from rich.progress import BarColumn, Progress, ProgressColumn, TextColumn
        from rich.table import Column

        class Count(ProgressColumn):
            def render(self, task: Task) -> Text:
                return Text(task.fields["count"](time.monotonic()))

        wide = Column(ratio=1, no_wrap=True, overflow="ellipsis")
        self._bar = Progress(
            TextColumn("{task.description}", markup=False, table_column=wide),
            BarColumn(12),
            Count(Column(no_wrap=True)),
            console=errors(),
            transient=True,
            redirect_stdout=False,  # what is printed there may be read by a program
            expand=True,
            auto_refresh=not still,
            refresh_per_second=4,
            disable=silent or not is_terminal(sys.stderr),
        )
        self._said = time.monotonic()
        self._unit, self._left, self._still = unit, left, still
        self._began: tuple[float, float] | None = None  # the time of the first `show`, and what was done before it
        # The time of the last one, the units it counted, these and those underway, and the total.
        self._now: tuple[float, float, float, int] = (0.0, 0.0, 0.0, 0)
        self._task = self._bar.add_task("loading", total=None, count=lambda now: "")

    def show(self, what: str, done: float, total: int, *, underway: float = 0.0) -> None:
        """Show what is being done from now on, and how much is done.

        Args:
            what: What is being done.
            done: Units done so far, those done in an earlier run included.
            total: All of them.
            underway: Units done in parts of others, which are not counted yet.
        """
        now = time.monotonic()
        fresh = self._still or self._began is None or done != self._now[1]  # the rest is drawn in time
        self._began = self._began or (now, done + underway)
        self._now = (now, done, done + underway, total)
        self._bar.update(self._task, description=what, completed=done + underway, total=total, count=self.count)
        if fresh and not self._bar.disable:
            self._bar.refresh()
        elif self._bar.disable and not silent and now - self._said >= EVERY:
            self._said = now
            errors().print(f"{what}: {self.count(now, wide=True)}", soft_wrap=True)

    def count(self, now: float, *, wide: bool | None = None) -> str:
        """What stands beside the bar at a time of `time.monotonic`: the count, the rate and the time left at that pace.

        The rate is left out where the console is not `wide`.
        """
        then, counted, done, total = self._now
        wide = self._bar.console.width >= WIDE if wide is None else wide
        narrow = not wide and self._bar.console.width < NARROW
        said = f"{int(counted):,}/{total:,}" if narrow else f"{int(counted):,} of {total:,} {self._unit}"
        began, before = self._began or (then, done)
        if done <= before:
            return said
        left = max(0.0, (then - began) / (done - before) * (total - done) - (now - then))
        minutes, seconds = divmod(round(left), 60)
        if narrow:
            return f"{said}, {minutes}:{seconds:02}"
        rate = f", {_rate((done - before) / max(then - began, 1e-9))}" if wide else ""
        return f"{said}{rate}, {self._left} {minutes}:{seconds:02} left"

    def pause(self) -> None:
        """Take the bar away, so that something can be printed."""
        if not self._bar.disable:
            self._bar.stop()

    def go_on(self) -> None:
        """Show the bar."""
        self._bar.start()

    def __enter__(self) -> Self:
        self.go_on()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.pause()


def _rate(per_second: float) -> str:
    """A pace, in a unit of time in which it is not below 1 if possible."""
    for unit, seconds in (("s", 1), ("min", 60)):
        if (pace := per_second * seconds) >= 1:
            return f"{pace:,.0f}/{unit}" if pace >= 10 else f"{pace:.1f}/{unit}"
    return f"{per_second * 3600:.1f}/h"


def quiet() -> None:
    """Turn off transformers' notices and loading bars, which would break tables and JSON output."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
