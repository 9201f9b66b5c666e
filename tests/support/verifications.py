"""What the verification of drafts should say, in numpy and float64; the cases for it; and the comparison.

A text is decided on position by position, as the algorithm is written down (Leviathan et al. 2023, arXiv 2211.17192,
algorithm 1). It shares with proxytune the contract: the counters of the noise, which word of it is whose, tiles of 1024
columns. Distributions and plain draws are `oracle.decide`'s. What float32 may decide differently is marked as unsure.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from support import oracle
from support.decisions import Case, Tally, in_numpy, logits, poisoned, random_combination, random_keys, settings_for
from support.oracle import CLOSE, TILE, UNIT, Array

from proxytune.ops import Combination
from proxytune.ops.noise import Noise
from proxytune.ops.outputs import VerifyOutput
from proxytune.ops.sampling_params import SamplingParams

DECISIONS = 2
Verify = Callable[..., VerifyOutput]
"""`ops.verify` with one implementation."""


@dataclass(frozen=True)
class Drafts:
    """One call of `verify`.

    Attributes:
        members: `[B · (K + 1), V_i]`, the base first.
        drafted: `[B, K]`.
        draft: `[B · K, V_q]`, or None.
        settings: Keywords of `SamplingParams.of`, of B rows.
        keys: Keywords of `Noise.of`, of B rows.
        weights: Numbers, or `[B · (K + 1), M]`, or a Combination of as many rows.
    """

    members: Sequence[torch.Tensor]
    drafted: torch.Tensor
    draft: torch.Tensor | None
    settings: dict[str, Any]
    keys: dict[str, Any]
    weights: Sequence[float] | torch.Tensor | Combination = (1.0,)

    @property
    def texts(self) -> int:
        return self.drafted.shape[0]

    @property
    def most(self) -> int:
        return self.drafted.shape[1]

    def prepared(self) -> dict[str, Any]:
        device = self.drafted.device
        return {
            "sampling": SamplingParams.of(self.texts, device=device, **self.settings),
            "noise": Noise.of(self.texts, device=device, **self.keys),
        }

    def verify(self, run: Verify) -> VerifyOutput:
        return run(self.members, self.weights, drafted=self.drafted, draft=self.draft, **self.prepared())

    def only(self, texts: Sequence[int]) -> Drafts:
        """The same for some of the texts, each with the keys that it had."""
        pick = torch.tensor(texts)

        def rows(x: Any, each: int) -> Any:
            return x.unflatten(0, (self.texts, each))[pick.to(x.device)].flatten(0, 1)

        def part(x: Any) -> Any:
            return x[pick.to(x.device)] if isinstance(x, torch.Tensor) else x

        weights = self.weights
        if isinstance(weights, Combination):
            whole = torch.arange(len(self.members[0]), device=pick.device)
            weights = weights.pick(rows(whole, self.most + 1).to(self.members[0].device))
        elif isinstance(weights, torch.Tensor):
            weights = rows(weights, self.most + 1)
        return replace(
            self,
            members=[rows(x, self.most + 1) for x in self.members],
            drafted=part(self.drafted),
            draft=None if self.draft is None else rows(self.draft, self.most),
            settings={k: part(x) for k, x in self.settings.items()},
            keys={k: part(x) for k, x in self.keys.items()},
            weights=weights,
        )

    def steps(self, each: int, members: Sequence[torch.Tensor], weights: Any) -> Case:
        """The rows as one decision of `step`: the text's settings at each of its positions."""

        def spread(x: Any) -> Any:
            return x.repeat_interleave(each) if isinstance(x, torch.Tensor) else x

        keys = {k: spread(x) for k, x in self.keys.items()}
        keys["position"] = (
            keys["position"] + torch.arange(each).repeat(self.texts).to(keys["position"].device)
        ) % 2**32
        return Case(members, weights, {k: spread(x) for k, x in self.settings.items()}, keys)


@dataclass(frozen=True)
class Truth:
    """tokens `[B, K + 1]`, accepted `[B]`, and whether float32 cannot see it otherwise, `[B]`."""

    tokens: Array
    accepted: Array
    sure: Array


