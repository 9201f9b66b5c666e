"""Bytes per forward pass and per token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from proxytune.validation import finite, whole

__all__ = ["PassBytes", "bytes_per_token", "gated_passes"]


@dataclass(frozen=True)
class PassBytes:
    """The bytes that one forward pass of a model reads.

    Attributes:
        weights: Bytes of the parameters, without an embedding table that is not also the head: a pass reads one row of
            it per token.
        cached: Bytes of the key-value cache per token of a row.
    """

    weights: float
    cached: float = 0.0

    def __post_init__(self) -> None:
        finite("weights", self.weights, "of bytes", least=0.0)
        finite("cached", self.cached, "of bytes", least=0.0)

    def at(self, *, context: float = 0.0, rows: int = 1) -> float:
        """Bytes of one pass over B rows with `context` cached tokens each, however many positions it computes."""
        finite("context", context, "of tokens", least=0.0)
        return self.weights + whole("rows", rows, "of rows", least=1) * context * self.cached


def bytes_per_token(
    passes: Sequence[tuple[float, PassBytes]], tokens: float, *, context: float = 0.0, rows: int = 1
) -> float:
    """Bytes read per generated token: the cost of a method, or its lower bound.

    Args:
        passes: Per member, the number of its forward passes and what one reads.
        tokens: Number of tokens generated, over all rows; > 0, else InputError.
        context: Tokens in each row's cache, the mean over the passes.
        rows: B.
    """
    for i, (count, _) in enumerate(passes):
        finite(f"passes[{i}]", count, "of passes", least=0.0)
    finite("tokens", tokens, "of tokens", above=0.0, remedy="Count what was generated.")
    return sum(count * one.at(context=context, rows=rows) for count, one in passes) / tokens


def gated_passes(share: float, rows: int = 1) -> float:
    """Companion passes per step under a gate that opens for a share of the tokens: `1 − (1 − share)^B`.

    Companions run once for all rows where one of B asks, and read what all rows wrote since; rows open independently
    here. At a share of 0.2 that is 0.2 for one row, 0.83 for eight: a gate saves passes where batches are small.

    Args:
        share: The share of tokens at which the gate is open, in [0, 1], else InputError.
        rows: B.
    """
    finite("share", share, "of the tokens", least=0.0, most=1.0)
    passes: float = 1.0 - (1.0 - share) ** whole("rows", rows, "of rows", least=1)
    return passes
