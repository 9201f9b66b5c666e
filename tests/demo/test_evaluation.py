"""Asking, scoring and comparing."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from lab.family.tokenizer import build_tokenizer
from lab.report import best_alpha
from transformers import PreTrainedTokenizerFast

from proxytune.demo.evaluation import (
    Gap,
    Outcome,
    Row,
    Score,
    answer,
    evaluate,
    gap_closed,
    held_out,
    shots_of,
    table_record,
)
from proxytune.demo.instructions import prompt_of
from proxytune.demo.tasks import Problem, problems
from proxytune.demo.verifiers import Grade
from proxytune.demo.world import World, build_world


@pytest.fixture(scope="module")
def world() -> World:
    return build_world()


@pytest.fixture(scope="module")
def tokenizer(world: World) -> PreTrainedTokenizerFast:
    return build_tokenizer(world)


class Scripted:
    """A model that looks its answers up: the part of `generate()` that `answer()` relies on."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, answers: dict[str, str]) -> None:
        self.tokenizer, self.answers = tokenizer, answers
        self.batches: list[int] = []
        self.stops: list[Any] = []

    def generate(
        self, *, input_ids: torch.Tensor, attention_mask: torch.Tensor, do_sample: bool, eos_token_id: Any = None
    ) -> torch.Tensor:
        assert not do_sample
        self.batches.append(len(input_ids))
        self.stops.append(eos_token_id)
        assert (attention_mask == (input_ids != 0)).all()
        rows = []
        for ids in input_ids:
            prompt = str(self.tokenizer.decode(ids, skip_special_tokens=True))
            rows.append([*self.tokenizer(self.answers[prompt.rpartition("Question: ")[2]])["input_ids"], 1])
        width = max(map(len, rows))
        return torch.cat([input_ids, torch.tensor([row + [0] * (width - len(row)) for row in rows])], dim=1)


def script(asked: list[Problem], texts: list[str]) -> dict[str, str]:
    return {
        prompt_of(problem.question).removeprefix("Question: "): text for problem, text in zip(asked, texts, strict=True)
    }


def test_answers_come_back_in_order_whatever_the_batching(world: World, tokenizer: PreTrainedTokenizerFast) -> None:
    asked = problems("chain", "validation", 10, world)
    texts = [f" {problem.answer}" if index % 3 else " I do not know." for index, problem in enumerate(asked)]
    model = Scripted(tokenizer, script(asked, texts))
    outcomes = answer(model, tokenizer, asked, batch_size=4)
    assert model.batches == [4, 4, 2]
    assert [outcome.problem for outcome in outcomes] == asked
    assert [outcome.text for outcome in outcomes] == texts
    assert [outcome.grade.strict for outcome in outcomes] == [index % 3 > 0 for index in range(10)]


def test_with_shots_an_answer_is_one_line_and_without_it_is_everything(
    world: World, tokenizer: PreTrainedTokenizerFast
) -> None:
    asked = problems("qa", "validation", 3, world)
    texts = [f" {problem.answer}\nQuestion: Where" for problem in asked]
    model = Scripted(tokenizer, script(asked, texts))
    run_on = answer(model, tokenizer, asked)
    cut = answer(model, tokenizer, asked, shots=shots_of(world, "qa"))
    assert [outcome.grade for outcome in run_on] == [Grade(True, False)] * 3
    assert [outcome.grade for outcome in cut] == [Grade(True, True)] * 3
    assert model.stops[0] is None  # the model's own setting
    assert model.stops[1] == [1, tokenizer.encode("\n")[0]]


def test_shots_are_training_problems_and_never_held_out_ones(world: World) -> None:
    for task in ("chain", "qa", "countdown"):
        shots = shots_of(world, task)
        held = {problem.key for split in ("validation", "test") for problem in problems(task, split, 300, world)}
        assert len(shots) == 3
        assert len({shot.question for shot in shots}) == 3
        assert not {shot.key for shot in shots} & held


