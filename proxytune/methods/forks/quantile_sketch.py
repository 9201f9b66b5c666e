"""What is kept of a stream of token entropies, on the device: its quantile, and how many of them were forks.

Integer counts only, so the order in which tokens come changes nothing; and the host waits for the device where a
method says so, not once a step.
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
        share: The share of tokens that the threshold is to leave above it.
        warm_up: How many tokens to see before there is one.
        initial: The threshold until then, nats.
    """

    def __init__(self, share: float, warm_up: int, initial: float) -> None:
        """Start empty.

        Args:
            share: In (0, 1).
            warm_up: In tokens.
            initial: In nats; may be +inf.

        Raises:
            InputError: If the warm-up is no whole number ≥ 1.
        """
        warm_up = whole("warm_up", warm_up, least=1, remedy="Pass e.g. warm_up=256.")
        self.share, self.warm_up, self.initial = share, warm_up, initial
        bins = math.ceil(math.log(16.0 / 1e-6) / math.log(1.002))
        # Bin i holds what is above edge i − 1 and not above edge i: the first one 0 and what is as good as 0.
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
        """Add tokens.

        Args:
            entropies: `[...]`, nats.
            counted: `[...]`, bool: which of them.

        Returns:
            `[]`, float32, nats: the threshold from now on.
        """
        device = entropies.device
        if self._edges.device != device:
            self._edges, self._histogram = self._edges.to(device), self._histogram.to(device)
        index = torch.bucketize(entropies.nan_to_num().flatten().float(), self._edges)
        self._histogram.scatter_add_(0, index, counted.flatten().long())
        below = self._histogram.cumsum(0)
        self._tokens = below[-1]
        above = (below[-1] - below[:-1]).float() / below[-1].clamp(min=1)  # [bins]: the share above each edge
        distance = (above - self.share).abs()
        # Between two values that are far apart all edges are as good: the one in the middle.
        best = distance == distance.min()
        first, last = best.long().argmax(), len(best) - 1 - best.flip(0).long().argmax()
        return torch.where(self.warm, self._edges[(first + last) // 2], self.initial)
