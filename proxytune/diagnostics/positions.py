"""A value of tokens by their position in the text."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from proxytune.diagnostics.prompts import LEAST, Floats, Resamples
from proxytune.stats.bootstrap import Interval
from proxytune.validation import whole

__all__ = ["Place", "by_position"]


@dataclass(frozen=True)
class Place:
    """The mean of a value at positions `first` to `last`, counted from 0, both included.

    Attributes:
        tokens: How many tokens it rests on.
    """

    first: int
    last: int
    value: Interval
    tokens: int


def by_position(
    values: list[list[Floats]], weights: list[Floats], resamples: Resamples, bins: int
) -> tuple[tuple[Place, ...], int]:
    """Means at up to `bins` places that hold about equally many tokens, and how many tokens were left out.

    Left out are positions that fewer than `LEAST` units reach: no interval could be made of them.

    Args:
        values: `[T]` of each text of each unit.
        weights: How much each text counts.
        resamples: Of the units.
        bins: How many places.
    """
    bins = whole("bins", bins, "of places", least=1)
    longest = sorted((max(map(len, texts)) for texts in values), reverse=True)
    end = longest[LEAST - 1]
    lengths = np.array([len(one) for texts in values for one in texts])
    alive = _alive(lengths, end)
    ends = np.cumsum(alive)
    edges = np.unique(np.searchsorted(ends, ends[-1] * np.arange(1, bins) / bins) + 1)
    edges = edges[edges < end]
    of = np.searchsorted(edges, np.arange(end), side="right")
    size = len(edges) + 1
    sums, masses = np.zeros((len(values), size)), np.zeros((len(values), size))
    for unit, (texts, counting) in enumerate(zip(values, weights, strict=True)):
        for one, weight in zip(texts, counting, strict=True):
            at = of[: len(one)]
            sums[unit] += weight * np.bincount(at, one[:end], minlength=size)
            masses[unit] += weight * np.bincount(at, minlength=size)
    held = np.bincount(of, alive, minlength=size).astype(int)
    starts = [0, *edges.tolist(), end]
    places = tuple(
        Place(starts[i], starts[i + 1] - 1, resamples.ratio(sums[:, i], masses[:, i]), int(held[i]))
        for i in range(size)
    )
    return places, int(lengths.sum() - ends[-1])


def _alive(lengths: NDArray[np.int64], end: int) -> NDArray[np.int64]:
    """How many texts have each of the first `end` positions."""
    ended = np.bincount(np.minimum(lengths, end), minlength=end + 1)
    return len(lengths) - np.cumsum(ended)[:end]
