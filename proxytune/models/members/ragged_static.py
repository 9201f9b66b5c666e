"""Static caches whose rows differ in length: each row's tokens are written behind its own, and masks say who sees what.

Under speculation rows keep different numbers of tokens. In a dynamic cache they are moved to end in one column. Here
nothing is moved or copied: a pass over N tokens writes row b's to the columns from `columns[b]` on, and what was
rejected is written over by the next. Keys and values stay at their addresses, in their shapes, so one graph serves
every pass over N tokens, and the drafts that are rejected cost one number per row.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from transformers import cache_utils
from transformers.cache_utils import Cache, StaticCache, StaticLayer, StaticSlidingWindowLayer

from proxytune.models.members.cache_name import CACHE

__all__ = ["RaggedLayer", "Rows", "hindrance_of", "masks_of", "ragged", "ragged_pass", "rows_of", "widen"]

_WITHOUT: Any = getattr(cache_utils, "DummyLayer", ())
_KINDS = {"full_attention", "sliding_attention"}


class Rows:
    """Where the rows of one member's layers are.

    Attributes:
        columns: `[B]`, int64: the column of each row's next token; a pass moves it on, in place.
        visible: `[B, room]`, bool: the columns that are no padding; None if none is.
        room: How many columns there are.
    """

    def __init__(self, columns: torch.Tensor, visible: torch.Tensor | None, room: int) -> None:
        self.columns, self.visible, self.room = columns, visible, room
        torch._dynamo.mark_static_address(columns)
        if visible is not None:
            torch._dynamo.mark_static_address(visible)

    def places(self, new: int) -> torch.Tensor:
        """The columns `[B, new]` of the next tokens; those past the room are past every row's last token."""
        return self.columns[:, None] + torch.arange(new, device=self.columns.device)

    def mask(self, new: int, window: int | None = None) -> torch.Tensor:
        """Which columns each new token sees, `[B, 1, new, room]`, bool."""
        own = self.places(new)[:, :, None]
        column = torch.arange(self.room, device=own.device)
        seen = column <= own
        if window is not None:
            seen = seen & (column > own - window)
        if self.visible is not None:
            seen = seen & self.visible[:, None]
        return seen[:, None]


class RaggedLayer(StaticLayer):
    """A static layer, of attention to all or to a window, that keeps all tokens; ragged once it has `rows`."""

    rows: Rows | None = None

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write the states `[B, H, N, D]` to each row's columns; returns those of all columns."""
        if self.rows is None:
            return super().update(key_states, value_states, *args, **kwargs)
        columns, last = self.rows.columns[:, None], self.max_cache_len - 1
        places = self.rows.places(key_states.shape[2])  # [B, N]
        # Beside longer rows, a short one may get more tokens than it has room for. They are no drafts of its own, and
        # must change nothing: instead, the first token is written once more, or what the last column holds already.
        past, full = places > last, columns > last
        places = torch.where(past, columns.clamp(max=last), places)[:, None, :, None]
        past, full = past[:, None, :, None], full[:, None, :, None]
        for held, new in ((self.keys, key_states), (self.values, value_states)):
            same = torch.where(full, held[:, :, -1:], new[:, :, :1])
            new = torch.where(past, same, new)
            held.scatter_(2, places.expand_as(new), new)
        return self.keys, self.values

    def get_seq_length(self) -> Any:
        """The length of the longest row; on the device, as in a static layer."""
        return super().get_seq_length() if self.rows is None else self.rows.columns.amax()

    def reset(self) -> None:
        """Forget all tokens."""
        super().reset()
        if self.rows is not None:
            self.rows.columns.zero_()


def rows_of(cache: Cache | None) -> Rows | None:
    """Where the rows of a member's cache are, if they may differ; None for other caches."""
    if not isinstance(cache, StaticCache):
        return None
    first = next((layer for layer in cache.layers if isinstance(layer, StaticLayer)), None)
    return first.rows if isinstance(first, RaggedLayer) else None


def ragged_pass(model: Any, given: dict[str, Any], cache: Cache, rows: Rows) -> torch.Tensor:
    """A model's logits `[B, N, V]` over `given` ids and positions; they are written to the cache, and it moves on."""
    new = given["input_ids"].shape[1]
    masks = masks_of(model, rows, new)
    logits: torch.Tensor = model(
        **given, attention_mask=masks, **{CACHE: cache}, use_cache=True, return_dict=True
    ).logits
    rows.columns.add_(new)
    return logits


def masks_of(model: Any, rows: Rows, new: int) -> torch.Tensor | dict[str, torch.Tensor]:
    """The masks of a pass over `new` tokens, in the form in which `generate()` hands them to this model."""
    config = model.config.get_text_config(decoder=True)
    window = getattr(config, "sliding_window", None)

    def formed(window: int | None) -> torch.Tensor:
        seen = rows.mask(new, window)
        if config._attn_implementation == "sdpa":
            return seen
        return torch.zeros(seen.shape, dtype=model.dtype, device=seen.device).masked_fill(
            ~seen, torch.finfo(model.dtype).min
        )

    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        return formed(window)
    return {kind: formed(window if kind == "sliding_attention" else None) for kind in sorted(set(kinds))}


def hindrance_of(model: Any, cache: Cache) -> str | None:
    """Why a model's static cache cannot have rows of different lengths, in words; None if it can."""
    config = model.config.get_text_config(decoder=True)
    if config._attn_implementation not in ("sdpa", "eager"):
        return f"attn_implementation={config._attn_implementation!r}"
    if other := sorted({*(getattr(config, "layer_types", None) or ())} - _KINDS):
        return f"{', '.join(other)} layers"
    if getattr(config, "attention_chunk_size", None) is not None:
        return "attention in chunks"
    held = {type(layer) for layer in cache.layers if not isinstance(layer, _WITHOUT)}
    if other := sorted(kind.__name__ for kind in held - {StaticLayer, RaggedLayer}):
        return f"layers of {', '.join(other)}"
    return None


def widen(cache: Cache, room: int) -> None:
    """Let the sliding layers of an empty static cache keep all of `room` tokens: drafts are taken back."""
    for i, layer in enumerate(cache.layers):
        if type(layer) is StaticSlidingWindowLayer and layer.get_seq_length() == 0:
            cache.layers[i] = RaggedLayer(max_cache_len=room)


@contextmanager
def ragged(parts: Sequence[Cache], mask: torch.Tensor | None, rows: int) -> Iterator[None]:
    """Let the `rows` of a filled static cache differ in length for a while.

    Afterwards the layers are transformers' own again, as long as the longest row.

    Args:
        parts: The members' views of it.
        mask: `[B, T]`: which of its columns are no padding; None if none is.
        rows: B.
    """
    turned: list[Any] = []
    for part in parts:
        layers = [layer for layer in part.layers if isinstance(layer, StaticLayer) and layer.is_initialized]
        room, device = layers[0].max_cache_len, layers[0].device
        visible = None
        if mask is not None:
            visible = torch.nn.functional.pad(mask.to(device) != 0, (0, room - mask.shape[1]), value=True)
        of_part = Rows(layers[0].cumulative_length.repeat(rows), visible, room)
        for layer in layers:
            layer.__class__, layer.rows = RaggedLayer, of_part
        turned += layers
    try:
        yield
    finally:
        for layer in turned:
            layer.cumulative_length.copy_(layer.rows.columns.amax())
            layer.__class__, layer.rows = StaticLayer, None
