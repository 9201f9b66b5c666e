"""A trace as one short string for the page: columns of small numbers, deflated, in 85 signs.

The string holds, before deflate: the length of the head (uint32, little-endian), the head (JSON, UTF-8), then columns
over the N tokens of all texts. A number of w bytes is stored as w planes: all lowest bytes, then all next ones.

* The chosen token, then each source's likeliest by rank, column by column: a byte that says where the id is found (0:
  new; j: as in column j − 1; 255: left out), then the new ids, three bytes each: numbers of `head["names"]`.
* Each source's log-probabilities by rank, as levels, two bytes each: the distance from the level of the rank before;
  none for those left out.
* `NUMBERS`, as levels, two bytes each, without their sign; 65535: unknown. That of `shift` is doubled, odd if negative.
* The base's rank, two bytes, then `SIGNALS`, a byte each: 0 unknown, 1 no, 2 yes.

Level l is (l / grain)² nats: probabilities near one, which people tell apart, lie closest.
"""

from __future__ import annotations

import base64
import json
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from proxytune.trace import SIGNALS, Trace
from proxytune.view.words import pieces

__all__ = ["ALPHABET", "packed"]

NUMBERS = ("logprobs", "entropy", "kl", "shift")
NOTHING = 0xFFFF
LEFT_OUT = 255
ALPHABET = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz!#$%&()*+-;,=>?@^_`{|}~"
"""That of Python's `b85encode`, with a comma for `<`: nothing in it can end a script block, or begin a comment."""


def packed(trace: Trace, head: Mapping[str, Any], *, top: int, grain: int, numbers: int, least: float) -> str:
    """The string.

    Args:
        trace: The trace.
        head: What the page is told besides, as JSON.
        top: How many likeliest tokens of each source to keep.
        grain: How fine their log-probabilities are: 1 nat to ± 1 / grain.
        numbers: The same of `NUMBERS`.
        least: Tokens less probable than this are left out.
    """
    most = (LEFT_OUT - 1) // max(1, len(trace.sources))
    ids, gaps = _likeliest(trace, min(top, trace.top, most), grain, least)
    number, places = _numbered(ids)
    columns = [_found(ids, places, column) for column in range(ids.shape[1])]
    columns += [_planes(gaps[kept, i], 2) for i, kept in enumerate((ids[:, 1:] >= 0).T)]
    columns += [_planes(_rounded(trace, name, numbers), 2) for name in NUMBERS]
    columns.append(_planes(np.minimum(_joined(trace, "base_rank"), NOTHING - 1), 2))
    columns += [_planes(_joined(trace, name) + 1, 1) for name in SIGNALS]
    names, texts = _words(trace, number)
    told = {
        **plain(head),
        "sources": trace.sources,
        "top": ids.shape[1] // max(1, len(trace.sources)),
        "grain": grain,
        "numbersGrain": numbers,
        "least": least,
        "names": names,
        "texts": texts,
    }
    words = json.dumps(told, ensure_ascii=False).encode("utf-8", "replace")
    raw = len(words).to_bytes(4, "little") + words + b"".join(columns)
    deflate = zlib.compressobj(6, zlib.DEFLATED, zlib.MAX_WBITS, 5, zlib.Z_FILTERED)  # short blocks: a column each
    return base64.b85encode(deflate.compress(raw) + deflate.flush()).decode("ascii").replace("<", ",")


def plain(value: Any) -> Any:
    """A value as JSON that a browser reads: what JSON has no form for, NaN among it, becomes text."""
    return json.loads(json.dumps(value, default=str), parse_constant=str)


def _joined(trace: Trace, name: str) -> NDArray[Any]:
    arrays = [getattr(text, name) for text in trace]
    return np.concatenate(arrays) if arrays else np.zeros(0, np.int64)


def _planes(values: NDArray[Any], width: int) -> bytes:
    whole = values.astype("<u4").view(np.uint8).reshape(-1, 4)
    return whole[:, :width].T.tobytes()


