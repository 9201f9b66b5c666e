"""The demo's notes say what the committed records say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from lab.family import documents

from proxytune.demo.tasks import problems
from proxytune.demo.world import STATEMENTS, build_world

ROOT = Path(__file__).resolve().parents[3]
NOTES = (ROOT / "proxytune" / "demo" / "NOTES.md").read_text(encoding="utf-8")
TASKS: tuple[Any, ...] = ("chain", "qa", "countdown")


def load(name: str) -> Any:
    return json.loads((ROOT / "benches" / "results" / name).read_text(encoding="utf-8"))


def row(title: str) -> list[str]:
    """The cells of the only row with a title."""
    (line,) = [line for line in NOTES.splitlines() if line.startswith(f"| {title} |")]
    return [cell.strip() for cell in line.strip("|").split("|")[1:]]


@pytest.mark.parametrize(
    ("title", "name"),
    [
        ("base, 0-shot", "base, 0-shot"),
        ("base, 3-shot", "base, 3-shot"),
        ("antiexpert alone", "antiexpert alone"),
        ("expert alone", "expert alone"),
        ("proxy, alpha 0.5", "proxy, chosen alpha"),
        ("tuned directly", "tuned directly"),
    ],
)
def test_the_family_s_figures(title: str, name: str) -> None:
    found = load("lab_seeds.json")["over_seeds"]["rows"][name]
    for cell, task in zip(row(title), TASKS, strict=True):
        mean, low, high = (f"{found[f'{task}, lenient'][end]:.2f}" for end in ("mean", "low", "high"))
        assert cell in (f"{mean} ({low}–{high})", *([mean] if low == high else []))


def test_the_gaps_closed_and_the_costs_of_training() -> None:
    record = load("lab_seeds.json")
    for cell, task in zip(row("gap closed, per seed"), TASKS, strict=True):
        gaps = [family["gap_closed"][task]["lenient"]["closed"] for family in record["per_seed"]]
        assert cell == ", ".join(f"{gap:.2f}" for gap in gaps)
    totals = {
        what: [sum(member[what] for member in family.values()) for family in record["training"]]
        for what in ("processor_seconds", "seconds")
    }
    processor, wall = totals["processor_seconds"], [seconds / 60 for seconds in totals["seconds"]]
    assert f"One family costs {min(processor):.0f}–{max(processor):.0f} processor-seconds" in NOTES
    assert f"{min(wall):.0f}–{max(wall):.0f} minutes" in NOTES


def test_the_form_that_the_base_never_saw() -> None:
    record = load("lab_template.json")
    for seen, unseen in zip(record["form seen in pre-training"], record["form never seen"], strict=True):
        assert row(f"{unseen['alpha']:g}") == [
            *(f"{unseen[f'{task}, lenient']:.2f} · {unseen[f'{task}, strict']:.2f}" for task in ("chain", "qa")),
            f"{seen['chain, strict']:.2f} · {seen['qa, strict']:.2f}",
        ]
    by = {line["alpha"]: line for line in record["form seen in pre-training"]}
    chain, qa = ([f"{by[alpha][f'{task}, lenient']:.2f}" for alpha in (0.5, 2.0)] for task in ("chain", "qa"))
    assert f"chains fall from {chain[0]} to {chain[1]} and QA from {qa[0]} to {qa[1]}" in " ".join(NOTES.split())


def test_what_the_base_completes() -> None:
    tasks = load("lab_documents.json")["tasks"]
    said = " ".join(NOTES.split())
    chain, qa, countdown = (tasks[task] for task in TASKS)
    assert f"completes {chain['right']} of these {chain['problems']} chains" in said
    assert f"and {qa['right']} of {qa['problems']} facts" in said
    assert f"As documents, the base solves {countdown['right']} of the {countdown['problems']};" in said


def test_problems_are_put_as_documents_and_graded_as_answers() -> None:
    world = build_world()
    chain, qa, countdown = (problems(task, "test", 1, world)[0] for task in TASKS)
    assert documents.beginning(chain) == f"{chain.question.removesuffix(' What is the result?')} So"
    assert documents.right(chain, f" {chain.solution}. Whatever.")
    assert not documents.right(chain, " 1+1=2.")
    name, attribute = qa.key.split(":")[1:]
    assert documents.beginning(qa) == STATEMENTS[attribute][0].format(name=name, value="").removesuffix(" .")
    assert documents.right(qa, f" {qa.gold}. The home of")
    assert not documents.right(qa, f" nowhere. {qa.gold}.")
    assert documents.beginning(countdown).startswith("Numbers ")
    assert documents.right(countdown, f" {countdown.solution}.")
    found = documents.measure(count=4)["tasks"]
    assert {task: one["problems"] for task, one in found.items()} == dict.fromkeys(TASKS, 4)
    assert found["qa"]["right"] == 4


def test_rounding() -> None:
    rows = load("lab_rounding.json")["rows"]
    changes = [
        abs(cell[f"float32, {kind}"] - cell[f"bfloat16, {kind}"])
        for tasks in rows.values()
        for cell in tasks.values()
        for kind in ("lenient", "strict")
    ]
    assert f"by more than {max(changes):.3f}." in NOTES
    proxy, tuned = (
        [rows[name][task]["same text"] for task in TASKS] for name in ("proxy, alpha 0.5", "tuned directly")
    )
    said = " ".join(NOTES.split())
    assert f"for {proxy[0]} of 300 chains, {proxy[1]} of 183 questions and {proxy[2]} of 300 Countdowns" in said
    assert f"the tuned model for {tuned[0]}, {tuned[1]} and {tuned[2]}." in said
