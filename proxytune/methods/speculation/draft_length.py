"""How many tokens to draft in the next round: what the costs and the acceptance so far say is fastest."""

from __future__ import annotations

from proxytune.costs.speculation import DraftCosts, best_draft_length

__all__ = ["MOST_DRAFTED", "DraftLength"]

MOST_DRAFTED = 16
"""The longest draft that is chosen; at a cost of the draft of 1 % this is best from an acceptance of .9 on."""

_PRIOR = (3.5, 5.0)  # accepted, decided: .7, with the weight of a round or two
_MEMORY = 0.99  # per decision: the last hundred count
_REST = 16  # rounds without a draft, before the next try


class DraftLength:
    """The draft length of one generation; from counts alone, so that the same run chooses the same.

    Attributes:
        fixed: The length that was asked for; None to choose.
    """

    def __init__(self, costs: DraftCosts, fixed: int | None, rows: int = 1) -> None:
        """Begin without any evidence.

        Args:
            costs: What a round takes.
            fixed: A draft length; None to choose.
            rows: B.
        """
        self.fixed = fixed
        self._costs = costs
        self._rows = rows
        self._accepted, self._decided = _PRIOR
        self._rested = 0

    @property
    def acceptance(self) -> float:
        """The estimate of the share of drafted tokens that are accepted, of those that were decided upon."""
        return self._accepted / self._decided

    def choose(self, room: int) -> int:
        """The length of the next draft.

        Args:
            room: How many tokens may be drafted at most.

        Returns:
            At least 0. Where drafting does not pay, it is tried again from time to time: the text may become easier.
        """
        if self.fixed is not None:
            return min(self.fixed, room)
        length = best_draft_length([self.acceptance] * self._rows, self._costs, MOST_DRAFTED)
        if not length:
            self._rested += 1
            if self._rested > _REST:
                self._rested, length = 0, 1
        return min(length, room)

    def learn(self, accepted: int, rejected: int) -> None:
        """Take in what became of a round's drafts.

        Args:
            accepted: How many were accepted, over all rows.
            rejected: How many rows rejected one.
        """
        decided = accepted + rejected
        kept = _MEMORY**decided
        self._accepted = self._accepted * kept + accepted
        self._decided = self._decided * kept + decided
