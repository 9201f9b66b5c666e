"""Counts of a generation, taken from outside: forward passes by hooks, memory by the storages of all new tensors."""

from __future__ import annotations

import time
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from transformers import PreTrainedModel, StoppingCriteria

from proxytune.models.members.cache_name import argument_of
from proxytune.models.members.rewind import length_of

__all__ = ["FirstToken", "LiveBytes", "Passes", "Reads", "counting", "now"]


def now(device: torch.device) -> float:
    """Seconds, after all work queued on the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


class FirstToken(StoppingCriteria):
    """A stopping criterion that never stops, and records when (`at`, seconds as of `now`) the first token came.

    If `passes` is given, its counts restart then, so that the prompt's passes are left out.
    """

    def __init__(self, device: torch.device, passes: Passes | None = None) -> None:
        self._device = device
        self.passes = passes
        self.at: float | None = None
        self.calls = 0

    def seen(self) -> None:
        """Record a token."""
        self.calls += 1
        if self.at is None:
            self.at = now(self._device)
            if self.passes is not None:
                self.passes.restart()

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        """Record a token, and let all rows go on: `[B]`, bool."""
        self.seen()
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


@dataclass
class Reads:
    """Forward passes of one model.

    Attributes:
        positions: Tokens × rows that went through them.
        context: Tokens × rows in the cache at the end of each pass, summed over passes.
    """

    passes: int = 0
    positions: int = 0
    context: int = 0


@dataclass
class Passes:
    """Forward passes since the last restart: role → `Reads`."""

    of: dict[str, Reads] = field(default_factory=dict)

    def restart(self) -> None:
        """Set all counts to zero."""
        for role in self.of:
            self.of[role] = Reads()


@contextmanager
def counting(models: Mapping[str, PreTrainedModel]) -> Iterator[Passes]:
    """Count the forward passes of models (role → model) by hooks; a model with two roles counts for the first."""
    counted, handles, known = Passes(), [], set()
    for role, model in models.items():
        if id(model) in known:
            continue
        known.add(id(model))
        counted.of[role] = Reads()

        def hook(
            module: Any, args: Any, kwargs: dict[str, Any], role: str = role, name: str | None = argument_of(model)
        ) -> None:
            ids = kwargs["input_ids"] if "input_ids" in kwargs else args[0]
            rows, length = ids.shape
            cache = None if name is None else kwargs.get(name)
            reads = counted.of[role]
            reads.passes += 1
            reads.positions += rows * length
            reads.context += rows * (length + (0 if cache is None else int(length_of(cache))))

        handles.append(model.register_forward_pre_hook(hook, with_kwargs=True))
    try:
        yield counted
    finally:
        for handle in handles:
            handle.remove()


class LiveBytes(TorchDispatchMode):
    """Bytes held now and at most by tensors created inside; for CPUs, where torch keeps no such record.

    Temporary memory inside an operator is not seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.held = self.peak = 0
        self._sizes: dict[int, int] = {}  # storage → bytes

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operator and track its outputs."""
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        given = {_storage(x)._cdata for x in tree_iter((args, kwargs)) if isinstance(x, torch.Tensor)}
        for x in tree_iter(out):
            if not isinstance(x, torch.Tensor):
                continue
            storage = _storage(x)
            key = storage._cdata
            if key in self._sizes or key in given:  # a view, or changed in place
                continue
            self._sizes[key] = storage.nbytes()
            self.held += storage.nbytes()
            self.peak = max(self.peak, self.held)
            weakref.finalize(storage, self._gone, key)
        return out

    def _gone(self, key: int) -> None:
        self.held -= self._sizes.pop(key)


def _storage(x: torch.Tensor) -> torch.UntypedStorage:
    return x.untyped_storage()
