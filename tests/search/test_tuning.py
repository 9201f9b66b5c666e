"""Values of a formula's numbers, against a slow statement: each value's own scores, in float64, without a cache."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
from support.tiny import shared
from torch.nn.functional import log_softmax

import proxytune
from proxytune.errors import InputError
from proxytune.formulas import ProxyTuning
from proxytune.formulas.contrastive import ContrastiveDecoding, DExperts
from proxytune.formulas.gates import Gate
from proxytune.formulas.guidance import ContextAware
from proxytune.search.knobs import knob_of, knobs_of
from proxytune.search.tuning import tune, tune_by
from proxytune.search.tuning_record import Item

VALUES = [-1.0, 0.0, 0.5, 1.0, 2.0]


def texts(count: int, low: int, high: int) -> list[list[int]]:
    return [torch.randint(3, 250, (int(torch.randint(low, high, ())),)).tolist() for _ in range(count)]


@pytest.fixture(scope="module")
def model() -> proxytune.ProxyTunedModel:
    roles = {"base": shared("llama", 1), "expert": shared("qwen3", 2), "antiexpert": shared("qwen3", 3)}
    return proxytune.wrap(**roles, alpha=0.25, check_vocabulary=False)


@pytest.fixture(scope="module")
def wide(model: proxytune.ProxyTunedModel) -> list[Any]:
    return [copy.deepcopy(m).double() for m in (model.base, model.expert, model.antiexpert)]


@torch.no_grad()
def logits(wide: list[Any], prompt: list[int], text: list[int]) -> list[torch.Tensor]:
    row = torch.tensor([prompt + text[:-1]])
    return [m(row, use_cache=False).logits[0, -len(text) :] for m in wide]


def logprob(z: list[torch.Tensor], text: list[int], alpha: float, temperature: float = 1.0) -> float:
    combined = (z[0] + alpha * (z[1] - z[2])) / temperature
    return float(log_softmax(combined, -1).gather(1, torch.tensor(text)[:, None]).sum())


def sampled(model: proxytune.ProxyTunedModel, alpha: float, prompts: list[list[int]], new: int) -> list[list[int]]:
    """Continuations that the model draws at an α, which is then the best one."""
    before, model.alpha = model.alpha, alpha
    draws = {"do_sample": True, "max_new_tokens": new, "min_new_tokens": new, "top_k": 0}
    ids = model.generate(torch.tensor(prompts), **draws)[:, len(prompts[0]) :].tolist()
    model.alpha = before
    return ids


def test_one_pass_serves_all_values(model: proxytune.ProxyTunedModel, wide: list[Any]) -> None:
    prompts = texts(20, 4, 5)
    given = sampled(model, 0.5, prompts, 6)
    items = [Item(p, [t]) for p, t in zip(prompts, given, strict=True)]
    before = dict(model.token_forwards)
    found = tune(model, items, VALUES, batch_size=20)
    read = {role: count - before[role] for role, count in model.token_forwards.items()}
    assert len(set(read.values())) == 1, "also the companions, whose weight is 0 for one of the values"
    assert read["base"] == 20 * (4 + 6 - 1), "each text once"
    assert found.metric == "logprob"
    assert (found.items, found.tokens) == (20, 20 * 6)
    z = [logits(wide, p, t) for p, t in zip(prompts, given, strict=True)]
    table = np.array([[logprob(z[i], given[i], value) for i in range(20)] for value in VALUES])
    full = [point for point in found.points if point.items == 20]
    assert [point.value for point in found.points] == VALUES
    for point in full:
        own = table[VALUES.index(point.value)]
        assert point.score.value == pytest.approx(own.sum() / 120, abs=2e-4)
        assert point.score.low <= point.score.value <= point.score.high
    # The rule, written out on the slow table.
    best = int(table.sum(1).argmax())
    assert found.best == VALUES[best]
    error = (table[best] - table).std(1, ddof=1) * math.sqrt(20)
    near = [v for v, row, e in zip(VALUES, table, error, strict=True) if table[best].sum() - row.sum() <= e]
    assert found.chosen == min(near, key=abs)
    assert found.formula == ProxyTuning(alpha=found.chosen)
    assert model.alpha == 0.25
    # The rungs: 16 items, then all. Whoever is 3 standard errors behind by then, and in the worse half, is dropped.
    order = np.random.default_rng(0).permutation(20)[:16]
    part = table[:, order]
    leader = int(part.sum(1).argmax())
    behind = [
        0.0 if c == leader else (part[leader] - row).mean() / ((part[leader] - row).std(ddof=1) / 4)
        for c, row in enumerate(part)
    ]
    worse = np.argsort(part.sum(1))[: len(VALUES) // 2]
    dropped = {VALUES[c] for c in worse if behind[c] > 3}
    assert dropped, "the example shows something"
    assert {point.value for point in found.points if point.items == 16} == dropped
    again = tune(model, items, reversed(VALUES), batch_size=3)
    assert again.to_json()["chosen"] == found.chosen
    assert [p.items for p in again.points] == [p.items for p in found.points]


def test_companions_that_are_idle_in_the_model_run(model: proxytune.ProxyTunedModel) -> None:
    items = [Item(p, [t]) for p, t in zip(texts(3, 2, 5), texts(3, 2, 5), strict=True)]
    curves = []
    before = model.alpha
    for model.alpha in (0.0, before):
        curves.append([point.score.value for point in tune(model, items, [0.0, 1.0]).points])
    assert curves[0] == curves[1]


def test_choices_by_accuracy(model: proxytune.ProxyTunedModel, wide: list[Any]) -> None:
    prompts = texts(18, 2, 6)
    items, z = [], []
    for number, prompt in enumerate(prompts):
        choices = texts(3, 4, 5)
        each = [logits(wide, prompt, text) for text in choices]
        z.append((choices, each))
        right = int(np.argmax([logprob(x, t, 1.0) for x, t in zip(each, choices, strict=True)]))
        items.append(Item(prompt, choices, right if number % 6 else (right + 1) % 3))
    found = tune(model, items, VALUES, seed=1)
    assert found.metric == "accuracy"
    shares = {
        value: np.mean(
            [
                int(np.argmax([logprob(x, t, value) for x, t in zip(each, choices, strict=True)])) == item.answer
                for item, (choices, each) in zip(items, z, strict=True)
            ]
        )
        for value in VALUES
    }
    full = [point for point in found.points if point.items == 18]
    assert {point.value: point.score.value for point in full} == pytest.approx({p.value: shares[p.value] for p in full})
    assert found.best == max(VALUES, key=lambda value: (shares[value], -abs(value)))
    assert found.point(1.0).score.value == pytest.approx(15 / 18)


def test_a_temperature_and_a_letter_of_its_own(model: proxytune.ProxyTunedModel, wide: list[Any]) -> None:
    prompts, given = texts(5, 2, 5), texts(5, 2, 5)
    items = [Item(p, [t]) for p, t in zip(prompts, given, strict=True)]
    found = tune(model, items, [0.5, 1.0, 4.0], knob=knob_of(model.formula, "temperature"))
    for point in found.points:
        sums = [logprob(logits(wide, p, t), t, 0.25, point.value) for p, t in zip(prompts, given, strict=True)]
        assert point.score.value == pytest.approx(sum(sums) / sum(map(len, given)), abs=2e-4)
    amateur = proxytune.wrap(
        shared("llama", 1),
        members={"amateur": shared("qwen3", 2)},
        formula=ContrastiveDecoding(beta=0.5, share=None),
        check_vocabulary=False,
    )
    found = tune(amateur, items, [0.0, 0.5])
    assert found.knob.name == "beta"
    with torch.no_grad():
        for point in found.points:
            sums = []
            for p, t in zip(prompts, given, strict=True):
                a, b = logits(wide[:2], p, t)
                sums.append(logprob([a, a, b], t, point.value))
            assert point.score.value == pytest.approx(sum(sums) / sum(map(len, given)), abs=2e-4)


def test_a_gate_says_where_it_is_open(model: proxytune.ProxyTunedModel, wide: list[Any]) -> None:
    prompts, given = texts(4, 2, 5), texts(4, 4, 9)
    items = [Item(p, [t]) for p, t in zip(prompts, given, strict=True)]
    knob = knob_of(model.formula, "gate.entropy")
    found = tune(model, items, [0.0, 1.0, 2.0, 9.0], knob=knob)
    assert found.formula == ProxyTuning(alpha=0.25, gate=Gate(entropy=found.chosen))
    assert [p.open for p in found.points][::3] == [1.0, 0.0]
    # Of an embedding table a pass reads one row for each token.
    weights = [sum(p.numel() for n, p in m.named_parameters() if "embed_tokens" not in n) for m in wide]
    for point in found.points:
        total, opened, count = 0.0, 0, 0
        for p, t in zip(prompts, given, strict=True):
            z = logits(wide, p, t)
            own = log_softmax(z[0], -1)
            entropy = -(own.exp() * own).sum(-1)
            mixed = torch.where((entropy > point.value)[:, None], z[0] + 0.25 * (z[1] - z[2]), z[0])
            total += float(log_softmax(mixed, -1).gather(1, torch.tensor(t)[:, None]).sum())
            opened, count = opened + int((entropy > point.value).sum()), count + len(t)
        assert point.score.value == pytest.approx(total / count, abs=2e-4)
        assert point.open == pytest.approx(opened / count)
        assert point.bytes == pytest.approx(1 + opened / count * (weights[1] + weights[2]) / weights[0])
    (shut,), (always,) = ([p.score.value for p in found.points if p.value == value] for value in (9.0, 0.0))
    assert (found.base, found.ungated) == pytest.approx((shut, always), abs=1e-6)
    assert found.gap(1.0) == pytest.approx((found.point(1.0).score.value - shut) / (always - shut), abs=1e-5)
    assert (found.gap(0.0), found.gap(9.0)) == pytest.approx((1.0, 0.0), abs=1e-5)
    assert found.to_json()["ungated"] == pytest.approx(always, abs=1e-5)


def test_members_read_their_own_prompts() -> None:
    model = proxytune.wrap(shared("llama", 1), formula=ContextAware(), check_vocabulary=False)
    prompts, own, given = texts(3, 4, 9), texts(3, 1, 4), texts(3, 2, 5)
    items = [Item({"base": p, "no_context": o}, [t]) for p, o, t in zip(prompts, own, given, strict=True)]
    found = tune(model, items, [0.0, 1.0])
    alone = tune(model, [Item({"base": p, "no_context": p}, [t]) for p, t in zip(prompts, given, strict=True)], [0, 1])
    assert found.point(0.0).score.value == pytest.approx(alone.point(0.0).score.value, abs=1e-5)
    assert found.point(1.0).score.value != pytest.approx(alone.point(1.0).score.value, abs=1e-2)
    assert alone.point(1.0).score.value == pytest.approx(alone.point(0.0).score.value, abs=1e-5), "one prompt: no shift"


def test_a_mask_that_forbids_a_right_text(model: proxytune.ProxyTunedModel) -> None:
    masked = proxytune.wrap(
        model.base,
        expert=model.expert,
        antiexpert=model.antiexpert,
        formula=DExperts(top_p=0.01),
        check_vocabulary=False,
    )
    items = [Item([5], [t]) for t in texts(3, 3, 6)]
    with pytest.raises(
        InputError, match=r"the values of alpha: expected one that allows all right texts; got .* for each of 0, 1"
    ):
        tune(masked, items, [0.0, 1.0])
    found = tune(masked, items, [0.01, 1.0], knob=knob_of(masked.formula, "top_p"))
    assert (found.best, found.chosen) == (1.0, 1.0)
    assert found.to_json()["curve"][0]["score"] is None
    choices = [Item([5], texts(2, 3, 4)) for _ in range(3)]
    found = tune(masked, choices, [0.01, 1.0], knob=knob_of(masked.formula, "top_p"))
    assert found.point(0.01).score.value == 0.0, "all forbidden: none is the likeliest"
    assert found.point(1.0).score.value > 0.0


def test_knobs_by_their_names(model: proxytune.ProxyTunedModel) -> None:
    assert knobs_of(ProxyTuning()) == ["alpha", "gate.entropy", "gate.top1", "temperature"]
    assert knobs_of(ContrastiveDecoding()) == ["beta", "gate.entropy", "gate.top1", "temperature", "share"]
    with pytest.raises(InputError, match=r"knob: expected 'beta', .* or 'share'; got 'lam'"):
        knob_of(ContrastiveDecoding(), "lam")
    assert knob_of(ContrastiveDecoding(), "alpha").name == "beta"
    entropy = knob_of(ProxyTuning(), "gate.entropy")
    assert min([0.1, 0.5, 2.0], key=entropy.distance) == 2.0, "the gate that opens least"


@pytest.mark.parametrize(
    ("items", "values", "message"),
    [
        ([Item([5], [[6]])], VALUES, "items: expected at least two, .*; got 1"),
        ([Item([5], [[6]]), Item([5], [[6], [7]])], VALUES, "got some of each kind"),
        ([Item([5], [[6]])] * 2, [1.0, 1.0], "values: expected at least two different numbers"),
        ([Item([5], [[6]])] * 2, [1.0, math.nan], "a value of alpha: expected a finite number"),
        ([Item([5], [[6]]), Item([5], [[]], name="line 2")], VALUES, "line 2: expected at least one token"),
        ([Item([5], [[6], [999]], name="line 1")] * 2, VALUES, "line 1, choice 1: expected ids from 0 to 255"),
    ],
)
def test_what_cannot_be_tuned_is_refused(
    model: proxytune.ProxyTunedModel, items: list[Item], values: list[float], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        tune(model, items, values)


def test_an_item_has_its_answer_among_its_choices() -> None:
    with pytest.raises(InputError, match=r"an item: expected at least one choice, .*; got 2 choices and answer=2"):
        Item([5], [[6], [7]], 2)


def test_answers_that_are_written_are_judged(model: proxytune.ProxyTunedModel) -> None:
    """A judge whose verdict is known: item `i` is right at α ≥ i / 20; more is not better."""
    calls: list[tuple[float, list[int]]] = []

    def judge(asked: Any, items: Any) -> list[bool]:
        assert asked is model
        calls.append((model.alpha, list(items)))
        return [model.alpha >= i / 20 for i in items]

    found = tune_by(model, judge, 40, [0.0, 0.5, 1.0, 1.9, 2.0], seed=3)
    assert model.alpha == 0.25, "as it was"
    assert {p.value: p.items for p in found.points if p.items == 40}.keys() >= {1.9, 2.0}
    assert found.point(2.0).score.value == 1.0
    assert found.point(1.9).score.value == 39 / 40
    assert (found.best, found.chosen) == (2.0, 1.9), "one item of 40 is one standard error"
    assert found.point(0.0).items == 16
    assert len({i for alpha, items in calls if alpha == 2.0 for i in items}) == 40
    assert sum(len(items) for alpha, items in calls if alpha == 0.0) == 16
    assert (found.metric, found.tokens) == ("accuracy", 0)
    knob = knob_of(model.formula, "gate.entropy")
    gated = tune_by(model, lambda asked, items: [asked.formula.gate is None] * len(items), 4, [0.5, 1.0], knob=knob)
    assert (gated.base, gated.ungated, gated.point(0.5).open) == (1.0, 1.0, None)
    assert model.formula == ProxyTuning(alpha=0.25)
    for wrong, message in (
        (lambda: tune_by(model, lambda m, items: [True], 3, [0, 1]), "judge: expected 3 verdicts, .*; got 1"),
        (lambda: tune_by(model, judge, 1, [0, 1]), "count: expected a whole number of items, at least 2; got 1"),
        (
            lambda: tune_by(model, judge, 3, [1, 2], knob=knob_of(model.formula, "temperature")),
            "knob: expected a number",
        ),
    ):
        with pytest.raises(InputError, match=message):
            wrong()
    assert model.formula == ProxyTuning(alpha=0.25)
