"""Measure a trained family: choose alpha on the validation split, report on the test split, write the record."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from lab.family.family import FamilyRecipe, write_record
from lab.family.training import TrainingReport
from proxytune.demo.bundle import MemberName, load_family
from proxytune.demo.evaluation import CRITERIA, STEERED, Row, compose, evaluate, held_out, shots_of, table_record
from proxytune.demo.holdout import HeldOut
from proxytune.demo.tasks import Problem, Task
from proxytune.demo.world import World, build_world

ALPHAS = (0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0)


def measure_family(
    folder: Path,
    *,
    seed: int,
    training: dict[MemberName, TrainingReport],
    recipe: FamilyRecipe | None = None,
    alphas: Sequence[float] = ALPHAS,
    count: int = 300,
) -> dict[str, Any]:
    """Choose alpha on validation, measure the table with at most `count` problems per task, write the record.

    Returns:
        The record, as in `family.json`: `alpha`, `seed`, `recipe`, `training`, `validation` (the sweep) and `test` (the
        table).
    """
    models, tokenizer = load_family(folder)
    sweep = sweep_alpha(models, tokenizer, alphas, count=count)
    alpha = best_alpha(sweep)
    record = {
        "alpha": alpha,
        "seed": seed,
        "recipe": asdict(recipe or FamilyRecipe()),
        "parameters": {member: model.num_parameters() for member, model in models.items()},
        "training": {member: asdict(report) for member, report in training.items()},
        "validation": [_sweep_record(row) for row in sweep],
        "test": table_record(family_rows(models, tokenizer, alpha, split="test", count=count)),
    }
    write_record(folder, record)
    return record


def _sweep_record(row: Row) -> dict[str, Any]:
    """One alpha of the sweep, lenient and strict rates per task."""
    rates = {task: {kind: round(row.score(task, kind).rate, 4) for kind in CRITERIA} for task in row.outcomes}
    return {"alpha": float(row.name), "rates": rates}


def family_rows(
    models: Mapping[MemberName, Any],
    tokenizer: PreTrainedTokenizerBase,
    alpha: float,
    *,
    split: HeldOut = "test",
    count: int = 300,
    world: World | None = None,
) -> list[Row]:
    """The rows of the family's table: base with 0 and 3 shots, antiexpert, expert, proxy, directly tuned."""
    world = world or build_world()
    asked = held_out(world, split, count)
    shots: dict[Task, list[Problem]] = {task: shots_of(world, task) for task in asked}
    base, expert, antiexpert = models["large-base"], models["tiny-tuned"], models["tiny-base"]
    with torch.inference_mode():
        return [
            evaluate("base, 0-shot", base, tokenizer, asked),
            evaluate("base, 3-shot", base, tokenizer, asked, shots=shots),
            evaluate("antiexpert alone", antiexpert, tokenizer, asked),
            evaluate("expert alone", expert, tokenizer, asked),
            evaluate(f"proxy, alpha {alpha:g}", compose(base, expert, antiexpert, alpha), tokenizer, asked),
            evaluate("tuned directly", models["large-tuned"], tokenizer, asked),
        ]


def sweep_alpha(
    models: Mapping[MemberName, Any],
    tokenizer: PreTrainedTokenizerBase,
    alphas: Sequence[float],
    *,
    count: int = 300,
    world: World | None = None,
) -> list[Row]:
    """The proxy on the validation split, one row per alpha."""
    asked = held_out(world or build_world(), "validation", count)
    members = models["large-base"], models["tiny-tuned"], models["tiny-base"]
    with torch.inference_mode():
        return [evaluate(f"{alpha:g}", compose(*members, alpha), tokenizer, asked) for alpha in alphas]


def best_alpha(rows: Sequence[Row]) -> float:
    """Choose alpha from a sweep: the smallest whose score is within one standard error of the best.

    The score is the strict share of right answers, averaged over chains and people; Countdown is left out, because
    tuning hardly gains anything there. 200 problems cannot tell neighbouring alphas apart, so the one-standard-error
    rule (Breiman et al. 1984) takes the smallest of the equally good ones.
    """

    def score(row: Row) -> float:
        return sum(row.score(task, "strict").rate for task in STEERED) / len(STEERED)

    best = max(rows, key=score)
    shares = [best.score(task, "strict") for task in STEERED]
    error = math.sqrt(sum(share.rate * (1 - share.rate) / share.total for share in shares)) / len(shares)
    return min(float(row.name) for row in rows if score(row) >= score(best) - error)
