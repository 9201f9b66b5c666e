"""`proxytune.ops.verify` in torch: the reference, used where Triton cannot run. See there for rule and sources.

All positions are measured at once; then one row per text is left. A token drawn where no draft stood equals
`proxytune.ops.torch_impl.draw.draw` to the bit. The residual is drawn in the same two levels, or among the truncation's
candidates, but with other words of the noise, since the draft's own words are not independent of the draft. On the CPU
the residual is computed block by block.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from proxytune.ops.noise import DECISIONS, TILES, TOKENS, Noise
from proxytune.ops.sampling_params import SamplingParams
from proxytune.ops.torch_impl.distribution import Distribution, distribution_of, tempered
from proxytune.ops.torch_impl.draw import draw
from proxytune.ops.torch_impl.measure import measure, statistics
from proxytune.ops.torch_impl.rows import FINITE, TILE, MemberRows, block_of
from proxytune.ops.torch_impl.truncate import largest

__all__ = ["judge"]

_WORD = 1
"""The word of the noise used by the draw after a rejected draft; drafts and other draws use word 0."""


@torch.no_grad()
def judge(
    rows: MemberRows, draft: MemberRows | None, drafted: torch.Tensor, sampling: SamplingParams, noise: Noise
) -> tuple[torch.Tensor, torch.Tensor]:
    """Accept or reject drafts `[B, K]` and draw the token after them, as `proxytune.ops.VerifyOutput` says.

    `rows` are the B · (K + 1) rows of the members, those of a text next to each other; `draft` the B · K rows that the
    drafts were drawn from, None if they were not drawn; `noise` the keys `[B]` at the positions of the first drafts.
    """
    count, most = drafted.shape
    on_cpu = rows.device.type == "cpu"
    texts = torch.arange(count, device=drafted.device)
    target = _Measured.of(rows, sampling, most + 1)
    x = torch.nn.functional.pad(drafted, (0, 1), value=-1)  # [B, K + 1]
    logp = target.logprobs(x.view(-1, 1)).view_as(x)
    if draft is not None and most:
        proposal: _Proposal = _Drawn(_Measured.of(draft, sampling, most), drafted)
    else:
        proposal = _Given(drafted)
    at = texts.repeat_interleave(most + 1)
    step = torch.arange(most + 1, device=drafted.device).repeat(count)
    threshold = noise.pick(at).at(noise.position.index_select(0, at) + step).uniform(DECISIONS).view_as(x)  # (0, 1]
    # −inf − −inf (a draft that neither can draw) is NaN, hence rejected.
    passed = proposal.real & (threshold <= (logp - proposal.logprobs).exp())  # [B, K + 1]
    accepted = passed.long().cumprod(1).sum(1)  # the last column holds no draft
    refused = proposal.real.gather(1, accepted[:, None])[:, 0]  # [B]: whether a draft was rejected there

    keys = noise.at(noise.position + accepted)
    final = torch.full_like(accepted, -1)
    for rejected, selected in ((False, ~refused), (True, refused)):
        which = selected.nonzero()[:, 0] if on_cpu else texts
        if on_cpu and not len(which):
            continue
        of = target.pick(which * (most + 1) + accepted[which])
        own, streams = sampling.pick(which), keys.pick(which)
        if rejected:
            drawn = _draw_residual(of, proposal.pick(which, accepted[which]), own, streams)
        else:
            drawn = draw(of.rows, of.tiles, of.entropy, of.top, own, streams, 1)["tokens"][:, 0]
        drawn = drawn.masked_fill(of.undecided, -1)
        final = final.index_copy(0, which, drawn) if on_cpu else torch.where(selected, drawn, final)
    place = torch.arange(most + 1, device=drafted.device)
    tokens = torch.where(place < accepted[:, None], x, torch.where(place == accepted[:, None], final[:, None], -1))
    return tokens, accepted


@dataclass(frozen=True, eq=False)
class _Measured:
    """Measured rows and the distributions they are drawn from."""

    rows: MemberRows
    tiles: dict[str, torch.Tensor]
    entropy: torch.Tensor | None
    top: torch.Tensor
    law: Distribution
    undecided: torch.Tensor

    @classmethod
    def of(cls, rows: MemberRows, sampling: SamplingParams, each: int) -> _Measured:
        """Measure rows; `each` neighbouring rows belong to one text and have its settings."""
        sampling = sampling.pick(torch.arange(rows.count, device=sampling.temperature.device) // each)
        tiles = measure(rows, sampling, ())
        top = tiles["max"].amax(1)  # [B]
        entropy = statistics(tiles, top).get("entropy")
        law = distribution_of(rows, tiles, entropy, top, sampling)
        return cls(rows, tiles, entropy, top, law, (top == torch.inf) | (top == FINITE))

    def pick(self, index: torch.Tensor) -> _Measured:
        return _Measured(
            self.rows.pick(index),
            {name: x.index_select(0, index) for name, x in self.tiles.items()},
            None if self.entropy is None else self.entropy.index_select(0, index),
            self.top.index_select(0, index),
            self.law.pick(index),
            self.undecided.index_select(0, index),
        )

    def logprobs(self, ids: torch.Tensor) -> torch.Tensor:
        """Log-probabilities of tokens `[B, n]`; −inf for what cannot be drawn or no id; NaN without a distribution."""
        outside = (ids < 0) | (ids >= self.rows.width)
        found = self.law.logprobs(self.rows.at(ids.masked_fill(outside, self.rows.width)))
        return found.masked_fill_(self.undecided[:, None], torch.nan)

    def probabilities(self, there: slice, columns: slice, out: torch.Tensor) -> torch.Tensor:
        """The probabilities of a block `[rows, columns]`, written to `out`; 0 past the width."""
        inside = max(0, min(self.rows.width, columns.stop) - columns.start)
        if inside:
            self.rows.read(there, slice(columns.start, columns.start + inside), out[:, :inside])
        out[:, inside:] = -torch.inf
        return self.law.pick(there).logprobs(out).exp_()


class _Drawn:
    """Drafts that were drawn from rows of logits.

    If such a row has no distribution, nothing is known of how its draft came about: the draft counts as missing, and
    the token is drawn from p.
    """

    def __init__(self, measured: _Measured, drafted: torch.Tensor) -> None:
        self._measured = measured
        self._most = drafted.shape[1]
        pad = torch.nn.functional.pad
        real = (drafted >= 0) & ~measured.undecided.view_as(drafted)
        self.real = pad(real, (0, 1), value=False)  # [B, K + 1]
        self.logprobs = pad(measured.logprobs(drafted.reshape(-1, 1)).view_as(drafted), (0, 1))  # [B, K + 1]

    def pick(self, which: torch.Tensor, accepted: torch.Tensor) -> _Drawn:
        """The rejected draft's row of each text; undefined where all drafts were accepted."""
        picked = object.__new__(_Drawn)
        picked._measured = self._measured.pick(which * self._most + accepted.clamp(max=self._most - 1))
        return picked

    def at(self, ids: torch.Tensor) -> torch.Tensor:
        """The probabilities q of tokens `[B, n]`."""
        return self._measured.logprobs(ids).exp_()

    def block(self, there: slice, columns: slice, out: torch.Tensor) -> torch.Tensor:
        return self._measured.probabilities(there, columns, out)


