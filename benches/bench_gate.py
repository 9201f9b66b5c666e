"""Measure how many steps need the companions: the gap closed by a shift that applies where a gate is open.

::

    python benches/bench_gate.py --write                        the bundled family, and keep it
    python benches/bench_gate.py --write --family A B           families that `python -m lab train --out A` made
    python benches/bench_gate.py --write --real PAIR --base M   a pair that `python -m lab real M --out PAIR` made
    python benches/bench_gate.py --markdown                     the tables, from the JSON

Writes benches/results/gate.json, where what was measured before under another name stays. Everything is greedy at one
α. All members run at every step here, and a rule says from what it may look at whether the step is shifted: the tokens
are those of a gate, whoever runs. A threshold is chosen on validation problems, as the one that asks least among those
that lose at most two problems in a hundred against the shift everywhere, over all tasks; test problems are answered
once with every rule. A share is that of the steps of unfinished rows.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch
from _gate.rules import Rule, everywhere, learnt, real_rules, rules
from _gate.subjects import Gated, Subject, family, real_pair

from proxytune.demo.bundle import bundled_family
from proxytune.demo.evaluation import Row, gap_closed

RESULTS = Path(__file__).resolve().parent / "results" / "gate.json"
BUNDLED = "the bundled family"
NAMES = {"chain": "chain", "qa": "QA", "json": "right and in form"}
LOSS = 0.02
"""What a chosen threshold may lose on validation problems, as a share of all of them."""


def measure(subject: Subject, tried: Sequence[Rule], learnt_at: Sequence[float]) -> dict[str, Any]:
    """Every rule on validation and test problems, and the chosen ones."""
    began, seen = time.perf_counter(), []
    subject.ask("validation", Gated(subject.composed, subject.end, Rule("always", 0.0, everywhere), seen=seen))
    ends = {split: (subject.ask(split, subject.base), subject.ask(split, subject.tuned)) for split in subject.counts}
    out: dict[str, Any] = {
        "name": subject.name,
        "alpha": subject.composed.alpha,
        "problems": subject.counts["test"],
        "chosen_on": subject.counts["validation"],
        "tuned": {task: sum(o.correct("strict") for o in ends["test"][1][task]) for task in subject.tasks},
        "rules": [],
    }
    for rule in [*tried, *learnt(seen, learnt_at)]:
        record: dict[str, Any] = {"kind": rule.kind, "at": rule.at}
        for split in subject.counts:
            gated = Gated(subject.composed, subject.end, rule)
            outcomes = subject.ask(split, gated)
            rows = [Row(which, answers) for which, answers in zip(("base", "tuned"), ends[split], strict=True)]
            gaps = {t: gap_closed(rows[0], Row("proxy", outcomes), rows[1], t, "strict") for t in subject.tasks}
            record[split] = {
                "share": round(gated.share, 4),
                "right": {task: sum(o.correct("strict") for o in outcomes[task]) for task in subject.tasks},
                "gap": {t: [round(float(x), 4) for x in (g.closed, g.low, g.high)] for t, g in gaps.items()},
            }
        out["rules"].append(record)
        found = record["test"]
        print(f"{subject.name}: {rule.kind} {rule.at:g}: {found['share']:.2f}, {found['gap']}", file=sys.stderr)
    out["chosen"] = chosen(out["rules"], out["chosen_on"])
    out["seconds"] = round(time.perf_counter() - began)
    return out


def chosen(found: Sequence[dict[str, Any]], problems: int) -> dict[str, float | None]:
    """For each kind the setting that asks least on validation problems and loses at most `LOSS`; None if none."""
    right = [sum(one["validation"]["right"].values()) for one in found]
    least = right[0] - LOSS * problems * len(found[0]["validation"]["right"])
    kinds: dict[str, float | None] = {}
    for kind in dict.fromkeys(one["kind"] for one in found):
        able = [
            (one["validation"]["share"], one["at"])
            for one, n in zip(found, right, strict=True)
            if one["kind"] == kind and n >= least
        ]
        kinds[kind] = min(able)[1] if able else None
    return kinds


def gate_table(record: dict[str, Any]) -> str:
    """The chosen settings on test problems: families of the same tasks side by side."""
    groups: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for subject in record["families"]:
        groups.setdefault(tuple(subject["rules"][0]["test"]["gap"]), []).append(subject)
    return "\n\n".join(_group_table(tasks, subjects) for tasks, subjects in groups.items())


def _group_table(tasks: Sequence[str], subjects: Sequence[dict[str, Any]]) -> str:
    found = [{kind: _picked(subject, kind) for kind in subject["chosen"]} for subject in subjects]
    widths = []
    lines = []
    for kind in subjects[0]["chosen"]:
        cells = []
        for of in found:
            at, test, kept = of[kind]
            widths += [(high - low) / 2 for _, low, high in test["gap"].values() if not np.isnan(low)]
            gaps = " · ".join("no gap" if np.isnan(gap[0]) else f"{100 * gap[0]:.0f}" for gap in test["gap"].values())
            cells.append(f"{at:g}: {100 * test['share']:.0f} % → {gaps}" + ("" if kept else " (lost)"))
        lines.append(f"| {kind} | " + " | ".join(cells) + " |")
    heads = [f"{subject['name']}, α = {subject['alpha']:g}" for subject in subjects]
    alike = {(subject["problems"], subject["chosen_on"]) for subject in subjects}
    asked = " or ".join(f"{problems} test and {chosen_on} validation problems a task" for problems, chosen_on in alike)
    said = ", ".join(NAMES[task] for task in tasks)
    return (
        "| the shift applies where | "
        + " | ".join(heads)
        + " |\n|---"
        + "|---" * len(heads)
        + "|\n"
        + "\n".join(lines)
        + "\n\nEach cell: the setting, the companion passes that are left → the gap closed, % ("
        + said
        + f"). Greedy, {asked}; settings chosen on validation, and *lost* where none kept the gap there (then the "
        f"best one of those tried). 95 % intervals of the gap, ± at most {100 * max(widths):.0f}, are in the record."
    )


def _picked(subject: dict[str, Any], kind: str) -> tuple[float, dict[str, Any], bool]:
    """The setting of a kind that validation chose, its test results, and whether it kept the gap on validation."""
    at = subject["chosen"][kind]
    tried = [one for one in subject["rules"] if one["kind"] == kind]
    one = next((one for one in tried if one["at"] == at), None)
    if one is None:
        one = max(tried, key=lambda one: sum(one["validation"]["right"].values()))
    return one["at"], one["test"], at is not None


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="keep the results")
    parser.add_argument("--family", type=Path, nargs="*", default=[], help="folders of families")
    parser.add_argument("--real", type=Path, help="folder of a pair made from a real model")
    parser.add_argument("--base", type=Path, help="folder of that real model")
    parser.add_argument("--alpha", type=float, default=1.0, help="α of the real pair [1]")
    parser.add_argument("--problems", type=int, default=120, help="test problems a task [120]")
    parser.add_argument("--chosen-on", type=int, default=60, help="validation problems a task [60]")
    parser.add_argument("--markdown", action="store_true", help="print the kept tables, measure nothing")
    wanted = parser.parse_args(arguments)
    record = json.loads(RESULTS.read_text(encoding="utf-8"))
    if wanted.markdown:
        print(gate_table(record))
        return
    if (wanted.real is None) != (wanted.base is None):
        parser.error("--real PAIR and --base MODEL go together")
    torch.set_num_threads(1)
    folders = wanted.family or ([] if wanted.real else [bundled_family()])
    subjects = [
        family(folder, BUNDLED if folder == bundled_family() else folder.name, wanted.problems, wanted.chosen_on)
        for folder in folders
    ]
    tried = [(rules(), (0.02, 0.05, 0.1, 0.2, 0.5))] * len(subjects)
    if wanted.real:
        subjects.append(real_pair(wanted.real, wanted.base, wanted.problems, wanted.chosen_on, wanted.alpha))
        tried.append((real_rules(), (0.05, 0.2)))
    for subject, which in zip(subjects, tried, strict=True):
        found = measure(subject, *which)
        print(gate_table({"families": [found]}))
        if wanted.write:  # read again: another run may have written meanwhile
            record = json.loads(RESULTS.read_text(encoding="utf-8"))
            record |= {"command": "python benches/bench_gate.py --write", "torch": torch.__version__}
            record["families"] = [*(one for one in record["families"] if one["name"] != found["name"]), found]
            RESULTS.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
