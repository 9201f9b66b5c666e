"""Choose a formula's strength, gate or another number of it on validation items, from one pass of the members.

The members' logits do not depend on the formula, so each item is read once, and every value is scored on the same
logits. What a value costs is its own sums over the vocabulary; values that fall behind are dropped (successive
halving): after 16 items, 32, 64, …, those that are three standard errors of the paired difference behind the best, at
most half at a time. The rest are scored on all items.

Of these, the one that changes the base least is chosen among those within one standard error of the best: the
one-standard-error rule (Breiman et al. 1984), with the standard error of the difference on the same items.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from proxytune.errors import InputError
from proxytune.formulas.gates import Gate
from proxytune.stats.bootstrap import Interval, ratio_interval
from proxytune.validation import Ids, as_float, choice, finite, whole

if TYPE_CHECKING:
    from proxytune.models.scoring import Part

__all__ = ["Item", "Judge", "Knob", "Metric", "Point", "Tuning", "knob_of", "knobs_of", "tune", "tune_by"]

Metric = Literal["logprob", "accuracy"]

Judge = Callable[[Any, Sequence[int]], Sequence[bool]]
"""From a model and the numbers of some items to whether each of its answers is right."""

FIRST = 16
"""Items before the first values are dropped."""
BEHIND = 3.0
"""Standard errors behind the best at which a value is dropped."""
_FLOAT_KINDS = ("float", "Strength")
_NEUTRAL = {"share": 0.0, "top_p": 1.0}


@dataclass(frozen=True)
class Knob:
    """A number that is to be chosen.

    Attributes:
        name: Its name: a field of the formula ("alpha", "beta", …), "gate.entropy", "gate.top1" or "temperature".
        neutral: The value that changes the base least, maybe infinite.
        turn: From the formula and a value to the formula at that value.
        of_sampling: Whether it divides the combined logits instead: a temperature.
    """

    name: str
    neutral: float
    turn: Callable[[Any, float], Any]
    of_sampling: bool = False

    def distance(self, value: float) -> float:
        """How far a value is from the neutral one; where that is infinite, smaller values are farther."""
        return abs(value - self.neutral) if math.isfinite(self.neutral) else -value


def knobs_of(formula: Any) -> list[str]:
    """The names of what can be tuned of a formula, its strength first."""
    names = [_strength_of(formula), "gate.entropy", "gate.top1", "temperature"]
    if is_dataclass(formula):
        names += [f.name for f in fields(formula) if f.init and str(f.type).split(" |")[0] in _FLOAT_KINDS]
    return list(dict.fromkeys(names if hasattr(formula, "gate") else [n for n in names if "gate" not in n]))


def knob_of(formula: Any, name: str | None = None) -> Knob:
    """A knob by its name, or the formula's strength; InputError if there is none of that name."""
    strength = _strength_of(formula)
    name = strength if name in (None, "alpha") else choice("knob", name, knobs_of(formula))
    if name == strength:
        return Knob(name, float(getattr(formula, "neutral_alpha", 0.0)), lambda f, value: f.with_alpha(value))
    if name == "temperature":
        return Knob(name, 1.0, lambda f, value: f, of_sampling=True)
    if name.startswith("gate."):
        which = name.removeprefix("gate.")
        return Knob(
            name,
            math.inf if which == "entropy" else 0.0,
            lambda f, value: replace(f, gate=_gate(which, value)),
        )
    return Knob(name, _NEUTRAL.get(name, 0.0), lambda f, value: replace(f, **{name: value}))


def _gate(which: str, value: float) -> Gate:
    return Gate(**{which: value})  # a share that was calibrated is another threshold's


def _strength_of(formula: Any) -> str:
    return str(getattr(formula, "strength_field", "alpha"))


@dataclass(frozen=True)
class Item:
    """A validation item, as token ids.

    Attributes:
        prompt: The prompt; or role → prompt, "base" among them, for members that read their own.
        choices: What may come after it: one text, whose log-probability is scored, or several.
        answer: Which of several is right.
        name: What errors call it.
    """

    prompt: Ids | Mapping[str, Ids]
    choices: Sequence[Ids]
    answer: int = 0
    name: str = "an item"

    def __post_init__(self) -> None:
        if len(self.choices) == 0 or not 0 <= self.answer < len(self.choices):
            raise InputError.of(
                self.name,
                expected="at least one choice, and the number of the right one, from 0",
                got=f"{len(self.choices)} choices and answer={self.answer}",
                remedy="Correct the item.",
            )


@dataclass(frozen=True)
class Point:
    """One value on the curve.

    Attributes:
        value: The value.
        items: On how many items it was scored: fewer than all if it was dropped.
        score: Its score with a 95 % bootstrap interval over items: nats per token, or the share of right answers.
        open: At which share of the scored positions the formula's gate is open; None without a gate.
        bytes: What a token reads of the members' weights then, over the base's: companions run where the gate is open.
    """

    value: float
    items: int
    score: Interval
    open: float | None = None
    bytes: float | None = None

    def to_json(self) -> dict[str, Any]:
        """The point as JSON values; null for minus infinity."""
        numbers = {"score": self.score.value, "low": self.score.low, "high": self.score.high}
        found = {k: round(v, 6) if math.isfinite(v) else None for k, v in numbers.items()}
        more = {"open": self.open, "bytes": self.bytes}
        return {"value": self.value, "items": self.items, **found} | {
            k: round(v, 4) for k, v in more.items() if v is not None
        }


