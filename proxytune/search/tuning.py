"""Choose a formula's strength, gate or another number of it on validation items, from one pass of the members.

The members' logits do not depend on the formula, so each item is read once, and every value is scored on the same
logits. What a value costs is its own sums over the vocabulary; values that fall behind are dropped (successive
halving): after 16 items, 32, 64, …, those that are three standard errors of the paired difference behind the best, at
most half at a time. The rest are scored on all items.

Of these, the one that changes the base least is chosen among those within one standard error of the best: the
one-standard-error rule (Breiman et al. 1984), with the standard error of the difference on the same items.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from proxytune.errors import InputError
from proxytune.validation import Ids, as_float, finite, whole

if TYPE_CHECKING:
    from proxytune.models.scored_parts import Part
from proxytune.search.halving import Trial, halved, scores
from proxytune.search.knobs import Knob, knob_of
from proxytune.search.tuning_record import Item, Judge, Metric, Tuning

__all__ = ["tune", "tune_by"]


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
    return halved(trial, seed, advance)


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
    return halved(_Judged(model, knob, _values(values, knob), judge, count), seed, advance)


class _Forced(Trial):
    """Log-probabilities of given texts, or which of several is the likeliest: one pass serves all values."""

    def __init__(self, model: Any, knob: Knob, tried: Sequence[float], items: Sequence[Item], batch_size: int) -> None:
        from proxytune.models.ensemble import Ensemble
        from proxytune.models.scored_texts import check_texts

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
            self._found[c] = scores(self.metric, self._sums[c], self._items, self._owners)

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


class _Judged(Trial):
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
