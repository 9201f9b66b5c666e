"""A running quantile of token entropies, on the device.

Counts are integers, so the order of the tokens does not matter. No method waits for the device.
"""

from __future__ import annotations

import math

import torch

from proxytune.validation import whole

__all__ = ["Sketch"]


class Sketch:
    """A histogram of entropies in logarithmic bins (as DDSketch, Masson et al. 2019, arXiv 1908.10693).

    Bins are 0.2 % wide, from 10⁻⁶ to 16 nats: 66 KiB whatever the length of the stream.

    Attributes:
        share: The share of tokens above the threshold.
        warm_up: How many tokens to see before the quantile counts.
        initial: The threshold until then, nats; may be +inf.
    """

    def __init__(self, share: float, warm_up: int, initial: float) -> None:
        """Start empty; InputError if `warm_up` is not a whole number ≥ 1."""
        warm_up = whole("warm_up", warm_up, least=1, remedy="Pass e.g. warm_up=256.")
        self.share, self.warm_up, self.initial = share, warm_up, initial
        bins = math.ceil(math.log(16.0 / 1e-6) / math.log(1.002))
        # Bin i holds entropies in (edge i − 1, edge i]; the first bin holds 0 and everything near it.
        self._edges = (1e-6 * 1.002 ** torch.arange(bins, dtype=torch.float64)).float()
        self.clear()

    def clear(self) -> None:
        """Forget all tokens."""
        self._histogram = torch.zeros(len(self._edges) + 1, dtype=torch.int64, device=self._edges.device)
        self._tokens = torch.zeros((), dtype=torch.int64, device=self._edges.device)

    @property
    def warm(self) -> torch.Tensor:
        """`[]`, bool: whether the warm-up is over."""
        return self._tokens >= self.warm_up

    def add(self, entropies: torch.Tensor, counted: torch.Tensor) -> torch.Tensor:
        """Add the `counted` entropies, nats; returns the new threshold, `[]`, float32, nats."""
        device = entropies.device
        if self._edges.device != device:
            self._edges, self._histogram = self._edges.to(device), self._histogram.to(device)
        index = torch.bucketize(entropies.nan_to_num().flatten().float(), self._edges)
        self._histogram.scatter_add_(0, index, counted.flatten().long())
        below = self._histogram.cumsum(0)
        self._tokens = below[-1]
        above = (below[-1] - below[:-1]).float() / below[-1].clamp(min=1)  # [bins]: the share above each edge
        distance = (above - self.share).abs()
        # All edges between two distant values fit equally well: take the middle one.
        best = distance == distance.min()
        first, last = best.long().argmax(), len(best) - 1 - best.flip(0).long().argmax()
        return torch.where(self.warm, self._edges[(first + last) // 2], self.initial)
