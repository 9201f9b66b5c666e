"""`proxytune report`: traces and right answers in, a report out."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from support.simulated import run as trace_of
from support.simulated import text

from proxytune.trace import load, save


@pytest.fixture
def traces(tmp_path: Path) -> list[str]:
    """Two runs of eight prompts, four samples each: one repeats a wrong answer, the other does not."""
    rng = np.random.default_rng(0)
    files = []
    for name, wrongs in (("x", 1), ("y", 1000)):
        texts = []
        for prompt in range(8):
            for sample in range(6):
                said = 7 if sample == 0 else 10 + int(rng.integers(wrongs))
                pieces = (" The answer is", f" {said}.", "<|end|>")
                texts.append(replace(text(prompt, 3, pieces=pieces), prompt=f"<s> What is {prompt}? Answer:"))
        files.append(str(save(trace_of(texts), tmp_path / f"{name}.npz")))
    return files


@pytest.fixture
def gold(tmp_path: Path) -> Path:
    file = tmp_path / "gold.jsonl"
    file.write_text("".join(json.dumps({"prompt": f"what is  {i}?", "answer": 7}) + "\n" for i in range(8)))
    return file


def test_runs_are_graded_and_reported(run, traces, gold, tmp_path):
    done = run("report", *traces, "--gold", gold)
    assert done.code == 0, done.err
    assert "x has lost diversity" in " ".join(done.out.split())
    assert "y: nothing is told to be lost" in " ".join(done.out.split())
    assert "--out report.html" in done.err
    assert run("report", *reversed(traces), "--gold", gold).out == done.out
    drawn = run("report", *traces, "--gold", gold, "--plots", tmp_path / "plots")
    assert drawn.code == 0, drawn.err
    plots = sorted(file.name for file in (tmp_path / "plots").iterdir())
    assert f"{len(plots)} plots" in drawn.err
    assert len(plots) > 3
    page, md = tmp_path / "r.html", tmp_path / "r.md"
    done = run("report", *traces, "--gold", gold, "--answer", r"is (\d+)", "--out", page, "--md", md)
    assert done.code == 0, done.err
    assert done.out == ""
    assert "r.html: 2 runs" in done.err
    assert page.read_text(encoding="utf-8").startswith("<!doctype html>")
    assert md.read_text(encoding="utf-8").startswith("# What was lost")
    assert [one.grade for one in load(traces[0])] == [None] * 48  # the runs stay as they are
    alone = run("report", traces[0])
    assert "nothing is told to be lost" in " ".join(alone.out.split())


def test_a_wrong_call_says_what_to_do(run, traces, gold, tmp_path):
    lines = {
        "short.jsonl": [{"prompt": "what is 1?", "answer": 7}],
        "none.jsonl": [{"prompt": "what is 1?"}],
        "two.jsonl": [{"prompt": "what is 1?", "answer": 7}, {"prompt": "What is 1?", "answer": 8}],
    }
    for name, held in lines.items():
        (tmp_path / name).write_text("".join(json.dumps(line) + "\n" for line in held))
    for words, said in (
        ([traces[0], "--gold", tmp_path / "short.jsonl"], "an answer to each prompt"),
        ([traces[0], "--gold", tmp_path / "none.jsonl"], '"answer"'),
        ([traces[0], "--gold", tmp_path / "two.jsonl"], "one right answer of a prompt"),
        ([traces[0], "--answer", "("], "a regular expression"),
        ([traces[0], "--out", "r.txt"], "NAME.html"),
        ([traces[0], "--md", "r.html"], "NAME.md"),
        ([traces[0], traces[0]], "each once"),
        ([tmp_path / "no.npz"], "no no.jsonl"),
    ):
        failed = run("report", *words)
        assert failed.code == 2, words
        assert said in failed.err
