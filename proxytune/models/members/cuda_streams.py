"""Streams of a GPU beside the current one: a companion's kernels need not queue behind the base's.

A companion does not read the base's logits of the same step, so only its inputs have to be there. What makes this safe:

- a side stream first waits for all that the current stream has been given so far, and the current stream for the side
  stream before the results are used: neither is ever more than one step ahead;
- a tensor that is used on a stream on which it was not made is recorded there, so that its memory is not handed out
  again too early: inputs, the layers of caches, which `generate()` may have reordered on its own stream, and results;
- every thread has side streams of its own, since threads do not wait for each other.

Where there is no GPU, inside `torch.compile` and while a CUDA graph is captured, all runs in turn, as it is called.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Self

import torch
from transformers.cache_utils import Cache

__all__ = ["CompanionStreams", "ForkJoin", "StreamOrder", "may_overlap", "tensors_of"]


def may_overlap(device: torch.device) -> bool:
    """Whether work on a device can be put on another stream now.

    Args:
        device: The device.

    Returns:
        Whether; False on a CPU, inside `torch.compile` and while a graph is captured.
    """
    return device.type == "cuda" and not torch.compiler.is_compiling() and not torch.cuda.is_current_stream_capturing()


def tensors_of(cache: Cache | None) -> Iterator[torch.Tensor]:
    """All tensors that a cache's layers hold.

    Args:
        cache: The cache, or a view of one; None for none.

    Yields:
        Keys, values and what else a layer keeps, on any device.
    """
    for layer in [] if cache is None else cache.layers:
        yield from (x for x in vars(layer).values() if isinstance(x, torch.Tensor))


class CompanionStreams(threading.local):
    """A stream for each name and device, in each thread another; made at the first use.

    Copies, also those of pickle, start without streams.
    """

    def __init__(self) -> None:
        self._streams: dict[tuple[str, torch.device], Any] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), ()

    @contextmanager
    def beside(
        self, name: str, device: torch.device, reads: Iterable[torch.Tensor | None], ready: Any = None
    ) -> Iterator[Any]:
        """Make a side stream the current one.

        Args:
            name: Whose stream, e.g. a role.
            device: A CUDA device.
            reads: What is read there that may have been made on another stream.
            ready: An event to wait for; None for all that the device's current stream has been given so far.

        Yields:
            The stream. Who uses the results has to wait for it.
        """
        stream = self._streams.get((name, device))
        if stream is None:
            stream = self._streams[name, device] = torch.cuda.Stream(device)
        stream.wait_event(torch.cuda.current_stream(device).record_event() if ready is None else ready)
        _record(reads, device, stream)
        with torch.cuda.stream(stream):
            yield stream


class StreamOrder:
    """The order of the streams that use something in place, one after the other, such as a cache."""

    def __init__(self) -> None:
        self._done: Any = None

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), ()  # a copy has not been used on any stream

    @contextmanager
    def on(self, device: torch.device, uses: Iterable[torch.Tensor | None]) -> Iterator[None]:
        """Take a turn on the current stream, after the last one on whichever stream it was.

        Args:
            device: Where the things are.
            uses: What they are made of now.
        """
        if not may_overlap(device):
            yield
            return
        stream = torch.cuda.current_stream(device)
        if self._done is not None:
            stream.wait_event(self._done)
        _record(uses, device, stream)
        try:
            yield
        finally:
            self._done = stream.record_event()


class ForkJoin:
    """The forward passes of one step; those of companions may run beside the one of the base.

    Use as a context manager: at its end, also after an error, the current streams wait for the side streams.
    """

    def __init__(self, sides: CompanionStreams | None) -> None:
        """Begin a step.

        Args:
            sides: The side streams; None to run everything in turn.
        """
        self._sides = sides
        # By device: what the side streams wait for, and what waits for them.
        self._ready: dict[torch.device, Any] = {}
        self._done: list[tuple[torch.device, Any]] = []

    def __enter__(self) -> Self:
        return self

    def open(self, device: torch.device) -> None:
        """Let the side streams of a device start from here, whatever its current stream is given from now on.

        Args:
            device: The device of a companion.
        """
        if self._sides is not None and device not in self._ready and may_overlap(device):
            self._ready[device] = torch.cuda.current_stream(device).record_event()

    def run(
        self,
        name: str,
        device: torch.device,
        work: Callable[[], torch.Tensor],
        reads: Iterable[torch.Tensor | None],
    ) -> torch.Tensor:
        """Run a companion, beside the current stream if its device has been opened.

        Args:
            name: Whose stream.
            device: The companion's device.
            work: Its forward pass.
            reads: What it reads that may have been made on another stream.

        Returns:
            What `work` returns; on the current stream, it may be used after the context.
        """
        ready = self._ready.get(device)
        if ready is None or self._sides is None:
            return work()
        current = torch.cuda.current_stream(device)
        with self._sides.beside(name, device, reads, ready) as stream:
            try:
                out = work()
            finally:
                self._done.append((device, stream.record_event()))
        _record([out], device, current)
        return out

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for device, event in self._done:
            torch.cuda.current_stream(device).wait_event(event)


def _record(tensors: Iterable[torch.Tensor | None], device: torch.device, stream: Any) -> None:
    for x in tensors:
        if x is not None and x.device == device:
            x.record_stream(stream)