@dataclass(frozen=True)
class Tuning:
    """What was found.

    Attributes:
        knob: What was tuned.
        metric: "logprob" (nats per token of the right text) or "accuracy" (the right choice is the likeliest, or the
            answer written is right).
        points: The curve, by value.
        best: The value with the highest score.
        chosen: The value that changes the base least, of those within one standard error of the best.
        error: That standard error of the paired difference between chosen and best, in the metric's unit.
        items: Number of items.
        tokens: Number of scored tokens; 0 where answers were written.
        formula: The formula at the chosen value.
        seed: The seed of the items' order.
        base: The base's own score, and `ungated` that of the formula without its gate; None unless a gate was tuned.
    """

    knob: Knob
    metric: Metric
    points: tuple[Point, ...]
    best: float
    chosen: float
    error: float
    items: int
    tokens: int
    formula: Any
    seed: int
    base: float | None = None
    ungated: float | None = None

    def gap(self, value: float) -> float | None:
        """The share of the gap between base and ungated formula that a value of the gate closes; None without one."""
        if self.base is None or self.ungated is None or self.ungated == self.base:
            return None
        return (self.point(value).score.value - self.base) / (self.ungated - self.base)

    def point(self, value: float) -> Point:
        """The point of a value."""
        return next(point for point in self.points if point.value == value)

    def to_json(self) -> dict[str, Any]:
        """The evidence as JSON values."""
        return {
            "metric": self.metric,
            "items": self.items,
            "tokens": self.tokens,
            "best": self.best,
            "chosen": self.chosen,
            "rule": "least change of the base within one standard error of the paired difference to the best",
            "error": round(self.error, 6),
            "seed": self.seed,
            **({} if self.base is None else {"base": _rounded(self.base), "ungated": _rounded(self.ungated)}),
            "curve": [point.to_json() for point in self.points],
        }


