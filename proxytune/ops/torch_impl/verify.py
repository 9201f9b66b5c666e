"""`proxytune.ops.verify` in torch: the reference, used where Triton cannot run. See there for rule and sources.

All positions are measured at once; then one row per text is left. A token drawn where no draft stood equals
`proxytune.ops.torch_impl.draw.draw` to the bit. The residual is drawn in the same two levels, or among the truncation's
candidates, but with other words of the noise, since the draft's own words are not independent of the draft. On the CPU
the residual is computed block by block.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch

from proxytune.ops.noise import DECISIONS, TILES, TOKENS, Noise
from proxytune.ops.sampling_params import SamplingParams
from proxytune.ops.torch_impl.arrays import (
    Array,
    as_float,
    as_tensor,
    at_least,
    count_up,
    exp,
    filled,
    joined,
    largest,
    log,
    peak,
    take,
    where,
)  # fmt: skip
from proxytune.ops.torch_impl.distribution import Distribution, distribution_of, tempered
from proxytune.ops.torch_impl.draw import best_of, draw
from proxytune.ops.torch_impl.measure import measure, settings_of, statistics
from proxytune.ops.torch_impl.rows import FINITE, TILE, MemberRows, block_of
from proxytune.ops.torch_impl.truncate import Truncation, truncated

__all__ = ["judge"]

_WORD = 1
"""The word of the noise used by the draw after a rejected draft; drafts and other draws use word 0."""


@torch.no_grad()
@np.errstate(all="ignore")
def judge(
    rows: MemberRows, draft: MemberRows | None, drafted: torch.Tensor, sampling: SamplingParams, noise: Noise
) -> tuple[torch.Tensor, torch.Tensor]:
    """Accept or reject drafts `[B, K]` and draw the token after them, as `proxytune.ops.VerifyOutput` says.

    `rows` are the B · (K + 1) rows of the members, those of a text next to each other; `draft` the B · K rows that the
    drafts were drawn from, None if they were not drawn; `noise` the keys `[B]` at the positions of the first drafts.
    """
    count, most = drafted.shape
    on_host = rows.on_host
    drafted = rows.small(drafted)
    texts = count_up(count, drafted)
    target = _Measured.of(rows, sampling, most + 1)
    x = _with_one_more(drafted, -1)  # [B, K + 1]
    logp = target.logprobs(x.reshape(-1, 1)).reshape(x.shape)
    if draft is not None and most:
        proposal: _Proposal = _Drawn(_Measured.of(draft, sampling, most), drafted)
    else:
        proposal = _Given(drafted)
    place = count_up(most + 1, drafted)
    threshold = _uniforms(noise, place, count)  # [B, K + 1], in (0, 1]
    # −inf − −inf (a draft that neither can draw) is NaN, hence rejected.
    passed = proposal.real & (threshold <= exp(logp - proposal.logprobs))  # [B, K + 1]
    accepted = (passed * 1).cumprod(1).sum(1)  # the last column holds no draft
    refused = take(proposal.real, accepted[:, None])[:, 0]  # [B]: whether a draft was rejected there

    keys = noise.at(noise.position + as_tensor(accepted))
    final = texts * 0 - 1
    for rejected, selected in ((False, ~refused), (True, refused)):
        which = selected.nonzero()[0] if on_host else texts
        if on_host and not len(which):
            continue
        of = target.pick(which * (most + 1) + accepted[which])
        own, streams = sampling.pick(as_tensor(which)), keys.pick(as_tensor(which))
        if rejected:
            drawn = _draw_residual(of, proposal.pick(which, accepted[which]), own, streams)
        else:
            drawn = draw(of.rows, of.tiles, of.entropy, of.top, own, streams, 1)["tokens"][:, 0]
        drawn = filled(drawn, of.undecided, -1)
        if on_host:
            final[which] = drawn
        else:
            final = where(selected, drawn, final)
    tokens = where(place < accepted[:, None], x, where(place == accepted[:, None], final[:, None], -1))
    return as_tensor(tokens), as_tensor(accepted)


def _with_one_more(x: Array, value: float) -> Array:
    """`[B, K]` with a last column of `value`."""
    return joined([x, filled(x.sum(1), x.sum(1) == x.sum(1), value)[:, None]], 1)


def _uniforms(noise: Noise, place: Array, count: int) -> Array:
    """The words that decide on the drafts, `[B, K + 1]`: those of the positions from the noise's on."""
    each = len(place)
    places = as_tensor(place)
    text = torch.arange(count, device=places.device).repeat_interleave(each)
    positions = noise.position.index_select(0, text) + places.repeat(count)
    uniform = noise.pick(text).at(positions).uniform(DECISIONS).view(count, each)
    return uniform.numpy() if isinstance(place, np.ndarray) else uniform


