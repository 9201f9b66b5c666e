"""The number of tokens to draft in the next round: the fastest by the costs and the acceptance so far."""

from __future__ import annotations

from proxytune.costs.speculation import DraftCosts, best_draft_length

__all__ = ["MOST_DRAFTED", "DraftLength"]

MOST_DRAFTED = 16
"""The longest draft chosen: if drafting costs 1 %, it is best from an acceptance of .9 on."""

_PRIOR = (3.5, 5.0)  # accepted and tested tokens: an acceptance of .7, with the weight of a round or two
_MEMORY = 0.99  # decay per tested token: about the last hundred count
_REST = 16  # rounds without a draft before it is tried again


class DraftLength:
    """The draft length of one generation. It depends on counts alone, not on timings, so a run can be repeated.

    `fixed` is the requested length; None to choose by the costs of a round of `rows` rows.
    """

    def __init__(self, costs: DraftCosts, fixed: int | None, rows: int = 1) -> None:
        self.fixed = fixed
        self._costs = costs
        self._rows = rows
        self._accepted, self._tested = _PRIOR
        self._rested = 0

    @property
    def acceptance(self) -> float:
        """Estimated share of accepted tokens among the draft tokens that were tested."""
        return self._accepted / self._tested

    def choose(self, room: int) -> int:
        """The next draft length, at most `room`. Where drafting does not pay, it is retried now and then."""
        if self.fixed is not None:
            return min(self.fixed, room)
        length = best_draft_length([self.acceptance] * self._rows, self._costs, MOST_DRAFTED)
        if not length:
            self._rested += 1
            if self._rested > _REST:
                self._rested, length = 0, 1
        return min(length, room)

    def learn(self, accepted: int, rejected: int) -> None:
        """Update the estimate with a round's accepted tokens and rejections, summed over the rows."""
        tested = accepted + rejected
        decay = _MEMORY**tested
        self._accepted = self._accepted * decay + accepted
        self._tested = self._tested * decay + tested
