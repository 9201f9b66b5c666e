"""`results/forks.json` as blocks of the pages."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import fmean
from typing import Any

from _forks.sampling import AT_ONE, CHOSEN

VOTES = {
    "equal": "all leaves equal",
    "p-weighted": "weighted by probability",
    "exact": "exact (Kool et al.)",
    "as many independent samples": "as many independent samples",
    "independent samples for as many tokens": "independent samples, equal tokens",
}
TREES = ("fork tree", "random tree", "start", "siblings, repulsion 0.5", "siblings, repulsion 2")
TEMPERATURES = "two temperatures"
MODELS = {"tuned": "tuned", "collapsed": "collapsed twin"}


def points(value: dict[str, float], *, sign: bool = True) -> str:
    """A share with its interval, in percentage points."""
    form = "{:+.1f}" if sign else "{:.1f}"
    return f"{form} [{form}, {form}]".format(*(100 * value[end] for end in ("value", "low", "high")))


def span(values: Sequence[float], digits: int = 2) -> str:
    """The range over seeds."""
    low, high = (f"{end:.{digits}f}" for end in (min(values), max(values)))
    return low if low == high else f"{low}–{high}"


def votes_table(record: dict[str, Any]) -> list[str]:
    """Bias and spread of votes over trees."""
    runs = record["per seed"]["votes"]
    lines = [
        f"| vote over a tree of {runs[0]['leaves at most']} leaves | share of the likeliest answer: error, points | "
        "in standard errors, per seed | root-mean-square error | winner is the likeliest answer, % |",
        "|---|--:|--:|--:|--:|",
    ]
    for key, name in VOTES.items():
        of = [run["by"][key] for run in runs]
        bias = fmean(100 * one["bias for the likeliest answer"]["value"] for one in of)
        errors = ", ".join(f"{one['the same in standard errors of the draws']:+.1f}" for one in of)
        spread = fmean(one["root-mean-square error"] for one in of)
        wins = fmean(100 * one["winner is the likeliest"]["value"] for one in of)
        lines.append(f"| {name} | {bias:+.1f} | {errors} | {spread:.3f} | {wins:.0f} |")
    return lines


def sampling_table(record: dict[str, Any], methods: Sequence[str] = (TEMPERATURES, *TREES)) -> list[str]:
    """Countdown: differences to the better of both references, for the same number of tokens."""
    over = record["over seeds"]
    measures = {"coverage": "some sample is right, points", "distinct solutions": "distinct solutions"}
    lines = [
        "| Countdown, difference to plain sampling, equal tokens | "
        + " | ".join(f"{name}: {what}" for name in MODELS.values() for what in measures.values())
        + " |",
        "|---|" + "--:|" * (2 * len(MODELS)),
    ]
    for k in over["tuned"]["two temperatures"] if TEMPERATURES in methods else ():
        cells = " | ".join(f"{_smaller(over[model]['two temperatures'][k], points)} | –" for model in MODELS)
        lines.append(f"| {TEMPERATURES}, k = {k.removeprefix('k=')} | {cells} |")
    for method in (one for one in TREES if one in methods):
        for size in (8, 16):
            rows = [over[model]["methods"][f"{method}, {size}"] for model in MODELS]
            forms = dict(zip(measures, (points, number), strict=True))
            cells = " | ".join(_smaller(row[measure], form) for row in rows for measure, form in forms.items())
            lines.append(f"| {method}, {size} | {cells} |")
    return lines


def _smaller(found: dict[str, Any], form: Callable[[dict[str, float]], str]) -> str:
    """The difference to the better reference; an asterisk if that is temperature 1."""
    better = found["better reference"]
    return form(found[better]) + ("*" if better == AT_ONE else "")


def reference_sentence(record: dict[str, Any]) -> str:
    """What the differences are to, which temperatures were chosen, and which of them are at an end of the sweep."""
    tests = {model: [run["temperatures"]["test"] for run in record["per seed"][model]] for model in MODELS}
    tried = record["per seed"]["tuned"][0]["temperatures"]["validation"]
    swept = sorted(one["exec"] for one in tried if one["exec"] == one["fork"])
    chosen = "; ".join(
        f"{name} {', '.join(format(test['k=16'][CHOSEN]['temperature'], 'g') for test in tests[model])}"
        for model, name in MODELS.items()
    )
    return (
        f"The reference is plain sampling at the temperature chosen on validation, of {len(swept)} from {swept[0]:g} "
        f"to {swept[-1]:g}, or at temperature 1: each cell shows the smaller difference of the two (an asterisk marks "
        f"temperature 1), which favours the reference. Chosen for pass@16: {chosen}. {_ends(tests, swept)}"
    )


def _ends(tests: dict[str, list[dict[str, Any]]], swept: Sequence[float]) -> str:
    """Where the choice fell on the first or the last temperature of the sweep."""
    found = []
    for model, name in MODELS.items():
        for k in tests[model][0]:
            for end in (swept[0], swept[-1]):
                count = sum(test[k][CHOSEN]["temperature"] == end for test in tests[model])
                if count:
                    found.append(f"{name}, k = {k.removeprefix('k=')}: {end:g} in {count} of {len(tests[model])}")
    if not found:
        return "No chosen temperature, for any k, is at an end of the sweep."
    return f"Chosen temperatures at an end of the sweep: {'; '.join(found)}."


def number(value: dict[str, float]) -> str:
    """A difference of counts with its interval."""
    return "{:+.2f} [{:+.2f}, {:+.2f}]".format(*(value[end] for end in ("value", "low", "high")))


def collapse_sentence(record: dict[str, Any]) -> str:
    """The effect of the policy gradient."""
    rates = {
        model: {
            k: fmean(
                run["spreads"]["independent"][AT_ONE][f"k={k}"]["coverage"]["value"]
                for run in record["per seed"][model]
            )
            for k in (1, 64)
        }
        for model in MODELS
    }
    return (
        f"The policy gradient took pass@1 from {100 * rates['tuned'][1]:.0f} to {100 * rates['collapsed'][1]:.0f} % "
        f"and pass@64 from {100 * rates['tuned'][64]:.0f} to {100 * rates['collapsed'][64]:.0f}\u00a0%."
    )


def lengths_table(record: dict[str, Any]) -> list[str]:
    """Accuracy of a sample by how long it was made."""
    runs = record["per seed"]["lengths"]
    ways = ["as it comes", *(f"at least {n} more" for n in (1, 3, 5)), "at most 40 tokens"]
    lines = ["| a sample is right, % | " + " | ".join(ways) + " |", "|---|" + "--:|" * len(ways)]
    for kind in ("worsens", "improves"):
        cells = " | ".join(span([100 * run[kind][way]["accuracy"]["value"] for run in runs], 0) for way in ways)
        lines.append(f"| answers that get {'worse' if kind == 'worsens' else 'better'} | {cells} |")
    return lines


def confidence_table(record: dict[str, Any]) -> list[str]:
    """DeepConf against the majority, and the vote chosen on the calibration set."""
    runs = record["per seed"]["confidence"]
    shown = ("majority, 8", "deepconf 90, 8", "deepconf 50, 8", "deepconf 10, 8")
    lines = [
        "| vote over 8 samples is right, % | majority | DeepConf η 90 | η 50 | η 10 | AUROC within problems "
        "| chosen on validation |",
        "|---|--:|--:|--:|--:|--:|---|",
    ]
    for kind in ("worsens", "improves"):
        of = [run["confidence"][kind] for run in runs]
        cells = " | ".join(span([100 * one["votes"][vote]["accuracy"]["value"] for one in of], 0) for vote in shown)
        signal = span([one["auroc"]["lowest_group"]["within problems"]["value"] for one in of])
        chosen = ", ".join(one["chosen on validation"]["how"] for one in of)
        lines.append(
            f"| answers that get {'worse' if kind == 'worsens' else 'better'} | {cells} | {signal} | {chosen} |"
        )
    return lines


def allocation_table(record: dict[str, Any]) -> list[str]:
    """The allocator against the policy that was best in hindsight."""
    runs = record["per seed"]["confidence"]
    lines = [
        "| budget, tokens | allocator, % | best fixed policy in hindsight, % | difference, points, per seed |",
        "|--:|--:|---|---|",
    ]
    for budget in runs[0]["allocation"]["budgets"]:
        of = [run["allocation"]["budgets"][budget] for run in runs]
        if any("refused" in one for one in of):
            continue
        best = ", ".join(
            f"{one['best fixed policy in hindsight']['name']}: "
            f"{100 * one['best fixed policy in hindsight']['accuracy']['value']:.0f}"
            for one in of
        )
        differences = "; ".join(points(one["− best fixed policy"]) for one in of)
        lines.append(
            f"| {budget} | {span([100 * one['accuracy']['value'] for one in of], 0)} | {best} | {differences} |"
        )
    return lines


def detection_block(record: dict[str, Any]) -> str:
    """How well a calibrated threshold finds forks that are known."""
    detection = record["per seed"]["detection"]
    taught = [run["target share as taught"] for run in detection]
    fifth = [run["target share 20 %"] for run in detection]
    return (
        f"**Forks.** On routes, {span([100 * run['share of real forks'] for run in detection], 1)} % of the tokens are "
        f"forks by construction. A threshold calibrated to that share finds them with precision "
        f"{span([one['precision'] for one in taught])} and recall {span([one['recall'] for one in taught])}; one "
        f"calibrated to 20 %, with precision {span([one['precision'] for one in fifth])}: a target share above the "
        "real one marks tokens as forks that are none."
    )


def votes_block(record: dict[str, Any]) -> str:
    """How a vote over a tree has to count its leaves."""
    trees = record["per seed"]["votes"]
    costs = span([100 * tree["tokens of a tree"] / tree["tokens of as many samples"] for tree in trees], 0)
    said = (
        f"**Votes over trees.** {trees[0]['routes']} routes, {trees[0]['trees of each']} trees of each, three models. "
        f"The true distribution is enumerated. A tree costs {costs} % of the tokens of as many samples."
    )
    return "\n".join([said, "", *votes_table(record)])


def countdown_block(record: dict[str, Any], methods: Sequence[str] = (TEMPERATURES, *TREES)) -> str:
    """Two temperatures, trees and siblings, or some of these, against plain sampling."""
    sizes = record["sizes"]["spreads"]
    said = (
        f"**Countdown, against plain sampling.** {sizes['count']} test problems; settings chosen on others. The "
        f"tuned model with three sampling seeds, and three trainings of its collapsed twin. {collapse_sentence(record)}"
        f" {reference_sentence(record)}"
    )
    return "\n".join([said, "", *sampling_table(record, methods)])


def lengths_block(record: dict[str, Any]) -> str:
    """Answers that change with their length."""
    said = "**Answers that change with their length**, by construction: range over three trainings."
    return "\n".join([said, "", *lengths_table(record)])


def confidence_block(record: dict[str, Any]) -> str:
    """Votes that filter by confidence."""
    said = "**Votes by confidence**, over the same models' answers: range over three trainings."
    return "\n".join([said, "", *confidence_table(record)])


def allocation_block(record: dict[str, Any]) -> str:
    """The allocator against fixed policies."""
    said = "**Parallel or sequential**, on problems of both kinds, calibrated on other problems:"
    return "\n".join([said, "", *allocation_table(record)])


def forks_block(record: dict[str, Any]) -> str:
    """All results, from what `bench_forks.py --write` wrote."""
    parts = (detection_block, votes_block, countdown_block, lengths_block, confidence_block, allocation_block)
    return "\n\n".join(part(record) for part in parts)
