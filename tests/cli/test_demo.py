"""`proxytune demo`: its figures against the lab's own, and the marked tokens against a slow reference."""

from __future__ import annotations

import json
import shlex

import pytest
import torch
from rich.cells import cell_len

import proxytune
from proxytune.cli import demo as command
from proxytune.cli import terminal
from proxytune.demo.bundle import bundled_family, bundled_record, load_family
from proxytune.demo.evaluation import evaluate, held_out
from proxytune.demo.measure import measure, shift_steps
from proxytune.demo.undecided import undecided
from proxytune.demo.world import build_world
from proxytune.errors import MemberNotFoundError

ROWS = ["base, 0-shot", "base, 3-shot", "expert alone", "proxy, α = 0.75", "tuned directly"]


@pytest.fixture(scope="module")
def record(family):
    terminal.quiet()
    return measure(family, 0.75, 6)


@pytest.fixture
def measured(record, monkeypatch):
    """The command shows this record; that it measures is another test's matter."""
    monkeypatch.setattr("proxytune.demo.measure.measure", lambda *_, **__: record)


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
    ended = run("demo", "--family", family, "--problems", "1", "--alpha", "1.5", "--json")
    assert ended.code == 0, ended.err
    assert json.loads(ended.out)["alpha"] == 1.5
    assert json.loads(ended.out)["rows"][3]["name"] == "proxy, α = 1.5"


@pytest.mark.usefixtures("measured")
@pytest.mark.parametrize("columns", ["80", "60"])  # below 80, lines wrap in the terminal; figures are never cut
def test_the_table_fits_80_columns_and_marks_changes_without_colour(run, family, monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", columns)
    monkeypatch.setenv("NO_COLOR", "1")
    ended = run("demo", "--family", family, "--problems", "6")
    assert ended.code == 0, ended.err
    assert "\x1b" not in ended.out
    assert "…" not in ended.out, "a column was cut off"
    for words in ("base, 0-shot", "base, 3-shot", "expert alone", "proxy, α = 0.75", "tuned directly", "gap closed"):
        assert words in ended.out
    for words in ("strict", "lenient", "Countdown", "tokens/s", "changed by the shift"):
        assert words in ended.out
    assert ended.out.count("proxy  ") == 4, "three answers, and what the row is"
    assert max(map(cell_len, ended.out.splitlines())) <= 80


@pytest.mark.usefixtures("measured")
def test_it_explains_its_rows_and_ends_with_what_to_do_next(run, family):
    out = run("demo", "--family", family, "--problems", "2").out
    for row in [*ROWS, "gap closed, %"]:
        name = row.split(", α")[0].removesuffix(", %")
        (line,) = [line for line in command.ROWS.splitlines() if line.startswith(f"{name}  ")]
        assert f"\n{line}\n" in out
    assert out.endswith("\n\n" + "\n".join(command.NEXT) + "\n")
    words, code = (line.strip() for line in command.NEXT[1:3])
    # Both lines can be called as they stand; only the models are not there.
    ended = run(*shlex.split(words)[1:])
    assert ended.code == 2
    assert "got 'LARGE'" in ended.err
    with pytest.raises(MemberNotFoundError, match="LARGE"):
        exec(code, {"proxytune": proxytune})


# The intervals of base, proxy and tuned model, and of the gap closed; what cannot be told.
TABLES = {
    "all is plain": ([0, 0.1], [0.5, 0.7], [0.6, 0.8], [0.7, 1.1], None),
    "tuned not told from the proxy, as is hoped": ([0, 0.1], [0.5, 0.7], [0.5, 0.7], [0.9, 1.1], None),
    "no gap by the bootstrap": ([0, 0.1], [0.5, 0.7], [0.6, 0.8], None, "tuned or base"),
    "tuned overlaps base": ([0, 0.3], [0.1, 0.4], [0.3, 0.8], [0.2, 1.1], "tuned or base"),
    "proxy overlaps base": ([0, 0.3], [0.1, 0.4], [0.6, 0.8], [0.2, 0.4], "proxy or base"),
    "proxy overlaps both": ([0, 0.3], [0.2, 0.7], [0.6, 0.8], [0.2, 1.2], "proxy or either"),
    "no width": ([0, 0.3], [0.4, 1], [0.4, 1], [1, 1], "proxy or tuned"),
}


def table(base, proxy, tuned, gap, tasks=("chain",), problems=20):
    def row(interval):
        return {"scores": {t: {"strict": {"interval": interval, "problems": problems}} for t in tasks}}

    closed = {"closed": None, "interval": None} if gap is None else {"closed": 0.5, "interval": gap}
    return {
        "rows": [row(base), row([0, 1]), row([0, 1]), row(proxy), row(tuned)],
        "gap_closed": {task: {"strict": closed} for task in tasks},
    }


@pytest.mark.parametrize("name", TABLES)
def test_what_the_intervals_leave_open(name):
    *intervals, question = TABLES[name]
    found = undecided(table(*intervals))
    assert [one.question for one in found] == ([] if question is None else [question])
    lines = command._too_few(table(*intervals), 20)
    assert bool(lines) == bool(found)
    if lines:
        assert lines[0].startswith("Too few problems to tell the ")
        assert "on chain arithmetic (strict)" in lines[0]
        assert lines[1] == "Raise --problems, which is 20 here."


def test_where_there_are_no_more_problems_it_does_not_ask_for_them():
    record = table(*TABLES["proxy overlaps base"][:4], tasks=("chain", "qa"), problems=183)
    assert command._too_few(record, 200)[-1] == "These are all the problems there are."
    record["rows"][0]["scores"]["chain"]["strict"]["problems"] = 200
    first, last = command._too_few(record, 200)
    assert first == "Too few problems to tell the proxy from the base on chain arithmetic (strict) and QA (strict)."
    assert last == "Raise --problems, which is 200 here; QA has no more than 183."


@pytest.mark.usefixtures("measured")
def test_too_few_problems_are_said_to_be_too_few(run, family):
    # Six answers each, of models that know nothing: all are wrong.
    printed = " ".join(run("demo", "--family", family, "--problems", "6").out.split())
    assert "tell the tuned model from the base on chain arithmetic, QA and Countdown: there may be no gap" in printed
    assert "Raise --problems, which is 6 here." in printed


def test_an_interval_without_width_is_not_shown_as_one():
    assert command._percent(1.0, [1.0, 1.0]) == "100 [?]"
    assert command._percent(0.5, [0.25, 0.75]) == "50 [25, 75]"


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
    assert {one.task for one in undecided(record)} <= {"countdown"}, "40 are enough for the other two"