def _levels(values: NDArray[np.float64], grain: int) -> NDArray[np.int64]:
    return np.rint(grain * np.sqrt(np.abs(values))).astype(np.int64)


def _likeliest(trace: Trace, top: int, grain: int, least: float) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Ids `[N, 1 + S·k]`, the chosen token's first, −1 where left out; distances `[N, S·k]`."""
    shape = (0, len(trace.sources), top)
    ids = np.concatenate([np.zeros(shape, np.int64), *(text.top_ids[:, :, :top] for text in trace)])
    nats = np.concatenate([np.zeros(shape), *(text.top_logprobs[:, :, :top] for text in trace)]).astype(np.float64)
    with np.errstate(divide="ignore"):
        known = (ids >= 0) & np.isfinite(nats) & (nats >= np.log(least)) & (nats > -(((NOTHING - 1) / grain) ** 2))
    known = np.logical_and.accumulate(known, axis=-1)
    levels = np.maximum.accumulate(_levels(np.where(known, np.minimum(nats, 0.0), 0.0), grain), axis=-1)
    gaps = np.where(known, np.diff(levels, axis=-1, prepend=0), 0)
    flat = np.where(known, ids, -1).reshape(len(ids), shape[1] * top)
    return np.concatenate([_joined(trace, "tokens")[:, None], flat], axis=1), gaps.reshape(flat.shape)


def _numbered(ids: NDArray[np.int64]) -> tuple[dict[int, int], NDArray[np.int64]]:
    """Token id → its number, the most frequent first; and the ids as numbers."""
    distinct, inverse, counts = np.unique(ids, return_inverse=True, return_counts=True)
    counts[distinct < 0] = -1  # those left out come last, and are not named
    order = np.argsort(-counts, kind="stable")
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order))
    numbers = {int(distinct[i]): int(rank[i]) for i in order if distinct[i] >= 0}
    return numbers, rank[inverse.reshape(ids.shape)]


def _found(ids: NDArray[np.int64], numbers: NDArray[np.int64], column: int) -> bytes:
    mine = ids[:, column]
    same = ids[:, :column] == mine[:, None]
    where = np.where(same.any(1), same.argmax(1) + 1, 0) if column else np.zeros(len(ids), np.int64)
    where = np.where(mine < 0, LEFT_OUT, where)
    return _planes(where, 1) + _planes(numbers[where == 0, column], 3)


def _rounded(trace: Trace, name: str, grain: int) -> NDArray[np.int64]:
    values = _joined(trace, name).astype(np.float64)
    known = np.isfinite(values)
    levels = _levels(np.where(known, values, 0.0), grain)
    if name == "shift":
        levels = 2 * levels + (values < 0)
    return np.where(known, np.minimum(levels, NOTHING - 1), NOTHING)


def _words(trace: Trace, number: Mapping[int, int]) -> tuple[list[str | None], list[dict[str, Any]]]:
    """The names of the numbered tokens, and each text without its arrays."""
    names: list[str | None] = [None] * len(number)
    for text in trace:
        for token, name in text.names.items():
            if token in number:
                names[number[token]] = name
        for token, piece in zip(text.tokens.tolist(), text.pieces or (), strict=False):
            if names[number[token]] is None:
                names[number[token]] = piece
    for token, i in number.items():
        if names[i] is None:
            names[i] = f" #{token}"
    texts = []
    for text in trace:
        own = pieces(text)
        usual = (names[number[token]] for token in text.tokens.tolist())
        told = {
            "count": len(text),
            "prompt": text.prompt,
            "pieces": {i: piece for i, (piece, name) in enumerate(zip(own, usual, strict=True)) if piece != name},
            "given": text.given,
            "answer": text.answer,
            "grade": plain(text.grade),
            "facts": plain(dict(text.facts)),
        }
        texts.append(
            {name: value for name, value in told.items() if not (value is None or value is False or value == {})}
        )
    return names, texts
