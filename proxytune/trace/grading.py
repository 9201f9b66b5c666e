"""Answers and grades, written into a trace after the run."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace

from proxytune.errors import InputError
from proxytune.trace.record import Trace, TracedText

__all__ = ["graded", "words_of"]

_SPECIAL = re.compile(r"<[^<>\s]{1,40}>|\[[A-Z]{2,12}\]")
"""How tokenizers write a token that ends a text: `<|end|>`, `</s>`, `[EOS]`."""


def words_of(text: TracedText) -> str | None:
    """A text without the tokens that end it (last pieces like `<|end|>` or `[SEP]`); None without a tokenizer."""
    if text.pieces is None:
        return None
    pieces = list(text.pieces)
    while pieces and _SPECIAL.fullmatch(pieces[-1].strip()):
        pieces.pop()
    return "".join(pieces)


def graded(
    trace: Trace,
    extract: Callable[[str], str | None] | None = None,
    grade: Callable[[TracedText], float | None] | None = None,
) -> Trace:
    """A trace with the answers that were found in its texts, and their grades.

    Args:
        trace: The run; it stays as it is.
        extract: The answer of a text, given as `words_of` it; None for no answer. Without it, answers stay.
        grade: The grade of a text, whose answer is set already: 1 for right; None if not graded. Without it, grades
            stay.

    Raises:
        InputError: If answers are to be found in a text that was recorded without a tokenizer.
    """
    texts = []
    for i, text in enumerate(trace):
        done = text
        if extract is not None:
            words = words_of(text)
            if words is None:
                raise InputError.of(
                    f"text {i}",
                    expected="words to find an answer in",
                    got="token ids alone",
                    remedy="Record with tokenizer=, or write answers to the texts yourself.",
                )
            done = replace(done, answer=extract(words))
        if grade is not None:
            value = grade(done)
            done = replace(done, grade=None if value is None else float(value))
        texts.append(done)
    return replace(trace, texts=tuple(texts))
