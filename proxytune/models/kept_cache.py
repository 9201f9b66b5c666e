"""A static cache that a compiled model keeps from one `generate()` to the next: graphs of CUDA know it by its address.

transformers makes a new one for each call, and its CUDA graphs are recorded anew. A cache that a caller has seen, or
whose layers were replaced on the way (by beams), is not kept.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

from transformers.cache_utils import Cache

__all__ = ["KeptCache"]


class _Lent(NamedTuple):
    key: Any
    cache: Cache
    layers: list[tuple[Any, type]]

    @classmethod
    def of(cls, key: Any, cache: Cache) -> _Lent:
        return cls(key, cache, [(x, type(x)) for x in cache.layers])


_IN_CALL: ContextVar[list[_Lent] | None] = ContextVar("_IN_CALL", default=None)


class KeptCache:
    """The last static cache of one model that nobody uses any more; a copy has none."""

    def __init__(self) -> None:
        self._kept: _Lent | None = None

    def __reduce__(self) -> tuple[Any, ...]:  # for copies as well
        return KeptCache, ()

    def take(self, key: Any) -> Cache | None:
        """The cache that was kept for calls with this key, empty; None if there is none. Another one is freed."""
        kept, self._kept = self._kept, None
        if kept is None or kept.key != key:
            return None
        kept.cache.reset()
        return kept.cache

    def lend(self, key: Any, cache: Cache) -> None:
        """Note that this call's cache was made for it, with its layers as they are to be."""
        if (lent := _IN_CALL.get()) is not None:
            lent[:] = [_Lent.of(key, cache)]

    @contextmanager
    def call(self, held: Any) -> Iterator[list[Any]]:
        """One `generate()`; keeps the cache that was made for it, if the result, put into the list, holds none.

        `held` is what the caller runs in place of transformers' loop: another one than ours may hold the cache.
        """
        ours = held is None or type(held).__module__.startswith("proxytune.")
        lent: list[_Lent] = []
        token, result = _IN_CALL.set(lent), list[Any]()
        try:
            yield result
        finally:
            _IN_CALL.reset(token)
        for one in lent:
            if ours and result and hasattr(result[0], "shape") and one == _Lent.of(one.key, one.cache):
                self._kept = one
