"""`results/latent.json` as blocks of the pages."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from _latent.verdicts import KINDS, PUZZLES, TWINS, latent_family

KIND = {"llama": "Llama", "hrm": "HRM"}
MARKS = {"win": " ▲", "null": "", "loss": " ▼"}
SELECTORS = {
    "pass@16": "verifier, of 16",
    "logprob@16": "mean log-probability, of 16",
    "vote@16": "vote, of 16",
}
COLUMNS = {
    "latent": "latent steps",
    "gated": "latent steps, gated",
    "recursion": "recursion",
    "fork sampling": "fork sampling",
    "tree": "fork tree",
    "siblings": "siblings",
}
CLAIMS = {
    "H1": "scratchpad only, varied twins: coverage",
    "H2": "collapsed twins: coverage, latent steps and recursion",
    "H3": "HRM: recursion with a verifier, the log-probability or a vote",
    "H4": "answer tokens, varied twins: no gain in coverage or validity",
}


def cell(found: dict[str, Any] | None) -> str:
    """A paired difference in percentage points, with its interval and its mark."""
    if found is None:
        return "–"
    ends = [100 * found["− best temperature"][end] for end in ("value", "low", "high")]
    # A second digit for wins and losses too small for one.
    digits = 2 if found["outcome"] != "null" and min(map(abs, ends)) < 0.05 else 1
    value, low, high = (_signed(end, digits) for end in ends)
    return f"{value} [{low}, {high}]{MARKS[found['outcome']]}"


def _signed(value: float, digits: int) -> str:
    return f"{value:+.{digits}f}" if round(value, digits) else "0.0"


def _names() -> list[tuple[str, str, str]]:
    return [(puzzle, kind, twin) for puzzle in PUZZLES for kind in KINDS for twin in TWINS]


def _rows(record: dict[str, Any], metric: str, families: Sequence[str]) -> list[str]:
    lines = []
    for puzzle, kind, twin in _names():
        one = record["cells"][f"{kind}-{twin} {puzzle}"]
        test = one["test"][metric]
        plain = test["temperature"]
        heats = sorted(float(setting.removeprefix("T ")) for setting in plain["settings"])
        heat = f"{heats[0]:g}" if heats[0] == heats[-1] else f"{heats[0]:g}–{heats[-1]:g}"
        found = [test.get(latent_family(puzzle) if family == "latent" else family) for family in families]
        if not any(found):
            continue  # recursion is for the HRM only
        shown = [cell(one) for one in found]
        lines.append(
            f"| {puzzle}, {KIND[kind]}, {twin} | {100 * plain['value']['value']:.1f} at {heat} "
            f"| {100 * one['uniform bound'][metric]:.1f} | {' | '.join(shown)} |"
        )
    return lines


def coverage_table(record: dict[str, Any], families: Sequence[str] = tuple(COLUMNS)) -> list[str]:
    """Coverage at the passes of 16 samples: families of methods against the best temperature."""
    return [
        "| coverage@16, % | best temperature | uniform sampler | " + " | ".join(COLUMNS[f] for f in families) + " |",
        "|---|--:|--:|" + "--:|" * len(families),
        *_rows(record, "coverage@16", families),
    ]


def selection_table(record: dict[str, Any]) -> list[str]:
    """Recursion with a selector, against the same selector on plain samples."""
    lines = [
        "| HRM, recursion − best temperature, points | " + " | ".join(SELECTORS.values()) + " |",
        "|---|" + "--:|" * len(SELECTORS),
    ]
    for puzzle in PUZZLES:
        for twin in TWINS:
            test = record["cells"][f"hrm-{twin} {puzzle}"]["test"]
            shown = [
                f"{cell(test[name]['recursion'])} of {100 * test[name]['temperature']['value']['value']:.0f}"
                for name in SELECTORS
            ]
            lines.append(f"| {puzzle}, {twin} | {' | '.join(shown)} |")
    return lines


def hypotheses_table(record: dict[str, Any]) -> list[str]:
    """The verdicts on the hypotheses."""
    lines = ["| registered | verdict | wins | nulls | losses |", "|---|---|--:|--:|--:|"]
    for name, claim in CLAIMS.items():
        one = record["hypotheses"][name]
        lines.append(f"| {name}: {claim} | {one['verdict']} | {one['win']} | {one['null']} | {one['loss']} |")
    return lines


def tally(record: dict[str, Any], metric: str, family: str) -> str:
    """In how many of its cells a family wins."""
    found = []
    for puzzle, kind, twin in _names():
        test = record["cells"][f"{kind}-{twin} {puzzle}"]["test"][metric]
        one = test.get(latent_family(puzzle) if family == "latent" else family)
        if one is not None:
            found.append(one["outcome"])
    return f"{_count(found, 'win')} of {len(found)} ({_count(found, 'loss')})"


def _count(outcomes: Iterable[str], what: str) -> int:
    return sum(one == what for one in outcomes)


def intro(record: dict[str, Any]) -> str:
    """What was measured, and how the tables are to be read."""
    return (
        "Three puzzles whose solutions are enumerated; a Llama and an HRM, each also trained on one solution per "
        f'instance ("collapsed"); {len(record["seeds"])} trainings of each. Every method gets the forward passes of 16 '
        "plain samples (a tree is compared at the passes it takes). Settings are chosen on validation, the reference's "
        "temperature among 20 from 0.05 to 4. Differences in percentage points; ▲ and ▼: the 95 % interval over all "
        "trainings is on one side of 0, and so is the mean of each training. Latent steps on Countdown are in the "
        "scratchpad only."
    )


def tallies(record: dict[str, Any], metric: str, families: Sequence[str]) -> str:
    """In how many of their cells families win, and lose in brackets."""
    return "; ".join(f"{COLUMNS[family]} {tally(record, metric, family)}" for family in families)


def coverage_block(record: dict[str, Any], families: Sequence[str]) -> str:
    """Some families against the best temperature."""
    counts = tallies(record, "coverage@16", families)
    said = f"Cells in which coverage@16 beats the best temperature, in brackets those in which it loses: {counts}."
    return "\n\n".join([intro(record), "\n".join(coverage_table(record, families)), said])


def selection_block(record: dict[str, Any]) -> str:
    """Recursion with a selector."""
    return "\n".join(selection_table(record))


def hypotheses_block(record: dict[str, Any]) -> str:
    """What was registered, and what came out."""
    said = (
        "The hypotheses were registered beforehand, in the docstring of `benches/bench_latent.py`, with the amendments "
        "made after trial runs:"
    )
    return "\n".join([said, "", *hypotheses_table(record)])


def latent_block(record: dict[str, Any]) -> str:
    """All results, from what `bench_latent.py --write` wrote."""
    lines = ["| cells won, of all (lost) | " + " | ".join(COLUMNS.values()) + " |", "|---|" + "--:|" * len(COLUMNS)]
    for metric, name in (("coverage@16", "coverage@16"), ("valid", "share of valid"), ("pass@16", "a valid one of 16")):
        lines.append(f"| {name} | {' | '.join(tally(record, metric, family) for family in COLUMNS)} |")
    tables = [coverage_table(record), lines]
    return "\n\n".join(
        [intro(record), *("\n".join(table) for table in tables), selection_block(record), hypotheses_block(record)]
    )