@dataclass(frozen=True, eq=False)
class _Measured:
    """Measured rows and the distributions they are drawn from."""

    rows: MemberRows
    tiles: dict[str, Array]
    entropy: Array | None
    top: Array
    law: Distribution
    undecided: Array

    @classmethod
    def of(cls, rows: MemberRows, sampling: SamplingParams, each: int) -> _Measured:
        """Measure rows; `each` neighbouring rows belong to one text and have its settings."""
        sampling = sampling.pick(torch.arange(rows.count, device=sampling.temperature.device) // each)
        tiles = measure(rows, sampling, ())
        top = peak(tiles["max"])  # [B]
        entropy = statistics(tiles, top).get("entropy")
        law = distribution_of(rows, tiles, entropy, top, sampling)
        return cls(rows, tiles, entropy, top, law, (top == torch.inf) | (top == FINITE))

    def pick(self, index: Array) -> _Measured:
        return _Measured(
            self.rows.pick(index),
            {name: x[index] for name, x in self.tiles.items()},
            None if self.entropy is None else self.entropy[index],
            self.top[index],
            self.law.pick(index),
            self.undecided[index],
        )

    def logprobs(self, ids: Array) -> Array:
        """Log-probabilities of tokens `[B, n]`; −inf for what cannot be drawn or no id; NaN without a distribution."""
        outside = (ids < 0) | (ids >= self.rows.width)
        found = self.law.logprobs(self.rows.at(filled(ids, outside, self.rows.width)))
        return filled(filled(found, outside, -math.inf), self.undecided[:, None], math.nan)

    def probabilities(self, there: slice, columns: slice, out: torch.Tensor) -> torch.Tensor:
        """The probabilities of a block `[rows, columns]`, written to `out`; 0 past the width."""
        inside = max(0, min(self.rows.width, columns.stop) - columns.start)
        if inside:
            self.rows.read(there, slice(columns.start, columns.start + inside), out[:, :inside])
        out[:, inside:] = -torch.inf
        law = self.law.pick(there)
        top, temperature, log_total = (as_tensor(x) for x in (law.top, law.temperature, law.log_total))
        forbidden = None if law.least is None else ~(out >= as_tensor(law.least))
        out.sub_(top).mul_(temperature.reciprocal()).sub_(log_total)
        return (out if forbidden is None else out.masked_fill_(forbidden, -torch.inf)).exp_()


class _Drawn:
    """Drafts that were drawn from rows of logits.

    If such a row has no distribution, nothing is known of how its draft came about: the draft counts as missing, and
    the token is drawn from p.
    """

    def __init__(self, measured: _Measured, drafted: Array) -> None:
        self._measured = measured
        self._most = drafted.shape[1]
        real = (drafted >= 0) & ~measured.undecided.reshape(drafted.shape)
        self.real = joined([real, real[:, :1] & ~real[:, :1]], 1)  # [B, K + 1]
        self.logprobs = _with_one_more(measured.logprobs(drafted.reshape(-1, 1)).reshape(drafted.shape), 0)

    def pick(self, which: Array, accepted: Array) -> _Drawn:
        """The rejected draft's row of each text; undefined where all drafts were accepted."""
        picked = object.__new__(_Drawn)
        last = self._most - 1
        picked._measured = self._measured.pick(which * self._most + filled(accepted, accepted > last, last))
        return picked

    def at(self, ids: Array, index: Array | slice = slice(None)) -> Array:
        """The probabilities q of tokens `[b, n]` of the rows `index`."""
        measured = self._measured if isinstance(index, slice) else self._measured.pick(index)
        return exp(measured.logprobs(ids))

    def block(self, there: slice, columns: slice, out: torch.Tensor) -> torch.Tensor:
        return self._measured.probabilities(there, columns, out)


class _Given:
    """Drafts that were not drawn: q(x) = 1. Also right for drafts drawn with word 0 of the noise, from any row."""

    def __init__(self, drafted: Array) -> None:
        self._drafted = _with_one_more(drafted, -1)
        self.real = self._drafted >= 0
        self.logprobs = 0.0

    def pick(self, which: Array, accepted: Array) -> _Given:
        """The rejected draft of each text."""
        picked = object.__new__(_Given)
        picked._drafted = take(self._drafted[which], accepted[:, None])
        return picked

    def at(self, ids: Array, index: Array | slice = slice(None)) -> Array:
        """The probabilities q of tokens `[b, n]` of the rows `index`: 1 or 0."""
        return as_float(ids == self._drafted[index])

    def block(self, there: slice, columns: slice, out: torch.Tensor) -> torch.Tensor:
        return (torch.arange(columns.start, columns.stop, device=out.device) == as_tensor(self._drafted[there])).float()


_Proposal = _Drawn | _Given


def _draw_residual(target: _Measured, proposal: _Proposal, sampling: SamplingParams, noise: Noise) -> Array:
    """Draw from max(0, p − q), one token per row, `[B]`; from p where that is 0 throughout.

    In the latter case p equals q to rounding, and one more digit would have accepted the draft. Drawing from p is right
    then, since that draw does not depend on the draft.
    """
    rows, law, choices = target.rows, target.law, []
    temperature, _, of_tiles, relative, total = tempered(rows, target.tiles, target.entropy, target.top, sampling)
    if sampling.some_truncated:

        def use(kept: Truncation) -> dict[str, Array]:
            which = kept.index
            own = noise if isinstance(which, slice) else noise.pick(as_tensor(which))
            ids, z = kept.tokens()
            p = exp(law.pick(which).logprobs(z))  # [b, n]
            rest = _residual(p, proposal.at(ids, which))
            rest = log(rest)
            return {"tokens": best_of(ids, rest, rest, own, 1, _WORD)["tokens"]}

        found = truncated(rows, target.tiles["groups"], target.top, temperature, total, sampling, use)
        choices.append(found["tokens"][:, 0])
    if not sampling.all_truncated:
        mass = rows.small(_masses(target, proposal))  # [B, tiles]
        assert of_tiles is not None
        assert relative is not None
        none = ~(mass > 0).any(1)[:, None]
        log_mass = where(none, log(of_tiles) + relative, log(mass))
        _, tile = largest(log_mass + noise.gumbel(count_up(mass.shape[1], mass)[None], TILES, _WORD), 1)
        span = TILE if mass.shape[1] > 1 else min(TILE, rows.width)
        ids = tile * TILE + count_up(span, mass)  # [B, span]
        p = exp(law.logprobs(rows.at(ids)))
        rest = _residual(p, filled(proposal.at(ids), none, 0))
        _, best = largest(log(rest) + noise.gumbel(ids, TOKENS, _WORD), 1)
        choices.append(take(ids, best)[:, 0])
    return choices[0] if len(choices) == 1 else where(settings_of(rows, sampling).truncated, *choices)


def _residual(p: Array, q: Array) -> Array:
    """`max(0, p − q)`, `[B, n]`; p in rows where that is 0 throughout."""
    rest = at_least(p - q, 0.0)
    return where((rest > 0).any(1)[:, None], rest, p)


def _masses(target: _Measured, proposal: _Proposal) -> torch.Tensor:
    """The residual's mass per tile, `[B, tiles]`, block by block; all 0 in rows where p equals q to rounding."""
    rows = target.rows
    tiles = -(-rows.width // TILE)
    high, wide = block_of(rows)
    ours, theirs = (rows.empty(high * wide * TILE) for _ in range(2))
    out = rows.empty(rows.count, tiles)
    for row in range(0, rows.count, high):
        there = slice(row, min(row + high, rows.count))
        for tile in range(0, tiles, wide):
            end = min(tile + wide, tiles)
            columns = slice(tile * TILE, end * TILE)  # whole tiles, the last one padded
            shape = (there.stop - there.start, columns.stop - columns.start)
            z, y = (x[: shape[0] * shape[1]].view(shape) for x in (ours, theirs))
            p = target.probabilities(there, columns, z)
            rest = p.sub_(proposal.block(there, columns, y)).clamp_(min=0.0)
            out[there, tile:end] = rest.unflatten(1, (-1, TILE)).sum(-1)
    return out
