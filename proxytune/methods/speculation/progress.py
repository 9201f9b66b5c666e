"""Which rows of a speculative generation go on: what of a round's tokens stands, and where a text ends in a draft."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import StoppingCriteriaList

from proxytune.methods.speculation.ragged_text import RaggedText
from proxytune.methods.speculation.verifier import Verification

__all__ = ["RoundResult", "RowProgress"]


@dataclass(frozen=True, eq=False)
class RoundResult:
    """What the host sees of a round.

    Attributes:
        ruling: What was decided.
        written: The texts with its tokens behind them.
        rows: Of each row: how many drafts were accepted, how many there were, whether there was no distribution to draw
            the next token from, and for each new token whether the text ends there.
        ends: The latter on the device, `[B, K + 1]`, bool.
    """

    ruling: Verification
    written: RaggedText
    rows: list[list[int]]
    ends: torch.Tensor


class RowProgress:
    """How far each row has come.

    Attributes:
        going: Which rows go on.
    """

    def __init__(self, texts: RaggedText, criteria: StoppingCriteriaList, *, most: int, fills_up: bool) -> None:
        """Begin with rows that all go on.

        Args:
            texts: The texts.
            criteria: The stopping criteria, asked at every token.
            most: How many tokens a row may get.
            fills_up: Whether rows that have ended are filled up with padding; otherwise they go on, as in transformers'
                loop, until all have ended.
        """
        self._texts = texts
        self._criteria = criteria
        self._most = most
        self._fills_up = fills_up
        self._ends: list[int | None] = [None] * len(texts.counts)
        self.going = [True] * len(texts.counts)

    @property
    def finished(self) -> bool:
        """Whether the generation is."""
        ends = [end for end in self._ends if end is not None]
        return len(ends) == len(self._ends) and min(self._texts.counts) >= (0 if self._fills_up else max(ends))

    @property
    def steps(self) -> int:
        """How many tokens the generation has, once it is finished."""
        return max(end or 0 for end in self._ends)

    @property
    def room(self) -> int:
        """How many tokens can be drafted in the row that has most room: each round brings one more by itself."""
        left = (self._most - n for n, on in zip(self._texts.counts, self.going, strict=True) if on)
        return max(left, default=1) - 1

    def within(self, drafted: torch.Tensor) -> torch.Tensor:
        """Leave of each row's draft what it has room for, so that no row's draft depends on the others' room.

        Args:
            drafted: `[B, K]`, int64; below 0 for none.

        Returns:
            The same, −1 from where there is none.
        """
        column = torch.arange(drafted.shape[1], device=drafted.device)
        fits = column < self._most - 1 - self._texts.lengths[:, None]
        there = ((drafted >= 0) & fits).long().cumprod(1).bool()
        return drafted.masked_fill(~there, -1)

    def read(
        self, ruling: Verification, drafted: torch.Tensor, *, last: bool = True, before: RoundResult | None = None
    ) -> RoundResult:
        """Let the host see what was decided, and where texts end by it. Waits for the device.

        Args:
            ruling: What was decided.
            drafted: `[B, K]`, int64, −1 from where a row has no draft.
            last: Whether the token behind a whole draft is one, and not drawn from a stand-in: of that the criteria
                must not hear.
            before: What was read without it, so that they are not asked twice; None for nothing.

        Returns:
            What it sees.
        """
        written = self._texts.written(ruling.tokens)
        most = drafted.shape[1]
        ends = self._asked(written, range(0 if before is None else most, most + last), most + 1)  # [B, K + 1]
        if before is not None:
            ends = ends | before.ends
        failed = ruling.tokens.gather(1, ruling.accepted[:, None]) < 0
        parts = (ruling.accepted[:, None], (drafted >= 0).sum(1, keepdim=True), failed.long(), ends.long())
        return RoundResult(ruling, written, torch.cat(parts, 1).tolist(), ends)

    def through(self, reading: RoundResult) -> bool:
        """Whether some row gets a token behind a draft of full length, all of which was accepted.

        Args:
            reading: What the host sees.

        Returns:
            Whether.
        """
        for (accepted, _, _, *stops), on in zip(reading.rows, self.going, strict=True):
            last = len(stops) - 1  # K
            if on and accepted == last > 0 and not (self._fills_up and any(stops[:last])):
                return True
        return False

    def take(self, reading: RoundResult) -> tuple[list[int], list[int]]:
        """Take over what stands.

        Args:
            reading: What the host sees.

        Returns:
            How many tokens each row had drafted, 0 for one that does not go on; and how many of them were accepted.

        Raises:
            NumericalError: If a row that goes on has no distribution.
        """
        ruling, written, rows = reading.ruling, reading.written, reading.rows
        before, counts = self._texts.counts, list(self._texts.counts)
        for row, (accepted, _, bad, *stops) in enumerate(rows):
            if not self.going[row]:
                continue
            stop = next((i for i, done in enumerate(stops[: accepted + (not bad)]) if done), None)
            if stop is None and bad and self._ends[row] is None:
                raise ruling.failure(row, before[row] + accepted)
            goes_on = stop is None or not self._fills_up
            counts[row] = before[row] + (accepted + 1 if goes_on and not bad else (stop or 0) + 1)
            if stop is not None and self._ends[row] is None:
                self._ends[row] = before[row] + stop + 1
        if not self._fills_up and None not in self._ends:  # no row has to go on beyond the last end
            counts = [min(n, self.steps) for n in counts]
        was = self.going
        self._texts.accept(written, counts)
        if self._fills_up:
            self.going = [end is None for end in self._ends]
        else:
            self.going = [n < self._most for n in counts]
        return (
            [row[1] if on else 0 for row, on in zip(rows, was, strict=True)],
            [row[0] if on else 0 for row, on in zip(rows, was, strict=True)],
        )

    def _asked(self, written: RaggedText, which: range, columns: int) -> torch.Tensor:
        """Whether each row ends at each of its new tokens, `[B, columns]`, bool; False for those that are not asked."""
        texts = self._texts
        ends = torch.zeros((len(texts.counts), columns), dtype=torch.bool, device=texts.lengths.device)
        for step in texts.steps(which, self.going):
            if step < self._most:
                column, there = texts.column(step, columns)
                there = there & (column >= which.start) & (column < which.stop)
                done = self._criteria(written.upto(step + 1), None) & there
                ends.scatter_(1, column[:, None], done[:, None] | ends.gather(1, column[:, None]))
        return ends
