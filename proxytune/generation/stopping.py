"""Which rows of a loop go on: the stopping criteria of a call, of which the longest length needs no tensor."""

from __future__ import annotations

from typing import Any

import torch
from transformers import MaxLengthCriteria, StoppingCriteriaList

__all__ = ["Ends"]


class Ends:
    """The stopping criteria of a call.

    Attributes:
        most: The length at which all rows end; None without one.
    """

    def __init__(self, criteria: StoppingCriteriaList) -> None:
        """Take the longest length apart, except where transformers would warn that it exceeds the model's positions."""
        # A list of another class may do more than ask its criteria.
        plain = [c for c in criteria if _is_plain(c)] if type(criteria) is StoppingCriteriaList else []
        self.most: int | None = min((c.max_length for c in plain), default=None)
        self._others = StoppingCriteriaList([c for c in criteria if c not in plain]) if plain else criteria

    def __call__(self, input_ids: torch.Tensor, scores: tuple[torch.Tensor, ...] | None) -> torch.Tensor | None:
        """Whether each row of ids `[B, T]` ends by another criterion, `[B]`, bool; None if there is no other one."""
        return self._others(input_ids, scores) if self._others else None

    def at(self, length: int) -> bool:
        """Whether all rows end at this length."""
        return self.most is not None and length >= self.most


def _is_plain(criterion: Any) -> bool:
    if type(criterion) is not MaxLengthCriteria:
        return False
    positions = criterion.max_position_embeddings
    return positions is None or criterion.max_length <= positions
