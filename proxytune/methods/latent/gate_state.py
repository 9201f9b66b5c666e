"""The state of the gates for each row, and their decision of a step. Pure tensors; nothing waits for the device."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from proxytune.generation.token_patterns import continued, ends_of
from proxytune.methods.latent.gates import LatentGates

__all__ = ["GateState"]


@dataclass
class GateState:
    """The gates' state of each row, `[B]` each.

    Attributes:
        cold: Consecutive steps with a low entropy.
        run: Consecutive latent steps.
        stopped: Whether a cold stop has ended the span.
        latent_mode: Whether the current block is latent.
        block: Steps in the current block.
        reference: Ĥ at the block's start.
        listed: `[n]`, int64: the ids that are always discrete.
        start: The length of the prompts, padding included.
    """

    cold: torch.Tensor
    run: torch.Tensor
    stopped: torch.Tensor
    latent_mode: torch.Tensor
    block: torch.Tensor
    reference: torch.Tensor
    listed: torch.Tensor
    start: int

    @classmethod
    def begin(cls, gates: LatentGates, rows: int, device: torch.device, start: int) -> GateState:
        """The state before the first new token; `start` is the length of the prompts, padding included."""
        zero = torch.zeros(rows, dtype=torch.int64, device=device)
        no = torch.zeros(rows, dtype=torch.bool, device=device)
        listed = sorted({*gates.discrete_ids, *gates.begin, *gates.end})
        nothing = torch.full((rows,), torch.nan, device=device)
        return cls(zero, zero, no, ~no, zero, nothing, torch.tensor(listed, dtype=torch.int64, device=device), start)

    def of(self, parents: torch.Tensor) -> GateState:
        """The state of rows that continue the rows `parents`, `[B]`, int64."""
        return replace(
            self,
            cold=self.cold[parents],
            run=self.run[parents],
            stopped=self.stopped[parents],
            latent_mode=self.latent_mode[parents],
            block=self.block[parents],
            reference=self.reference[parents],
        )

    def step(
        self, gates: LatentGates, ids: torch.Tensor, entropy: torch.Tensor, spread: torch.Tensor
    ) -> tuple[torch.Tensor, GateState]:
        """Decide how the last token of each row is fed back.

        Args:
            gates: The gates.
            ids: `[B, T]`, int64: the whole texts, the last drawn token included.
            entropy: `[B]`, nats: H of the distribution it was drawn from.
            spread: `[B]`: Ĥ of its candidates; NaN where there is no distribution.

        Returns:
            `[B]`, bool: whether the step is latent; and the next state.
        """
        inside = self._inside(gates, ids[:, :-1])  # whether the span was open when the token was drawn
        cold = torch.where(inside & (entropy < gates.cold_entropy), self.cold + 1, 0)
        stopped = self.stopped
        if gates.cold_steps is not None:
            stopped = (stopped | (cold >= gates.cold_steps)) & (inside if gates.end_ids else True)

        # A span begins with a new block.
        fresh = self.reference.isnan() | ~inside
        mode, block = self.latent_mode | fresh, torch.where(fresh, 0, self.block)
        reference = torch.where(fresh, spread, self.reference)
        if gates.dwell is not None:
            latent, discrete = gates.dwell  # type: ignore[misc]
            ends = torch.where(
                mode, (spread < reference) & (block >= latent), (spread > reference) & (block >= discrete)
            )
            mode, block, reference = mode ^ ends, torch.where(ends, 0, block), torch.where(ends, spread, reference)

        soft = inside & mode & ~stopped & (spread >= gates.min_entropy)  # NaN is never latent
        soft &= ~torch.isin(ids[:, -1], self.listed)
        if gates.max_run is not None:
            soft &= self.run < gates.max_run
        if gates.loop_ngram is not None:
            soft &= ~self._loops(ids, gates.loop_ngram, gates.loop_repeats)
        run = torch.where(soft, self.run + 1, 0)
        reference = torch.where(inside, reference, torch.nan)
        return soft, replace(
            self, cold=cold, run=run, stopped=stopped, latent_mode=mode, block=block + 1, reference=reference
        )

    def due(self, gates: LatentGates, ids: torch.Tensor) -> torch.Tensor | None:
        """The token that a cold stop forces next in each row, `[B]`, int64, −1 for none; None if no gate forces any."""
        ends = gates.end
        if gates.cold_steps is None or not ends:
            return None
        open_ = self.stopped & self._inside(gates, ids)
        written = continued(ids, ends, torch.full_like(self.cold, self.start), least=0)
        return torch.where(open_, written, -1)

    def _inside(self, gates: LatentGates, ids: torch.Tensor) -> torch.Tensor:
        """Whether the span is open after these ids; `[B]`, bool."""
        begins, ends = gates.begin, gates.end
        if not ends:
            return torch.ones(len(ids), dtype=torch.bool, device=ids.device)
        place = torch.arange(ids.shape[1], device=ids.device)
        closed = ends_of(ids, ends)
        if not begins:
            return ~(closed & (place >= self.start)).any(1)
        # The last position of each; there are no ids yet if the prompt was given as embeddings.
        opened, shut = (
            torch.nn.functional.pad(torch.where(x, place, -1), (1, 0), value=-1).amax(1)
            for x in (ends_of(ids, begins), closed)
        )
        return opened > shut

    def _loops(self, ids: torch.Tensor, size: int, repeats: int) -> torch.Tensor:
        """Whether the last n-gram of the new ids has occurred often enough; `[B]`, bool."""
        new = ids[:, self.start :]
        if new.shape[1] < size:
            return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)
        same = (new.unfold(1, size, 1) == new[:, None, -size:]).all(-1)  # [B, windows]
        return same.sum(1) >= repeats
