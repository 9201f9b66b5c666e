"""Losses: what a policy has lost, each as one number that is larger the worse it is, so that runs can be compared."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, get_args

import numpy as np

from proxytune.diagnostics.degenerate import faults_of
from proxytune.diagnostics.kl_drift import kl_drift
from proxytune.diagnostics.prompts import (
    LEAST,
    Floats,
    Resamples,
    graded,
    keyed,
    over,
    prompts_of,
    refuse_weighted,
    said,
    values_of,
    weights_of,
)
from proxytune.errors import InputError
from proxytune.stats.bootstrap import Interval
from proxytune.trace import Trace, TracedText

__all__ = ["LOSSES", "MARKS", "Loss", "LossName", "Order", "compared", "losses", "ordered"]

LossName = Literal["diversity", "calibration", "over-thinking", "drift", "degenerate texts"]
LOSSES: tuple[LossName, ...] = get_args(LossName)

MARKS: Mapping[LossName, float] = {
    "diversity": 0.25,
    "calibration": 0.1,
    "over-thinking": 0.05,
    "drift": 0.5,
    "degenerate texts": 0.02,
}
"""A loss is told if its whole interval lies above this."""


@dataclass(frozen=True, kw_only=True)
class Loss:
    """One loss of one run.

    Attributes:
        name: Which.
        value: The number, larger for worse; None if the trace cannot say.
        told: Whether its interval lies above the mark.
        prompts: How many prompts it rests on.
        says: The finding in a sentence, or why there is none.
    """

    name: LossName
    value: Interval | None
    told: bool
    prompts: int
    says: str


@dataclass(frozen=True, kw_only=True)
class Order:
    """Runs in the order of one loss, the worst first.

    Attributes:
        name: The loss.
        runs: Names of the runs that have it.
        apart: Of each but the last, whether it is told apart from the next.
        first: Whether the first is told apart from all others.
        without: Names of the runs whose trace cannot say.
        says: The order in words.
    """

    name: LossName
    runs: tuple[str, ...]
    apart: tuple[bool, ...]
    first: bool
    without: tuple[str, ...]
    says: str


def losses(trace: Trace, *, level: float = 0.95, draws: int = 1000, seed: int = 0) -> dict[LossName, Loss]:
    """Each loss of a run, a number that is larger the worse it is, or why the trace cannot say.

    - `"diversity"`: the chance that two wrong samples of a prompt, both with an answer, give the same one: mistakes
      that repeat are mistakes that more samples do not get around. Told above 0.25
    - `"calibration"`: how much more often the samples of a prompt agree with each other than they are right. Told above
      0.1
    - `"over-thinking"`: of two texts of a prompt, how much more often the shorter alone is right than the longer alone.
      Told above 0.05
    - `"drift"`: KL(combined ‖ base) per token, in nats. Told above 0.5
    - `"degenerate texts"`: the share of texts that loop, copy their prompt or skip the computation. Told above 0.02

    A loss is *told* if its whole interval lies above that mark: a convention, not a law.

    Args:
        trace: The run, graded, with answers: several samples of each prompt. What it lacks is said, never raised.
        level: Confidence level of the intervals.
        draws: Number of resamples, of whole prompts.
        seed: Seed of the resamples.
    """
    return compared({"": trace}, level=level, draws=draws, seed=seed)[0][""]


def ordered(
    runs: Mapping[str, Trace], name: LossName, *, level: float = 0.95, draws: int = 1000, seed: int = 0
) -> Order:
    """Runs ordered by a loss, the worst first, with the ties said; the order of `runs` makes no difference.

    Runs are compared on the prompts that they share, prompt by prompt; as two sets of prompts if these are fewer than
    five. Two are told apart if the interval of their difference leaves out 0, at a level that allows for the number of
    pairs (Bonferroni).

    Args:
        runs: Name → run, graded, with answers.
        name: The loss, as in `losses`.
        level: Confidence level of the intervals.
        draws: Number of resamples, of whole prompts.
        seed: Seed of the resamples.
    """
    return compared(runs, (name,), level=level, draws=draws, seed=seed)[1][name]


def compared(
    runs: Mapping[str, Trace],
    names: Sequence[LossName] = LOSSES,
    *,
    level: float = 0.95,
    draws: int = 1000,
    seed: int = 0,
) -> tuple[dict[str, dict[LossName, Loss]], dict[LossName, Order]]:
    """Run → each loss, as `losses`; and each loss → the order of the runs, as `ordered`."""
    found: dict[str, dict[LossName, Loss]] = {run: {} for run in runs}
    orders: dict[LossName, Order] = {}
    for name in names:
        sums: dict[str, Sums] = {}
        for run, trace in runs.items():
            try:
                sums[run] = _sums(trace, name)
                found[run][name] = _loss(sums[run], name, level=level, draws=draws, seed=seed)
            except InputError as refusal:
                found[run][name] = Loss(name=name, value=None, told=False, prompts=0, says=str(refusal))
        values = {run: each[name].value for run, each in found.items()}
        orders[name] = _order(name, values, sums, level=level, draws=draws, seed=seed)
    return found, orders


def _order(
    name: LossName,
    values: Mapping[str, Interval | None],
    sums: Mapping[str, Sums],
    *,
    level: float,
    draws: int,
    seed: int,
) -> Order:
    known = {run: value for run, value in values.items() if value is not None}
    order = sorted(known, key=lambda run: (-round(known[run].value, 9), run))
    pairs = max(1, len(order) * (len(order) - 1) // 2)
    strict = 1 - (1 - level) / pairs

    def apart(worse: str, better: str) -> bool:
        return _difference(sums[worse], sums[better], name, level=strict, draws=draws, seed=seed)

    neighbours = tuple(apart(*pair) for pair in pairwise(order))
    parts = [f"{run} ({said(known[run], percent=name != 'drift')})" for run in order]
    words = "".join(f"{' > ' if told else ' ~ '}{part}" for part, told in zip(parts[1:], neighbours, strict=True))
    return Order(
        name=name,
        runs=tuple(order),
        apart=neighbours,
        first=len(order) > 1 and all(apart(order[0], other) for other in order[1:]),
        without=tuple(sorted(set(values) - set(order))),
        says=f"{parts[0]}{words}" if parts else "no run can say",
    )


Sums = Mapping[str, tuple[float, float]]
"""Prompt → what is summed over prompts: the loss is the quotient of the two sums."""


def _loss(sums: Sums, name: LossName, *, level: float, draws: int, seed: int) -> Loss:
    resamples = Resamples(len(sums), name, level=level, draws=draws, seed=seed)
    top, bottom = np.array([sums[key] for key in sorted(sums)]).T
    share = name in ("diversity", "degenerate texts")
    value = resamples.bounded(top, bottom) if share else resamples.ratio(top, bottom)
    told = value.low > MARKS[name]
    return Loss(name=name, value=value, told=told, prompts=len(sums), says=_SAYS[name](value, told))


def _said(value: Interval) -> str:
    return said(value, percent=True)


_SAYS: Mapping[LossName, Callable[[Interval, bool], str]] = {
    "diversity": lambda value, told: (
        f"Two wrong samples of a prompt give the same answer in {_said(value)} of the cases: "
        + ("its mistakes repeat." if told else "that its mistakes repeat is not told.")
    ),
    "calibration": lambda value, told: (
        f"Its samples agree with each other {_said(value)} more often than they are right: "
        + ("it is surer than it should be." if told else "that it is surer than it should be is not told.")
    ),
    "over-thinking": lambda value, told: (
        f"Of two texts of a prompt, the shorter alone is right {_said(value)} more often than the longer alone: "
        + ("longer texts are worse." if told else "that longer texts are worse is not told.")
    ),
    "drift": lambda value, told: (
        f"Steering moves it {said(value)} nats per token from its base: " + ("far." if told else "not told to be far.")
    ),
    "degenerate texts": lambda value, told: (
        f"{_said(value)} of its texts loop, copy or skip the computation: "
        + ("too many to let them vote." if told else "that these are many is not told.")
    ),
}


def _sums(trace: Trace, name: LossName) -> Sums:
    """What each prompt adds; InputError if the trace cannot say."""
    prompts = prompts_of(trace, name)
    keys = sorted(keyed(trace, given=False))
    rows = _OF_PROMPT[name](trace, prompts)
    return dict(zip(keys, [(float(top), float(bottom)) for top, bottom in rows], strict=True))


Rows = list[tuple[float, float]]


def _answered(trace: Trace, prompts: list[list[TracedText]], what: str) -> list[Floats]:
    """Which texts are right, of independent samples with answers."""
    refuse_weighted(trace, prompts, what, "Draw independent samples.")
    rights = graded(prompts, what)
    if all(text.answer is None for texts in prompts for text in texts) or max(map(len, prompts)) < 2:
        raise InputError.of(
            what,
            expected="several samples of a prompt, with answers",
            got=f"{sum(map(len, prompts))} texts of {len(prompts)} prompts, "
            f"{sum(text.answer is not None for texts in prompts for text in texts)} with an answer",
            remedy="Draw several samples of each prompt, and have their answers found.",
        )
    return rights


def _repeated(trace: Trace, prompts: list[list[TracedText]]) -> Rows:
    """Pairs of wrong texts of a prompt: those with one answer, and all."""
    out = []
    for texts, right in zip(prompts, _answered(trace, prompts, "diversity"), strict=True):
        wrong = [t.answer for t, r in zip(texts, right.tolist(), strict=True) if not r and t.answer is not None]
        same = sum(n * (n - 1) / 2 for n in Counter(wrong).values())
        out.append((same, len(wrong) * (len(wrong) - 1) / 2))
    return out


def _overconfident(trace: Trace, prompts: list[list[TracedText]]) -> Rows:
    """Agreement with the other samples, less what was right."""
    out = []
    for texts, right in zip(prompts, _answered(trace, prompts, "calibration"), strict=True):
        held = Counter(text.answer for text in texts if text.answer is not None)
        others = len(texts) - 1
        agreed = sum(n * (n - 1) for n in held.values()) / others if others else 0.0
        out.append((agreed - float(right.sum()), len(texts)) if others else (0.0, 0.0))
    return out


def _longer(trace: Trace, prompts: list[list[TracedText]]) -> Rows:
    """Pairs of texts of a prompt: shorter alone right less longer alone right, and all."""
    refuse_weighted(trace, prompts, "over-thinking", "Draw independent samples.")
    out = []
    for texts, right in zip(prompts, graded(prompts, "over-thinking"), strict=True):
        lengths = np.array([len(text) for text in texts])
        shorter = lengths[:, None] < lengths[None, :]
        out.append((float((shorter * (right[:, None] - right[None, :])).sum()), len(texts) * (len(texts) - 1) / 2))
    if sum(pairs > 0 for _, pairs in out) < LEAST:
        raise InputError.of(
            "over-thinking",
            expected=f"several texts of at least {LEAST} prompts",
            got=f"{sum(pairs > 0 for _, pairs in out)} of {len(out)} prompts with several",
            remedy="Draw several samples of each prompt.",
        )
    return out


def _drifted(trace: Trace, prompts: list[list[TracedText]]) -> Rows:
    kl_drift(trace, draws=1)  # refuses what has no base of its own
    values, weights = values_of(prompts, "kl", "drift"), weights_of(prompts, "drift")
    return [
        (
            sum(w * float(one.sum()) for one, w in zip(texts, row, strict=True)),
            sum(w * len(one) for one, w in zip(texts, row, strict=True)),
        )
        for texts, row in zip(values, weights, strict=True)
    ]


def _faulty(trace: Trace, prompts: list[list[TracedText]]) -> Rows:
    by_id = {id(text): bool(found) for text, found in zip(trace.texts, faults_of(trace), strict=True)}
    return [
        (sum(w for text, w in zip(texts, row.tolist(), strict=True) if by_id[id(text)]), float(row.sum()))
        for texts, row in zip(prompts, weights_of(prompts, "degenerate texts"), strict=True)
    ]


_OF_PROMPT: Mapping[LossName, Callable[[Trace, list[list[TracedText]]], Rows]] = {
    "diversity": _repeated,
    "calibration": _overconfident,
    "over-thinking": _longer,
    "drift": _drifted,
    "degenerate texts": _faulty,
}


def _difference(one: Sums, other: Sums, what: str, *, level: float, draws: int, seed: int) -> bool:
    """Whether two runs are told apart: on the prompts that both have, else as two sets of prompts."""
    keys = sorted(one.keys() & other.keys())
    paired = len(keys) >= LEAST

    def drawn(sums: Sums, order: Sequence[str], seed: int) -> tuple[Floats, Resamples]:
        table = np.array([sums[key] for key in order])
        resamples = Resamples(len(order), what, level=level, draws=draws, seed=seed)
        times = np.concatenate([np.ones((1, len(order))), resamples.times])
        return over(times @ table[:, 0], times @ table[:, 1]), resamples

    first, resamples = drawn(one, keys if paired else sorted(one), seed)
    second, others = drawn(other, keys if paired else sorted(other), seed if paired else seed + 1)
    fewer = min(resamples, others, key=lambda one: one.units)
    difference = first - second
    try:
        found = fewer.interval(float(difference[0]), difference[1:])
    except InputError:  # too few prompts tell
        return False
    return 0.0 not in found