class _Given:
    """Drafts that were not drawn: q(x) = 1. Also right for drafts drawn with word 0 of the noise, from any row."""

    def __init__(self, drafted: torch.Tensor) -> None:
        self._drafted = torch.nn.functional.pad(drafted, (0, 1), value=-1)
        self.real = self._drafted >= 0
        self.logprobs = torch.zeros_like(self._drafted, dtype=torch.float32)

    def pick(self, which: torch.Tensor, accepted: torch.Tensor) -> _Given:
        """The rejected draft of each text."""
        picked = object.__new__(_Given)
        picked._drafted = self._drafted.index_select(0, which).gather(1, accepted[:, None])
        return picked

    def at(self, ids: torch.Tensor) -> torch.Tensor:
        """The probabilities q of tokens `[B, n]`: 1 or 0."""
        return (ids == self._drafted).float()

    def block(self, there: slice, columns: slice, out: torch.Tensor) -> torch.Tensor:
        return (torch.arange(columns.start, columns.stop, device=out.device) == self._drafted[there]).float()


_Proposal = _Drawn | _Given


def _draw_residual(target: _Measured, proposal: _Proposal, sampling: SamplingParams, noise: Noise) -> torch.Tensor:
    """Draw from max(0, p − q), one token per row, `[B]`; from p where that is 0 throughout.

    In the latter case p equals q to rounding, and one more digit would have accepted the draft. Drawing from p is right
    then, since that draw does not depend on the draft.
    """
    choices = []
    if sampling.some_truncated:
        kept = target.law.kept
        assert kept is not None
        p = (kept.relative - kept.log_kept).exp().masked_fill_(~kept.kept, 0.0)  # [B, n]
        rest = _residual(p, proposal.at(kept.ids))
        _, best = largest(rest.log() + noise.gumbel(kept.ids, TOKENS, _WORD), 1)
        choices.append(kept.ids.gather(1, best)[:, 0])
    if not sampling.all_truncated:
        mass = _masses(target, proposal)  # [B, tiles]
        _, _, of_tiles, relative, _ = tempered(target.tiles, target.entropy, target.top, sampling)
        assert of_tiles is not None
        assert relative is not None
        none = ~(mass > 0).any(1, keepdim=True)
        log_mass = torch.where(none, of_tiles.log() + relative, mass.log())
        number = torch.arange(mass.shape[1], device=mass.device)[None]
        _, tile = largest(log_mass + noise.gumbel(number, TILES, _WORD), 1)
        span = TILE if mass.shape[1] > 1 else min(TILE, target.rows.width)
        ids = tile * TILE + torch.arange(span, device=mass.device)  # [B, span]
        p = target.law.logprobs(target.rows.at(ids)).exp_()
        rest = _residual(p, proposal.at(ids).masked_fill_(none, 0.0))
        _, best = largest(rest.log() + noise.gumbel(ids, TOKENS, _WORD), 1)
        choices.append(ids.gather(1, best)[:, 0])
    return choices[0] if len(choices) == 1 else torch.where(sampling.truncated, choices[0], choices[1])


def _residual(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """`max(0, p − q)`, `[B, n]`; p in rows where that is 0 throughout."""
    rest = (p - q).clamp_(min=0.0)
    return torch.where((rest > 0).any(1, keepdim=True), rest, p)


def _masses(target: _Measured, proposal: _Proposal) -> torch.Tensor:
    """The residual's mass per tile, `[B, tiles]`, block by block; all 0 in rows where p equals q to rounding."""
    rows = target.rows
    tiles = -(-rows.width // TILE)
    high, wide = block_of(rows)
    ours, theirs = (rows.empty(high * wide * TILE) for _ in range(2))
    out = rows.empty(rows.count * tiles).view(rows.count, tiles)
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
