"""When to stop: a trace that falls below a confidence, and sampling whose winner is settled.

Three rules, none of which looks at a model:

- `OnlineFilter` (DeepConf, arXiv 2508.15260) stops a trace while it is written, exactly if the filter of finished
  traces would drop it: the same prefix sums, the same threshold.
- `consensus` (DeepConf) stops sampling when the leading answer holds nearly all of the weight.
- `settled` (adaptive consistency: Aggarwal et al. 2023, arXiv 2305.11860) stops when the leader hardly loses to the
  runner-up any more.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from proxytune.errors import InputError
from proxytune.validation import finite, share, whole
from proxytune.voting.confidence import FINITE, WINDOW, TraceScores, threshold_of
from proxytune.voting.vote import Tally

__all__ = ["ConfidenceTracker", "OnlineFilter", "consensus", "leader_probability", "settled"]


class ConfidenceTracker:
    """The group confidences of one trace while it is written; a step costs the same however long the trace is.

    Attributes:
        window: Tokens of a group.
        length: Tokens so far.
        group: The confidence of the last window; None before there is a whole one.
        lowest: The smallest so far; None before there is one.
    """

    def __init__(self, window: int = WINDOW) -> None:
        """Start with no token.

        Args:
            window: Tokens of a group, at least 1. A share of the length is not known before the end.

        Raises:
            InputError: If it is no whole number of at least 1.
        """
        self.window = whole("window", window, least=1)
        self.length = 0
        self.group: float | None = None
        self.lowest: float | None = None
        self._sums: deque[float] = deque([0.0], maxlen=self.window + 1)  # prefix sums

    def push(self, confidence: float) -> float | None:
        """Add one token.

        Args:
            confidence: Its confidence, in nats.

        Returns:
            The confidence of the window that ends here; None before there is a whole one.

        Raises:
            InputError: If it is not finite.
        """
        value = finite("confidence", float(confidence), remedy=FINITE)
        self.length += 1
        self._sums.append(self._sums[-1] + value)
        if self.length >= self.window:
            self.group = (self._sums[-1] - self._sums[0]) / self.window
            self.lowest = self.group if self.lowest is None else min(self.lowest, self.group)
        return self.group


class OnlineFilter:
    """DeepConf online: the first traces set a threshold, later ones stop where a window falls below it.

    The threshold is the (100 − η)-th percentile of the warm-up traces' lowest group confidences. It stays where it is
    afterwards. A trace below it does not vote: neither one that was stopped, nor one of the warm-up, nor one that is
    shorter than a window and is found to be below when it has ended.

    Attributes:
        eta: η in percent.
        window: Tokens of a group.
        warmup: How many traces set the threshold.
        threshold: In nats; None during the warm-up.
    """

    def __init__(self, eta: float = 10.0, *, window: int = WINDOW, warmup: int = 16) -> None:
        """Start the warm-up.

        Args:
            eta: η in (0, 100]: 10 is strict, 90 lenient.
            window: Tokens of a group. For short answers, choose it by the warm-up's lengths.
            warmup: How many traces set the threshold, at least 1.

        Raises:
            InputError: If a setting is out of its range.
        """
        self.eta = share("eta", eta, 100.0)
        self.window = whole("window", window, least=1)
        self.warmup = whole("warmup", warmup, "of traces", least=1)
        self.threshold: float | None = None
        self._lowest: list[float] = []

    def update(self, trace: TraceScores) -> bool:
        """Hand over a finished trace of the warm-up; the last one sets the threshold.

        Args:
            trace: Its scores, of windows of this filter's size.

        Returns:
            Whether the threshold is set. Traces after that do not move it.

        Raises:
            InputError: If its lowest group confidence is not finite.
        """
        finite("lowest_group", trace.lowest_group, remedy=FINITE)
        if self.threshold is None:
            self._lowest.append(trace.lowest_group)
            if len(self._lowest) == self.warmup:
                self.threshold = threshold_of(self._lowest, self.eta)
        return self.threshold is not None

    def track(self) -> ConfidenceTracker:
        """A tracker for a trace that starts; push each token's confidence into it, then ask `keep_going`."""
        return ConfidenceTracker(self.window)

    def keep_going(self, confidences_so_far: ConfidenceTracker | Sequence[float] | NDArray[np.floating[Any]]) -> bool:
        """Whether a trace may be continued.

        Args:
            confidences_so_far: Its tracker, at a cost that does not depend on the length; or its confidences `[T]`,
                which are all read.

        Returns:
            False once a whole window was below the threshold; True during the warm-up.

        Raises:
            InputError: If confidences are not finite, or the tracker has windows of another size.
        """
        tracker = confidences_so_far
        if not isinstance(tracker, ConfidenceTracker):
            tracker = self.track()
            for confidence in np.asarray(confidences_so_far, np.float64):
                tracker.push(float(confidence))
        if tracker.window != self.window:
            raise InputError.of(
                "tracker",
                expected=f"windows of {self.window} tokens",
                got=f"{tracker.window}",
                remedy="Make it with this filter's track().",
            )
        return self.threshold is None or tracker.lowest is None or tracker.lowest >= self.threshold

    def votes(self, trace: TraceScores) -> bool:
        """Whether a finished trace votes: one of the warm-up, one that ran to its end, or one that was stopped.

        Args:
            trace: Its scores.

        Returns:
            Whether its lowest group confidence reaches the threshold; True during the warm-up.
        """
        return self.threshold is None or trace.lowest_group >= self.threshold


def consensus(tally: Tally, least: float = 0.95) -> bool:
    """Whether the leading answer holds enough of the weight to stop sampling.

    Args:
        tally: The vote so far. Samples without an answer hold weight too, so they put the stop off.
        least: The share, in (0, 1].

    Returns:
        Whether the winner's share reaches it; False if there is no answer.

    Raises:
        InputError: If the share is out of its range.
    """
    return tally.winner is not None and tally.share >= share("least", least)


def leader_probability(leader: int, runner_up: int) -> float:
    """P(the leader's probability is above ½) under Beta(v₁ + 1, v₂ + 1): that it beats the runner-up in the long run.

    For whole numbers that tail is a binomial one, `Σ_{j ≤ v₁} C(v₁ + v₂ + 1, j) / 2^(v₁ + v₂ + 1)`: here in whole
    numbers throughout, and rounded once.

    Args:
        leader: Votes v₁ of the leading answer.
        runner_up: Votes v₂ of the next.

    Returns:
        The probability.

    Raises:
        InputError: If a number of votes is negative or no int.
    """
    remedy = "Adaptive consistency counts samples; for weights use consensus()."
    v1 = whole("leader", leader, "of votes", remedy=remedy)
    n = v1 + whole("runner_up", runner_up, "of votes", remedy=remedy) + 1
    term = total = 1
    for j in range(1, v1 + 1):
        term = term * (n - j + 1) // j
        total += term
    return total / (1 << n)


def settled(counts: Mapping[Hashable, int], least: float = 0.95) -> bool:
    """Adaptive consistency: whether the leader is so far ahead of the runner-up that sampling can stop.

    Args:
        counts: Answer → number of samples, e.g. `Tally.counts`. None, no answer, neither leads nor runs up.
        least: The probability to be reached, in (0, 1].

    Returns:
        Whether it is reached; False without an answer.

    Raises:
        InputError: If a count is negative or no int, or `least` is out of its range.
    """
    votes = sorted((n for answer, n in counts.items() if answer is not None), reverse=True)
    least = share("least", least)
    if not votes:
        return False
    return leader_probability(votes[0], votes[1] if len(votes) > 1 else 0) >= least
