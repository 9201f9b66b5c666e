"""Accept or reject a round's draft tokens, and draw the token after them, at all positions at once.

Greedily, and with `accept="coupled"`, the tokens are those that decoding without drafts would take: a draft token is
accepted if it is that token. With `accept="rejection"` (Leviathan et al. 2023, arXiv 2211.17192; Chen et al. 2023,
arXiv 2302.01318) more of them are accepted, and the tokens have the same distribution. Processors run on the text as it
would stand at each position, draft tokens included.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch

from proxytune import ops
from proxytune.errors import NumericalError
from proxytune.generation.sampler import DrawSettings, combined, failure, row_on
from proxytune.methods.speculation.progress import RowProgress
from proxytune.methods.speculation.ragged_text import RaggedText
from proxytune.methods.speculation.round import Proposal, Verification

__all__ = ["Accept", "DraftVerifier"]

Accept = Literal["rejection", "coupled"]


class DraftVerifier:
    """Draws draft tokens and verifies them, by the same settings and the same noise."""

    def __init__(self, settings: DrawSettings, accept: Accept, wanted: tuple[bool, bool]) -> None:
        """Keep what all rounds share.

        Args:
            settings: What all draws share, with the noise at the first generated position.
            accept: How draft tokens are accepted where tokens are sampled.
            wanted: Whether scores and logits are to be reported.
        """
        self._settings = settings
        self._rejection = accept == "rejection" and settings.sampling is not None
        self._wanted = wanted

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
        if (missing := s.usable - row.shape[1]) > 0:  # the settings are for rows of the base's width
            row = torch.nn.functional.pad(row, (0, missing), value=-torch.inf)
        if s.plan.before:
            scores = combined(([row], (1.0,)), s.width, s.impl).to(drafted.device)
            row = row_on(s.place, self._processed(scores[:, None], rows.texts.written(drafted), ahead, rows)[:, 0])
        noise = None if s.noise is None else s.noise.at(self._positions(rows) + ahead)
        found = ops.step([row], sampling=s.sampling, noise=noise, impl=s.impl)
        assert found.tokens is not None
        return found.tokens[:, 0].to(drafted.device), row

    def verify(
        self, members: Sequence[torch.Tensor], weights: Sequence[float], proposal: Proposal, rows: RowProgress
    ) -> Verification:
        """Accept or reject the draft tokens, and draw the token after those that were accepted.

        Args:
            members: Raw logits of the base and its companions, `[B, K + 1, V_i]`.
            weights: One per member, the base's first.
            proposal: The draft tokens.
            rows: The rows, without them.
        """
        s, drafted = self._settings, proposal.tokens
        batch, columns = drafted.shape[0], drafted.shape[1] + 1
        flat = [row_on(s.place, x.flatten(0, 1)) for x in members]  # [B · (K + 1), V_i]
        flat[0] = flat[0][:, : s.usable]  # a view: ids beyond are not masked but absent
        logits = scores = None
        if s.plan.before or any(self._wanted):
            logits = combined((flat, weights), s.width, s.impl).to(drafted.device).unflatten(0, (batch, columns))
            scores = self._processed(logits, rows.texts.written(drafted), 0, rows)  # [B, K + 1, V]
            if s.plan.before:
                flat, weights = [row_on(s.place, scores.flatten(0, 1))], (1.0,)
        if self._rejection:
            assert s.sampling is not None
            assert s.noise is not None
            found = ops.verify(
                flat,
                weights,
                drafted=drafted.to(s.place),
                draft=proposal.drawn_from,
                sampling=s.sampling,
                noise=s.noise.at(self._positions(rows)),
                impl=s.impl,
            )
            tokens, accepted = found.tokens.to(drafted.device), found.accepted.to(drafted.device)
        else:
            tokens, accepted = self._matching(flat, weights, drafted, rows)

        def why(row: int, column: int, step: int) -> NumericalError:
            here = ([x.unflatten(0, (batch, columns))[:, column] for x in flat], weights)
            return failure(here, row, batch, step, bool(s.plan.before), s.impl)

        if self._wanted[0]:
            assert scores is not None
            scores = s.plan.warpers(rows.texts.prompts, scores.flatten(0, 1)).view_as(scores)
        return Verification(
            tokens, accepted, scores if self._wanted[0] else None, logits if self._wanted[1] else None, why
        )

    def _matching(
        self, flat: list[torch.Tensor], weights: Sequence[float], drafted: torch.Tensor, rows: RowProgress
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The tokens that are drawn without drafts, as far as the draft agrees with them, and how many agree."""
        s, (batch, length) = self._settings, drafted.shape
        columns = length + 1
        sampling = noise = None
        if s.sampling is not None:
            assert s.noise is not None
            each = torch.arange(batch, device=s.place).repeat_interleave(columns)
            ahead = torch.arange(columns, device=s.place).repeat(batch)
            sampling, noise = s.sampling.pick(each), s.noise.pick(each).at(self._positions(rows)[each] + ahead)
        found = ops.step(flat, weights, sampling=sampling, noise=noise, impl=s.impl)
        assert found.tokens is not None
        tokens = found.tokens[:, 0].to(drafted.device).unflatten(0, (batch, columns))
        # −1 stands for no draft, and for no distribution: neither agrees with anything.
        agree = (drafted == tokens[:, :-1]) & (drafted >= 0)
        accepted = agree.long().cumprod(1).sum(1)
        behind = torch.arange(columns, device=drafted.device) > accepted[:, None]
        return tokens.masked_fill(behind, -1), accepted

    def _positions(self, rows: RowProgress) -> torch.Tensor:
        """`[B]`, int64: how many tokens each row has, padding not counted."""
        assert self._settings.noise is not None
        return self._settings.noise.position + rows.texts.lengths.to(self._settings.place)

    def _processed(self, logits: torch.Tensor, texts: RaggedText, ahead: int, rows: RowProgress) -> torch.Tensor:
        """What the processors make of logits `[B, N, V]` at the positions `ahead`, … behind the rows' own tokens."""
        before = self._settings.plan.before
        if not before:
            return logits
        columns, width = logits.shape[1:]
        out = logits.clone()
        for step in texts.steps(range(columns), rows.going):
            column, there = texts.column(step, columns)
            at = column[:, None, None].expand(-1, 1, width)
            now = logits.gather(1, at)  # [B, 1, V]
            # The whole batch, as the processors know it; rows that are elsewhere are not taken over.
            processed = before(texts.upto(step + ahead), now[:, 0].clone())[:, None]
            out.scatter_(1, at, torch.where(there[:, None, None], processed, out.gather(1, at)))
        return out
