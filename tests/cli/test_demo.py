"""`proxytune demo`: its figures against the lab's own, and the marked tokens against a slow reference."""

from __future__ import annotations

import json

import pytest
import torch

import proxytune
from proxytune.cli import demo as command
from proxytune.cli import terminal
from proxytune.demo.bundle import bundled_family, bundled_record, load_family
from proxytune.demo.evaluation import evaluate, held_out
from proxytune.demo.measure import measure, shift_steps
from proxytune.demo.world import build_world

ROWS = ["base, 0-shot", "base, 3-shot", "expert alone", "proxy, α = 0.75", "tuned directly"]


@pytest.fixture(scope="module")
def record(family):
    terminal.quiet()
    return measure(family, 0.75, 6)


def steered(folder, alpha):
    models, tokenizer = load_family(folder)
    model = proxytune.wrap(
        models["large-base"], expert=models["tiny-tuned"], antiexpert=models["tiny-base"], alpha=alpha
    )
    return model, tokenizer


def test_rows_tasks_and_speeds_are_complete(record):
    assert [row["name"] for row in record["rows"]] == ROWS
    for row in record["rows"]:
        assert list(row["scores"]) == ["chain", "qa", "countdown"]
        assert row["tokens_per_second"] > 0
        for score in row["scores"].values():
            for criterion in ("strict", "lenient"):
                low, high = score[criterion]["interval"]
                assert low <= score[criterion]["rate"] <= high
                assert score[criterion]["problems"] == 6
    assert json.loads(json.dumps(record, allow_nan=False)) == record


def test_the_proxy_row_is_the_composed_model_on_held_out_problems(record, family):
    model, tokenizer = steered(family, 0.75)
    asked = held_out(build_world(), "test", 6)
    row = evaluate("proxy", model, tokenizer, asked)
    for task in asked:
        assert record["rows"][3]["scores"][task]["lenient"]["rate"] == round(row.score(task).rate, 4)
    for answer in record["answers"]:
        assert answer["proxy"] == row.outcomes[answer["task"]][0].text


@pytest.mark.parametrize("alpha", [0.0, 0.75, 3.0])  # nothing changes; something does; nearly everything does
def test_changed_tokens_are_those_the_base_would_not_have_chosen(family, alpha):
    model, tokenizer = steered(family, alpha)
    prompt = "Question: Who?\nAnswer:"
    text, steps = shift_steps(model, tokenizer, prompt)
    # The reference: one position at a time, no cache, each model asked on its own.
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    chosen = []
    with torch.inference_mode():
        for step in steps:
            base, expert, antiexpert = (
                member(input_ids=ids).logits[0, -1].float() for member in (model.base, model.expert, model.antiexpert)
            )
            own = int((base + alpha * (expert - antiexpert)).argmax())
            assert (step.token, step.base_token) == (tokenizer.decode([own]), tokenizer.decode([int(base.argmax())]))
            assert step.changed == (own != int(base.argmax()))
            chosen.append(own)
            ids = torch.cat([ids, torch.tensor([[own]])], dim=1)
    assert text == tokenizer.decode(chosen, skip_special_tokens=True)
    assert any(step.changed for step in steps) == (alpha > 0)


def test_json_is_one_object_and_nothing_else(run, family):
    ended = run("demo", "--family", family, "--problems", "2", "--json")
    assert ended.code == 0, ended.err
    assert json.loads(ended.out)["alpha"] == 0.75


@pytest.mark.parametrize("columns", ["80", "60"])  # below 80, lines wrap in the terminal; figures are never cut
def test_the_table_fits_80_columns_and_marks_changes_without_colour(run, family, monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", columns)
    monkeypatch.setenv("NO_COLOR", "1")
    ended = run("demo", "--family", family, "--problems", "2", "--alpha", "1.5")
    assert ended.code == 0, ended.err
    assert "\x1b" not in ended.out
    assert "…" not in ended.out, "a column was cut off"
    for words in ("base, 0-shot", "base, 3-shot", "expert alone", "proxy, α = 1.5", "tuned directly", "gap closed"):
        assert words in ended.out
    for words in ("strict", "lenient", "Countdown", "tokens/s", "changed by the shift"):
        assert words in ended.out
    assert ended.out.count("proxy  ") == 3


def test_brackets_stand_around_changed_tokens_only():
    steps = [(" The", False), (" answer", True), (" ", True), ("\n", True), ("<|end|>", True)]
    answer = {
        "prompt": "Q?",
        "gold": "7",
        "base": "a\nb",
        "proxy": "",
        "tuned": "t",
        "tokens": [{"token": token, "base_token": "x", "changed": changed} for token, changed in steps],
    }
    question, base, proxy, _ = (text.plain for text in command._side_by_side(answer))
    assert question.startswith("Q?")
    assert base == "base   a⏎b"
    assert proxy.startswith("proxy   The [answer] [␣][⏎][<|end|>]")
    assert "4 of 5 tokens changed" in proxy


def test_a_family_without_a_record_is_a_clear_error(run, tmp_path):
    ended = run("demo", "--family", tmp_path)
    assert ended.code == 2
    assert "family.json" in ended.err
    ended = run("demo", "--family", tmp_path, "--alpha", "1")
    assert ended.code == 2
    assert "large-base" in ended.err


@pytest.mark.smoke
def test_the_bundled_family_shows_what_the_table_claims():
    record = measure(bundled_family(), bundled_record()["alpha"], 40)
    base, proxy, tuned = (record["rows"][index]["scores"] for index in (0, 3, 4))
    for task in ("chain", "qa"):
        # 40 problems: the intervals are about 0.3 wide, so only a gap that is plain to see is asserted.
        assert proxy[task]["strict"]["rate"] > base[task]["strict"]["rate"] + 0.3
        assert proxy[task]["strict"]["rate"] > tuned[task]["strict"]["rate"] - 0.3
    assert any(step["changed"] for answer in record["answers"] for step in answer["tokens"])
