"""How tokens, probabilities and nats are written where people read them."""

from __future__ import annotations

import math

from proxytune.errors import InputError
from proxytune.trace import Trace, TracedText

__all__ = ["check_texts", "name_of", "nats", "pieces", "share", "visible"]

# Control characters (except tab and line feed) become Unicode's control pictures; C1 controls become U+FFFD.
_PICTURES = {code: 0x2400 + code for code in range(0x20) if chr(code) not in "\t\n"}
_PICTURES |= {0x7F: 0x2421, **dict.fromkeys(range(0x80, 0xA0), 0xFFFD)}
_SPACES = {"\n": "↵", "\t": "⇥", " ": "␣"}


def visible(text: str) -> str:
    """Replace control characters by visible signs: a byte-level model can write sequences that control a terminal."""
    return text.translate(_PICTURES)


def name_of(text: TracedText, token: int) -> str:
    """A token on one line: its text, with signs for line feeds, tabs and spaces alone; its id if that is not known."""
    if token < 0:
        return "–"
    name = text.names.get(token)
    if name is None and text.pieces is not None:
        own = (piece for i, piece in zip(text.tokens.tolist(), text.pieces, strict=True) if i == token and piece)
        name = next(own, None)
    if name is None:
        return f"#{token}"
    if not name.strip():
        return "".join(_SPACES.get(letter, visible(letter)) for letter in name)
    return visible(name).replace("\n", "↵").replace("\t", "⇥").strip(" ")


def pieces(text: TracedText) -> tuple[str, ...]:
    """What each token adds to the text; ids without a tokenizer."""
    return tuple(f" #{token}" for token in text.tokens) if text.pieces is None else text.pieces


def check_texts(trace: Trace) -> None:
    """Refuse a trace to which nothing was recorded."""
    if not len(trace):
        raise InputError.of(
            "trace",
            expected="a trace with texts",
            got="none: nothing was recorded",
            remedy="Call generate() of the model that is recorded, inside the `with` block; what a loop of your own "
            "computes with model(…) is not recorded.",
        )


def share(logprob: float) -> str:
    """A probability in percent, from nats."""
    if math.isnan(logprob):
        return "?"
    percent = 100.0 * math.exp(logprob)
    return "<1 %" if 0.0 < percent < 0.5 else f"{percent:.0f} %"


def nats(value: float) -> str:
    """A number of nats."""
    return f"{value:.2f}" if abs(value) < 100 else f"{value:.0f}"
