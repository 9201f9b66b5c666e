"""What the commands share about the terminal: two consoles, one form for errors, silence for the libraries below."""

from __future__ import annotations

from typing import TextIO

from rich.console import Console
from rich.text import Text

__all__ = ["errors", "is_terminal", "output", "quiet", "safe", "show_error", "show_note", "show_warning"]

# Control characters but tab and line feed, as the pictures that Unicode has for them; C1 controls become one sign.
_PICTURES = {code: 0x2400 + code for code in range(0x20) if chr(code) not in "\t\n"}
_PICTURES |= {0x7F: 0x2421, **dict.fromkeys(range(0x80, 0xA0), 0xFFFD)}


def output() -> Console:
    """The console on stdout, made anew so that it follows a redirected stream.

    Returns:
        A console that never interprets a model's text as markup and, piped, prints plain text.
    """
    return Console(markup=False, highlight=False, emoji=False)


def errors() -> Console:
    """The console on stderr.

    Returns:
        A console that never interprets a model's text as markup.
    """
    return Console(stderr=True, markup=False, highlight=False, emoji=False)


def is_terminal(stream: TextIO) -> bool:
    """Whether a person reads this stream."""
    return stream.isatty()


def safe(text: str) -> str:
    """Make a model's text harmless to print: a byte-level model can write the sequences that command a terminal.

    Args:
        text: Any text.

    Returns:
        The text with a visible sign in the place of each control character.
    """
    return text.translate(_PICTURES)


def show_error(message: str) -> None:
    """Print an error as one line on stderr."""
    errors().print(
        Text("error: ", style="bold red").append(" ".join(message.split()), style="not bold"), soft_wrap=True
    )


def show_note(message: str) -> None:
    """Print what is no fault as one line on stderr."""
    errors().print(Text("note: ", style="dim").append(message, style="not dim"), soft_wrap=True)


def show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """Print a warning as one line on stderr, in the place of `warnings.showwarning`: no file, no source line."""
    errors().print(Text("warning: ", style="yellow").append(" ".join(str(message).split())), soft_wrap=True)


def quiet() -> None:
    """Turn off the notices and loading bars of transformers, which would tear a table or a stream of JSON apart."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