def _rounded(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else round(value, 6)


def tune(
    model: Any,
    items: Sequence[Item],
    values: Sequence[float],
    *,
    knob: Knob | None = None,
    seed: int = 0,
    batch_size: int = 8,
    advance: Callable[[int], object] = lambda _: None,
) -> Tuning:
    """Choose the value of a knob on validation items; never on those that results are reported on.

    Args:
        model: A `ProxyTunedModel`. It is not changed.
        items: The items, all with one text, or all with several choices.
        values: The candidates, at least two.
        knob: What they are values of [the formula's strength].
        seed: Of the order in which items are read.
        batch_size: How many texts are read at once.
        advance: Called with the number of items read so far.

    Raises:
        InputError: If there are fewer than two values or items, a value or an item does not fit, or every value forbids
            some right text.
        NumericalError: As `proxytune.models.scoring.score`.
    """
    knob = knob_of(model.formula) if knob is None else knob
    trial = _Forced(model, knob, _values(values, knob), items, batch_size)
    return _halved(trial, seed, advance)


def tune_by(
    model: Any,
    judge: Judge,
    count: int,
    values: Sequence[float],
    *,
    knob: Knob | None = None,
    seed: int = 0,
    advance: Callable[[int], object] = lambda _: None,
) -> Tuning:
    """Choose the value of a knob by answers that the model writes: each value writes its own, so it takes longer.

    Args:
        model: A `ProxyTunedModel`; its formula is at the value while `judge` is called, and afterwards as it was.
        judge: From the model and the numbers of some items to whether each of its answers is right.
        count: How many items there are, at least two.
        values: As in `tune`, like the rest.
        knob: A number of the formula, not the temperature.
        seed: Of the order in which items are asked.
        advance: Called with the number of items asked so far.

    Raises:
        InputError: If values, count or knob do not fit, or `judge` returns another number of verdicts.
    """
    knob = knob_of(model.formula) if knob is None else knob
    if knob.of_sampling:
        raise InputError.of(
            "knob",
            expected="a number of the formula where answers are written: how they are drawn is up to the judge",
            got=repr(knob.name),
            remedy="Tune it on right completions or choices.",
        )
    whole("count", count, "of items", least=2)
    return _halved(_Judged(model, knob, _values(values, knob), judge, count), seed, advance)


class _Trial:
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


class _Forced(_Trial):
    """Log-probabilities of given texts, or which of several is the likeliest: one pass serves all values."""

    def __init__(self, model: Any, knob: Knob, tried: Sequence[float], items: Sequence[Item], batch_size: int) -> None:
        from proxytune.models.ensemble import Ensemble
        from proxytune.models.scoring import check_texts

        self.metric = _metric(items)
        super().__init__(model, knob, tried, len(items))
        ensemble = Ensemble.of(model)
        self._weighings = [ensemble.weighing_of(formula) for formula in (*self.formulas, *self.always)]
        self._items, self._batch_size = items, batch_size
        self._texts, self._prompts, self._names = _flat(items)
        check_texts(model, self._texts, prompts=self._prompts, names=self._names)
        self._owners = np.repeat(np.arange(len(items)), [len(item.choices) for item in items])
        self._counts = np.zeros(len(self._texts))
        self._sums = np.full((len(self._weighings), len(self._texts)), np.nan)
        self._open = np.zeros((2, len(self._weighings)))  # positions where the gate was open, and all

    def read(self, alive: Sequence[int], items: NDArray[np.intp]) -> None:
        every = [*alive, *range(len(self.tried), len(self._weighings))]
        chosen = np.flatnonzero(np.isin(self._owners, items))
        self._sums[every, chosen[:, None]] = 0.0
        for part in self._parts(chosen):
            of = chosen[part.texts[part.scored].cpu().numpy()]
            np.add.at(self._counts, of, 1)
            for c in every:
                value = self.tried[c] if self.knob.of_sampling and c < len(self.tried) else 1.0
                logprobs, _ = part.logprobs(self._weighings[c], value)
                np.add.at(self._sums[c], of, logprobs.cpu().numpy())
                if self._weighings[c].gate is not None:
                    is_open = part.open(self._weighings[c])
                    self._open[:, c] += int(is_open.sum()), len(is_open)
            del part  # before the next one is made
        self.tokens = int(self._counts.sum())
        for c in every:
            self._found[c] = _scores(self.metric, self._sums[c], self._items, self._owners)

    def _parts(self, chosen: NDArray[np.intp]) -> Iterator[Part]:
        from proxytune.models.scoring import parts_of

        def of(values: Sequence[Any]) -> list[Any]:
            return [values[i] for i in chosen]

        by_role = isinstance(self._prompts, Mapping)
        prompts = {role: of(x) for role, x in self._prompts.items()} if by_role else of(self._prompts)
        names, size = of(self._names), self._batch_size
        return parts_of(self.model, of(self._texts), prompts=prompts, batch_size=size, names=names, everyone=True)

    @property
    def units(self) -> NDArray[np.float64]:
        return self._counts if self.metric == "logprob" else np.ones(self.count)

    def share_open(self, c: int) -> float | None:
        opened, seen = self._open[:, c]
        return float(opened / seen) if seen else None


class _Judged(_Trial):
    """Answers that the model writes at each value."""

    def __init__(self, model: Any, knob: Knob, tried: Sequence[float], judge: Judge, count: int) -> None:
        super().__init__(model, knob, tried, count)
        self._judge = judge

    def read(self, alive: Sequence[int], items: NDArray[np.intp]) -> None:
        before = self.model.formula
        try:
            for c in (*alive, *range(len(self.tried), len(self._found))):
                self.model.formula = (*self.formulas, *self.always)[c]
                verdicts = list(self._judge(self.model, items.tolist()))
                if len(verdicts) != len(items):
                    raise InputError.of(
                        "judge",
                        expected=f"{len(items)} verdicts, one for each item",
                        got=f"{len(verdicts)}",
                        remedy="Return whether each answer is right.",
                    )
                self._found[c, items] = verdicts
        finally:
            self.model.formula = before


def _halved(trial: _Trial, seed: int, advance: Callable[[int], object]) -> Tuning:
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


def _values(values: Sequence[float], knob: Knob) -> list[float]:
    found = sorted({as_float(value) for value in values})
    for value in values:
        finite(f"a value of {knob.name}", value, above=0.0 if knob.of_sampling else None)
    if len(found) < 2:
        raise InputError.of(
            "values",
            expected="at least two different numbers to choose from",
            got=repr(list(values)),
            remedy="Pass e.g. [0.25, 0.5, 0.75, 1.0].",
        )
    return found


def _metric(items: Sequence[Item]) -> Metric:
    several = {len(item.choices) > 1 for item in items}
    if len(items) < 2 or len(several) > 1:
        raise InputError.of(
            "items",
            expected="at least two, all with one text or all with several choices",
            got=f"{len(items)}" if len(items) < 2 else "some of each kind",
            remedy="Give more validation items, of one kind.",
        )
    return "accuracy" if several.pop() else "logprob"


def _flat(items: Sequence[Item]) -> tuple[list[Ids], Any, list[str]]:
    """All items' texts, their prompts as `score` takes them, and their names."""
    texts, prompts, names = [], [], []
    for item in items:
        for number, text in enumerate(item.choices):
            texts.append(text)
            prompts.append(item.prompt)
            names.append(item.name if len(item.choices) == 1 else f"{item.name}, choice {number}")
    if all(isinstance(prompt, Mapping) for prompt in prompts):
        return texts, {role: [prompt[role] for prompt in prompts] for role in prompts[0]}, names  # type: ignore[index]
    return texts, prompts, names


def _rungs(count: int) -> list[int]:
    """After how many items values may be dropped, and all of them."""
    rungs, at = [], FIRST
    while at < count:
        rungs.append(at)
        at *= 2
    return [*rungs, count]


def _scores(
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
