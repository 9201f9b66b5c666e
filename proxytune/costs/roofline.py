"""Bytes of a forward pass, and bytes per token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from proxytune.validation import finite, whole

__all__ = ["PassBytes", "bytes_per_token"]


@dataclass(frozen=True)
class PassBytes:
    """What one forward pass of a model has to read.

    Attributes:
        weights: Bytes of the parameters of a pass. A table of embeddings that is no head as well does not count: of it
            a pass reads one row per token.
        cached: Bytes that the key-value cache holds per token of a row.

    Raises:
        InputError: If a number is negative or not finite.
    """

    weights: float
    cached: float = 0.0

    def __post_init__(self) -> None:
        finite("weights", self.weights, "of bytes", least=0.0)
        finite("cached", self.cached, "of bytes", least=0.0)

    def at(self, *, context: float = 0.0, rows: int = 1) -> float:
        """Bytes of one pass; those of several positions at once are the same.

        Args:
            context: Tokens that each row's cache holds.
            rows: B.

        Returns:
            Bytes.

        Raises:
            InputError: If the context is negative, or there is no row.
        """
        finite("context", context, "of tokens", least=0.0)
        return self.weights + whole("rows", rows, "of rows", least=1) * context * self.cached


def bytes_per_token(
    passes: Sequence[tuple[float, PassBytes]], tokens: float, *, context: float = 0.0, rows: int = 1
) -> float:
    """Bytes read per generated token of all rows together: what a method costs, or has to cost at least.

    Args:
        passes: Of each member, how many forward passes it made, and what one reads.
        tokens: How many tokens that gave, over all rows.
        context: Tokens in each row's cache, the mean over the passes.
        rows: B.

    Returns:
        Bytes per token.

    Raises:
        InputError: If there is no token, or a number is negative or not finite.
    """
    for i, (count, _) in enumerate(passes):
        finite(f"passes[{i}]", count, "of passes", least=0.0)
    finite("tokens", tokens, "of tokens", above=0.0, remedy="Count what was generated.")
    return sum(count * one.at(context=context, rows=rows) for count, one in passes) / tokens
