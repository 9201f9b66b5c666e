"""On a CPU: run the companions in a second thread while the base runs in the caller's.

torch splits the small matrix products of a decode step badly over many threads: two models at the same time, each on
half of the threads, can be faster than one after the other on all of them. Off by default; `benches/bench_overlap.py`
measures it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch

__all__ = ["SideThread", "may_split"]

_Result = TypeVar("_Result")


def may_split(devices: Sequence[torch.device]) -> bool:
    """Whether passes on these devices can be divided between two threads now.

    They can on CPUs with at least two torch threads, unless gradients, autocast or `torch.compile` are active, which
    belong to one thread.
    """
    if len(devices) < 2 or any(device.type != "cpu" for device in devices) or torch.get_num_threads() < 2:
        return False
    return not (torch.compiler.is_compiling() or torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"))


class SideThread:
    """One thread, started at its first use; copies, also by pickle, start their own."""

    def __init__(self) -> None:
        self._pool: ThreadPoolExecutor | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), ()

    def run(self, works: Sequence[Callable[[], _Result]]) -> list[_Result]:
        """Run the first function here and the others, in order, on the side thread, with torch's threads divided.

        After an error in one of them nothing is still running.
        """
        if self._pool is None:
            self._pool = ThreadPoolExecutor(1, thread_name_prefix="proxytune-companions")
        threads = torch.get_num_threads()
        theirs = threads // 2
        inference = torch.is_inference_mode_enabled()

        def beside() -> list[_Result]:
            # Thread count and inference mode belong to a thread: set them on the side thread too.
            torch.set_num_threads(theirs)
            with torch.inference_mode(inference), torch.no_grad():
                return [work() for work in works[1:]]

        others = self._pool.submit(beside)
        torch.set_num_threads(threads - theirs)
        try:
            first = works[0]()
        finally:
            failed = others.exception()  # waits
            torch.set_num_threads(threads)
        if failed is not None:
            raise failed
        return [first, *others.result()]
