"""What tokens say: the piece of text that each adds, and a name for a token alone."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

__all__ = ["names_of", "pieces_of"]

_WAITING = "\ufffd"
"""How a tokenizer writes a character of which bytes are missing."""


def pieces_of(tokenizer: Any, ids: Sequence[int], before: Sequence[int] = ()) -> tuple[str, ...]:
    """What each token adds to the text; they join to the text.

    A character that several tokens make comes with the last of them. Special tokens are written out. `before` are the
    ids in front: whether a first word begins with a space depends on them.
    """
    pieces: list[str] = []
    held = list(before[-1:])  # the tokens since the last whole character, and the one before them
    told = _decoded(tokenizer, held)
    for token in ids:
        held.append(int(token))
        text = _decoded(tokenizer, held)
        if text.endswith(_WAITING):
            pieces.append("")
            continue
        pieces.append(text[len(told) :])
        held = held[-1:]
        told = _decoded(tokenizer, held)
    if pieces and len(held) > 1:  # a character that never became whole
        pieces[-1] = _decoded(tokenizer, held)[len(told) :]
    return tuple(pieces)


def names_of(tokenizer: Any, ids: Iterable[int]) -> dict[int, str]:
    """Token id → its text alone, with the space it begins with; bytes of a longer character as they are written."""
    wanted = sorted({int(token) for token in ids if token >= 0})
    names = {}
    for token, raw in zip(wanted, tokenizer.convert_ids_to_tokens(wanted), strict=True):
        text = _decoded(tokenizer, [token])
        if raw is not None and raw.startswith("▁") and not text.startswith(" "):  # SentencePiece's space
            text = f" {text}"
        names[token] = str(raw) if raw is not None and (_WAITING in text or not text) else text
    return names


def _decoded(tokenizer: Any, ids: Sequence[int]) -> str:
    text: str = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return text
