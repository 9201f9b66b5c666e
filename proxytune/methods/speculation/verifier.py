"""Accept or reject a round's draft tokens, and draw the token after them, at all positions at once.

Greedily, and with `accept="coupled"`, a draft token is accepted if it is the token that decoding without drafts would
take. `accept="rejection"` (Leviathan et al. 2023, arXiv 2211.17192; Chen et al. 2023, arXiv 2302.01318) accepts more,
and keeps the distribution of the tokens, not the tokens themselves. At each position, processors see the text with the
draft tokens before it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch

from proxytune import ops
from proxytune.errors import NumericalError
from proxytune.generation.sampler import DrawSettings, combined, failure, row_on
from proxytune.methods.speculation.progress import RowProgress
from proxytune.methods.speculation.ragged_text import RaggedText
from proxytune.methods.speculation.round import Proposal, Verification
from proxytune.models.weighing import picked, weights_on
from proxytune.ops.combination import Weights

__all__ = ["Accept", "DraftVerifier"]

Accept = Literal["rejection", "coupled"]

Weigh = Callable[[Sequence[torch.Tensor], torch.Tensor], tuple[list[torch.Tensor], Weights]]


class DraftVerifier:
    """Draws draft tokens and verifies them, with the same settings and the same noise."""

    def __init__(self, settings: DrawSettings, accept: Accept, wanted: tuple[bool, bool]) -> None:
        self._settings = settings
        self._rejection = accept == "rejection" and settings.sampling is not None
        self._wanted = wanted

    @property
    def usable(self) -> int:
        """How many ids can be drawn."""
        return self._settings.usable

    def draw(self, logits: torch.Tensor, drafted: torch.Tensor, rows: RowProgress) -> tuple[torch.Tensor, torch.Tensor]:
        """Draw one more token of a draft.

        Args:
            logits: `[B, V_q]`, raw logits of the draft.
            drafted: `[B, j]`, int64: the draft tokens before it.
            rows: The rows, without them.

        Returns:
            `[B]`, int64, −1 where the draft has no distribution; and the logits it was drawn from.
        """
        s, ahead = self._settings, drafted.shape[1]
        row = row_on(s.place, logits)
        if (missing := s.usable - row.shape[1]) > 0:  # the draw settings expect rows as wide as the base's
            row = torch.nn.functional.pad(row, (0, missing), value=-torch.inf)
        if s.plan.before:
            scores = combined(([row], (1.0,)), s.width, s.impl).to(drafted.device)
            row = row_on(s.place, self._processed(scores[:, None], rows.texts.written(drafted), ahead, rows)[:, 0])
        noise = None if s.noise is None else s.noise.at(self._positions(rows) + ahead)
        step = ops.step([row], sampling=s.sampling, noise=noise, impl=s.impl)
        assert step.tokens is not None
        return step.tokens[:, 0].to(drafted.device), row

    def verify(
        self, members: Sequence[torch.Tensor], weigh: Weigh, proposal: Proposal, rows: RowProgress
    ) -> Verification:
        """Accept or reject the draft tokens, and draw the token after the accepted ones.

        Args:
            members: Raw logits of the base and its companions, `[B, K + 1, V_i]`.
            weigh: From the members' rows `[B · (K + 1), V_i]`, and how many tokens were generated before each, to what
                `ops.verify` takes.
            proposal: The draft tokens.
            rows: The rows, without the draft tokens.
        """
        s, drafted = self._settings, proposal.tokens
        batch, columns = drafted.shape[0], drafted.shape[1] + 1
        flat, weights = weigh([x.flatten(0, 1) for x in members], self._generated(rows, columns))
        flat = [row_on(s.place, x) for x in flat]  # [B · (K + 1), V_i]
        weights = weights_on(s.place, weights)
        flat[0] = flat[0][:, : s.usable]  # a view: ids from `usable` on are cut off, not masked
        logits = scores = None
        if s.plan.before or any(self._wanted):
            logits = combined((flat, weights), s.width, s.impl).to(drafted.device).unflatten(0, (batch, columns))
            scores = self._processed(logits, rows.texts.written(drafted), 0, rows)  # [B, K + 1, V]
            if s.plan.before:
                flat, weights = [row_on(s.place, scores.flatten(0, 1))], (1.0,)
        if self._rejection:
            assert s.sampling is not None
            assert s.noise is not None
            verdict = ops.verify(
                flat,
                weights,
                drafted=drafted.to(s.place),
                draft=proposal.drawn_from,
                sampling=s.sampling,
                noise=s.noise.at(self._positions(rows)),
                impl=s.impl,
            )
            tokens, accepted = verdict.tokens.to(drafted.device), verdict.accepted.to(drafted.device)
        else:
            tokens, accepted = self._matching(flat, weights, drafted, rows)

        def why(row: int, column: int, step: int) -> NumericalError:
            at = torch.arange(batch) * columns + column
            here = ([x.unflatten(0, (batch, columns))[:, column] for x in flat], picked(weights, at))
            return failure(here, row, batch, step, bool(s.plan.before), s.impl)

        if self._wanted[0]:
            assert scores is not None
            scores = s.plan.warpers(rows.texts.prompts, scores.flatten(0, 1)).view_as(scores)
        return Verification(
            tokens, accepted, scores if self._wanted[0] else None, logits if self._wanted[1] else None, why
        )

    def _matching(
        self, flat: list[torch.Tensor], weights: Weights, drafted: torch.Tensor, rows: RowProgress
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Accept draft tokens that equal the undrafted draw; returns tokens `[B, K + 1]` and accepted counts `[B]`."""
        s, (batch, length) = self._settings, drafted.shape
        columns = length + 1
        sampling = noise = None
        if s.sampling is not None:
            assert s.noise is not None
            row = torch.arange(batch, device=s.place).repeat_interleave(columns)
            ahead = torch.arange(columns, device=s.place).repeat(batch)
            sampling, noise = s.sampling.pick(row), s.noise.pick(row).at(self._positions(rows)[row] + ahead)
        step = ops.step(flat, weights, sampling=sampling, noise=noise, impl=s.impl)
        assert step.tokens is not None
        tokens = step.tokens[:, 0].to(drafted.device).unflatten(0, (batch, columns))
        # −1 means no draft, or no distribution: it never agrees.
        agree = (drafted == tokens[:, :-1]) & (drafted >= 0)
        accepted = agree.long().cumprod(1).sum(1)
        after = torch.arange(columns, device=drafted.device) > accepted[:, None]
        return tokens.masked_fill(after, -1), accepted

    @staticmethod
    def _generated(rows: RowProgress, columns: int) -> torch.Tensor:
        """`[B · columns]`: tokens that each row has generated before each of its next `columns` ones."""
        own = rows.texts.lengths  # [B]
        return (own[:, None] + torch.arange(columns, device=own.device)).flatten()

    def _positions(self, rows: RowProgress) -> torch.Tensor:
        """`[B]`, int64: how many tokens each row has, without padding."""
        assert self._settings.noise is not None
        return self._settings.noise.position + rows.texts.lengths.to(self._settings.place)

    def _processed(self, logits: torch.Tensor, texts: RaggedText, ahead: int, rows: RowProgress) -> torch.Tensor:
        """Run the processors on logits `[B, N, V]` at positions `ahead`, `ahead` + 1, … after each row's own tokens."""
        before = self._settings.plan.before
        if not before:
            return logits
        columns, width = logits.shape[1:]
        out = logits.clone()
        for step in texts.steps(range(columns), rows.going):
            column, there = texts.column(step, columns)
            at = column[:, None, None].expand(-1, 1, width)
            now = logits.gather(1, at)  # [B, 1, V]
            # Processors expect the whole batch; results for rows of another length are discarded.
            processed = before(texts.upto(step + ahead), now[:, 0].clone())[:, None]
            out.scatter_(1, at, torch.where(there[:, None, None], processed, out.gather(1, at)))
        return out
