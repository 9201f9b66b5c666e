"""One pass of a model whose rows run with different adapters: LoRA is applied to the rows of those members alone.

PEFT's own mixed batch (`adapter_names=`) gathers and scatters rows by index in every layer. Here the rows of a member
stand together, so a layer takes a slice, and adds to it in place. PEFT's layers get another `forward` for the time of
the pass, in this thread, and lose it afterwards.

Linear layers (also Conv1D) of plain LoRA and rsLoRA, with `lora_bias` or not, run so; embeddings, `modules_to_save` and
`trainable_token_indices` run PEFT's own forward on each slice. Whatever else a model carries is not mixed.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from proxytune.models.members.adapter_state import AdapterState, Switches, adapters_set, with_inside

__all__ = ["NotByRowsError", "Rows", "mixable", "mixed_rows"]

_LINEAR = ("peft.tuners.lora.layer", "Linear")
_SLICED = (
    ("peft.tuners.lora.layer", "Embedding"),
    ("peft.utils.other", "ModulesToSaveWrapper"),
    ("peft.utils.other", "TrainableTokensWrapper"),
)


class NotByRowsError(Exception):
    """A layer got something whose rows are not those of the batch, such as the tokens of a mixture's expert."""


class Rows:
    """The rows of one pass: each member's stand together, in the order of the members.

    Attributes:
        each: How many rows a member has.
        total: How many there are.
        thread: The thread that runs the pass; others find PEFT's layers as ever.
        fused: Whether no autocast is active.
    """

    def __init__(self, members: int, each: int, device: str) -> None:
        """Lay out `each` rows for every member."""
        self.each, self.total = each, members * each
        self.thread = threading.get_ident()
        self.fused = not torch.is_autocast_enabled(device)


def mixable(switches: Switches) -> bool:
    """Whether all of a model's adapter layers can run rows with different adapters in one pass."""
    return all(_is_linear(layer) or _is_sliced(layer) for layer in switches.layers)


@contextmanager
def mixed_rows(switches: Switches, states: Sequence[AdapterState], rows: Rows) -> Iterator[None]:
    """Run each member's rows in its state; all layers have to be `mixable`, and the turn held."""
    key = tuple(states)
    if key not in switches.forwards:
        slices = _slices(states)
        switches.forwards[key] = [(vars(layer), _forward_of(layer, slices, switches)) for layer in switches.layers]
    switches.rows = rows
    done = []
    try:
        for own, forward in switches.forwards[key]:
            own["forward"] = forward
            done.append(own)
        yield
    finally:
        for own in done:
            del own["forward"]
        switches.rows = None


_Slice = tuple[int, int, AdapterState]


def _slices(states: Sequence[AdapterState]) -> list[_Slice]:
    """From which member to which a state runs, in order; those of one state that stand side by side together."""
    slices: list[_Slice] = []
    for i, state in enumerate(states):
        start = slices.pop()[0] if slices and slices[-1][2] == state else i
        slices.append((start, i + 1, state))
    return slices


def _named(kind: type) -> tuple[str, str]:
    return kind.__module__, kind.__name__


def _is_linear(layer: Any) -> bool:
    if _named(type(layer)) != _LINEAR or "forward" in vars(layer) or layer.lora_variant:
        return False
    return type(layer.base_layer) in (nn.Linear, Conv1D)


def _is_sliced(layer: Any) -> bool:
    return _named(type(layer)) in _SLICED and "forward" not in vars(layer) and not getattr(layer, "lora_variant", None)


def _forward_of(layer: Any, slices: list[_Slice], switches: Switches) -> Callable[..., torch.Tensor]:
    return (_linear if _is_linear(layer) else _sliced)(layer, slices, switches)


def _linear(layer: Any, slices: list[_Slice], switches: Switches) -> Callable[..., torch.Tensor]:
    """A LoRA layer's forward that adds each slice's adapters to the rows of that slice."""
    plain, base = type(layer).forward, layer.base_layer
    added = [
        (start, stop, _Added(layer, name))
        for start, stop, state in slices
        for name in _names(layer, state)
        if name in layer.lora_A
    ]

    def forward(x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        rows = switches.rows
        if rows is None or rows.thread != threading.get_ident():
            out: torch.Tensor = plain(layer, x, *args, **kwargs)
            return out
        if x.ndim != 3 or x.shape[0] != rows.total or args or kwargs:
            raise NotByRowsError
        result: torch.Tensor = base(x)
        for start, stop, one in added:
            one.add(result, x, start * rows.each, stop * rows.each, rows.fused)
        return result

    return forward


def _names(layer: Any, state: AdapterState) -> Sequence[str]:
    """The adapters that a layer runs with in a state."""
    if state is None:
        return () if layer.disable_adapters else tuple(layer.active_adapters)
    return () if state is False else (state,)


class _Added:
    """One LoRA of one layer."""

    def __init__(self, layer: Any, name: str) -> None:
        self.down, self.up, self.scaling = layer.lora_A[name], layer.lora_B[name], layer.scaling[name]
        self.a: torch.Tensor = self.down.weight
        # Its own copy, since products with transposed rows of a few numbers take twice as long.
        self.b: torch.Tensor | None = None
        hooked = any(type(part) is not nn.Linear or _hooks(part) for part in (self.down, self.up))
        if self.a.dtype == torch.float32 and isinstance(self.scaling, float) and not hooked and not self.a.is_meta:
            self.b = self.up.weight.detach().t().contiguous()
            self.bias = self.up.bias

    def add(self, result: torch.Tensor, x: torch.Tensor, start: int, stop: int, fused: bool) -> None:
        """Add the LoRA of rows `start` to `stop` of `x` `[B, N, D]` to those of `result` `[B, N, E]`, in place."""
        plain = x.is_contiguous() and result.is_contiguous()
        if fused and self.b is not None and x.dtype == torch.float32 and plain:
            n, wide, out = x.shape[1], x.shape[2], result.shape[2]
            # One view each, as slices of flattened tensors would be two.
            own = x.as_strided(((stop - start) * n, wide), (wide, 1), x.storage_offset() + start * n * wide)
            at = result.storage_offset() + start * n * out
            rows = result.as_strided(((stop - start) * n, out), (out, 1), at)
            hidden = nn.functional.linear(own, self.a)
            rows.addmm_(hidden, self.b, alpha=self.scaling)
            if self.bias is not None:
                rows.add_(self.bias, alpha=self.scaling)
            return
        # Rounded as PEFT does.
        result[start:stop] += self.up(self.down(x[start:stop].to(self.a.dtype))) * self.scaling


def _hooks(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module))


def _sliced(layer: Any, slices: list[_Slice], switches: Switches) -> Callable[..., torch.Tensor]:
    """A layer's forward that runs PEFT's own on each slice, in its state."""
    plain, inside = type(layer).forward, with_inside([layer])

    def forward(x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        rows = switches.rows
        if rows is None or rows.thread != threading.get_ident():
            out: torch.Tensor = plain(layer, x, *args, **kwargs)
            return out
        if x.ndim != (3 if x.is_floating_point() else 2) or x.shape[0] != rows.total or args or kwargs:
            raise NotByRowsError
        parts = []
        for start, stop, state in slices:
            with adapters_set(inside, state):
                parts.append(plain(layer, x[start * rows.each : stop * rows.each]))
        if not all(isinstance(part, torch.Tensor) for part in parts):
            raise NotByRowsError
        return torch.cat(parts)

    return forward
