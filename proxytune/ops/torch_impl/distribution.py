"""The distribution that a row is drawn from, in a few numbers."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from proxytune.ops.sampling_params import SamplingParams
from proxytune.ops.torch_impl.rows import CLAMP, MemberRows
from proxytune.ops.torch_impl.truncate import Truncation, truncate

__all__ = ["Distribution", "distribution_of", "shares", "tempered"]


@dataclass(frozen=True, eq=False)
class Distribution:
    """The distribution of each row, in few numbers from which the probability of any logit follows.

    Attributes:
        top: `[B, 1]`, the largest logit.
        temperature: `[B, 1]`.
        log_total: `[B, 1]`: log Σ e^((z − top) / T) over what can be drawn.
        kept: The truncation's candidates and bounds; None if no row is truncated.
    """

    top: torch.Tensor
    temperature: torch.Tensor
    log_total: torch.Tensor
    kept: Truncation | None

    def pick(self, index: torch.Tensor | slice) -> Distribution:
        """The distributions of the rows `index`, `[N]`, int64."""
        kept = None if self.kept is None else self.kept.pick(index)
        return Distribution(self.top[index], self.temperature[index], self.log_total[index], kept)

    def logprobs(self, z: torch.Tensor) -> torch.Tensor:
        """Log-probabilities, nats, of combined logits `[B, N]`, float32; −inf for what cannot be drawn."""
        relative = (z - self.top) * self.temperature.reciprocal()
        logprobs = relative - self.log_total
        if self.kept is None:
            return logprobs
        # Rows without truncation have bounds of −inf.
        return logprobs.masked_fill_(~self.kept.keeps(z / self.temperature, relative), -torch.inf)


def distribution_of(
    rows: MemberRows,
    tiles: dict[str, torch.Tensor],
    entropy: torch.Tensor | None,
    top: torch.Tensor,
    sampling: SamplingParams,
) -> Distribution:
    """The distribution of rows that `measure` reduced to `tiles`; undefined in rows with NaN, +inf or −inf only.

    `entropy` is `[B]`, nats, None without fork temperatures; `top` `[B]` is the largest logit.
    """
    temperature, _, _, _, total = tempered(tiles, entropy, top, sampling)
    kept, log_total = None, total.log()[:, None]
    if sampling.some_truncated:
        kept = truncate(rows, tiles["groups"], top, temperature, total, sampling)
        log_total = torch.where(sampling.truncated[:, None], kept.log_kept, log_total)
    return Distribution(top[:, None], temperature[:, None], log_total, kept)


def shares(
    rows: MemberRows,
    tiles: dict[str, torch.Tensor],
    entropy: torch.Tensor | None,
    top: torch.Tensor,
    sampling: SamplingParams,
    ids: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities of given tokens under the distribution drawn from, and of all others together.

    Args as for `distribution_of`; `ids` is `[B, K]`, int64, padded with −1 or V; a token may occur twice.

    Returns:
        `[B, K]`, nats: −inf for tokens that cannot be drawn; `[B]`, nats: the log of the mass of the tokens not in
        `ids`, summed rather than 1 minus the rest, so that small masses keep their digits.
    """
    drawn_from = distribution_of(rows, tiles, entropy, top, sampling)
    ids = ids.masked_fill((ids < 0) | (ids > rows.width), rows.width)
    given = torch.zeros(rows.count, rows.width + 1, dtype=torch.bool, device=top.device).scatter_(1, ids, True)
    choices = []
    if drawn_from.kept is not None:
        others = drawn_from.kept.kept & ~given.gather(1, drawn_from.kept.ids.clamp(max=rows.width))
        choices.append(drawn_from.kept.relative.masked_fill(~others, -torch.inf).logsumexp(1))
    if not sampling.all_truncated:
        columns = torch.arange(rows.width, device=top.device).expand(rows.count, -1)
        relative = (rows.at(columns) - drawn_from.top) * drawn_from.temperature.reciprocal()
        choices.append(relative.masked_fill_(given[:, :-1], -torch.inf).logsumexp(1))
    rest = choices[0] if len(choices) == 1 else torch.where(sampling.truncated, choices[0], choices[1])
    return drawn_from.logprobs(rows.at(ids)), rest - drawn_from.log_total[:, 0]


def tempered(
    tiles: dict[str, torch.Tensor], entropy: torch.Tensor | None, top: torch.Tensor, sampling: SamplingParams
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None, torch.Tensor]:
    """Masses at the temperature each row is drawn at; arguments as for `distribution_of`.

    Returns:
        The temperature `[B]`; whether it is a fork's `[B]`; the tiles' masses `[B, tiles]`, each relative to its
        maximum; the tiles' maxima relative to the row's, over T, `[B, tiles]`; the total mass `[B]`. If no row needs
        the last three, they are None, None and 0.
    """
    temperature, mass = sampling.temperature, tiles.get("mass")
    fork = torch.zeros_like(top, dtype=torch.bool)
    if sampling.fork_threshold is not None:
        assert entropy is not None
        assert sampling.fork_temperature is not None
        fork = entropy > sampling.fork_threshold  # False for NaN
        temperature = torch.where(fork, sampling.fork_temperature, temperature)
        if mass is not None:
            mass = torch.where(fork[:, None], tiles["fork mass"], mass)
    if mass is None:
        return temperature, fork, None, None, torch.zeros_like(top)
    relative = (tiles["max"] - top[:, None]) * temperature.reciprocal()[:, None]  # [B, tiles]
    return temperature, fork, mass, relative, (mass * relative.clamp(min=CLAMP).exp()).sum(1)
