"""The distribution that a row is drawn from, in a few numbers."""

from __future__ import annotations

from dataclasses import dataclass

from proxytune.ops.sampling_params import SamplingParams
from proxytune.ops.torch_impl.arrays import Array, at_least, count_up, exp, filled, joined, log, log_sum_exp, where
from proxytune.ops.torch_impl.measure import settings_of
from proxytune.ops.torch_impl.rows import CLAMP, MemberRows
from proxytune.ops.torch_impl.truncate import Truncation, truncated

__all__ = ["Distribution", "distribution_of", "shares", "tempered"]


@dataclass(frozen=True, eq=False)
class Distribution:
    """The distribution of each row, in few numbers from which the probability of any logit follows.

    Attributes:
        top: `[B, 1]`, the largest logit.
        temperature: `[B, 1]`.
        log_total: `[B, 1]`: log Σ e^((z − top) / T) over what can be drawn.
        least: `[B, 1]`: the least logit that can be drawn, −inf in rows without truncation; None if no row has one.
    """

    top: Array
    temperature: Array
    log_total: Array
    least: Array

    def pick(self, index: Array | slice) -> Distribution:
        """The distributions of the rows `index`, `[N]`, int64."""
        least = None if self.least is None else self.least[index]
        return Distribution(self.top[index], self.temperature[index], self.log_total[index], least)

    def logprobs(self, z: Array) -> Array:
        """Log-probabilities, nats, of combined logits `[B, N]`, float32; −inf for what cannot be drawn."""
        logprobs = (z - self.top) * (1.0 / self.temperature) - self.log_total
        return logprobs if self.least is None else filled(logprobs, ~(z >= self.least), -float("inf"))


def distribution_of(
    rows: MemberRows, tiles: dict[str, Array], entropy: Array | None, top: Array, sampling: SamplingParams
) -> Distribution:
    """The distribution of rows that `measure` reduced to `tiles`; undefined in rows with NaN, +inf or −inf only.

    `entropy` is `[B]`, nats, None without fork temperatures; `top` `[B]` is the largest logit.
    """
    temperature, _, _, _, total = tempered(rows, tiles, entropy, top, sampling)
    least, log_total = None, log(total)[:, None]
    if sampling.some_truncated:
        found = truncated(
            rows, tiles["groups"], top, temperature, total, sampling,
            lambda kept: {"least": kept.least, "log_total": kept.log_kept},
        )  # fmt: skip
        own = settings_of(rows, sampling).truncated[:, None]
        least = filled(found["least"], ~own, -float("inf"))
        log_total = where(own, found["log_total"], log_total)
    return Distribution(top[:, None], temperature[:, None], log_total, least)


def shares(
    rows: MemberRows,
    tiles: dict[str, Array],
    entropy: Array | None,
    top: Array,
    sampling: SamplingParams,
    ids: Array,
) -> tuple[Array, Array]:
    """Log-probabilities of given tokens under the distribution drawn from, and of all others together.

    Args as for `distribution_of`; `ids` is `[B, K]`, int64, padded with −1 or V; a token may occur twice.

    Returns:
        `[B, K]`, nats: −inf for tokens that cannot be drawn; `[B]`, nats: the log of the mass of the tokens not in
        `ids`, summed rather than 1 minus the rest, so that small masses keep their digits.
    """
    ids = filled(ids, (ids < 0) | (ids > rows.width), rows.width)
    temperature, _, _, _, total = tempered(rows, tiles, entropy, top, sampling)
    inverse = 1.0 / temperature[:, None]
    own = settings_of(rows, sampling).truncated
    least, log_total, rest = None, log(total)[:, None], None
    if sampling.some_truncated:

        def of(kept: Truncation) -> dict[str, Array]:
            which = kept.index
            tokens, z = kept.tokens()
            given = (tokens[..., None] == ids[which][:, None]).any(-1)
            relative = (z - top[which][:, None]) * inverse[which]
            others = log_sum_exp(filled(relative, given, -float("inf")))
            return {"least": kept.least, "log_total": kept.log_kept, "rest": others}

        found = truncated(rows, tiles["groups"], top, temperature, total, sampling, of)
        least = filled(found["least"], ~own[:, None], -float("inf"))
        log_total = where(own[:, None], found["log_total"], log_total)
        rest = found["rest"]
    if not sampling.all_truncated:
        columns = count_up(rows.width, ids)[None] + 0 * ids[:, :1]
        relative = (rows.at(columns) - top[:, None]) * inverse
        # With one column more, for what is no id.
        relative = joined([relative, relative[:, :1]], 1)
        relative[count_up(rows.count, ids)[:, None], ids] = -float("inf")
        plain = log_sum_exp(relative[:, :-1])
        rest = plain if rest is None else where(own, rest, plain)
    law = Distribution(top[:, None], temperature[:, None], log_total, least)
    return law.logprobs(rows.at(ids)), rest - law.log_total[:, 0]


def tempered(
    rows: MemberRows, tiles: dict[str, Array], entropy: Array | None, top: Array, sampling: SamplingParams
) -> tuple[Array, Array, Array | None, Array | None, Array]:
    """Masses at the temperature each row is drawn at; arguments as for `distribution_of`.

    Returns:
        The temperature `[B]`; whether it is a fork's `[B]`; the tiles' masses `[B, tiles]`, each relative to its
        maximum; the tiles' maxima relative to the row's, over T, `[B, tiles]`; the total mass `[B]`. If no row needs
        the last three, they are None, None and 0.
    """
    settings = settings_of(rows, sampling)
    temperature, mass = settings.temperature, tiles.get("mass")
    fork = top != top  # False: there is no NaN in it
    if sampling.fork_threshold is not None:
        assert entropy is not None
        fork = entropy > settings.fork_threshold  # False for NaN
        temperature = where(fork, settings.fork_temperature, temperature)
        if mass is not None:
            mass = where(fork[:, None], tiles["fork mass"], mass)
    if mass is None:
        return temperature, fork, None, None, filled(top, top == top, 0.0)
    relative = (tiles["max"] - top[:, None]) * (1.0 / temperature)[:, None]  # [B, tiles]
    return temperature, fork, mass, relative, (mass * exp(at_least(relative, CLAMP))).sum(1)
