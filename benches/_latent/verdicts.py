"""A cell's result over three training seeds, and the verdict on each registered hypothesis."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Literal

import numpy as np
from _forks.common import record

from _latent.measures import pooled

Outcome = Literal["win", "null", "loss"]
PUZZLES = ("colouring", "queens", "countdown")
KINDS = ("llama", "hrm")
TWINS = ("varied", "collapsed")


def outcome(interval: dict[str, float], means: Sequence[float]) -> Outcome:
    """A win or a loss if the pooled interval and the mean of every training seed agree on the sign; else null."""
    if interval["low"] > 0 and min(means) > 0:
        return "win"
    if interval["high"] < 0 and max(means) < 0:
        return "loss"
    return "null"


def over_seeds(records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One cell over its training seeds: every metric's families with values, paired differences and outcome."""
    tests = [one["test"] for one in records]
    metrics = {
        metric: {family: _family([test[metric][family] for test in tests]) for family in tests[0][metric]}
        for metric in tests[0]
    }
    return {
        "fork threshold, nats": [one["nats"] for one in records],
        "base temperature": [one["base temperature"] for one in records],
        "solutions of an instance": [one["solutions"] for one in records],
        "uniform bound": {
            name: round(float(np.mean([np.mean(one["uniform bound"][name]) for one in records])), 4)
            for name in records[0]["uniform bound"]
        },
        "test": metrics,
        "temperatures on validation": [
            [row for row in one["validation"] if row["family"] == "temperature"] for one in records
        ],
        "settings tried": [len(one["validation"]) for one in records],
    }


def _family(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    out: dict[str, Any] = {
        "settings": [run["setting"] for run in runs],
        "samples": [run["samples"] for run in runs],
        "passes of an instance": [run["passes of an instance"] for run in runs],
        "passes drawn of an instance": [round(float(np.mean(run["passes drawn"])), 2) for run in runs],
        "value": record(pooled([run["values"] for run in runs])),
    }
    out |= _difference([run["differences"] for run in runs])
    if "differences at equal samples" in runs[0]:
        out["at equal samples"] = _difference([run["differences at equal samples"] for run in runs])
    return out


def _difference(groups: Sequence[Sequence[float]]) -> dict[str, Any]:
    over = record(pooled(groups))
    each = [record(pooled([group])) for group in groups]
    return {
        "− best temperature": over,
        "per seed": each,
        "outcome": outcome(over, [one["value"] for one in each]),
    }


def latent_family(puzzle: str) -> str:
    """Where the registered latent steps are: in the scratchpad if the puzzle has one, else everywhere."""
    return "scratchpad" if puzzle == "countdown" else "latent"


def _cells() -> dict[str, list[tuple[str, str, str, str]]]:
    """Hypothesis → the model, puzzle, metric and family of each cell that it covers."""
    h2 = [(f"{kind}-collapsed", p, "coverage@16", latent_family(p)) for kind in KINDS for p in PUZZLES]
    h2 += [("hrm-collapsed", p, "coverage@16", "recursion") for p in PUZZLES]
    selectors = ("pass@16", "logprob@16", "vote@16")
    answers = ("colouring", "queens")
    return {
        "H1": [(f"{kind}-varied", "countdown", "coverage@16", "scratchpad") for kind in KINDS],
        "H2": h2,
        "H3": [(f"hrm-{t}", p, m, "recursion") for m in selectors for t in TWINS for p in PUZZLES],
        "H4": [(f"{k}-varied", p, m, "latent") for m in ("coverage@16", "valid") for k in KINDS for p in answers],
    }


def verdict(name: str, outcomes: Iterable[Outcome]) -> str:
    """The verdict registered for such outcomes of a hypothesis."""
    found = set(outcomes)
    if name == "H4":
        return "not as expected" if "win" in found else "as expected"
    if found == {"win"}:
        return "supported"
    if {"win", "loss"} <= found:
        return "mixed"
    if "win" in found:
        return "supported in part"
    return "contradicted" if "loss" in found else "null"


def verdicts(cells: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The verdict on each hypothesis, and the outcome of every cell it covers."""
    out: dict[str, Any] = {}
    for name, about in _cells().items():
        rows = []
        for model, puzzle, metric, family in about:
            found = cells[f"{model} {puzzle}"]["test"][metric][family]
            difference = {key: found[key] for key in ("− best temperature", "outcome")}
            rows.append({"model": model, "puzzle": puzzle, "metric": metric, "family": family, **difference})
        outcomes = [row["outcome"] for row in rows]
        counts = {what: outcomes.count(what) for what in ("win", "null", "loss")}
        out[name] = {"verdict": verdict(name, outcomes), **counts, "cells": rows}
    return out
