"""Variance inflation: what longer thinking does to accuracy, and to how far the answers to a prompt scatter."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from proxytune.diagnostics.prompts import (
    Finding,
    Floats,
    Resamples,
    counts,
    graded,
    numbers_of,
    over,
    prompts_of,
    refuse_weighted,
    said,
)
from proxytune.errors import InputError
from proxytune.stats.bootstrap import Interval
from proxytune.trace import Trace
from proxytune.validation import whole

__all__ = ["LengthBin", "LengthEffect", "length_effect"]

LEAST_RATIO = 1.5
"""How much longer long texts have to be than short ones."""


@dataclass(frozen=True)
class LengthBin:
    """Texts of about one length.

    Attributes:
        shortest: Length of the shortest.
        longest: Length of the longest.
        texts: How many.
        accuracy: Share of right texts among them; None where fewer than half of the resamples have any.
        disagreement: The chance that two texts of one prompt in this bin differ in their answers: the variance of the
            answer. None without answers, or where too few prompts have two texts here.
    """

    shortest: float
    longest: float
    texts: int
    accuracy: Interval | None
    disagreement: Interval | None


@dataclass(frozen=True, kw_only=True)
class LengthEffect(Finding):
    """Accuracy and answer variance against length.

    What doubling adds is a difference of two shares, cut to [−1, 1]: 0.1 is 10 points.

    Attributes:
        bins: Of about equally many texts, the short ones first. Not compared within prompts.
        overall: What doubling the length adds to accuracy, within prompts, by a straight line in its logarithm.
        at_start: The same for a short text (the 5th percentile), by a parabola.
        at_end: For a long text (the 95th percentile).
        falls: Whether longer texts are told less accurate at the long end: `at_end` lies below 0.
        beyond: The length beyond which accuracy falls; None unless `falls`. At the short end's length or less,
            accuracy falls all along.
    """

    bins: tuple[LengthBin, ...]
    overall: Interval
    at_start: Interval
    at_end: Interval
    falls: bool
    beyond: Interval | None


def length_effect(
    trace: Trace,
    *,
    by: str = "tokens",
    bins: int = 5,
    level: float = 0.95,
    draws: int = 1000,
    seed: int = 0,
) -> LengthEffect:
    """Accuracy and answer variance against length, and the length beyond which accuracy falls.

    Longer thinking widens the distribution of answers (Ghosal et al. 2025, arXiv 2506.04210): at first it covers the
    right one more often, later less. Hard prompts make for long texts as well, so texts are compared *within* a prompt:
    every prompt has a level of its own.

    Accuracy is fitted as a parabola in the logarithm of the length plus a level for each prompt, by least squares. It
    falls at the long end if the parabola's slope there is told below 0 (one half of the test of Lind and Mehlum 2010
    for a hump); it turns where the slope is 0. Where accuracy is not roughly a hump, look at the bins.

    Args:
        trace: The run, graded: several independent samples of each prompt, of different lengths.
        by: "tokens": the length of the text; or the name of a fact, e.g. "budget" for a thinking budget that was set. A
            budget that was set shows what length does; a length that the model chose shows what goes with it.
        bins: How many bins.
        level: Confidence level of the intervals.
        draws: Number of resamples, of whole prompts.
        seed: Seed of the resamples.

    Raises:
        InputError: If texts have no grade or no such fact, samples depend on each other, there are fewer than five
            prompts, or lengths hardly differ.
    """
    what = "length_effect"
    prompts = prompts_of(trace, what)
    bins = whole("bins", bins, "of bins", least=1)
    refuse_weighted(trace, prompts, what, "Draw independent samples.")
    rights = graded(prompts, what)
    if by == "tokens":
        lengths = [np.array([float(len(text)) for text in texts]) for texts in prompts]
    else:
        lengths = numbers_of(prompts, by, what)
    resamples = Resamples(len(prompts), what, level=level, draws=draws, seed=seed)
    flat = np.concatenate(lengths)
    varied = sum(len(np.unique(one)) > 1 for one in lengths)
    if varied < 2 or len(np.unique(flat)) < 3:
        raise InputError.of(
            what,
            expected="several prompts with texts of different lengths, and three lengths or more in all",
            got=f"{varied} of {len(prompts)} prompts with different ones, {len(np.unique(flat))} lengths",
            remedy="Draw several samples of each prompt, or set several thinking budgets.",
        )
    middle = float(np.log(flat).mean())
    short, long = (float(q) for q in np.quantile(np.log(flat), [0.05, 0.95]))
    if long - short < math.log(LEAST_RATIO):
        raise InputError.of(
            what,
            expected=f"long texts at least {LEAST_RATIO:g} times as long as short ones (95th and 5th percentile)",
            got=f"{math.exp(short):.0f} and {math.exp(long):.0f}",
            remedy="Texts of about one length say nothing about others: set several thinking budgets.",
        )
    squares, products = _sums(lengths, rights, middle)

    def slopes(times: Floats) -> Floats:
        """The parabola's two coefficients, `[N, 2]`; NaN where a resample does not tell them."""
        left = np.einsum("np,pij->nij", times, squares)
        right = times @ products
        spread = left[:, 0, 0] * left[:, 1, 1] - left[:, 0, 1] * left[:, 1, 0]
        usable = spread > 1e-9 * np.maximum(left[:, 0, 0] * left[:, 1, 1], 1e-300)
        first = left[:, 1, 1] * right[:, 0] - left[:, 0, 1] * right[:, 1]
        second = left[:, 0, 0] * right[:, 1] - left[:, 1, 0] * right[:, 0]
        return np.where(usable, np.array([first, second]) / np.where(usable, spread, 1.0), np.nan).T

    def at(place: float) -> Interval:
        """What doubling adds at a log-length."""
        return resamples.of(lambda times: math.log(2) * (slopes(times) @ [1.0, 2 * (place - middle)]))

    overall = resamples.of(lambda times: math.log(2) * over(times @ products[:, 0], times @ squares[:, 0, 0]))
    start, end = at(short), at(long)
    too_wide = end.high - end.low > 2  # the fit's slope is free: accuracy moves by 100 points at most
    overall, start, end = map(_cut, (overall, start, end))
    beyond = None
    if end.high < 0:
        beyond = resamples.of(lambda times: _turn(slopes(times), middle, short, long))
    elif end.low > 0:
        says = f"Accuracy still rises at the longest texts: doubling them adds {said(end, points=True)}."
    elif overall.high < 0:
        says = (
            f"Longer texts are less accurate: doubling the length adds {said(overall, points=True)}; from what length "
            "on is not told."
        )
    elif too_wide:
        says = (
            "There are too few lengths to tell whether accuracy falls with length: draw more samples, or set several "
            "thinking budgets."
        )
    else:
        says = f"Whether accuracy falls with length is not told: doubling long texts adds {said(end, points=True)}."
    if beyond is not None:
        unit = "tokens" if by == "tokens" else by
        falling = beyond.value <= math.exp(short) * (1 + 1e-9)
        says = (
            f"Accuracy falls with length all along: doubling long texts adds {said(end, points=True)}."
            if falling
            else f"Accuracy falls beyond {said(beyond)} {unit}: doubling long texts adds {said(end, points=True)}."
        )
    return LengthEffect(
        says=says,
        **counts(prompts),
        bins=_bins(lengths, rights, [[text.answer for text in texts] for texts in prompts], resamples, bins),
        overall=overall,
        at_start=start,
        at_end=end,
        falls=beyond is not None,
        beyond=beyond,
    )


