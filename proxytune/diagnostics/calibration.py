"""Calibration: does a policy know when it is right?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from proxytune.diagnostics.prompts import (
    Finding,
    Floats,
    Prompts,
    Resamples,
    counts,
    graded,
    over,
    prompts_of,
    refuse_weighted,
    said,
    values_of,
)
from proxytune.errors import InputError
from proxytune.stats.bootstrap import Interval
from proxytune.stats.calibration import auroc, ece
from proxytune.trace import Trace
from proxytune.trace.record import COMBINED
from proxytune.validation import as_float, choice, shown, whole
from proxytune.voting.confidence import WINDOW, token_confidence, trace_scores

__all__ = ["Calibration", "Confidence", "Probability", "ReliabilityPoint", "calibration", "confidences_of"]

Probability = Literal["likelihood", "agreement", "stated"]
"""Confidences in [0, 1]."""

Confidence = Probability | Literal["entropy", "deepconf"]
"""Confidences that a trace may have."""

_MEANING: Mapping[Probability, str] = {
    "likelihood": "exp of the mean token log-probability, not the probability of the answer",
    "agreement": "the share of the prompt's other texts with the same answer",
    "stated": "the text's own facts['confidence']",
}

_ALL: tuple[Confidence, ...] = ("likelihood", "agreement", "stated", "entropy", "deepconf")


@dataclass(frozen=True)
class ReliabilityPoint:
    """A bin of a reliability diagram.

    Attributes:
        confidence: Mean probability.
        accuracy: Share of right texts; None where too few resamples have a text in this bin.
        texts: How many.
    """

    confidence: float
    accuracy: Interval | None
    texts: int


@dataclass(frozen=True, kw_only=True)
class Calibration(Finding):
    """How well confidences fit what was right.

    Attributes:
        by: The probability that `brier`, `ece` and `points` are of.
        brier: Mean of `(probability − right)²`; smaller is better. Always the share of right texts gives `p (1 − p)`.
        ece: Expected calibration error over bins of equal mass. Few texts make it look too large; the interval allows
            for that, and begins at 0 where noise alone would give such a value.
        gap: Mean probability less the share of right texts.
        points: The reliability diagram, the least confident bin first.
        auroc: Confidence → the chance that a right text is more confident than a wrong one of the same prompt; ½ is no
            signal. Only those that the trace has, and only where prompts have both.
        pooled: The same over all pairs of texts: it also counts knowing which prompts are hard.
        missing: Confidence → why it, or its AUROC, is not there.
    """

    by: Probability
    brier: Interval
    ece: Interval
    gap: Interval
    points: tuple[ReliabilityPoint, ...]
    auroc: Mapping[Confidence, Interval]
    pooled: Mapping[Confidence, Interval]
    missing: Mapping[Confidence, str]


def calibration(
    trace: Trace,
    by: Probability = "likelihood",
    *,
    bins: int = 10,
    window: int | float = WINDOW,
    level: float = 0.95,
    draws: int = 1000,
    seed: int = 0,
) -> Calibration:
    """Does a policy know when it is right? Brier score, calibration error, and the AUROC of each confidence.

    Confidences that a trace has; larger is more confident:

    - `"likelihood"`: `exp` of the mean token log-probability, in (0, 1]. It is a mean token's probability: not that of
      the text, and not that the answer is right. Long texts of sure tokens have a high one.
    - `"agreement"`: the share of the prompt's other texts that have the same answer, in [0, 1]; 0 without an answer
    - `"stated"`: `facts["confidence"]`, in [0, 1]
    - `"entropy"`: the mean token entropy in nats, negative
    - `"deepconf"`: the lowest group confidence of DeepConf (arXiv 2508.15260), in nats, of as many likeliest tokens as
      the trace has (the paper has 20)

    `by` is one of the first three: these lie in [0, 1], and have a Brier score and a calibration error. They may differ
    in whether the policy is too sure. Whether a confidence tells right from wrong, its AUROC says, for all five.

    Args:
        trace: The run, graded; independent samples.
        by: "likelihood", "agreement" or "stated": what is compared with the share of right texts.
        bins: Bins of about equally many texts; equal probabilities share one.
        window: Tokens per group of `"deepconf"`, or a share of the text in (0, 1).
        level: Confidence level of the intervals.
        draws: Number of resamples, of whole prompts.
        seed: Seed of the resamples.

    Raises:
        InputError: If a text has no grade, samples depend on each other, there are fewer than five prompts, or the
            trace does not have the probability asked for.
    """
    what = "calibration"
    choice("by", by, get_args(Probability))
    bins = whole("bins", bins, "of bins", least=1)
    prompts = prompts_of(trace, what)
    refuse_weighted(trace, prompts, what, "Draw independent samples.")
    right = np.concatenate(graded(prompts, what))
    found, missing = confidences_of(trace, prompts, window=window)
    if by not in found:
        raise InputError(f"{what}: {missing[by]}")
    problem = np.repeat(np.arange(len(prompts)), list(map(len, prompts)))
    resamples = Resamples(len(prompts), what, level=level, draws=draws, seed=seed)
    within: dict[Confidence, Interval] = {}
    pooled: dict[Confidence, Interval] = {}
    for name, scores in found.items():
        try:
            pairs = _Pairs(scores, right > 0, problem, resamples)
            pooled[name] = pairs.pooled()
            within[name] = pairs.within()
        except InputError as failure:
            missing[name] = str(failure)
    probability = found[by]
    sizes = np.bincount(problem)
    error, points = _reliability(probability, right, problem, resamples, bins, level)
    gap = resamples.ratio(np.bincount(problem, probability - right), sizes)
    verdict = "surer than it is right" if gap.low > 1e-6 else "less sure than it is right"
    if gap.low <= 1e-6 and gap.high >= -1e-6:
        verdict = "on the whole as sure as it is right"
    knows = "Too few prompts have right and wrong texts for an AUROC."
    if by in within:
        knows = f"Within prompts the AUROC of {by} is {said(within[by])}; ½ is no signal."
    return Calibration(
        says=(
            f"By {by} ({_MEANING[by]}) the policy is {verdict}: the mean {by} less the share of right texts is "
            f"{said(gap, points=True)}; the calibration error is {said(error, points=True)}. {knows}"
        ),
        **counts(prompts),
        by=by,
        brier=resamples.ratio(np.bincount(problem, (probability - right) ** 2), sizes),
        ece=error,
        gap=gap,
        points=points,
        auroc=within,
        pooled=pooled,
        missing=missing,
    )


def confidences_of(
    trace: Trace, prompts: Prompts, *, window: int | float = WINDOW
) -> tuple[dict[Confidence, Floats], dict[Confidence, str]]:
    """Each confidence of each text, `[N]`, prompt after prompt; and why the others are not there."""
    texts = [text for row in prompts for text in row]
    found: dict[Confidence, Floats] = {}
    missing: dict[Confidence, str] = {}
    for name in _ALL:
        try:
            found[name] = np.array(_confidence(name, trace, prompts, window), np.float64)
        except InputError as failure:
            missing[name] = str(failure)
    assert all(len(one) == len(texts) for one in found.values())
    return found, missing


def _confidence(name: Confidence, trace: Trace, prompts: Prompts, window: int | float) -> list[float]:
    what = f"the confidence {name!r}"
    texts = [text for row in prompts for text in row]
    match name:
        case "likelihood":
            # Rounding may put the log-probability of a certain token slightly above 0.
            rows = [one for row in values_of(prompts, "logprobs", what) for one in row]
            return [min(1.0, float(np.exp(one.mean()))) for one in rows]
        case "entropy":
            return [-float(one.mean()) for row in values_of(prompts, "entropy", what) for one in row]
        case "agreement":
            without = sum(text.answer is None for text in texts)
            if without == len(texts) or min(map(len, prompts)) < 2:
                raise InputError.of(
                    what,
                    expected="answers, and at least two texts of each prompt",
                    got=f"{without} of {len(texts)} texts without an answer, {min(map(len, prompts))} of a prompt",
                    remedy="Draw several samples of each prompt, and write their answers to the texts.",
                )
            return [
                0.0 if text.answer is None else (sum(t.answer == text.answer for t in row) - 1) / (len(row) - 1)
                for row in prompts
                for text in row
            ]
        case "stated":
            stated = [as_float(text.facts.get("confidence")) for text in texts]
            bad = [text.facts.get("confidence") for text, c in zip(texts, stated, strict=True) if not 0 <= c <= 1]
            if bad:
                raise InputError.of(
                    what,
                    expected="facts['confidence'] in [0, 1] of each text",
                    got=f"{shown(bad[0], 40)} in {len(bad)} of {len(texts)}",
                    remedy="Read what the text says of itself into its facts.",
                )
            return stated
        case "deepconf":
            at = trace.sources.index(COMBINED)
            return [
                trace_scores(token_confidence(text.top_logprobs[:, at], trace.top), window).lowest_group
                for text in texts
            ]


class _Pairs:
    """Pairs of a right and a wrong text: how many, and in how many the right one is more confident, ties counting ½."""

    def __init__(
        self, scores: Floats, right: NDArray[np.bool_], problem: NDArray[np.intp], resamples: Resamples
    ) -> None:
        auroc(scores, right)  # refuses where there are none
        self._given, self._resamples = (scores, right, problem), resamples
        units = resamples.units
        self._wins, self._all = np.zeros((units, units)), np.zeros((units, units))
        wrong, of_wrong = scores[~right], problem[~right]
        for unit in range(units):
            mine = scores[right & (problem == unit)][:, None]
            better = ((mine > wrong) + 0.5 * (mine == wrong)).sum(0)
            self._wins[unit] = np.bincount(of_wrong, better, minlength=units)
            self._all[unit] = len(mine) * np.bincount(of_wrong, minlength=units)

    def pooled(self) -> Interval:
        """AUROC over all pairs."""
        return self._resamples.of(
            lambda times: over(((times @ self._wins) * times).sum(1), ((times @ self._all) * times).sum(1))
        )

    def within(self) -> Interval:
        """AUROC over pairs of one prompt; a prompt that is drawn twice counts as two."""
        auroc(*self._given)
        return self._resamples.bounded(self._wins.diagonal(), self._all.diagonal())


def _reliability(
    probability: Floats, right: Floats, problem: NDArray[np.intp], resamples: Resamples, bins: int, level: float
) -> tuple[Interval, tuple[ReliabilityPoint, ...]]:
    """The calibration error, and the diagram in the same bins."""
    units = resamples.units
    _, tied, sizes = np.unique(probability, return_inverse=True, return_counts=True)
    of = np.minimum(((np.cumsum(sizes) - sizes / 2) * bins / len(probability)).astype(int), bins - 1)[tied]
    points, gaps = [], []
    for number in np.unique(of):
        mine = of == number
        held, hits = (np.bincount(problem[mine], weights, minlength=units) for weights in (None, right[mine]))
        gaps.append(np.bincount(problem[mine], probability[mine] - right[mine], minlength=units))
        try:
            accuracy = resamples.bounded(hits, held)
        except InputError:
            accuracy = None
        points.append(ReliabilityPoint(float(probability[mine].mean()), accuracy, int(mine.sum())))
    table, counted = np.array(gaps).T, np.bincount(problem, minlength=units)
    here = table.sum(0) / counted.sum()
    drawn = resamples.times @ table / (resamples.times @ counted)[:, None]
    value = ece(probability, right > 0, bins)
    spread = resamples.interval(value, np.abs(drawn).sum(1))
    # Noise alone makes a sum of distances. Where it makes as large a one as was found, the error may be 0.
    noise = float(np.quantile(np.abs(drawn - here).sum(1), level)) * resamples.stretch
    low = 0.0 if value <= noise else max(0.0, 2 * value - spread.high)
    return Interval(value, low, max(spread.high, 2 * value - spread.low)), tuple(points)
