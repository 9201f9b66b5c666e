"""Coverage: how likely k samples of a prompt hold a right one, and where the curves of two policies cross."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from proxytune.diagnostics.prompts import (
    Finding,
    Floats,
    Prompts,
    Resamples,
    as_trace,
    counts,
    graded,
    is_weighted,
    keyed,
    prompts_of,
    refuse_weighted,
    said,
    shared_prompts,
    weights_of,
)
from proxytune.errors import InputError
from proxytune.stats.bootstrap import Interval
from proxytune.stats.coverage import pass_at_k
from proxytune.trace import Trace
from proxytune.validation import whole

__all__ = ["Coverage", "Crossing", "chance", "checked_ks", "coverage", "crossing"]


@dataclass(frozen=True, kw_only=True)
class Coverage(Finding):
    """The chance that k samples hold a right one, mean over prompts.

    Attributes:
        curve: k → that chance.
        weighted: Whether it was estimated from weights.
    """

    curve: Mapping[int, Interval]
    weighted: bool


def coverage(
    trace: Trace,
    ks: Sequence[int] | None = None,
    *,
    weighted: bool = False,
    level: float = 0.95,
    draws: int = 1000,
    seed: int = 0,
) -> Coverage:
    """pass@k of the texts that the model wrote.

    Independent samples: the unbiased `1 − C(n−c, k)/C(n, k)` of each prompt (arXiv 2107.03374). Leaves of a tree, and
    siblings: `1 − (1 − p)^k` with p the share of the weight that is right: the chance of k independent samples, had
    they been drawn. It is somewhat low where a tree has few leaves.

    Args:
        trace: The run, graded.
        ks: Numbers of samples, from 1 to the fewest that a prompt has. None: powers of two, and the largest.
        weighted: Whether the texts have weights, `facts["weight"]`.
        level: Confidence level of the intervals.
        draws: Number of resamples, of whole prompts.
        seed: Seed of the resamples.

    Raises:
        InputError: If texts are not graded, there are fewer than five prompts, a k is out of range, or texts have
            weights and `weighted` is False, or the other way round.
    """
    what = "coverage"
    prompts = prompts_of(trace, what)
    _check_kind(trace, prompts, what, weighted)
    ks = checked_ks(ks, prompts)
    resamples = Resamples(len(prompts), what, level=level, draws=draws, seed=seed)
    table = _table(prompts, ks, what, weighted)
    curve = {k: resamples.share(table[:, i]) for i, k in enumerate(ks)}
    ends = f"{said(curve[ks[0]], percent=True)} with {ks[0]}"
    if len(ks) > 1:
        ends += f", {said(curve[ks[-1]], percent=True)} with {ks[-1]}"
    return Coverage(
        says=f"The chance that a right answer is among the samples of a prompt is {ends}.",
        **counts(prompts),
        curve=curve,
        weighted=weighted,
    )


@dataclass(frozen=True, kw_only=True)
class Crossing(Finding):
    """Where two coverage curves cross, on the same prompts.

    Attributes:
        at: k, read between the ks as a straight line over log k; None if the curves do not cross. Its interval ends at
            infinity where resamples do not cross.
        difference: k → chance of the first less that of the second.
        told: Whether the first is told ahead at one end and behind at the other.
    """

    at: Interval | None
    difference: Mapping[int, Interval]
    told: bool


def crossing(
    one: Trace,
    other: Trace,
    ks: Sequence[int] | None = None,
    *,
    weighted: bool = False,
    level: float = 0.95,
    draws: int = 1000,
    seed: int = 0,
) -> Crossing:
    """Where the coverage curves of two policies cross, on the prompts that both have.

    A collapsed policy is ahead at k = 1 and behind at large k: what it gave up, it no longer finds.

    Args:
        one: A run, graded.
        other: A run of another policy.
        ks: As in `coverage`, of the fewest samples that a prompt has in either run.
        weighted: Whether the texts of both have weights.
        level: Confidence level of the intervals.
        draws: Number of resamples, of whole prompts; of both runs the same.
        seed: Seed of the resamples.

    Raises:
        InputError: As `coverage`; also if fewer than five prompts are in both.
    """
    what = "crossing"
    runs = as_trace(one, "one"), as_trace(other, "other")
    found = keyed(runs[0], given=False), keyed(runs[1], given=False)
    keys = shared_prompts(*found, what)
    first, second = ([run[key] for key in keys] for run in found)
    for trace, prompts in zip(runs, (first, second), strict=True):
        _check_kind(trace, prompts, what, weighted)
    ks = checked_ks(ks, first + second)
    resamples = Resamples(len(keys), what, level=level, draws=draws, seed=seed)
    gaps = _table(first, ks, what, weighted) - _table(second, ks, what, weighted)
    difference = {k: resamples.mean(gaps[:, i]) for i, k in enumerate(ks)}
    mean = gaps.mean(0)
    ahead = float(np.sign(mean[0]))
    value = float(_first_crossing(mean[None], ks, ahead)[0]) if ahead else np.inf
    at = None
    if np.isfinite(value):
        at = resamples.interval(value, _first_crossing(resamples.times @ gaps / len(keys), ks, ahead))
    start, end = difference[ks[0]], difference[ks[-1]]
    told = at is not None and ((start.low > 0 and end.high < 0) or (start.high < 0 and end.low > 0))
    if at is None:
        says = f"The curves do not cross up to {ks[-1]} samples"
    elif told:
        lead = ("first", "second") if ahead > 0 else ("second", "first")
        says = f"The {lead[0]} leads below {said(at)} samples, the {lead[1]} above"
    else:
        says = f"The curves seem to cross at {said(at)} samples, but that either leads at both ends is not told"
    says += f"; first less second is {said(start, points=True)} at {ks[0]}, {said(end, points=True)} at {ks[-1]}."
    return Crossing(
        says=says,
        **counts([a + b for a, b in zip(first, second, strict=True)]),
        at=at,
        difference=difference,
        told=told,
    )


def _first_crossing(gaps: Floats, ks: Sequence[int], ahead: float) -> Floats:
    """Of curves `[N, K]`, the first k at which who was ahead falls behind; the smallest k, or infinity."""
    lead, places = gaps * ahead, np.log(ks)
    behind = lead < 0
    at = behind.argmax(1)
    rows = np.arange(len(lead))
    before, after = lead[rows, np.maximum(at - 1, 0)], lead[rows, at]
    part = np.divide(before, before - after, out=np.zeros(len(lead)), where=before != after)
    left = places[np.maximum(at - 1, 0)]
    found = np.exp(left + part * (places[at] - left))
    return np.where(behind.any(1), found, np.inf)


def chance(hits: NDArray[np.bool_], weights: Floats | None, k: int) -> float:
    """The chance that a kind of sample is among k, from which of the samples are of the kind."""
    if weights is None:
        return pass_at_k(int(hits.sum()), len(hits), k)
    return float(1 - max(0.0, 1 - float(weights @ hits) / float(weights.sum())) ** k)


def checked_ks(ks: Sequence[int] | None, prompts: Prompts) -> tuple[int, ...]:
    """Numbers of samples in ascending order, at most as many as each prompt has."""
    most = min(map(len, prompts))
    if ks is None:
        return tuple(sorted({2**i for i in range(most.bit_length())} | {most}))
    remedy = f"Draw more samples: a prompt has {most}."
    found = tuple(sorted({whole("ks", k, "of samples", least=1, most=most, remedy=remedy) for k in ks}))
    if not found:
        raise InputError.of("ks", expected="numbers of samples", got="none", remedy="Pass e.g. ks=[1, 2, 4].")
    return found


def _check_kind(trace: Trace, prompts: Prompts, what: str, weighted: bool) -> None:
    if not weighted:
        remedy = "Pass weighted=True, with facts['weight'] of each leaf: pass@k is for independent samples."
        refuse_weighted(trace, prompts, what, remedy)
    elif not all(is_weighted(texts, what) for texts in prompts):
        raise InputError.of(
            what,
            expected="facts['weight'] in each text",
            got="a prompt whose texts have none",
            remedy="Write the tree's weights() to the facts; leave weighted out for independent samples.",
        )


def _table(prompts: Prompts, ks: Sequence[int], what: str, weighted: bool) -> Floats:
    """The chance of each prompt at each k, `[prompts, K]`."""
    rights = graded(prompts, what)
    weights = weights_of(prompts, what) if weighted else [None] * len(prompts)
    return np.array([[chance(r > 0, w, k) for k in ks] for r, w in zip(rights, weights, strict=True)])