@pytest.mark.parametrize(
    ("correct", "total", "low", "high"),
    # Reference values: Wilson score intervals without continuity correction, computed by hand from the formula.
    [(0, 10, 0.0, 0.2775), (5, 10, 0.2366, 0.7634), (10, 10, 0.7225, 1.0), (81, 263, 0.2553, 0.3662)],
)
def test_wilson_intervals(correct: int, total: int, low: float, high: float) -> None:
    assert Score(correct, total).interval == pytest.approx((low, high), abs=1e-4)


def test_an_empty_score_is_not_a_number() -> None:
    assert math.isnan(Score(0, 0).rate)
    assert all(math.isnan(end) for end in Score(0, 0).interval)


def row_of(name: str, right: list[bool], strict: list[bool] | None = None) -> Row:
    problem = Problem("qa", "?", "x", "", "qa:x:job")
    outcomes = [
        Outcome(problem, "", Grade(lenient, exact)) for lenient, exact in zip(right, strict or right, strict=True)
    ]
    return Row(name, {"qa": outcomes, "chain": outcomes})


def test_gap_closed_is_the_share_of_the_gain_and_its_interval_covers_it() -> None:
    rng = np.random.default_rng(3)
    base = row_of("base", list(rng.random(300) < 0.1))
    proxy = row_of("proxy", list(rng.random(300) < 0.8))
    tuned = row_of("tuned", list(rng.random(300) < 0.9))
    gap = gap_closed(base, proxy, tuned, "qa")
    expected = (proxy.score("qa").rate - base.score("qa").rate) / (tuned.score("qa").rate - base.score("qa").rate)
    assert gap.closed == pytest.approx(expected)
    assert gap.low < gap.closed < gap.high
    # The delta-method standard error of this share is about 0.035.
    assert 0.08 < gap.high - gap.low < 0.2
    assert gap_closed(base, tuned, tuned, "qa") == Gap(1.0, 1.0, 1.0)
    assert gap_closed(base, base, tuned, "qa").closed == 0.0


def test_no_gain_leaves_the_gap_undefined_and_json_says_null() -> None:
    rows = [row_of("base", [True, False]), row_of("proxy", [True, True]), row_of("tuned", [True, False])]
    assert math.isnan(gap_closed(rows[0], rows[1], rows[2], "qa").closed)
    record = json.loads(json.dumps(table_record(rows), allow_nan=False))
    assert record["gap_closed"]["qa"]["lenient"] == {"closed": None, "interval": None}
    assert [row["scores"]["qa"]["strict"]["rate"] for row in record["rows"]] == [0.5, 1.0, 0.5]


def test_alpha_is_the_gentlest_within_one_standard_error_by_strict_scores() -> None:
    def sweep_row(alpha: str, strict: int) -> Row:
        return row_of(alpha, [True] * 100, [index < strict for index in range(100)])

    # At 90 of 100 on both tasks the standard error of the average is 3 % / sqrt(2) = 2.1 %.
    assert best_alpha([sweep_row("1", 90), sweep_row("0.5", 88), sweep_row("0.25", 87)]) == 0.5
    assert best_alpha([sweep_row("0.25", 50), sweep_row("0.5", 90), sweep_row("1", 91)]) == 0.5
    assert best_alpha([sweep_row("0.25", 50), sweep_row("0.5", 80), sweep_row("1", 91)]) == 1.0


def test_a_row_has_every_task_and_its_problems(world: World, tokenizer: PreTrainedTokenizerFast) -> None:
    asked = held_out(world, "validation", 4)
    flat = [problem for chosen in asked.values() for problem in chosen]
    model = Scripted(tokenizer, script(flat, [f" {problem.answer}" for problem in flat]))
    row = evaluate("gold", model, tokenizer, asked)
    assert {task: row.score(task, "strict") for task in row.outcomes} == dict.fromkeys(
        ("chain", "qa", "countdown"), Score(4, 4)
    )
