"""When to stop a trace, and when to stop sampling.

- `OnlineFilter` (DeepConf, arXiv 2508.15260) stops a trace while it is written, exactly when the filter of finished
  traces would drop it: same prefix sums, same threshold.
- `consensus` (DeepConf) stops sampling when the leading answer holds nearly all of the weight.
- `settled` (adaptive consistency: Aggarwal et al. 2023, arXiv 2305.11860) stops when the leader is unlikely to lose to
  the runner-up.
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
    """Group confidences of a trace while it is written, at constant cost per token.

    Attributes:
        window: Tokens per group.
        length: Tokens so far.
        group: Confidence of the last window; None before one is complete.
        lowest: The smallest so far; None before one is complete.
    """

    def __init__(self, window: int = WINDOW) -> None:
        """Start with no token. A share of the length cannot be a window, since the length is unknown before the end."""
        self.window = whole("window", window, least=1)
        self.length = 0
        self.group: float | None = None
        self.lowest: float | None = None
        self._sums: deque[float] = deque([0.0], maxlen=self.window + 1)  # prefix sums

    def push(self, confidence: float) -> float | None:
        """Add one token's confidence, in nats; InputError if it is not finite.

        Returns:
            The confidence of the window that ends here; None before one is complete.
        """
        value = finite("confidence", float(confidence), remedy=FINITE)
        self.length += 1
        self._sums.append(self._sums[-1] + value)
        if self.length >= self.window:
            self.group = (self._sums[-1] - self._sums[0]) / self.window
            self.lowest = self.group if self.lowest is None else min(self.lowest, self.group)
        return self.group


class OnlineFilter:
    """DeepConf online: warm-up traces set a threshold; later traces stop once a window falls below it.

    The threshold is the (100 − η)-th percentile of the warm-up traces' lowest group confidences, and then fixed. A
    trace below it does not vote, whether it was stopped, belongs to the warm-up, or was shorter than a window.
    `threshold` is in nats, None during the warm-up.
    """

    def __init__(self, eta: float = 10.0, *, window: int = WINDOW, warmup: int = 16) -> None:
        """Start the warm-up.

        Args:
            eta: η in (0, 100]: 10 is strict, 90 lenient.
            window: Tokens per group. For short answers, choose it by the lengths of the warm-up.
            warmup: Number of traces that set the threshold, ≥ 1.

        Raises:
            InputError: If a setting is out of range.
        """
        self.eta = share("eta", eta, 100.0)
        self.window = whole("window", window, least=1)
        self.warmup = whole("warmup", warmup, "of traces", least=1)
        self.threshold: float | None = None
        self._lowest: list[float] = []

    def update(self, trace: TraceScores) -> bool:
        """Add the scores of a finished warm-up trace, for this filter's window; the last one sets the threshold.

        Returns:
            Whether the threshold is set. Later traces do not change it.

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
        """A tracker for a new trace: push each token's confidence into it, then ask `keep_going`."""
        return ConfidenceTracker(self.window)

    def keep_going(self, confidences_so_far: ConfidenceTracker | Sequence[float] | NDArray[np.floating[Any]]) -> bool:
        """Whether a trace may continue: False once a whole window was below the threshold, True during the warm-up.

        Args:
            confidences_so_far: Its tracker, at constant cost; or its confidences `[T]`, which are all read.

        Raises:
            InputError: If confidences are not finite, or the tracker has another window.
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
        """Whether a trace votes: its lowest group confidence reaches the threshold. True in the warm-up."""
        return self.threshold is None or trace.lowest_group >= self.threshold


def consensus(tally: Tally, least: float = 0.95) -> bool:
    """Whether the leading answer holds enough of the weight to stop sampling; False if there is none.

    Samples without an answer hold weight too, so they delay the stop. `least` is in (0, 1], else InputError.
    """
    return tally.winner is not None and tally.share >= share("least", least)


def leader_probability(leader: int, runner_up: int) -> float:
    """P(the leader beats the runner-up in the long run): that its probability is > ½ under Beta(v₁ + 1, v₂ + 1).

    v₁ and v₂ are their votes, integers ≥ 0, else InputError. For integers this tail is binomial, `Σ_{j ≤ v₁} C(v₁ + v₂
    + 1, j) / 2^(v₁ + v₂ + 1)`, computed in integers and rounded once.
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
    """Adaptive consistency: whether the leader is so far ahead that sampling can stop; False without an answer.

    Args:
        counts: Answer → number of samples, e.g. `Tally.counts`. None (no answer) is neither leader nor runner-up.
        least: The probability to reach, in (0, 1], else InputError.
    """
    votes = sorted((n for answer, n in counts.items() if answer is not None), reverse=True)
    least = share("least", least)
    if not votes:
        return False
    return leader_probability(votes[0], votes[1] if len(votes) > 1 else 0) >= least
