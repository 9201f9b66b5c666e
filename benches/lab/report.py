"""Measure a trained family: choose alpha on the validation split, report on the test split, write the record."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lab.family.family import FamilyRecipe, load_family, write_record
from lab.family.training import TrainingReport
from proxytune.demo.bundle import MemberName
from proxytune.demo.evaluation import CRITERIA, Row, best_alpha, family_rows, sweep_alpha, table_record

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
    """Choose alpha, fill the table and write `family.json`.

    Args:
        folder: A family folder.
        seed: The training seed it was made with.
        training: The cost of every member.
        recipe: What was trained [the shipped recipe].
        alphas: The candidates, tried on the validation split only.
        count: Problems per task and split at most.

    Returns:
        The record: `alpha`, `seed`, `recipe`, `training`, `validation` (the sweep) and `test` (the table).
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
