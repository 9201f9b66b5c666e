"""The state of every row: its text, its columns in the caches, and whether it is still generating."""

from __future__ import annotations

import torch
from transformers.cache_utils import Cache

from proxytune.generation.call import Call
from proxytune.methods.speculation.ragged_cache import RaggedCache
from proxytune.methods.speculation.ragged_text import RaggedText
from proxytune.methods.speculation.round import Commit, Proposal, RoundResult, Verification
from proxytune.models.members.rewind import length_of
from proxytune.models.members.text_layer import text_layer_of

__all__ = ["RowProgress"]


class RowProgress:
    """How far each row is.

    Attributes:
        texts: The texts.
        columns: The column layout that all caches share.
        going: Which rows are still generating.
    """

    def __init__(self, call: Call, cache: Cache, pads: torch.Tensor | None) -> None:
        rows, positions = len(call.input_ids), call.kwargs.get("position_ids")
        following = call.lengths if positions is None else (positions[:, -1] + 1).expand(rows)
        self.texts = RaggedText(call.input_ids, call.most_new, 0 if pads is None else int(pads))
        texts = text_layer_of(cache)
        others = None if texts is None else texts.masks
        self.columns = RaggedCache(following, int(length_of(cache)), call.kwargs.get("attention_mask"), others)
        self.going = [True] * rows
        self._criteria = call.criteria
        self._most = call.most_new
        # Without a padding token, ended rows keep generating until all have ended, as in transformers' own loop.
        self._pads = pads is not None
        self._ends: list[int | None] = [None] * rows

    @property
    def finished(self) -> bool:
        """Whether all rows have ended."""
        ends = [end for end in self._ends if end is not None]
        return len(ends) == len(self._ends) and min(self.texts.counts) >= (0 if self._pads else max(ends))

    @property
    def steps(self) -> int:
        """Length of the longest row in generated tokens, once all have ended."""
        return max(end or 0 for end in self._ends)

    @property
    def room(self) -> int:
        """How many tokens can be drafted in the row with most room; a round adds one more token by itself."""
        left = (self._most - n for n, on in zip(self.texts.counts, self.going, strict=True) if on)
        return max(left, default=1) - 1

    def trim(self, proposal: Proposal) -> Proposal:
        """Cut each row's draft to the row's own room, so that it does not depend on the other rows."""
        tokens = proposal.tokens
        fits = torch.arange(proposal.length, device=tokens.device) < self._most - 1 - self.texts.lengths[:, None]
        there = ((tokens >= 0) & fits).long().cumprod(1).bool()
        return Proposal(tokens.masked_fill(~there, -1), proposal.drawn_from)

    def inspect(
        self, verification: Verification, proposal: Proposal, *, bonus: bool = True, earlier: RoundResult | None = None
    ) -> RoundResult:
        """Run the stopping criteria on the new tokens, and copy the verification to the host. Waits for the device.

        With `bonus=False` the bonus token comes from a placeholder, and the criteria must not see it. `earlier` is the
        result of that first call in the second one, so that no token is tested twice.
        """
        length = proposal.length
        ends = self._ends_at(verification.tokens, range(0 if earlier is None else length, length + bonus))
        accepted, drafted = verification.accepted[:, None], (proposal.tokens >= 0).sum(1, keepdim=True)
        failed = verification.tokens.gather(1, accepted) < 0
        rows = torch.cat((accepted, drafted, failed.long(), ends.long()), 1).tolist()
        flags = [[bool(end) for end in row[3:]] for row in rows]
        if earlier is not None:
            flags = [[a or b for a, b in zip(*both, strict=True)] for both in zip(flags, earlier.ends, strict=True)]
        return RoundResult(
            verification, [row[0] for row in rows], [row[1] for row in rows], [bool(row[2]) for row in rows], flags
        )

    def accepted_whole(self, result: RoundResult) -> bool:
        """Whether some row continues after a full-length draft that was wholly accepted, and so needs a bonus token."""
        length = len(result.ends[0]) - 1
        return any(
            on and accepted == length > 0 and not (self._pads and any(ends[:length]))
            for accepted, ends, on in zip(result.accepted, result.ends, self.going, strict=True)
        )

    def commit(self, result: RoundResult) -> Commit:
        """Append each row's accepted tokens and the one after them, up to where it ends.

        Raises:
            NumericalError: If an unfinished row has no distribution.
        """
        start, counts, was = self.texts.counts, list(self.texts.counts), self.going
        for row, accepted in enumerate(result.accepted):
            if not self.going[row]:
                continue
            new = accepted + (not result.failed[row])
            end = next((i for i, done in enumerate(result.ends[row][:new]) if done), None)
            ended_before = self._ends[row] is not None
            if result.failed[row] and end is None and not ended_before:
                raise result.verification.failure(row, accepted, start[row] + accepted)
            stops_here = end is not None and self._pads
            # An ended row that waits for the others and has no distribution still gets a token, which is cut off.
            counts[row] = start[row] + ((end or 0) + 1 if stops_here or result.failed[row] else new)
            if end is not None and not ended_before:
                self._ends[row] = start[row] + end + 1
        if not self._pads and None not in self._ends:  # all have ended: cut at the longest
            counts = [min(n, self.steps) for n in counts]
        self.texts.accept(result.verification.tokens, counts)
        self.going = [end is None for end in self._ends] if self._pads else [n < self._most for n in counts]
        drafted = [n if on else 0 for n, on in zip(result.drafted, was, strict=True)]
        taken = [min(n, d) for n, d in zip(result.accepted, drafted, strict=True)]
        return Commit(
            start=start,
            kept=[after - before for after, before in zip(counts, start, strict=True)],
            drafted=drafted,
            accepted=taken,
            rejected=[int(a < d) for a, d in zip(taken, drafted, strict=True)],
        )

    def _ends_at(self, tokens: torch.Tensor, asked: range) -> torch.Tensor:
        """`[B, N]`: whether each row ends at each of its new tokens `[B, N]`; False at columns outside `asked`."""
        columns, written = tokens.shape[1], self.texts.written(tokens)
        ends = torch.zeros(tokens.shape, dtype=torch.bool, device=tokens.device)
        for step in self.texts.steps(asked, self.going):
            if step < self._most:
                column, there = self.texts.column(step, columns)
                there = there & (column >= asked.start) & (column < asked.stop)
                done = self._criteria(written.upto(step + 1), None) & there
                ends.scatter_(1, column[:, None], done[:, None] | ends.gather(1, column[:, None]))
        return ends