def _cut(added: Interval) -> Interval:
    """What is added to a share: at most all of it."""
    return Interval(*(min(1.0, max(-1.0, one)) for one in (added.value, added.low, added.high)))


def _sums(lengths: list[Floats], rights: list[Floats], middle: float) -> tuple[Floats, Floats]:
    """What the fit needs of each prompt, its means taken out: `XᵀX`, `[prompts, 2, 2]`, and `Xᵀy`, `[prompts, 2]`."""
    squares, products = np.zeros((len(lengths), 2, 2)), np.zeros((len(lengths), 2))
    for i, (length, right) in enumerate(zip(lengths, rights, strict=True)):
        place = np.log(length) - middle
        columns = np.stack([place, place**2])
        columns = columns - columns.mean(1, keepdims=True)
        squares[i], products[i] = columns @ columns.T, columns @ (right - right.mean())
    return squares, products


def _turn(slopes: Floats, middle: float, short: float, long: float) -> Floats:
    """The length at which a hump turns: the short end's where it falls all along, infinite where it does not fall."""
    first, second = slopes.T
    falls = first + 2 * second * (long - middle) < 0
    rises = first + 2 * second * (short - middle) > 0
    turning = middle - over(first, 2 * second)
    place = np.where(falls, np.where(rises, turning, short), np.inf)
    return np.where(np.isnan(first), np.nan, np.exp(place))


def _bins(
    lengths: list[Floats],
    rights: list[Floats],
    answers: list[list[str | None]],
    resamples: Resamples,
    bins: int,
) -> tuple[LengthBin, ...]:
    flat = np.concatenate(lengths)
    edges = np.unique(np.quantile(flat, np.arange(1, bins) / bins, method="higher")) if bins > 1 else np.empty(0)
    edges = edges[edges > flat.min()]
    of = [np.searchsorted(edges, one, side="right") for one in lengths]
    known = any(answer is not None for row in answers for answer in row)
    every = np.concatenate(of)
    out = []
    for number in range(len(edges) + 1):
        mine = [one == number for one in of]
        held = np.array([one.sum() for one in mine])
        right = np.array([row[one].sum() for row, one in zip(rights, mine, strict=True)])
        apart = np.array([_differing(row, one) for row, one in zip(answers, mine, strict=True)])
        inside = flat[every == number]
        out.append(
            LengthBin(
                float(inside.min()),
                float(inside.max()),
                len(inside),
                _maybe(resamples, right, held),
                _maybe(resamples, apart, held * (held - 1) / 2) if known else None,
            )
        )
    return tuple(out)


def _differing(answers: list[str | None], mine: NDArray[np.bool_]) -> float:
    """How many pairs of texts differ in their answers."""
    held: dict[str | None, int] = {}
    for answer, inside in zip(answers, mine.tolist(), strict=True):
        if inside:
            held[answer] = held.get(answer, 0) + 1
    count = sum(held.values())
    return (count * (count - 1) - sum(n * (n - 1) for n in held.values())) / 2


def _maybe(resamples: Resamples, sums: Floats, held: Floats) -> Interval | None:
    try:
        return resamples.bounded(sums, held)
    except InputError:
        return None
