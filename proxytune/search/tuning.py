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
from proxytune.validation import Ids, as_float, choice, finite

if TYPE_CHECKING:
    from proxytune.models.scoring import Part

__all__ = ["Item", "Knob", "Point", "Tuning", "knob_of", "knobs_of", "tune"]

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
            lambda f, value: replace(f, gate=_gate(f.gate, which, value)),
        )
    return Knob(name, _NEUTRAL.get(name, 0.0), lambda f, value: replace(f, **{name: value}))


def _gate(gate: Gate | None, which: str, value: float) -> Gate:
    same = gate is not None and getattr(gate, which) is not None
    return replace(gate, **{which: value}) if same and gate is not None else Gate(**{which: value})


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
        metric: "logprob" (nats per token of the right text) or "accuracy" (the right choice is the likeliest).
        points: The curve, by value.
        best: The value with the highest score.
        chosen: The value that changes the base least, of those within one standard error of the best.
        error: That standard error of the paired difference between chosen and best, in the metric's unit.
        items: Number of items.
        tokens: Number of scored tokens.
        formula: The formula at the chosen value.
        seed: The seed of the items' order.
        base: The base's own score, and `ungated` that of the formula without its gate; None unless a gate was tuned.
    """

    knob: Knob
    metric: Literal["logprob", "accuracy"]
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
    from proxytune.costs.model_size import pass_bytes
    from proxytune.models.ensemble import Ensemble
    from proxytune.models.scoring import check_texts

    knob = knob_of(model.formula) if knob is None else knob
    tried = _values(values, knob)
    metric = _metric(items)
    ensemble = Ensemble.of(model)
    formulas = [knob.turn(model.formula, value) for value in tried]
    compared = [model.formula.neutral(), replace(model.formula, gate=None)] if knob.name.startswith("gate.") else []
    weighings = [ensemble.weighing_of(formula) for formula in (*formulas, *compared)]
    texts, prompts, names = _flat(items)
    check_texts(model, texts, prompts=prompts, names=names)
    owners = np.repeat(np.arange(len(items)), [len(item.choices) for item in items])
    counts = np.zeros(len(texts))
    sums = np.full((len(weighings), len(texts)), np.nan)
    always = range(len(tried), len(weighings))
    opened, seen = np.zeros(len(tried)), np.zeros(len(tried))
    gated = [getattr(formula, "gate", None) is not None for formula in formulas]
    order = np.random.default_rng(seed).permutation(len(items))
    alive, done = list(range(len(tried))), 0
    for upto in _rungs(len(items)):
        chosen = np.flatnonzero(np.isin(owners, order[done:upto]))
        sums[[*alive, *always], chosen[:, None]] = 0.0
        for part in _read(model, texts, prompts, names, chosen, batch_size):
            of = chosen[part.texts[part.scored].cpu().numpy()]
            np.add.at(counts, of, 1)
            for c in (*alive, *always):
                logprobs, _ = part.logprobs(weighings[c], tried[c] if knob.of_sampling else 1.0)
                np.add.at(sums[c], of, logprobs.cpu().numpy())
                if c < len(tried) and gated[c]:
                    is_open = part.open(weighings[c])
                    opened[c], seen[c] = opened[c] + int(is_open.sum()), seen[c] + len(is_open)
            del part  # before the next one is made
        done = upto
        advance(done)
        if done < len(items):
            there = order[:done]
            found = {c: _scores(metric, sums[c], items, owners)[there] for c in alive}
            alive = _kept(found)
    everything = {c: _scores(metric, sums[c], items, owners) for c in range(len(tried))}
    units = _units(metric, counts, items, owners)
    base, *companions = (pass_bytes(member.model).weights for member in ensemble.members)
    others, points = sum(companions) / base, []
    for c, value in enumerate(tried):
        there = np.flatnonzero(~np.isnan(everything[c]))
        share = opened[c] / seen[c] if gated[c] and seen[c] else None
        score = ratio_interval(everything[c][there], units[there], seed=seed)
        points.append(Point(value, len(there), score, share, None if share is None else 1.0 + share * others))
    references = [float(_scores(metric, sums[c], items, owners).sum() / units.sum()) for c in always]
    best, pick, error = _one_standard_error(knob, tried, {c: everything[c] for c in alive}, float(units.sum()), metric)
    return Tuning(
        knob=knob,
        metric=metric,
        points=tuple(points),
        best=tried[best],
        chosen=tried[pick],
        error=error,
        items=len(items),
        tokens=int(counts.sum()),
        formula=formulas[pick],
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


def _metric(items: Sequence[Item]) -> Literal["logprob", "accuracy"]:
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


def _read(
    model: Any, texts: Sequence[Ids], prompts: Any, names: Sequence[str], chosen: NDArray[np.intp], batch_size: int
) -> Iterator[Part]:
    from proxytune.models.scoring import parts_of

    def of(values: Sequence[Any]) -> list[Any]:
        return [values[i] for i in chosen]

    own = {role: of(each) for role, each in prompts.items()} if isinstance(prompts, Mapping) else of(prompts)
    return parts_of(model, of(texts), prompts=own, batch_size=batch_size, names=of(names), everyone=True)


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
            found[i] = own.argmax() == item.answer
    return found


def _units(
    metric: str, counts: NDArray[np.float64], items: Sequence[Item], owners: NDArray[np.intp]
) -> NDArray[np.float64]:
    return counts if metric == "logprob" else np.ones(len(items))


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
    knob: Knob, values: Sequence[float], found: Mapping[int, NDArray[np.float64]], units: float, metric: str
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
