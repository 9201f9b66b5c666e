"""A thread beside the current one, on a CPU: the companions run in it while the base runs in the caller's.

torch shares one matrix product between its threads, and the small ones of a decode step badly: two models that run at
the same time on half of the threads each can be faster than one after the other on all of them. Where they are is a
matter of measurement (`benches/bench_overlap.py`), so it is off until it is asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

__all__ = ["SideThread", "may_split"]


def may_split(devices: Sequence[torch.device]) -> bool:
    """Whether passes on these devices can be divided between two threads now.

    Args:
        devices: Where each pass runs.

    Returns:
        Whether: on CPUs, with two threads at least, and where nothing is in force that belongs to one thread alone
        (gradients, autocast, inside `torch.compile`).
    """
    if len(devices) < 2 or any(device.type != "cpu" for device in devices) or torch.get_num_threads() < 2:
        return False
    return not (torch.compiler.is_compiling() or torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"))


class SideThread:
    """One thread, made at the first use; copies, also those of pickle, make one of their own."""

    def __init__(self) -> None:
        self._pool: ThreadPoolExecutor | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), ()

    def run(self, works: Sequence[Callable[[], torch.Tensor]]) -> list[torch.Tensor]:
        """Run the first one here and the others, one after the other, on the side thread; torch's threads are divided.

        Args:
            works: At least two, which do not depend on each other.

        Returns:
            What each returns. After an error in one of them nothing is still running.
        """
        if self._pool is None:
            self._pool = ThreadPoolExecutor(1, thread_name_prefix="proxytune-companions")
        threads = torch.get_num_threads()
        theirs = threads // 2
        inference = torch.is_inference_mode_enabled()

        def beside() -> list[torch.Tensor]:
            # Both belong to a thread, so the side thread has its own.
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
