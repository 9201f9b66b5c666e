"""A cache layer that only tells a length, for caches of recurrent layers alone, which have none."""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import CacheLayerMixin

__all__ = ["CountingLayer"]


class CountingLayer(CacheLayerMixin):
    """A layer that no model writes to; it tells the length of a cache that has recurrent layers only."""

    is_croppable = True
    is_sliding = is_compileable = supports_early_init = False

    def __init__(self, counted: Any) -> None:
        """Tell the length of `counted`, a layer of the same cache."""
        super().__init__()
        self.counted = counted

    def get_seq_length(self) -> int:
        """Tokens in the cache."""
        return self.counted.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """How many columns a mask has, and which is the first."""
        return self.counted.length + query_length, 0

    def get_max_length(self) -> int:
        """No maximum, as transformers writes it."""
        return -1

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Not called."""

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Refuse keys and values: a model has more layers than its config says."""
        raise RuntimeError("a model wrote to a layer that its config does not have")

    def _nothing(self, *args: Any) -> None:
        """Nothing is held here."""

    crop = reorder_cache = batch_repeat_interleave = batch_select_indices = reset = offload = prefetch = _nothing
