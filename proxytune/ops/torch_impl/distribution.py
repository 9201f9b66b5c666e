"""What a row is drawn from, in a few numbers."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from proxytune.ops.sampling_params import SamplingParams
from proxytune.ops.torch_impl.rows import CLAMP, MemberRows
from proxytune.ops.torch_impl.truncate import Truncation, truncate

__all__ = ["Distribution", "distribution_of", "shares", "tempered"]


@dataclass(frozen=True, eq=False)
class Distribution:
    """What each row is drawn from, in so few numbers that the probability of any logit can be told from them.

    Attributes:
        top: `[B, 1]`, the largest logit.
        temperature: `[B, 1]`.
        log_total: `[B, 1]`: log Σ e^((z − top) / T) over what can be drawn.
        kept: The truncation's candidates and bounds; None where no row is truncated.
    """

    top: torch.Tensor
    temperature: torch.Tensor
    log_total: torch.Tensor
    kept: Truncation | None

    def pick(self, index: torch.Tensor | slice) -> Distribution:
        """The laws of some of the rows.

        Args:
            index: Which rows, `[N]`, int64.

        Returns:
            Those of N rows.
        """
        kept = None if self.kept is None else self.kept.pick(index)
        return Distribution(self.top[index], self.temperature[index], self.log_total[index], kept)

    def logprobs(self, z: torch.Tensor) -> torch.Tensor:
        """The log-probabilities of logits.

        Args:
            z: `[B, N]`, float32: combined logits.

        Returns:
            `[B, N]`, nats: −inf beside what cannot be drawn.
        """
        relative = (z - self.top) * self.temperature.reciprocal()
        logprobs = relative - self.log_total
        if self.kept is None:
            return logprobs
        # Rows that are not truncated have bounds of −inf.
        return logprobs.masked_fill_(~self.kept.keeps(z / self.temperature, relative), -torch.inf)


def distribution_of(
    rows: MemberRows,
    tiles: dict[str, torch.Tensor],
    entropy: torch.Tensor | None,
    top: torch.Tensor,
    sampling: SamplingParams,
) -> Distribution:
    """What rows are drawn from.

    Args:
        rows: The members' rows.
        tiles: What `proxytune.ops.torch_impl.measure.measure` gave.
        entropy: `[B]`, nats; None where no temperature depends on it.
        top: `[B]`, the largest logit.
        sampling: The settings.

    Returns:
        The laws; of no meaning in rows that have no distribution.
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
    """The log-probabilities of given tokens under the distribution drawn from, and of all others together.

    Args:
        rows: The members' rows.
        tiles: What `proxytune.ops.torch_impl.measure.measure` gave.
        entropy: `[B]`, nats; None where no temperature depends on it.
        top: `[B]`, the largest logit.
        sampling: The settings.
        ids: `[B, K]`, int64; −1, or V and more, for none. A token may be given twice.

    Returns:
        `[B, K]`, nats: −inf beside tokens that cannot be drawn; `[B]`, nats: the logarithm of the mass of the tokens
        that are not among `ids`. It is summed, not what is missing to 1, so that it keeps its digits where it is small.
    """
    law = distribution_of(rows, tiles, entropy, top, sampling)
    ids = ids.masked_fill((ids < 0) | (ids > rows.width), rows.width)
    given = torch.zeros(rows.count, rows.width + 1, dtype=torch.bool, device=top.device).scatter_(1, ids, True)
    choices = []
    if law.kept is not None:
        others = law.kept.kept & ~given.gather(1, law.kept.ids.clamp(max=rows.width))
        choices.append(law.kept.relative.masked_fill(~others, -torch.inf).logsumexp(1))
    if not sampling.all_truncated:
        columns = torch.arange(rows.width, device=top.device).expand(rows.count, -1)
        relative = (rows.at(columns) - law.top) * law.temperature.reciprocal()
        choices.append(relative.masked_fill_(given[:, :-1], -torch.inf).logsumexp(1))
    rest = choices[0] if len(choices) == 1 else torch.where(sampling.truncated, choices[0], choices[1])
    return law.logprobs(rows.at(ids)), rest - law.log_total[:, 0]


def tempered(
    tiles: dict[str, torch.Tensor], entropy: torch.Tensor | None, top: torch.Tensor, sampling: SamplingParams
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None, torch.Tensor]:
    """At the temperature of each row: that, whether it is a fork's, and the masses.

    Args:
        tiles: What `proxytune.ops.torch_impl.measure.measure` gave.
        entropy: `[B]`, nats; None where no temperature depends on it.
        top: `[B]`, the largest logit.
        sampling: The settings.

    Returns:
        The temperature `[B]`; whether it is a fork's `[B]`; the tiles' own masses `[B, tiles]`, each relative to its
        maximum; the maxima relative to the row's, `[B, tiles]`; the total mass `[B]`. Where no row's draw depends on
        the last three they are None, None and 0.
    """
    temperature, mass = sampling.temperature, tiles.get("mass")
    fork = torch.zeros_like(top, dtype=torch.bool)
    if sampling.fork_threshold is not None:
        assert entropy is not None
        assert sampling.fork_temperature is not None
        fork = entropy > sampling.fork_threshold  # NaN is no fork
        temperature = torch.where(fork, sampling.fork_temperature, temperature)
        if mass is not None:
            mass = torch.where(fork[:, None], tiles["fork mass"], mass)
    if mass is None:
        return temperature, fork, None, None, torch.zeros_like(top)
    relative = (tiles["max"] - top[:, None]) * temperature.reciprocal()[:, None]  # [B, tiles]
    return temperature, fork, mass, relative, (mass * relative.clamp(min=CLAMP).exp()).sum(1)
