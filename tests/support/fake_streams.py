"""Streams that only keep the books: what would race on a GPU is an error on the CPU.

Every operation is taken to run on the stream that is current when it is called. A stream knows how far it is behind the
others (vector clocks, by which its events and waits are followed). It is an error

- to read or write what another stream has written, or to write what another one has read, without having waited for it;
- to make something on a stream while another one may still be reading memory that the first has made and nobody holds
  any more, which a GPU's allocator then gives out again: it has to be told of the reader by `record_stream`, or the
  first stream has to have waited for it.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


@dataclass(eq=False)
class Stream:
    name: str
    seen: dict[str, int] = field(default_factory=dict)  # by stream: how many of its operations come before what follows

    def tick(self) -> int:
        self.seen[self.name] = self.seen.get(self.name, 0) + 1
        return self.seen[self.name]

    def record_event(self) -> dict[str, int]:
        return dict(self.seen)

    def wait_event(self, event: dict[str, int]) -> None:
        for name, count in event.items():
            self.seen[name] = max(count, self.seen.get(name, 0))


@dataclass(eq=False)
class Memory:
    storage: Any  # held, so that its key stays its own
    made: str
    written: tuple[str, int]
    recorded: set[str] = field(default_factory=set)
    read: dict[str, int] = field(default_factory=dict)


class Books(TorchDispatchMode):
    """The streams, and who has used which memory on which of them."""

    def __init__(self) -> None:
        super().__init__()
        self.main = self.current = Stream("main")
        self.streams = [self.main]
        self.memory: dict[int, Memory] = {}
        self.operations: dict[str, int] = {}
        self.crossings = 0

    # --- what stands in for torch.cuda ---

    def new(self, device: Any = None) -> Stream:
        self.streams.append(Stream(f"side {len(self.streams)}"))
        return self.streams[-1]

    @contextlib.contextmanager
    def use(self, stream: Stream) -> Iterator[None]:
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before

    def record(self, tensor: torch.Tensor, stream: Stream) -> None:
        if (memory := self.memory.get(tensor.untyped_storage()._cdata)) is not None:
            memory.recorded.add(stream.name)

    # --- what each operation does ---

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        now = self.current
        count = now.tick()
        self.operations[now.name] = self.operations.get(now.name, 0) + 1
        written = set()
        for argument, value in zip(func._schema.arguments, args, strict=False):
            if argument.alias_info is not None and argument.alias_info.is_write:
                written |= {x.untyped_storage()._cdata for x in tree_leaves(value) if isinstance(x, torch.Tensor)}
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        for x in given:
            if (memory := self.memory.get(x.untyped_storage()._cdata)) is None:
                continue  # weights, and what was there before
            self.check(func, memory, x.untyped_storage()._cdata in written, count)
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor) and x.untyped_storage()._cdata not in self.memory:
                key, storage = x.untyped_storage()._cdata, x.untyped_storage()
                if all(key != y.untyped_storage()._cdata for y in given):
                    self.give(func)
                    self.memory[key] = Memory(storage, now.name, (now.name, count))
        return out

    def give(self, func: Any) -> None:
        """New memory for the current stream: whatever it has made before, and nobody holds."""
        now = self.current
        for key, memory in list(self.memory.items()):
            if memory.made == now.name and torch._C._storage_Use_Count(key) == 1:  # held here alone
                for user, when in memory.read.items():
                    waited = now.seen.get(user, 0) >= when or user in memory.recorded
                    assert waited, f"{func} on {now.name} may be given memory that {user} still reads"
                del self.memory[key]

    def check(self, func: Any, memory: Memory, writes: bool, count: int) -> None:
        now = self.current
        stream, at = memory.written
        if stream != now.name:
            self.crossings += 1
            assert now.seen.get(stream, 0) >= at, f"{func} on {now.name} does not wait for {stream}"
        if writes:
            for reader, when in memory.read.items():
                assert now.seen.get(reader, 0) >= when, f"{func} on {now.name} overwrites what {reader} reads"
            memory.written = (now.name, count)
        memory.read[now.name] = count


@contextlib.contextmanager
def streams(monkeypatch: pytest.MonkeyPatch) -> Iterator[Books]:
    """Let the CPU have streams, and check what is done on them."""
    books = Books()
    with monkeypatch.context() as patch:
        for module in ("models.members.cuda_streams", "methods.steering.processor"):
            patch.setattr(f"proxytune.{module}.may_overlap", lambda device: True)
        patch.setattr(torch.cuda, "Stream", books.new)
        patch.setattr(torch.cuda, "current_stream", lambda device=None: books.current)
        patch.setattr(torch.cuda, "stream", books.use)
        patch.setattr(torch.Tensor, "record_stream", lambda x, stream: books.record(x, stream))
        with books:
            yield books
