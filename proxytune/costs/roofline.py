"""Bytes of a forward pass, and bytes per token."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from proxytune.errors import InputError
from proxytune.validation import whole

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
        refuse_negative(weights=self.weights, cached=self.cached)

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
        refuse_negative(context=context)
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
    refuse_negative(**{f"passes[{i}]": count for i, (count, _) in enumerate(passes)})
    if not 0 < tokens < math.inf:
        raise InputError.of("tokens", expected="a number above 0", got=repr(tokens), remedy="Count what was generated.")
    return sum(count * one.at(context=context, rows=rows) for count, one in passes) / tokens


def refuse_negative(**numbers: float) -> None:
    for name, number in numbers.items():
        if not 0.0 <= number < math.inf:
            raise InputError.of(
                name, expected="a finite number, at least 0", got=repr(number), remedy="Check its unit."
            )
