"""Successive halving over values that are scored on the same items."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from proxytune.errors import InputError
from proxytune.stats.bootstrap import ratio_interval

if TYPE_CHECKING:
    pass
from proxytune.search.knobs import Knob
from proxytune.search.tuning_record import Item, Metric, Point, Tuning

__all__ = ["BEHIND", "FIRST", "Trial", "halved", "scores"]

FIRST = 16
"""Items before the first values are dropped."""


BEHIND = 3.0
"""Standard errors behind the best at which a value is dropped."""


class Trial:
    """Values of a knob, scored on items; and, of a gate, what they are compared with: the base, and no gate.

    Attributes:
        knob: The knob.
        tried: Its values.
        formulas: The formula at each of them.
        always: The formulas that they are compared with.
        metric: The metric.
        count: N, the number of items.
        tokens: How many tokens were scored.
    """

    metric: Metric = "accuracy"
    tokens = 0

    def __init__(self, model: Any, knob: Knob, tried: Sequence[float], count: int) -> None:
        self.knob, self.tried, self.count, self.model = knob, tried, count, model
        self.formulas = [knob.turn(model.formula, value) for value in tried]
        gated = knob.name.startswith("gate.")
        self.always = [model.formula.neutral(), replace(model.formula, gate=None)] if gated else []
        self._found = np.full((len(tried) + len(self.always), count), np.nan)

    @property
    def units(self) -> NDArray[np.float64]:
        """`[N]`: what each item counts."""
        return np.ones(self.count)

    def scores(self, c: int) -> NDArray[np.float64]:
        """`[N]`: the scores of a value, or after the values of what they are compared with; NaN where not read."""
        return self._found[c]

    def share_open(self, c: int) -> float | None:
        """At which share of the positions a value's gate was open; None if that is not known."""
        return None

    def read(self, alive: Sequence[int], items: NDArray[np.intp]) -> None:
        """Score values, by their numbers, on further items."""
        raise NotImplementedError


def halved(trial: Trial, seed: int, advance: Callable[[int], object]) -> Tuning:
    """Successive halving of the values, and the choice among those that were scored on all items."""
    from proxytune.costs.model_size import pass_bytes

    tried, order = trial.tried, np.random.default_rng(seed).permutation(trial.count)
    alive, done = list(range(len(tried))), 0
    for upto in _rungs(trial.count):
        trial.read(alive, order[done:upto])
        done = upto
        advance(done)
        if done < trial.count:
            alive = _kept({c: trial.scores(c)[order[:done]] for c in alive})
    units = trial.units
    base, *others = (member.model for member in trial.model.members)
    more = pass_bytes(*others).weights / pass_bytes(base).weights  # companions that are one model read it once
    points = []
    for c, value in enumerate(tried):
        scores, share = trial.scores(c), trial.share_open(c)
        there = np.flatnonzero(~np.isnan(scores))
        read = None if share is None else 1.0 + share * more
        points.append(Point(value, len(there), ratio_interval(scores[there], units[there], seed=seed), share, read))
    references = [float(trial.scores(len(tried) + i).sum() / units.sum()) for i in range(len(trial.always))]
    found = {c: trial.scores(c) for c in alive}
    best, pick, error = _one_standard_error(trial.knob, tried, found, float(units.sum()))
    return Tuning(
        knob=trial.knob,
        metric=trial.metric,
        points=tuple(points),
        best=tried[best],
        chosen=tried[pick],
        error=error,
        items=trial.count,
        tokens=trial.tokens,
        formula=trial.formulas[pick],
        seed=seed,
        **dict(zip(("base", "ungated"), references, strict=False)),
    )


def _rungs(count: int) -> list[int]:
    """After how many items values may be dropped, and all of them."""
    rungs, at = [], FIRST
    while at < count:
        rungs.append(at)
        at *= 2
    return [*rungs, count]


def scores(
    metric: str, sums: NDArray[np.float64], items: Sequence[Item], owners: NDArray[np.intp]
) -> NDArray[np.float64]:
    """Each item's score `[N]`: nats of its text, or whether the right choice is the likeliest; NaN where not read."""
    if metric == "logprob":
        return sums
    starts = np.searchsorted(owners, np.arange(len(items)))
    found = np.full(len(items), np.nan)
    for i, (item, start) in enumerate(zip(items, starts, strict=True)):
        own = sums[start : start + len(item.choices)]
        if not np.isnan(own).any():
            # Where all are forbidden, none is the likeliest.
            found[i] = own.argmax() == item.answer and own[item.answer] > -np.inf
    return found


def _kept(found: Mapping[int, NDArray[np.float64]]) -> list[int]:
    """The values to go on with: at most half are dropped, the worst first, and only those clearly behind."""
    best = max(found, key=lambda c: (float(found[c].sum()), -c))
    behind = {c: _standard_errors_behind(found[best], found[c]) for c in found}
    worst = sorted(found, key=lambda c: float(found[c].sum()))
    dropped = {c for c in worst[: len(found) // 2] if behind[c] > BEHIND}
    return [c for c in found if c not in dropped]


def _standard_errors_behind(best: NDArray[np.float64], other: NDArray[np.float64]) -> float:
    if best is other:
        return 0.0
    if not np.isfinite(best).all() or not np.isfinite(other).all():
        return math.inf if np.isfinite(best).all() else 0.0
    difference = best - other
    error = difference.std(ddof=1) / math.sqrt(len(difference))
    return float(difference.mean() / error) if error > 0 else math.inf if difference.mean() > 0 else 0.0


def _one_standard_error(
    knob: Knob, values: Sequence[float], found: Mapping[int, NDArray[np.float64]], units: float
) -> tuple[int, int, float]:
    """The best and the chosen value's number, and the standard error of their difference."""
    best = max(found, key=lambda c: (float(found[c].sum()), -knob.distance(values[c])))
    if not np.isfinite(found[best]).all():
        raise InputError.of(
            f"the values of {knob.name}",
            expected="one that allows all right texts",
            got=f"a right text of log-probability -inf for each of {', '.join(f'{values[c]:g}' for c in found)}: the "
            "formula's mask forbids it",
            remedy="Widen the mask, or give choices, which are compared.",
        )
    errors = {}
    for c in found:
        difference = found[best] - found[c]
        error = difference.std(ddof=1) * math.sqrt(len(difference)) if np.isfinite(difference).all() else math.nan
        if c == best or difference.sum() <= error:
            errors[c] = float(error / units)
    pick = min(errors, key=lambda c: (knob.distance(values[c]), values[c]))
    return best, pick, errors[pick]
