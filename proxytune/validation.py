"""Which prefixes of token ids were seen before, exactly, and how much of another one that covers.

A trie in one dictionary, from (node, token) to node. Hashes of whole prefixes would be smaller, but a collision would
pass for a text that was seen; a set of all prefixes is quadratic in the length. Here each node is a token that was new.
"""

from __future__ import annotations

import operator
import sys
from collections.abc import Sequence
from typing import Any

from proxytune.errors import InputError

__all__ = ["Ids", "Prefixes", "token_ids", "whole"]

Ids = Sequence[int] | bytes

_ROOT = 0
_WIDTHS = (1, 2, 4, 8)


class Prefixes:
    """A set of token sequences with all their prefixes. Not locked: its owner is."""

    def __init__(self) -> None:
        self._children: dict[tuple[int, int], int] = {}  # (node, token id) → node

    def __len__(self) -> int:
        """How many different prefixes it holds, the empty one not counted."""
        return len(self._children)

    def covered(self, ids: Sequence[int]) -> int:
        """How many tokens at the start of a sequence are known.

        Args:
            ids: `[T]`.

        Returns:
            The length of the longest prefix that it shares with any sequence added, in 0 … T.
        """
        return self._walk(ids)[1]

    def add(self, ids: Sequence[int]) -> None:
        """Add a sequence.

        Args:
            ids: `[T]`.
        """
        node, depth = self._walk(ids)
        for token in ids[depth:]:
            child = len(self._children) + 1
            self._children[node, token] = child
            node = child

    def _walk(self, ids: Sequence[int]) -> tuple[int, int]:
        """The deepest node on the way of some ids, and its depth."""
        node = _ROOT
        for depth, token in enumerate(ids):
            child = self._children.get((node, token))
            if child is None:
                return node, depth
            node = child
        return node, len(ids)


def token_ids(key: Ids, length: int | None = None) -> list[int]:
    """Token ids as Python's own ints, whatever they came in; a tensor's elements would not be found again.

    Args:
        key: A sequence of ints, or `bytes` of `length` equally wide ints in the machine's byte order.
        length: How many tokens; needed for bytes. Of a sequence the first `length`, all if None.

    Returns:
        `[length]`, or fewer if there are fewer.

    Raises:
        InputError: If it is neither.
    """
    if isinstance(key, bytes):
        if length is None or (length and len(key) / length not in _WIDTHS) or (not length and key):
            raise InputError.of(
                "prefix",
                expected="bytes of `length` ints, each 1, 2, 4 or 8 bytes wide",
                got=f"{len(key)} bytes and length={length}",
                remedy="Pass the ids as a sequence of ints, or the number of tokens with their bytes.",
            )
        width = len(key) // length if length else 1
        return [int.from_bytes(key[i : i + width], sys.byteorder) for i in range(0, len(key), width)]
    try:
        ids = [operator.index(token) for token in key]
    except TypeError:
        ids = [-1]
    if any(token < 0 for token in ids):
        raise InputError.of(
            "prefix",
            expected="token ids (ints, at least 0), or the name of a tree node (a str or an int)",
            got=repr(key)[:80],
            remedy="Pass e.g. input_ids[0].tolist(), without padding.",
        )
    return ids if length is None else ids[:length]


def whole(name: str, value: Any, what: str = "of tokens", *, least: int = 0) -> int:
    """Check that a value is a whole number.

    Args:
        name: The argument.
        value: Its value.
        what: What it counts, after "a whole number".
        least: The smallest that is right.

    Returns:
        An int.

    Raises:
        InputError: If it is not.
    """
    try:
        number = operator.index(value)
    except TypeError:
        number = None
    # True is an int to Python, and no number of tokens.
    if number is None or isinstance(value, bool) or number < least:
        raise InputError.of(
            name, expected=f"a whole number {what}, at least {least}", got=repr(value), remedy="Pass an int."
        )
    return number