def drafts(
    texts: int,
    most: int,
    *widths: int,
    draft: int | None = None,
    apart: float = 0.5,
    seed: int = 0,
    dtypes: Sequence[torch.dtype] = (torch.float32,),
    given: bool = False,
    ragged: bool = False,
    per_row: bool = False,
    settings: dict[str, Any] | None = None,
    odd_memory: bool = False,
    shifted: bool = False,
) -> Drafts:
    """Random members, and drafts from logits that are `apart` from theirs, drawn by the oracle with the same keys.

    `shifted` is with offsets, floors, or both.
    """
    rows = texts * (most + 1)
    members = logits(rows, *widths, seed=seed, scale=2.0, dtypes=dtypes)
    weights: Any = (1.0, 0.7, -0.7, 0.2, 0.0, -0.3, 0.4, 0.1)[: len(widths)]
    if per_row:
        weights = torch.tensor([1.0, 0.5, -1.0, 2.0, 0.0])[(torch.arange(rows * len(widths)) * 3 % 5)]
        weights = weights.view(rows, len(widths)).contiguous()
        weights[:, 0] = torch.tensor([1.0, 0.5])[torch.arange(rows) % 2]
    if shifted:
        weights = random_combination(np.random.default_rng(seed), members, weights)
    settings = settings_for(texts, min(widths[0], draft or widths[0])) if settings is None else settings
    keys = random_keys(np.random.default_rng(seed), texts)
    out = Drafts(members, torch.full((texts, most), -1), None, settings, keys, weights)
    if not most:
        return out
    z = torch.from_numpy(oracle.combine([x.float().numpy() for x in members], in_numpy(weights, rows)))
    z = z.unflatten(0, (texts, most + 1))[:, :-1].flatten(0, 1)
    width = draft or widths[0]
    other = torch.full((texts * most, width), -3.0)
    other[:, : z.shape[1]] = z[:, :width]
    generator = torch.Generator().manual_seed(seed + 1)
    other = (other + apart * torch.randn(other.shape, generator=generator)).to(dtypes[-1])
    found = out.steps(most, [other], (1.0,)).truth()
    drafted = torch.from_numpy(found.values["tokens"][:, 0].reshape(texts, most).copy())
    if ragged:
        lengths = torch.arange(texts) % (most + 1)
        drafted[torch.arange(most) >= lengths[:, None]] = -1
    if odd_memory:
        out = replace(out, members=[poisoned(x, pad=5, start=i + 1) for i, x in enumerate(members)])
        other = poisoned(other, pad=3, start=1)
    return replace(out, drafted=drafted, draft=None if given else other)


def truth(case: Drafts) -> Truth:
    """Decide, one text after the other."""
    most = case.most
    p = case.steps(most + 1, case.members, case.weights).truth()
    q = case.steps(most, [case.draft], (1.0,)).truth() if case.draft is not None and most else None
    steps = case.steps(most + 1, case.members, case.weights)
    keys = oracle.Keys(**{k: np.asarray(x.cpu().numpy(), np.int64) for k, x in (steps.keys or {}).items()})
    truncated = SamplingParams.of(case.texts, **case.settings).truncated.tolist()
    tokens = np.full((case.texts, most + 1), -1, np.int64)
    accepted, sure = np.zeros(case.texts, np.int64), np.ones(case.texts, bool)
    for b in range(case.texts):
        j = 0
        while True:
            row, row_of_q = b * (most + 1) + j, b * most + j
            x = int(case.drafted[b, j]) if j < most else -1
            if p.bad[row] or p.dead[row]:
                break
            if x < 0 or (q is not None and (q.bad[row_of_q] or q.dead[row_of_q])):
                tokens[b, j] = p.values["tokens"][row, 0]
                sure[b] &= p.sure[row, 0]
                break
            of_p = _Range.of(p, row)
            of_q = _given(x, max(x + 1, len(of_p.value))) if q is None else _Range.of(q, row_of_q)
            last = int(keys.branch[row]) * 4 + DECISIONS
            word = oracle.philox(keys.seed[row], 0, keys.position[row], keys.row[row], last)[0]
            wish = (float(word) + 0.5) / 2**32
            (p_low, p_x, p_high), (q_low, q_x, q_high) = of_p.at(x), of_q.at(x)
            value = _ratio(p_x, q_x)
            if wish <= value:
                sure[b] &= wish <= _ratio(p_low, q_high) * (1 - 8 * UNIT)
            else:
                sure[b] &= wish > _ratio(p_high, q_low) * (1 + 8 * UNIT)
            if wish <= value:
                tokens[b, j] = x
                j += 1
                continue
            tokens[b, j], certain = _residual(of_p, of_q.fitted(len(of_p.value)), keys, row, truncated[b])
            sure[b] &= certain
            break
        accepted[b] = j
    return Truth(tokens, accepted, sure)


