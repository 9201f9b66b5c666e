"""What the commands share about the terminal: two consoles, one form for errors, and silence for the libraries."""

from __future__ import annotations

from typing import TextIO

from rich.console import Console
from rich.text import Text

__all__ = ["errors", "is_terminal", "output", "quiet", "safe", "show_error", "show_note", "show_warning"]

# Control characters (except tab and line feed) become Unicode's control pictures; C1 controls become U+FFFD.
_PICTURES = {code: 0x2400 + code for code in range(0x20) if chr(code) not in "\t\n"}
_PICTURES |= {0x7F: 0x2421, **dict.fromkeys(range(0x80, 0xA0), 0xFFFD)}


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
    return text.translate(_PICTURES)


def show_error(message: str) -> None:
    """Print an error as one line on stderr."""
    errors().print(
        Text("error: ", style="bold red").append(" ".join(message.split()), style="not bold"), soft_wrap=True
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
    errors().print(Text("warning: ", style="yellow").append(" ".join(str(message).split())), soft_wrap=True)


def quiet() -> None:
    """Turn off transformers' notices and loading bars, which would break tables and JSON output."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
