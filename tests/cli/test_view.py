"""`proxytune see` and `view`, and `generate --trace`."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

import proxytune
from proxytune.trace import load


@pytest.fixture
def members(family):
    return [
        "--base",
        str(family / "large-base"),
        "--expert",
        str(family / "tiny-tuned"),
        "--antiexpert",
        str(family / "tiny-base"),
    ]


def test_an_answer_is_seen_and_viewed_again(run, members, family, tmp_path):
    file = tmp_path / "run.npz"
    done = run(
        "see",
        "Question: Who",
        *members,
        "--dtype",
        "float32",
        "--max-new-tokens",
        "6",
        "--trace",
        str(file),
        "--changed",
        "2",
    )
    assert done.code == 0, done.err
    assert "Question: Who" in done.out
    again = run("view", str(file), "--changed", "2")
    assert again.out == done.out
    (text,) = load(file)
    tokenizer = AutoTokenizer.from_pretrained(family / "large-base")
    ids = tokenizer("Question: Who", return_tensors="pt")
    model = proxytune.wrap(
        members[1], expert=members[3], antiexpert=members[5], alpha=1.0, dtype=torch.float32, check_vocabulary=False
    )
    assert len(text) <= 6
    told = run(
        "see",
        "Question: Who",
        *members,
        "--dtype",
        "float32",
        "--text",
        " was it",
        "--trace",
        str(tmp_path / "given.npz"),
    )
    assert told.code == 0, told.err
    (given,) = load(tmp_path / "given.npz")
    assert given.given
    assert given.text == " was it"
    assert given.prompt_ids.tolist() == ids["input_ids"][0].tolist()
    with torch.no_grad():
        logits = model(torch.tensor([[*given.prompt_ids.tolist(), *given.tokens.tolist()]])).logits[0]
    want = logits.log_softmax(-1)[len(given.prompt_ids) - 1 : -1].gather(
        1, torch.tensor(given.tokens.tolist())[:, None]
    )
    np.testing.assert_allclose(given.logprobs, want[:, 0].numpy(), atol=1e-4)


def test_a_run_is_recorded_text_by_text(run, members, tmp_path):
    file = tmp_path / "run.npz"
    command = ["generate", "Question: Who", "x", "y", *members, "max_new_tokens=5", "--batch-size", "2"]
    done = run(*command, "--trace", str(file))
    assert done.code == 0, done.err
    assert done.out == run(*command).out
    completions = [json.loads(line) for line in done.out.splitlines()]
    trace = load(file)
    assert [len(text) for text in trace] == [line["tokens"] for line in completions]
    viewed = run("view", str(file)).out
    assert viewed.count("text 2") == 1
    assert run("view", str(file), "--text", "1").out.startswith("x")
    page = tmp_path / "run.html"
    none = [str(tmp_path / "none") if "/" in word else word for word in members]  # refused before the models are loaded
    assert run("view", str(file), "--html", str(page)).err.strip().endswith("run.html: 3 texts.")
    assert page.read_text(encoding="utf-8").startswith("<!doctype html>")
    assert run("view", str(file), "--html", str(page), "--text", "1").err.strip().endswith("run.html: 1 text.")
    for wrong, said in (
        (("view", str(file), "--html", str(page), "--text", "3"), "It has 3 texts"),
        (("view", str(file), "--html", str(tmp_path / "run.txt")), "NAME.html"),
        ((*command, "--trace", str(file)), "a new file"),
        (("see", "x", *none, "--trace", str(file)), "a new file"),
        ((*command[:2], *none, "--trace", str(tmp_path / "none" / "x.npz")), "Make the folder"),
        (("see", "x", *none, "--trace", str(tmp_path / "none" / "x.npz")), "Make the folder"),
        ((*command, "--trace", "run.json"), r"NAME.npz"),
        ((*command, "--trace", "new.npz", "--resume", "--out", str(tmp_path / "out.jsonl")), "no --resume"),
        (("view", str(tmp_path / "none.npz")), "no none.jsonl"),
        (("view", str(file), "--text", "3"), "It has 3 texts"),
    ):
        failed = run(*wrong)
        assert failed.code == 2
        assert said in failed.err


def test_without_models_the_bundled_family_answers(run):
    done = run("see", "Question: Start with 3. Add 5. What is the result?", "--max-new-tokens", "8", "--changed", "1")
    assert done.code == 0, done.err
    assert "3+5=" in done.out