@dataclass(frozen=True)
class _Range:
    """Probabilities `[V]`, and the bounds of what float32 may take them for."""

    low: Array
    value: Array
    high: Array

    @classmethod
    def of(cls, t: oracle.Truth, row: int) -> _Range:
        p = np.where(t.kept[row], np.exp(t.draw_logp[row]), 0.0)
        slack = t.slack["draw_logprobs"][row] + 8 * UNIT
        may = np.where(t.most[row], np.exp(np.where(t.most[row], t.draw_logp[row], 0.0)), 0.0)
        return cls(np.where(t.least[row], p * (1 - slack), 0.0), p, may * (1 + slack))

    def at(self, token: int) -> tuple[float, float, float]:
        if token >= len(self.value):
            return 0.0, 0.0, 0.0
        return float(self.low[token]), float(self.value[token]), float(self.high[token])

    def fitted(self, width: int) -> _Range:
        def fit(x: Array) -> Array:
            return np.pad(x[:width], (0, max(0, width - len(x))))

        return _Range(fit(self.low), fit(self.value), fit(self.high))


def _given(token: int, width: int) -> _Range:
    q = (np.arange(width) == token).astype(float)
    return _Range(q, q, q)


def _ratio(p: float, q: float) -> float:
    return p / q if q else np.inf if p else 0.0


def _residual(p: _Range, q: _Range, keys: oracle.Keys, row: int, truncated: bool) -> tuple[int, bool]:
    rest = np.maximum(p.value - q.value, 0.0)
    low, high = np.maximum(p.low - q.high, 0.0), np.maximum(p.high - q.low, 0.0)
    width, sure = len(rest), True
    if not rest.any():  # p is q: a draw from p
        rest, low, high, sure = p.value, p.low, p.high, not high.any()
    ids = np.arange(width)
    if not truncated:
        sums = [np.add.reduceat(x, np.arange(0, width, TILE)) for x in (low, rest, high)]
        tile, certain = _largest(*sums, _second(keys, row, np.arange(len(sums[0])), oracle.TILES))
        sure &= certain
        ids = ids[tile * TILE : (tile + 1) * TILE]
    at, certain = _largest(low[ids], rest[ids], high[ids], _second(keys, row, ids, oracle.TOKENS))
    return int(ids[at]), sure and certain


def _second(keys: oracle.Keys, row: int, index: Array, stream: int) -> Array:
    last = int(keys.branch[row]) * 4 + stream
    return oracle.gumbel(oracle.philox(keys.seed[row], index, keys.position[row], keys.row[row], last)[1])


def _largest(low: Array, value: Array, high: Array, noise: Array) -> tuple[int, bool]:
    with np.errstate(divide="ignore"):
        best = int(np.argmax(np.log(value) + noise))
        worst_of_best = np.log(low[best]) + noise[best]
        others = np.delete(np.log(high) + noise + oracle.blur(noise), best)
    return best, not len(others) or bool(worst_of_best - CLOSE - oracle.blur(noise[best]) > others.max())


def check(case: Drafts, run: Verify) -> Tally:
    """Run a case and compare it with the oracle's verdict."""
    got, want = case.verify(run), truth(case)
    tokens, accepted = got.tokens.cpu().numpy(), got.accepted.cpu().numpy()
    assert got.tokens.shape == (case.texts, case.most + 1)
    assert got.accepted.shape == (case.texts,)
    assert got.tokens.dtype == got.accepted.dtype == torch.int64
    assert got.tokens.device == got.accepted.device == case.drafted.device
    for b in range(case.texts):
        n = accepted[b]
        # What is always so, however close it was.
        assert 0 <= n <= case.most
        np.testing.assert_array_equal(tokens[b, :n], case.drafted[b, :n].cpu().numpy())
        assert (tokens[b, n + 1 :] == -1).all()
        if want.sure[b]:
            np.testing.assert_array_equal(n, want.accepted[b], err_msg=f"text {b}")
            np.testing.assert_array_equal(tokens[b], want.tokens[b], err_msg=f"text {b}")
    return Tally(case.texts, int((~want.sure).sum()))


def same(a: VerifyOutput, b: VerifyOutput, texts: Sequence[int] | None = None) -> None:
    """Assert that two verdicts are equal, in the texts given of `a`."""
    for x, y in ((a.tokens, b.tokens), (a.accepted, b.accepted)):
        x = x if texts is None else x[torch.tensor(texts, device=x.device)]
        assert torch.equal(x, y), (x, y)
