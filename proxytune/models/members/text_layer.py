"""A layer of the composite cache that holds no keys, but the texts: each member's own ids and mask.

It is a dynamic layer of one head, so whatever moves, reorders or crops a cache does so with the texts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicLayer

__all__ = ["TextLayer", "text_layer_of"]


class TextLayer(DynamicLayer):
    """Ids (as keys) and masks (as values) of all texts that a cache holds, `[B, 1, L, texts]`, int64.

    Attributes:
        added: Columns of padding that `generate()` put before the base's prompt, since another one is longer.
    """

    _layer_type = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.added = 0

    def append(self, ids: Sequence[torch.Tensor], masks: Sequence[torch.Tensor]) -> None:
        """Add columns: ids and mask of each text, `[B, N]`, int64."""
        keys, values = (torch.stack(list(x), -1)[:, None] for x in (ids, masks))  # [B, 1, N, texts]
        self.update(keys, values)

    @property
    def ids(self) -> torch.Tensor | None:
        """`[texts, B, L]`, int64; None while it is empty."""
        return self.keys[:, 0].permute(2, 0, 1) if self.is_initialized else None

    @property
    def masks(self) -> torch.Tensor | None:
        """`[texts, B, L]`, int64, 1 for tokens and 0 for padding; None while it is empty."""
        return self.values[:, 0].permute(2, 0, 1) if self.is_initialized else None


def text_layer_of(cache: Cache | None) -> TextLayer | None:
    """The texts that a cache holds; None if it holds none."""
    last = None if cache is None or not getattr(cache, "layers", None) else cache.layers[-1]
    return last if isinstance(last, TextLayer) else None
