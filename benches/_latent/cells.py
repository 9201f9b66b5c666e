"""One cell of `bench_latent.py`: a model, a puzzle, every method; settings chosen on validation, tested on test."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from _latent.measures import METRICS, SELECTIONS, SIZES, Answered, compare, per_sample, uniform_bound
from _latent.methods import FAMILIES, TEMPERATURES, Asked, Setting, draw, settings

RULE = "coverage@16"
"""The metric that chooses the base temperature of the other methods."""


@dataclass(frozen=True)
class Size:
    """How much is drawn: `tried` samples of `chosen_on` validation instances, `drawn` of `judged_on` test instances."""

    chosen_on: int
    tried: int
    judged_on: int
    drawn: int


def cell(validation: Asked, test: Asked, size: Size, *, seed: int) -> dict[str, Any]:
    """Everything about one model and one puzzle: settings chosen on validation, tested on test with other draws.

    Returns:
        The record: `validation` with all settings, `test` with a value per instance, and the base temperature.
    """
    tried = {t: draw(validation, t, size.tried, seed) for t in map(_plain, TEMPERATURES)}
    best = max(tried, key=lambda t: _mean(tried[t], RULE))
    for setting in settings(validation, best.temperature):
        tried[setting] = draw(validation, setting, size.tried, seed)
    metrics = [*METRICS, *(SELECTIONS if validation.recurs else ())]
    chosen = {metric: choose(tried, best, metric) for metric in metrics}
    needed = {setting: None for row in chosen.values() for setting in row.values()}
    judged = {setting: draw(test, setting, size.drawn, seed + 1) for setting in needed}
    solutions = [a.solutions for a in judged[chosen[RULE]["temperature"]]]
    return {
        "nats": [round(nats, 4) for nats in validation.nats],
        "base temperature": best.temperature,
        "solutions": round(float(np.mean(solutions)), 3),
        "uniform bound": {f"coverage@{n}": _round([uniform_bound(s, n) for s in solutions]) for n in SIZES},
        "validation": [_tried(setting, answered) for setting, answered in tried.items()],
        "test": {metric: _judged(judged, row, metric) for metric, row in chosen.items()},
    }


def choose(tried: dict[Setting, list[Answered]], best: Setting, metric: str) -> dict[str, Setting]:
    """The best setting of each family for a metric, by its mean advantage over the temperature `best` at equal passes.

    `tried` has each setting's answers on validation. Families that cannot have the metric are left out. Ties, frequent
    in pass@16 on few instances, are broken by the advantage in coverage@16, then by order.
    """
    out: dict[str, Setting] = {}
    for family in FAMILIES:
        of = [setting for setting in tried if setting.family == family and _fits(setting, metric)]
        if metric in SELECTIONS and family not in ("temperature", "recursion"):
            continue
        if of:
            score = {
                s: [round(float(compare(tried[s], tried[best], m).differences.mean()), 9) for m in (metric, RULE)]
                for s in of
            }
            out[family] = max(of, key=score.__getitem__)
    return out


def _fits(setting: Setting, metric: str) -> bool:
    """Whether a tree has as many leaves as the metric has samples (16 if it has no number)."""
    leaves = dict(setting.knobs).get("leaves")
    return leaves is None or leaves == int(metric.partition("@")[2] or 16)


def _plain(temperature: float) -> Setting:
    return Setting.of("temperature", temperature)


def _mean(answered: Sequence[Answered], metric: str) -> float:
    return float(np.mean([a.at(metric, int(metric.partition("@")[2] or 1)) for a in answered]))


def _tried(setting: Setting, answered: Sequence[Answered]) -> dict[str, Any]:
    shown = {m: round(_mean(answered, m), 4) for m in METRICS if _fits(setting, m)}
    return {"family": setting.family, "setting": setting.label, "passes": round(per_sample(answered), 2), **shown}


def _judged(judged: dict[Setting, list[Answered]], row: dict[str, Setting], metric: str) -> dict[str, Any]:
    reference = judged[row["temperature"]]
    out: dict[str, Any] = {}
    for family, setting in row.items():
        pair = compare(judged[setting], reference, metric)
        out[family] = {
            "setting": setting.label,
            "samples": [round(n, 3) for n in pair.samples],
            "passes of an instance": round(pair.passes, 2),
            "passes drawn": [a.passes for a in judged[setting]],
            "values": _round(pair.method),
            "differences": _round(pair.differences),
        }
        if family == "recursion":  # at equal samples, though each trajectory also reads the prompt again
            same = [_mean([a], metric) - _mean([b], metric) for a, b in zip(judged[setting], reference, strict=True)]
            out[family]["differences at equal samples"] = _round(same)
    return out


def _round(values: Sequence[float] | np.ndarray) -> list[float]:
    return [round(float(value), 4) for value in values]
