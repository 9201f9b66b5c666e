"""CUDA streams beside the current one, so that a companion's kernels do not queue behind the base's.

A companion does not read the base's logits of the same step; only its inputs have to be ready. What makes this safe:

- A side stream first waits for the current stream's work so far, and the current stream waits for the side stream
  before the results are used. Neither is more than one step ahead.
- A tensor used on another stream than its own is recorded there, so that its memory is not reused too early: inputs,
  results, and cache layers, which `generate()` may have reordered on its own stream.
- Every thread has its own side streams, since threads do not wait for each other.

Without a GPU, inside `torch.compile` and during CUDA graph capture everything runs in order.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Self

import torch
from transformers.cache_utils import Cache, EncoderDecoderCache

__all__ = ["CompanionStreams", "ForkJoin", "StreamOrder", "may_overlap", "tensors_of"]


def may_overlap(device: torch.device) -> bool:
    """Whether work can go on another stream now: on CUDA, outside `torch.compile` and graph capture."""
    return device.type == "cuda" and not torch.compiler.is_compiling() and not torch.cuda.is_current_stream_capturing()


def tensors_of(cache: Cache | None) -> Iterator[torch.Tensor]:
    """All tensors that the layers of a cache (a pair, or a view of one) hold."""
    if isinstance(cache, EncoderDecoderCache):
        yield from tensors_of(cache.self_attention_cache)
        yield from tensors_of(cache.cross_attention_cache)
        return
    for layer in [] if cache is None else cache.layers:
        yield from (x for x in vars(layer).values() if isinstance(x, torch.Tensor))


class CompanionStreams(threading.local):
    """One stream per name, device and thread, made at its first use; copies, also by pickle, start without streams."""

    def __init__(self) -> None:
        self._streams: dict[tuple[str, torch.device], Any] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), ()

    @contextmanager
    def beside(
        self, name: str, device: torch.device, reads: Iterable[torch.Tensor | None], ready: Any = None
    ) -> Iterator[Any]:
        """Make a side stream the current one, and yield it; who uses the results has to wait for it.

        It waits for the event `ready`, by default for all work given to the device's current stream so far. `reads` are
        the tensors read there that may have been made on another stream.
        """
        stream = self._streams.get((name, device))
        if stream is None:
            stream = self._streams[name, device] = torch.cuda.Stream(device)
        stream.wait_event(torch.cuda.current_stream(device).record_event() if ready is None else ready)
        _record(reads, device, stream)
        with torch.cuda.stream(stream):
            yield stream


class StreamOrder:
    """Orders the streams that use something in place, such as a cache, one after the other."""

    def __init__(self) -> None:
        self._done: Any = None

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), ()  # a copy has not been used on any stream

    @contextmanager
    def on(self, device: torch.device, uses: Iterable[torch.Tensor | None]) -> Iterator[None]:
        """Take a turn on the current stream, after the last turn on any stream; `uses` are the tensors used."""
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
    """The forward passes of one step; the companions' may run beside the base's.

    Use as a context manager: at its end, also after an error, the current streams wait for the side streams.
    """

    def __init__(self, sides: CompanionStreams | None) -> None:
        """Begin a step; without side streams everything runs in order."""
        self._sides = sides
        # By device: events that the side streams wait for, and events to wait for at the end.
        self._ready: dict[torch.device, Any] = {}
        self._done: list[tuple[torch.device, Any]] = []

    def __enter__(self) -> Self:
        return self

    def open(self, device: torch.device) -> None:
        """Let a device's side streams start from here, whatever its current stream is given later."""
        if self._sides is not None and device not in self._ready and may_overlap(device):
            self._ready[device] = torch.cuda.current_stream(device).record_event()

    def run(
        self,
        name: str,
        device: torch.device,
        work: Callable[[], list[torch.Tensor]],
        reads: Iterable[torch.Tensor | None],
    ) -> list[torch.Tensor]:
        """Run a companion's forward pass `work`, beside the current stream if its device has been opened.

        `reads` are the tensors it reads that may have been made on another stream. The results may be used on the
        current stream after the context.
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
        _record(out, device, current)
        return out

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for device, event in self._done:
            torch.cuda.current_stream(device).wait_event(event)


def _record(tensors: Iterable[torch.Tensor | None], device: torch.device, stream: Any) -> None:
    for x in tensors:
        if x is not None and x.device == device:
            x.record_stream(stream)
