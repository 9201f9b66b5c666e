"""How unsure a policy is, token by token: its entropies, its forks, and what it makes of text from elsewhere."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from proxytune.diagnostics.positions import Place, by_position
from proxytune.diagnostics.prompts import (
    Finding,
    Floats,
    Prompts,
    Resamples,
    as_trace,
    counts,
    keyed,
    over,
    prompts_of,
    said,
    shared_prompts,
    values_of,
    weights_of,
)
from proxytune.errors import InputError
from proxytune.stats.bootstrap import Interval
from proxytune.stats.quantile import share_threshold
from proxytune.trace import UNKNOWN, Trace
from proxytune.validation import finite

__all__ = [
    "EntropyProfile",
    "ForkChange",
    "Signature",
    "entropy_profile",
    "fork_change",
    "on_policy_signature",
    "totals",
]

_SHARES = (0.1, 0.25, 0.5, 0.75, 0.8, 0.9, 0.99)


@dataclass(frozen=True, kw_only=True)
class EntropyProfile(Finding):
    """Token entropies, in nats.

    Attributes:
        mean: Over tokens.
        quantiles: Share of the tokens → the entropy that they do not exceed.
        edges: `[21]`: borders of a histogram, equally wide from 0 to the largest entropy.
        shares: `[20]`: the share of the tokens in each.
        threshold: h, in nats; None if none was given.
        above: The share of tokens above h, or at recorded forks; None if there is neither.
        places: The mean entropy by position.
        left_out: Tokens at positions that too few prompts reach, not in `places`.
    """

    mean: Interval
    quantiles: Mapping[float, float]
    edges: tuple[float, ...]
    shares: tuple[float, ...]
    threshold: float | None
    above: Interval | None
    places: tuple[Place, ...]
    left_out: int


def entropy_profile(
    trace: Trace,
    *,
    threshold: float | None = None,
    given: bool = False,
    bins: int = 10,
    level: float = 0.95,
    draws: int = 1000,
    seed: int = 0,
) -> EntropyProfile:
    """The distribution of token entropies, the share of forks, and the entropy by position.

    Entropies are those of the trace: of the raw combined distribution at temperature 1, full vocabulary, in nats. A
    fork is a token whose entropy is above a threshold h (arXiv 2506.01939). Leaves of a tree count by their weights.

    Args:
        trace: The run.
        threshold: h, in nats. None: the forks that the run recorded, if it did.
        given: Read the texts that came from elsewhere, instead of those that the model wrote.
        bins: Places along the text, of about equally many tokens.
        level: Confidence level of the intervals.
        draws: Number of resamples, of whole prompts.
        seed: Seed of the resamples.

    Raises:
        InputError: If there are no such texts, of fewer than five prompts, or an entropy is not finite.
    """
    what = "entropy_profile"
    prompts = prompts_of(trace, what, given=given)
    values, weights = values_of(prompts, "entropy", what), weights_of(prompts, what)
    resamples = Resamples(len(prompts), what, level=level, draws=draws, seed=seed)
    sums, masses = totals(values, weights)
    mean = resamples.ratio(sums, masses)
    h = None if threshold is None else finite("threshold", threshold, "of nats", least=0.0)
    above = None
    if h is not None:
        above = resamples.ratio(totals([[one > h for one in texts] for texts in values], weights)[0], masses)
    elif all((text.fork != UNKNOWN).all() for texts in prompts for text in texts):
        above = resamples.ratio(totals([[text.fork == 1 for text in texts] for texts in prompts], weights)[0], masses)
    flat = np.concatenate([one for texts in values for one in texts])
    mass = np.concatenate(
        [
            np.full(len(one), w)
            for texts, row in zip(values, weights, strict=True)
            for one, w in zip(texts, row, strict=True)
        ]
    )
    order = np.argsort(flat, kind="stable")
    reached = np.cumsum(mass[order]) / mass.sum()
    at = np.minimum(np.searchsorted(reached, np.array(_SHARES) - 1e-9), len(flat) - 1)
    held, edges = np.histogram(flat, bins=20, range=(0.0, max(float(flat.max()), 1e-9)), weights=mass)
    places, left_out = by_position(values, weights, resamples, bins)
    forks = "" if above is None else f"; {said(above, percent=True)} of the tokens are forks"
    return EntropyProfile(
        says=f"The mean entropy is {said(mean)} nats per token{forks}.",
        **counts(prompts),
        mean=mean,
        quantiles=dict(zip(_SHARES, flat[order][at].tolist(), strict=True)),
        edges=tuple(edges.tolist()),
        shares=tuple((held / mass.sum()).tolist()),
        threshold=h,
        above=above,
        places=places,
        left_out=left_out,
    )


@dataclass(frozen=True, kw_only=True)
class ForkChange(Finding):
    """Planning and execution tokens of two checkpoints, on the same prompts; each pair is before, after.

    Attributes:
        threshold: h of both, in nats.
        forks: Share of tokens above h.
        change: Share after, less the share before.
        planning: Mean entropy above h; None if a checkpoint has (almost) no such token.
        execution: Mean entropy at or below h; None likewise.
        kept: Of the forks before, the share that are forks after: where both traces have the same texts, else None. By
            chance it would be the share of forks after.
    """

    threshold: float
    forks: tuple[Interval, Interval]
    change: Interval
    planning: tuple[Interval | None, Interval | None]
    execution: tuple[Interval | None, Interval | None]
    kept: Interval | None


def fork_change(
    before: Trace,
    after: Trace,
    *,
    threshold: float | None = None,
    share: float = 0.2,
    given: bool = False,
    level: float = 0.95,
    draws: int = 1000,
    seed: int = 0,
) -> ForkChange:
    """How planning and execution tokens changed between two checkpoints, on the prompts that both have.

    Tokens whose entropy is above a threshold h, the forks, are *planning* tokens; all others are *execution* tokens
    (arXiv 2506.01939).

    Args:
        before: A run of the first checkpoint.
        after: A run of the second; of the same texts (teacher-forced) to learn which forks were kept.
        threshold: h of both, in nats. None: what `share` of the first one's tokens exceed.
        share: The share of forks that the threshold gives the first checkpoint.
        given: Read the texts that came from elsewhere.
        level: Confidence level of the intervals.
        draws: Number of resamples, of whole prompts.
        seed: Seed of the resamples.

    Raises:
        InputError: If fewer than five prompts are in both, or an entropy is not finite.
    """
    what = "fork_change"
    found = keyed(as_trace(before, "before"), given=given), keyed(as_trace(after, "after"), given=given)
    keys = shared_prompts(*found, what)
    first, second = ([one[key] for key in keys] for one in found)
    values = [values_of(one, "entropy", what) for one in (first, second)]
    weights = [weights_of(one, what) for one in (first, second)]
    if threshold is None:
        h, _ = share_threshold(np.concatenate([one for texts in values[0] for one in texts]), share)
    else:
        h = finite("threshold", threshold, "of nats", least=0.0)
    resamples = Resamples(len(keys), what, level=level, draws=draws, seed=seed)
    runs = list(zip(values, weights, strict=True))
    whole, masses = zip(*(totals(v, w) for v, w in runs), strict=True)
    above = [totals([[one > h for one in texts] for texts in v], w)[0] for v, w in runs]
    high = [totals([[one * (one > h) for one in texts] for texts in v], w)[0] for v, w in runs]

    def mean(sums: Floats, held: Floats) -> Interval | None:
        try:
            return resamples.ratio(sums, held)
        except InputError:
            return None

    forks = resamples.ratio(above[0], masses[0]), resamples.ratio(above[1], masses[1])
    change = resamples.of(
        lambda times: over(times @ above[1], times @ masses[1]) - over(times @ above[0], times @ masses[0])
    )
    verdict = "more forks" if change.low > 0 else "fewer forks" if change.high < 0 else "no difference is told"
    return ForkChange(
        says=(
            f"Above {h:.3g} nats lie {said(forks[0], percent=True)} of the tokens before and "
            f"{said(forks[1], percent=True)} after: {verdict}."
        ),
        **counts([a + b for a, b in zip(first, second, strict=True)]),
        threshold=h,
        forks=forks,
        change=change,
        planning=(mean(high[0], above[0]), mean(high[1], above[1])),
        execution=(
            mean(whole[0] - high[0], masses[0] - above[0]),
            mean(whole[1] - high[1], masses[1] - above[1]),
        ),
        kept=_kept(first, second, h, resamples),
    )


def _kept(first: Prompts, second: Prompts, h: float, resamples: Resamples) -> Interval | None:
    both, before = np.zeros(len(first)), np.zeros(len(first))
    for i, (ours, theirs) in enumerate(zip(first, second, strict=True)):
        pairs = [sorted(texts, key=lambda text: text.tokens.tolist()) for texts in (ours, theirs)]
        if [text.tokens.tolist() for text in pairs[0]] != [text.tokens.tolist() for text in pairs[1]]:
            return None
        for one, other in zip(*pairs, strict=True):
            both[i] += ((one.entropy > h) & (other.entropy > h)).sum()
            before[i] += (one.entropy > h).sum()
    try:
        return resamples.ratio(both, before)
    except InputError:
        return None


@dataclass(frozen=True, kw_only=True)
class Signature(Finding):
    """The on-policy signature, and the two mean entropies that it is the quotient of, in nats.

    Attributes:
        ratio: Mean entropy on text from elsewhere over that on the model's own text, same prompts.
        elsewhere: Mean entropy on text from elsewhere.
        own: Mean entropy on the model's own text.
    """

    ratio: Interval
    elsewhere: Interval
    own: Interval


def on_policy_signature(
    trace: Trace, elsewhere: Trace | None = None, *, level: float = 0.95, draws: int = 1000, seed: int = 0
) -> Signature:
    """How much surer a model is of its own text than of text from elsewhere, on the same prompts.

    About 1 for base models; 3 to 4 for models after training by reinforcement.

    Args:
        trace: A run, with the texts that the model wrote.
        elsewhere: A trace of given texts, scored by the same model. None: they are in the first one.
        level: Confidence level of the intervals.
        draws: Number of resamples, of whole prompts.
        seed: Seed of the resamples.

    Raises:
        InputError: If fewer than five prompts have texts of both kinds, or the model is certain of every own token.
    """
    what = "on_policy_signature"
    own, given = keyed(trace, given=False), keyed(trace if elsewhere is None else elsewhere, given=True)
    keys = shared_prompts(own, given, what)
    texts = [own[key] for key in keys], [given[key] for key in keys]
    (mine, mine_count), (theirs, theirs_count) = (
        totals(values_of(one, "entropy", what), weights_of(one, what)) for one in texts
    )
    if not mine.any():
        raise InputError.of(
            what,
            expected="own texts with some entropy",
            got="0 nats at every token",
            remedy="A model that is certain everywhere has no such ratio: see entropy_profile.",
        )
    resamples = Resamples(len(keys), what, level=level, draws=draws, seed=seed)
    ratio = resamples.of(
        lambda times: over(times @ theirs * (times @ mine_count), times @ mine * (times @ theirs_count))
    )
    return Signature(
        says=f"The model is {said(ratio)} times as unsure on text from elsewhere as on its own.",
        **counts([a + b for a, b in zip(*texts, strict=True)]),
        ratio=ratio,
        elsewhere=resamples.ratio(theirs, theirs_count),
        own=resamples.ratio(mine, mine_count),
    )


def totals(values: Sequence[Sequence[NDArray[Any]]], weights: list[Floats]) -> tuple[Floats, Floats]:
    """Weighted sums over the tokens of each prompt, and their weights' sums."""
    sums, masses = np.zeros(len(values)), np.zeros(len(values))
    for i, (texts, row) in enumerate(zip(values, weights, strict=True)):
        sums[i] = sum(weight * float(one.sum()) for one, weight in zip(texts, row, strict=True))
        masses[i] = sum(weight * len(one) for one, weight in zip(texts, row, strict=True))
    return sums, masses
