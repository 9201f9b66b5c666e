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
    """The rows of one pass.

    Attributes:
        total: How many there are.
        slices: From where to where which state runs, in order; members of one state that stand side by side together.
        thread: The thread that runs the pass; others find PEFT's layers as ever.
        fused: Whether no autocast is active.
    """

    def __init__(self, states: Sequence[AdapterState], each: int, device: str) -> None:
        """Lay out `each` rows for every member, by their states."""
        self.total = each * len(states)
        self.thread = threading.get_ident()
        self.fused = not torch.is_autocast_enabled(device)
        self.slices: list[tuple[int, int, AdapterState]] = []
        for i, state in enumerate(states):
            start = i * each
            if self.slices and self.slices[-1][2] == state:
                start = self.slices.pop()[0]
            self.slices.append((start, (i + 1) * each, state))


def mixable(switches: Switches) -> bool:
    """Whether all of a model's adapter layers can run rows with different adapters in one pass."""
    return all(_is_linear(layer) or _is_sliced(layer) for layer in switches.layers)


@contextmanager
def mixed_rows(switches: Switches, rows: Rows) -> Iterator[None]:
    """Run the rows of each member's state with its adapters; all layers have to be `mixable`, and the turn held."""
    if switches.forwards is None:
        switches.forwards = [(vars(layer), _forward_of(layer, switches)) for layer in switches.layers]
    switches.rows = rows
    done = []
    try:
        for own, forward in switches.forwards:
            own["forward"] = forward
            done.append(own)
        yield
    finally:
        for own in done:
            del own["forward"]
        switches.rows = None


def _named(kind: type) -> tuple[str, str]:
    return kind.__module__, kind.__name__


def _is_linear(layer: Any) -> bool:
    if _named(type(layer)) != _LINEAR or "forward" in vars(layer) or layer.lora_variant:
        return False
    return type(layer.base_layer) is nn.Linear or type(layer.base_layer) is Conv1D


def _is_sliced(layer: Any) -> bool:
    return _named(type(layer)) in _SLICED and "forward" not in vars(layer) and not getattr(layer, "lora_variant", None)


def _forward_of(layer: Any, switches: Switches) -> Callable[..., torch.Tensor]:
    return _linear(layer, switches) if _is_linear(layer) else _sliced(layer, switches)


def _linear(layer: Any, switches: Switches) -> Callable[..., torch.Tensor]:
    """A LoRA layer's forward that adds each slice's adapters to the rows of that slice."""
    plain, parts = type(layer).forward, layer._modules
    base, down, up = parts["base_layer"], parts["lora_A"]._modules, parts["lora_B"]._modules
    own, scalings = vars(layer), layer.scaling

    def forward(x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        rows = switches.rows
        if rows is None or rows.thread != threading.get_ident():
            out: torch.Tensor = plain(layer, x, *args, **kwargs)
            return out
        if x.ndim != 3 or x.shape[0] != rows.total or args or kwargs:
            raise NotByRowsError
        result: torch.Tensor = base(x)
        for start, stop, state in rows.slices:
            if state is False or (state is None and own.get("_disable_adapters", False)):
                continue
            for name in layer.active_adapters if state is None else (state,):
                if name in down:
                    _add(result[start:stop], x[start:stop], down[name], up[name], scalings[name], rows.fused)
        return result

    return forward


def _add(result: torch.Tensor, x: torch.Tensor, down: Any, up: Any, scaling: Any, fused: bool) -> None:
    """Add a LoRA of `x` `[B, N, D]` to `result` `[B, N, E]`, in place."""
    a, b = down.weight, up.weight
    if fused and x.dtype == a.dtype == torch.float32 and isinstance(scaling, float):
        hidden = nn.functional.linear(x, a).flatten(0, 1)
        flat = result.view(-1, b.shape[0])
        flat.addmm_(hidden, b.t(), alpha=scaling)
        if up.bias is not None:
            flat.add_(up.bias, alpha=scaling)
        return
    # Rounded as PEFT does.
    result.copy_(result + up(down(x.to(a.dtype))) * scaling)


def _sliced(layer: Any, switches: Switches) -> Callable[..., torch.Tensor]:
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
        for start, stop, state in rows.slices:
            with adapters_set(inside, state):
                parts.append(plain(layer, x[start:stop]))
        if not all(isinstance(part, torch.Tensor) for part in parts):
            raise NotByRowsError
        return torch.cat(parts)

    return forward
