"""From drafts and what the members say about them to the tokens that stand: one verdict for all positions of a round.

Greedily, and by coupling, the tokens are those that are drawn anyway: drafts are accepted as long as they are the
same. By rejection (Leviathan et al. 2023, arXiv 2211.17192; Chen et al. 2023, arXiv 2302.01318) more of them are
accepted, and the tokens have the same law. Processors run on the text as it would stand at each position, drafts
included.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch

from proxytune import ops
from proxytune.errors import NumericalError
from proxytune.generation.processor_plan import ProcessorPlan
from proxytune.generation.sampler import MembersAndWeights, combined, failure, row_on
from proxytune.methods.speculation.ragged_text import RaggedText
from proxytune.ops.noise import Noise
from proxytune.ops.sampling_params import SamplingParams

__all__ = ["Accept", "DraftVerifier"]

Accept = Literal["rejection", "coupled"]


class DraftVerifier:
    """What draws drafts, and what decides about them, by the same settings and the same noise."""

    def __init__(
        self,
        translation: ProcessorPlan,
        sampling: SamplingParams | None,
        noise: Noise | None,
        *,
        width: int,
        usable: int,
        place: torch.device,
        impl: ops.Impl,
        accept: Accept,
        record: tuple[bool, bool],
    ) -> None:
        """Keep what all rounds share.

        Args:
            translation: Which processors run, and which are settings.
            sampling: The settings; None for greedy decoding.
            noise: The keys of the noise at the first generated position; None with `sampling`.
            width: The base's width V.
            usable: How many ids may be drawn.
            place: Where the draws are made.
            impl: As in `ops.step`.
            accept: How drafts are accepted where tokens are sampled.
            record: Whether scores and logits are wanted.
        """
        self._translation = translation
        self._sampling = sampling
        self._noise = noise
        self._width = width
        self._usable = usable
        self._place = place
        self._impl: ops.Impl = impl
        self._rejection = accept == "rejection" and sampling is not None
        self._record = record

    def draw(
        self, logits: torch.Tensor, drafted: torch.Tensor, texts: RaggedText, going: Sequence[bool]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Draw one more token of a draft.

        Args:
            logits: `[B, V_q]`, raw logits of the draft.
            drafted: `[B, j]`, int64: the drafts before it.
            texts: The texts without them.
            going: Which rows go on.

        Returns:
            `[B]`, int64, −1 where the draft has no distribution; and the rows they were drawn from.
        """
        rows = row_on(self._place, logits)
        if (missing := self._usable - rows.shape[1]) > 0:  # the settings are for rows of the base's width
            rows = torch.nn.functional.pad(rows, (0, missing), value=-torch.inf)
        ahead = drafted.shape[1]
        if self._translation.before:
            scores = combined(([rows], (1.0,)), self._width, self._impl).to(drafted.device)
            scores = self._processed(scores[:, None], texts.written(drafted), ahead, going)[:, 0]
            rows = row_on(self._place, scores)
        noise = None if self._noise is None else self._noise.at(self._position(texts) + ahead)
        found = ops.step([rows], sampling=self._sampling, noise=noise, impl=self._impl)
        assert found.tokens is not None
        return found.tokens[:, 0].to(drafted.device), rows

    def verdict(
        self,
        members: Sequence[torch.Tensor],
        weights: Sequence[float],
        drafted: torch.Tensor,
        drawn_from: torch.Tensor | None,
        texts: RaggedText,
        going: Sequence[bool],
    ) -> Verification:
        """Decide which drafts stand, and draw the token behind them.

        Args:
            members: Raw logits of the base and its companions, `[B, K + 1, V_i]`.
            weights: One per member, the base's first.
            drafted: `[B, K]`, int64; −1 from where a row has no draft.
            drawn_from: `[B · K, V_q]`, what they were drawn from; None if they were not drawn.
            texts: The texts without them.
            going: Which rows go on.

        Returns:
            What was decided.
        """
        batch, columns = drafted.shape[0], drafted.shape[1] + 1
        rows = [row_on(self._place, x.flatten(0, 1)) for x in members]  # [B · (K + 1), V_i]
        rows[0] = rows[0][:, : self._usable]  # a view: ids beyond are not masked but absent
        logits = scores = None
        if self._translation.before or any(self._record):
            logits = (
                combined((rows, weights), self._width, self._impl).to(drafted.device).unflatten(0, (batch, columns))
            )
            scores = self._processed(logits, texts.written(drafted), 0, going)  # [B, K + 1, V]
        if self._translation.before:
            assert scores is not None
            rows, weights = [row_on(self._place, scores.flatten(0, 1))], (1.0,)
        if self._rejection:
            assert self._noise is not None
            assert self._sampling is not None
            verdict = ops.verify(
                rows,
                weights,
                drafted=drafted.to(self._place),
                draft=drawn_from,
                sampling=self._sampling,
                noise=self._noise.at(self._position(texts)),
                impl=self._impl,
            )
            tokens, accepted = verdict.tokens.to(drafted.device), verdict.accepted.to(drafted.device)
        else:
            tokens, accepted = self._same(rows, weights, drafted, texts)
        ruling = Verification(self, (rows, weights), tokens, accepted)
        if self._record[0]:
            assert scores is not None
            ruling.scores = self._translation.warpers(texts.prompts, scores.flatten(0, 1)).view_as(scores)
        if self._record[1]:
            ruling.logits = logits
        return ruling

    def _same(
        self, rows: list[torch.Tensor], weights: Sequence[float], drafted: torch.Tensor, texts: RaggedText
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The tokens that are drawn without drafts, as far as drafts agree with them, and how many do."""
        batch, columns = drafted.shape[0], drafted.shape[1] + 1
        sampling = noise = None
        if self._sampling is not None:
            assert self._noise is not None
            each = torch.arange(batch, device=self._place).repeat_interleave(columns)
            ahead = torch.arange(columns, device=self._place).repeat(batch)
            sampling, noise = self._sampling.pick(each), self._noise.pick(each)
            noise = noise.at(self._position(texts)[each] + ahead)
        found = ops.step(rows, weights, sampling=sampling, noise=noise, impl=self._impl)
        assert found.tokens is not None
        tokens = found.tokens[:, 0].to(drafted.device).unflatten(0, (batch, columns))
        # Where there is no draft, −1, or no distribution, −1 too: neither agrees with anything.
        agree = (drafted == tokens[:, :-1]) & (drafted >= 0)
        accepted = agree.long().cumprod(1).sum(1)
        behind = torch.arange(columns, device=drafted.device) > accepted[:, None]
        return tokens.masked_fill(behind, -1), accepted

    def _position(self, texts: RaggedText) -> torch.Tensor:
        """`[B]`, int64: how many tokens each row has, padding not counted."""
        assert self._noise is not None
        return self._noise.position + texts.lengths.to(self._place)

    def _processed(self, logits: torch.Tensor, texts: RaggedText, ahead: int, going: Sequence[bool]) -> torch.Tensor:
        """What the processors make of logits `[B, N, V]` at the positions `ahead`, … behind the texts' own tokens."""
        if not self._translation.before:
            return logits
        columns, width = logits.shape[1:]
        out = logits.clone()
        for step in texts.steps(range(columns), going):
            column, there = texts.column(step, columns)
            at = column[:, None, None].expand(-1, 1, width)
            now = logits.gather(1, at)  # [B, 1, V]
            # The whole batch, as the processors know it; rows that are elsewhere are not taken over.
            processed = self._translation.before(texts.upto(step + ahead), now[:, 0].clone())[:, None]
            out.scatter_(1, at, torch.where(there[:, None, None], processed, out.gather(1, at)))
        return out

    def failure(
        self, rows: MembersAndWeights, row: int, column: int, batch: int, columns: int, step: int
    ) -> NumericalError:
        """Say that a row had no distribution at some position. Waits for the device.

        Args:
            rows: What was drawn from.
            row: Which row.
            column: Which of its positions.
            batch: How many rows there are.
            columns: How many positions each has.
            step: How many tokens were generated before it.

        Returns:
            The error to raise.
        """
        here = ([x.unflatten(0, (batch, columns))[:, column] for x in rows[0]], rows[1])
        return failure(here, row, batch, step, bool(self._translation.before), self._impl)


class Verification:
    """What was decided about a round.

    Attributes:
        tokens: `[B, K + 1]`, int64: the accepted drafts, the token behind them (−1 where there is no distribution), −1.
        accepted: `[B]`, int64.
        scores: `[B, K + 1, V]`, float32, after all processors; None if not wanted.
        logits: `[B, K + 1, V]`, float32, before any; None if not wanted.
    """

    def __init__(
        self, judge: DraftVerifier, rows: MembersAndWeights, tokens: torch.Tensor, accepted: torch.Tensor
    ) -> None:
        """Keep it.

        Args:
            judge: Who decided.
            rows: What was drawn from.
            tokens: The tokens.
            accepted: How many drafts were accepted.
        """
        self.tokens = tokens
        self.accepted = accepted
        self.scores: torch.Tensor | None = None
        self.logits: torch.Tensor | None = None
        self._judge = judge
        self._rows = rows

    def failure(self, row: int, step: int) -> NumericalError:
        """Say why the token behind a row's accepted drafts could not be drawn.

        Args:
            row: Which row.
            step: How many tokens were generated before it.

        Returns:
            The error to raise.
        """
        batch, columns = self.tokens.shape
        return self._judge.failure(self._rows, row, int(self.accepted[row]), batch, columns, step)
