"""The prefixes that were paid for, exactly: a trie in one dictionary from (node, token) to node."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["Prefixes"]

_ROOT = 0


class Prefixes:
    """A set of token sequences with all their prefixes. Not thread-safe; the ledger locks it."""

    def __init__(self) -> None:
        self._children: dict[tuple[int, int], int] = {}  # (node, token id) → node

    def __len__(self) -> int:
        """The number of different non-empty prefixes."""
        return len(self._children)

    def covered(self, ids: Sequence[int]) -> int:
        """The length of the longest prefix that `ids` shares with any added sequence."""
        return self._walk(ids)[1]

    def add(self, ids: Sequence[int]) -> None:
        """Add a sequence with all its prefixes."""
        node, depth = self._walk(ids)
        for token in ids[depth:]:
            child = len(self._children) + 1
            self._children[node, token] = child
            node = child

    def _walk(self, ids: Sequence[int]) -> tuple[int, int]:
        """The deepest node along `ids`, and its depth."""
        node = _ROOT
        for depth, token in enumerate(ids):
            child = self._children.get((node, token))
            if child is None:
                return node, depth
            node = child
        return node, len(ids)
