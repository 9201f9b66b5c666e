"""How much memory tensors take at once, counted where they are made: on any device, and to the byte.

What a kernel takes and gives back inside one operator is not seen, nor what the allocator keeps for later. NumPy's
arrays are no tensors: `numpy_peak` counts these.
"""

from __future__ import annotations

import tracemalloc
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Follows the storages that operators make while it is on.

    Attributes:
        now: Bytes of those that are alive.
        peak: The most there were at once.
        held: At the peak: the sizes of the storages, in bytes, the largest first.
    """

    def __init__(self, least: int = 1) -> None:
        """Start at 0.

        Args:
            least: Smaller storages are not counted, in bytes.
        """
        super().__init__()
        self.now = self.peak = 0
        self.held: list[int] = []
        self._least = least
        self._alive: dict[int, int] = {}
        self._serial = 0
        self._seen: weakref.WeakSet[Any] = weakref.WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self._meet(tensor.untyped_storage(), args)
        return out

    def _meet(self, storage: torch.UntypedStorage, args: Any) -> None:
        size = storage.nbytes()
        # A view of what was there before, or the argument itself, is nothing new.
        given = {id(x.untyped_storage()) for x in tree_leaves(args) if isinstance(x, torch.Tensor)}
        if size < self._least or id(storage) in given or storage in self._seen:
            return
        self._seen.add(storage)
        self._serial += 1
        self._alive[self._serial] = size
        weakref.finalize(storage, self._part, self._serial)
        self.now += size
        if self.now > self.peak:
            self.peak, self.held = self.now, sorted(self._alive.values(), reverse=True)

    def _part(self, serial: int) -> None:
        self.now -= self._alive.pop(serial)


@contextmanager
def counted(least: int = 1) -> Iterator[LiveBytes]:
    """Count what is made inside.

    Args:
        least: Smaller storages are not counted, in bytes.

    Yields:
        The counter.
    """
    with torch.no_grad(), LiveBytes(least) as live:
        yield live


def numpy_peak(call: Callable[[], Any]) -> int:
    """Peak bytes of NumPy's arrays and Python's own objects in a call, with scratch that is kept for later calls."""

    def traced() -> int:
        with torch.no_grad():
            tracemalloc.start()
            try:
                call()
                return tracemalloc.get_traced_memory()[1]
            finally:
                tracemalloc.stop()

    with ThreadPoolExecutor(1) as fresh:  # a thread has scratch of its own
        return fresh.submit(traced).result()
