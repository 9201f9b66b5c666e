"""Caches whose rows differ in length: which columns hold a token, and how rows are realigned.

A cache has one column per token for all rows of a batch, but drafts are accepted row by row. Rows are aligned at their
*last* token: a row that kept fewer tokens is shifted right by the difference, which adds padding at its left, and
columns that are padding in every unfinished row are cut. So each row's tokens stay contiguous, and masks, positions and
sliding windows are those of an ordinary left-padded batch. In a static cache nothing moves: each row has columns of its
own (`proxytune.models.members.ragged_static`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from transformers.cache_utils import (
    DYNAMIC_LAYER_TYPE_MAPPING,
    Cache,
    DynamicIndexedLayer,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionLayer,
    StaticCache,
    StaticLayer,
)

from proxytune.errors import CacheError
from proxytune.generation.call import Call
from proxytune.models.ensemble import Ensemble
from proxytune.models.members.cache_name import CACHE, cache_of
from proxytune.models.members.composite_cache import refuse_short_cache, room_of, stored
from proxytune.models.members.counting_layer import CountingLayer
from proxytune.models.members.layer_kinds import ABLE
from proxytune.models.members.ragged_static import RaggedLayer, ragged, rows_of, widen
from proxytune.models.members.rewind import RewindableLayer, rewindable_layers
from proxytune.models.members.text_layer import TextLayer

__all__ = ["RaggedCache", "ahead", "forget", "in_place", "make_room", "record", "refuse_cache"]

Update = Callable[..., tuple[torch.Tensor, torch.Tensor]]


class RaggedCache:
    """The column layout that all caches of one generation share.

    Attributes:
        lengths: `[B]`, int64: the position of each row's next token. That is its number of tokens without padding,
            unless the caller passed other positions.
        width: How many columns there are.
    """

    def __init__(
        self, lengths: torch.Tensor, width: int, mask: torch.Tensor | None, others: torch.Tensor | None = None
    ) -> None:
        """Start from a prompt's layout; waits for the device.

        `mask` is `[B, width]`, None if nothing is padded; `others` `[texts, B, width]` the masks of prompts that
        members read beside it, whose columns must not be cut.
        """
        self.lengths = lengths.clone()
        self.width = width
        self._mask = mask
        self._first = width - lengths  # [B]: of a static cache, the column of position 0
        used = mask if mask is None or others is None else torch.cat([mask[None], others.to(mask)]).amax(0)
        leading = torch.zeros_like(lengths) if used is None else (used.cumsum(1) == 0).sum(1)
        self._pads: list[int] = leading.tolist()

    def mask(self, new: int) -> torch.Tensor | None:
        """Attention mask `[B, width + new]`, int64, of a pass over `new` tokens per row; None if nothing is padded."""
        return None if self._mask is None else torch.nn.functional.pad(self._mask, (0, new), value=1)

    def positions(self, new: int, ahead: int = 0) -> torch.Tensor:
        """The positions `[B, new]`, int64, of a pass over `new` tokens per row, after `ahead` uncommitted ones."""
        return self.lengths[:, None] + torch.arange(ahead, ahead + new, device=self.lengths.device)

    def settle(self, caches: Sequence[tuple[Cache, int]], kept: Sequence[int], going: Sequence[bool]) -> None:
        """Keep the first `kept` of each row's uncommitted tokens, and realign the rows.

        Args:
            caches: The caches, and how many uncommitted columns each holds: at least as many as any row keeps.
            kept: Tokens to keep per row; at least 1 for an unfinished row.
            going: Which rows are unfinished, at least one; what the others hold afterwards does not matter.
        """
        most = max(n for n, on in zip(kept, going, strict=True) if on)
        shifts = [most - n if on else 0 for n, on in zip(kept, going, strict=True)]
        self._pads = [pad + shift for pad, shift in zip(self._pads, shifts, strict=True)]
        # A single row keeps its padding: its cache is returned, and must match ids that have the padding.
        drop = min(pad for pad, on in zip(self._pads, going, strict=True) if on) if len(shifts) > 1 else 0
        self.width += most - drop
        self._advance(kept, going)
        static = [where for cache, _ in caches if (where := rows_of(cache)) is not None]
        for where in static:
            where.columns.copy_((self.lengths + self._first).clamp(max=where.room - 1))
        caches = [pair for pair in caches if rows_of(pair[0]) is None]
        if not caches:
            self._pads = [max(pad - drop, 0) for pad in self._pads]
            self._mask = None  # of rows in line
            return
        if not any(shifts) and not drop:
            for cache, new in caches:
                cache.crop(most - new)
            if self._mask is not None:
                self._mask = torch.nn.functional.pad(self._mask, (0, most), value=1)
            return
        self._pads = [max(pad - drop, 0) for pad in self._pads]
        shift = torch.tensor(shifts, device=self.lengths.device)
        self._mask = self._in_line(drop, shift)
        for cache, new in caches:
            for layer in stored(cache):
                if layer.is_initialized:
                    _move(layer, shift, self.width, new - most)

    def _advance(self, kept: Sequence[int], going: Sequence[bool]) -> None:
        new = [n if on else -1 for n, on in zip(kept, going, strict=True)]
        moved = torch.tensor(new, device=self.lengths.device)
        # An ended row's position does not matter, but must stay within every member's range.
        self.lengths = torch.where(moved < 0, self.lengths.clamp(max=self.width), self.lengths + moved)

    def _in_line(self, drop: int, shift: torch.Tensor) -> torch.Tensor:
        """The mask after rows have moved right by `shift` and `drop` columns were cut at the left."""
        rows, device = shift.shape[0], shift.device
        column = torch.arange(drop, drop + self.width, device=device)[None] - shift[:, None]  # where each came from
        if self._mask is None:
            return (column >= 0).long()
        before = torch.nn.functional.pad(self._mask, (0, int(drop + self.width - self._mask.shape[1])), value=1)
        return before.gather(1, column.clamp(min=0).expand(rows, -1)) * (column >= 0)


def _move(layer: DynamicLayer, shift: torch.Tensor, width: int, cut: int) -> None:
    """Shift rows right by `shift` `[B]`, cut `cut` columns at the right, keep the last `width` (or a window)."""
    stored = layer.keys.shape[-2]
    keep = min(width, stored - cut)
    if isinstance(layer, DynamicSlidingWindowLayer):
        layer.cumulative_length = width
        keep = min(keep, layer.sliding_window - 1)
    # Left of a row's first column there is only padding: any finite numbers will do.
    index = torch.arange(stored - cut - keep, stored - cut, device=shift.device)[None] - shift[:, None]
    index = index.clamp(min=0).to(layer.keys.device)  # [B, keep]
    for name in ("keys", "values"):
        states = getattr(layer, name)  # [B, heads, stored, D]
        rows, heads = states.shape[:2]
        # Selecting whole vectors by index is faster on a CPU than gathering their elements.
        first = torch.arange(0, rows * heads * stored, stored, device=index.device).view(rows, heads, 1)
        numbers = (first + index[:, None]).flatten()
        moved = states.flatten(0, 2).index_select(0, numbers)
        setattr(layer, name, moved.view(rows, heads, keep, states.shape[3]))
    if isinstance(layer, DynamicIndexedLayer):
        _move_index(layer, index)
    if isinstance(layer, TextLayer):  # its masks say which columns are padding
        layer.values = layer.values.masked_fill(_repeated(index)[:, None, :, None], 0)


def _move_index(layer: DynamicIndexedLayer, index: torch.Tensor) -> None:
    """Take the columns `index` `[B, keep]` of what a layer keeps beside its keys; repeated ones are padding."""
    if layer.indexer_keys is not None:  # [B, stored, D]; zeros also where it says which columns are padding
        moved = layer.indexer_keys.take_along_dim(index[..., None], 1)
        layer.indexer_keys = moved.masked_fill(_repeated(index)[..., None], 0)
    if (positions := getattr(layer, "indexer_position_ids", None)) is not None:  # [3, B, stored]; 5.17 has none
        layer.indexer_position_ids = positions.take_along_dim(index[None], 2)


def _repeated(index: torch.Tensor) -> torch.Tensor:
    """Which of the columns `index` `[B, keep]` stand for padding: those whose source is taken once more."""
    return torch.nn.functional.pad(index.diff(dim=1) == 0, (0, 1))


def record(cache: Cache) -> Callable[[], None]:
    """Let layers keep what drafts push out of a window, or overwrite in a state; returns what ends it."""
    windows = [(x, x.record_past) for x in cache.layers if _has_window(x)]
    for window, _ in windows:
        window.activate_past_recording()
        window.update = _of_window(window, window.update)
    for layer in rewindable_layers(cache):
        layer.activate_past_recording()

    def end() -> None:
        for window, before in windows:
            window.record_past = before
            vars(window).pop("update", None)
        for layer in rewindable_layers(cache):
            layer.stop_recording()

    return end


def _has_window(layer: Any) -> bool:
    return isinstance(layer, DynamicSlidingWindowLayer) and not isinstance(layer, RewindableLayer)


def _of_window(layer: DynamicSlidingWindowLayer, update: Update) -> Update:
    # After several passes without a crop, transformers before 5.20 returns more states than the mask covers.
    def visible(keys: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        most = layer.sliding_window - 1 + keys.shape[-2]
        all_keys, all_values = update(keys, *args, **kwargs)
        return all_keys[:, :, -most:], all_values[:, :, -most:]

    return visible


@contextmanager
def ahead(cache: Cache) -> Iterator[None]:
    """Allow uncommitted drafts in a cache. On an error it is emptied: nobody could tell which drafts were rejected."""
    end = record(cache)
    try:
        yield
    except BaseException:
        forget(cache)
        raise
    finally:
        end()


def forget(cache: Cache) -> None:
    """Empty a cache whose rows do not match the sequences, as its owner may hold it and continue from it."""
    for layer in stored(cache):
        if isinstance(layer, StaticLayer):  # which transformers before 5.24 cannot crop
            layer.reset()
        else:
            layer.crop(-int(layer.get_seq_length()))


def refuse_cache(cache: Cache | None) -> None:
    """Raise CacheError unless rejected drafts can be removed: a DynamicCache of attention and recurrent layers."""
    layers = None if cache is None or not hasattr(cache, "layers") else stored(cache)
    plain = layers is not None and all(_can_drop(x) for x in layers) and not hasattr(cache, "set_linear_cache")
    if plain and not getattr(cache, "offloading", False):  # offloaded layers move between devices meanwhile
        return
    kinds = ["offloaded layers"] if plain else sorted({type(x).__name__ for x in layers or ()})
    raise CacheError.of(
        CACHE,
        expected="a DynamicCache or StaticCache, from which rejected drafts can be removed row by row",
        got="none (use_cache=False)"
        if cache is None
        else f"a {type(cache).__name__}" + (f" of {', '.join(kinds)}" if kinds else ""),
        # Some configs, such as MPT's, say use_cache=False by themselves.
        remedy="Pass use_cache=True to generate()." if cache is None else "Leave out cache_implementation.",
    )


def make_room(call: Call) -> None:
    """Prepare a static cache for drafts, before the prompt is read.

    Raises:
        CacheError: If rows cannot keep different numbers of drafts in it, or it is too short.
    """
    cache = cache_of(call.kwargs)
    if not isinstance(cache, StaticCache) or getattr(cache, "offloading", False):
        return
    mask = call.kwargs.get("attention_mask")
    seen = call.input_ids if mask is None else mask  # which covers what a given cache holds
    refuse_short_cache(cache, seen.shape[1] + call.most_new - 1)
    room = room_of(cache)
    assert room is not None
    widen(cache, room)
    for member, (_, part) in zip(call.ensemble.members, call.ensemble.views(cache), strict=True):
        member.refuse_ragged_cache(part)


@contextmanager
def in_place(cache: Cache, ensemble: Ensemble, mask: torch.Tensor | None, rows: int) -> Iterator[None]:
    """Let the rows of a static cache differ in length, for a while; other caches stay as they are."""
    if isinstance(cache, StaticCache):
        with ragged([part for _, part in ensemble.views(cache)], mask, rows):
            yield
    else:
        yield


def _can_drop(layer: Any) -> bool:
    if isinstance(layer, StaticLayer):
        return type(layer) in (StaticLayer, RaggedLayer)
    kinds = [DYNAMIC_LAYER_TYPE_MAPPING.get(kind) for kind, able in ABLE.items() if "crop" in able]
    ours = LinearAttentionLayer | RewindableLayer | CountingLayer | TextLayer
    return isinstance(layer, ours) or type(layer) in kinds
