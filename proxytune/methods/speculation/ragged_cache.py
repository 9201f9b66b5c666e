"""The columns of caches whose rows have come differently far: which hold a token, and how rows are brought in line.

A cache has one column per token for all rows of a batch, but drafts are accepted row by row. Rows are kept in line at
their *last* token: a row that got fewer tokens is moved to the right by the difference, which is more padding at its
left, and columns that have become padding in every row that goes on are cut off. So each row's tokens stay next to each
other, and masks, positions and sliding windows are those of an ordinary left-padded batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer

from proxytune.errors import CacheError

__all__ = ["RaggedCache", "ahead", "forget", "record", "refuse_cache"]

Update = Callable[..., tuple[torch.Tensor, torch.Tensor]]


class RaggedCache:
    """The columns that all caches of one generation have in common.

    Attributes:
        lengths: `[B]`, int64: the position of each row's next token. That is how many tokens it holds, padding not
            counted, unless the caller's own positions began elsewhere.
        width: How many columns there are.
    """

    def __init__(self, lengths: torch.Tensor, width: int, mask: torch.Tensor | None) -> None:
        """Take over what a prompt has left; waits for the device, so this is for before the loop.

        Args:
            lengths: `[B]`, int64.
            width: How many columns the caches have.
            mask: `[B, width]`, 1 for tokens and 0 for padding; None if nothing is padded.
        """
        self.lengths = lengths.clone()
        self.width = width
        self._mask = mask
        leading = torch.zeros_like(lengths) if mask is None else (mask.cumsum(1) == 0).sum(1)
        self._pads: list[int] = leading.tolist()

    def mask(self, new: int) -> torch.Tensor | None:
        """The mask of a forward pass.

        Args:
            new: How many tokens it gets for each row.

        Returns:
            `[B, width + new]`, int64; None if nothing is padded.
        """
        return None if self._mask is None else torch.nn.functional.pad(self._mask, (0, new), value=1)

    def positions(self, new: int, ahead: int = 0) -> torch.Tensor:
        """The positions of a forward pass's tokens.

        Args:
            new: How many tokens it gets for each row.
            ahead: How many were given before them, and are not settled.

        Returns:
            `[B, new]`, int64.
        """
        return self.lengths[:, None] + torch.arange(ahead, ahead + new, device=self.lengths.device)

    def settle(self, caches: Sequence[tuple[Cache, int]], kept: Sequence[int], going: Sequence[bool]) -> None:
        """Keep the first tokens of those that the last forward passes have added, of each row its own number.

        Args:
            caches: The caches, and how many columns each holds beyond `width`: no fewer than any row keeps.
            kept: How many of them each row keeps, at least 1 for a row that goes on.
            going: Which rows go on, at least one; what becomes of the others does not matter.
        """
        most = max(n for n, on in zip(kept, going, strict=True) if on)
        shifts = [most - n if on else 0 for n, on in zip(kept, going, strict=True)]
        self._pads = [pad + shift for pad, shift in zip(self._pads, shifts, strict=True)]
        # A row alone keeps its padding: the cache that is handed back belongs to ids that have it.
        drop = min(pad for pad, on in zip(self._pads, going, strict=True) if on) if len(shifts) > 1 else 0
        self.width += most - drop
        self._advance(kept, going)
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
            for layer in cache.layers:
                if layer.is_initialized:
                    _move(layer, shift, self.width, new - most)

    def _advance(self, kept: Sequence[int], going: Sequence[bool]) -> None:
        new = [n if on else -1 for n, on in zip(kept, going, strict=True)]
        moved = torch.tensor(new, device=self.lengths.device)
        # What becomes of a row that does not go on does not matter, but it must stay within every member's positions.
        self.lengths = torch.where(moved < 0, self.lengths.clamp(max=self.width), self.lengths + moved)

    def _in_line(self, drop: int, shift: torch.Tensor) -> torch.Tensor:
        """The mask after rows have moved by `shift`, and `drop` columns have gone."""
        rows, device = shift.shape[0], shift.device
        column = torch.arange(drop, drop + self.width, device=device)[None] - shift[:, None]  # where it was
        if self._mask is None:
            return (column >= 0).long()
        before = torch.nn.functional.pad(self._mask, (0, int(drop + self.width - self._mask.shape[1])), value=1)
        return before.gather(1, column.clamp(min=0).expand(rows, -1)) * (column >= 0)


def _move(layer: DynamicLayer, shift: torch.Tensor, width: int, cut: int) -> None:
    """Move rows to the right, cut columns off at the right and, down to what is needed, at the left.

    Args:
        layer: A layer of a dynamic cache.
        shift: `[B]`, int64.
        width: How many columns it has to stand for afterwards; a sliding layer holds the last of them.
        cut: How many to cut off at the right.
    """
    stored = layer.keys.shape[-2]
    keep = min(width, stored - cut)
    if isinstance(layer, DynamicSlidingWindowLayer):
        layer.cumulative_length = width
        keep = min(keep, layer.sliding_window - 1)
    # Past the left end of a row there is only padding, which any finite numbers will do for.
    index = torch.arange(stored - cut - keep, stored - cut, device=shift.device)[None] - shift[:, None]
    index = index.clamp(min=0).to(layer.keys.device)  # [B, keep]
    for name in ("keys", "values"):
        states = getattr(layer, name)  # [B, heads, stored, D]
        rows, heads = states.shape[:2]
        # Whole vectors by their number: several times faster on a CPU than a gather of their elements.
        first = torch.arange(0, rows * heads * stored, stored, device=index.device).view(rows, heads, 1)
        numbers = (first + index[:, None]).flatten()
        moved = states.flatten(0, 2).index_select(0, numbers)
        setattr(layer, name, moved.view(rows, heads, keep, states.shape[3]))


def record(cache: Cache) -> list[tuple[DynamicSlidingWindowLayer, bool]]:
    """Make sliding layers keep what a rejected draft would push out of their window, until they are settled.

    Args:
        cache: The cache.

    Returns:
        The layers, and whether they did so before.
    """
    layers = [(x, x.record_past) for x in cache.layers if isinstance(x, DynamicSlidingWindowLayer)]
    for layer, _ in layers:
        layer.activate_past_recording()
        layer.update = _of_window(layer, layer.update)
    return layers


def _of_window(layer: DynamicSlidingWindowLayer, update: Update) -> Update:
    # Over several passes without a crop, transformers before 5.20 returns more states than it tells the mask of.
    def visible(keys: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        most = layer.sliding_window - 1 + keys.shape[-2]
        all_keys, all_values = update(keys, *args, **kwargs)
        return all_keys[:, :, -most:], all_values[:, :, -most:]

    return visible


@contextmanager
def ahead(cache: Cache) -> Iterator[None]:
    """Let drafts stand in a cache. What is interrupted leaves it empty: nobody could tell which of them were rejected.

    Args:
        cache: The cache.
    """
    recorded = record(cache)
    try:
        yield
    except BaseException:
        forget(cache)
        raise
    finally:
        for layer, before in recorded:
            layer.record_past = before
            vars(layer).pop("update", None)


def forget(cache: Cache) -> None:
    """Empty a cache whose rows are not in line with the sequences: its owner may hold it, and would go on from it.

    Args:
        cache: The cache.
    """
    for layer in cache.layers:
        layer.crop(-int(layer.get_seq_length()))


def refuse_cache(cache: Cache | None) -> None:
    """Refuse a cache that rejected drafts cannot be taken out of, row by row.

    Args:
        cache: The cache of the generation.

    Raises:
        CacheError: If it is not a dynamic one of plain attention layers, or there is none.
    """
    layers = getattr(cache, "layers", None)
    plain = layers is not None and all(type(x) in (DynamicLayer, DynamicSlidingWindowLayer) for x in layers)
    if plain and not getattr(cache, "offloading", False):  # whose layers are under way while rows would be moved
        return
    kinds = ["offloaded layers"] if plain else sorted({type(x).__name__ for x in layers or ()})
    raise CacheError.of(
        "past_key_values",
        expected="a DynamicCache, out of which rejected drafts can be taken row by row",
        got="no cache" if cache is None else f"a {type(cache).__name__}" + (f" of {', '.join(kinds)}" if kinds else ""),
        remedy="Leave cache_implementation out, and use_cache=False too.",
    )
