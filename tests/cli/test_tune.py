"""`proxytune tune`: the value that the library chooses, a curve, a recipe with its evidence, and wrong calls."""

from __future__ import annotations

import hashlib
import importlib.util
import json

import pytest
import torch

import proxytune
from proxytune.cli import tune as command
from proxytune.errors import RecipeError
from proxytune.formulas import ProxyTuning
from proxytune.formulas.contrastive import ContrastiveDecoding
from proxytune.recipe import RECIPE_FILE, Recipe, write_tuned
from proxytune.search.knobs import knob_of
from proxytune.search.tuning import tune
from proxytune.search.tuning_record import Item, Point, Tuning
from proxytune.stats.bootstrap import Interval

WORDS = ["red", "blue", "seven", "nobody", "cheese", "grapes", "two", "nuts"]
PAIRS = [
    (f"Question: Start with {i}, add {i}. Who is {WORDS[i % 8]}?", f" The answer is {WORDS[(i * 3) % 8]}.")
    for i in range(18)
]


@pytest.fixture
def kit(family, tmp_path):
    """A saved recipe of format 1 whose members are named by relative folders."""
    folder = tmp_path / "kit"
    folder.mkdir()
    data = {"format_version": 1, "formula": "proxy-tuning", "alpha": 0.5}
    for role, name in (("base", "large-base"), ("expert", "tiny-tuned"), ("antiexpert", "tiny-base")):
        (folder / name).symlink_to(family / name)
        data[role] = {"id": name, "revision": None}
    (folder / RECIPE_FILE).write_text(json.dumps(data))
    return folder


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "validation.jsonl"
    path.write_text("".join(json.dumps({"prompt": p, "completion": c}) + "\n" for p, c in PAIRS))
    return path


def found(run, *words):
    ended = run("tune", *words, "--json", "--dtype", "float32")
    assert ended.code == 0, ended.err
    (line,) = ended.lines
    return line


def test_help_says_that_it_must_be_validation_data(run):
    assert "Never test data" in " ".join(run("tune", "--help").out.replace("│", " ").split())


@pytest.mark.smoke
def test_the_recipe_gets_what_the_library_chooses_with_its_evidence(run, kit, file, tmp_path):
    test = tmp_path / "test.jsonl"
    test.write_text(json.dumps({"prompt": "Another question?"}) + "\n")
    said = found(run, "--recipe", kit, "--file", file, "--values", "0:1.5:0.5", "--test", test, "--write")
    model = proxytune.ProxyTunedModel.from_pretrained(kit, dtype=torch.float32)
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(kit / "large-base")
    items = []
    for prompt, completion in PAIRS:
        ids = tokenizer(prompt + completion)["input_ids"]
        start = len(tokenizer(prompt)["input_ids"])
        items.append(Item(ids[:start], [ids[start:]]))
    want = tune(model, items, [0.0, 0.5, 1.0, 1.5]).to_json()
    assert {key: said[key] for key in want} == want
    assert [point["value"] for point in said["curve"]] == [0.0, 0.5, 1.0, 1.5]
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    assert said["file"] == {"file": "validation.jsonl", "sha256": digest}
    recipe = Recipe.load(kit)
    assert recipe.alpha == said["chosen"] == model.alpha
    assert recipe.evidence["tune"]["alpha"] == {key: said[key] for key in (*want, "file")}
    assert recipe.evidence["test"] == said["test"]
    data = json.loads((kit / RECIPE_FILE).read_text())
    assert data["base"] == {"id": "large-base", "revision": None}, "as it stood there"
    assert data["format_version"] == 2
    # The test file is remembered, and another knob beside this one.
    again = run("tune", "--recipe", kit, "--file", test.rename(tmp_path / "other.jsonl"))
    assert again.code == 2
    assert "which the recipe names as test data (test.jsonl)" in again.err
    gate = found(run, "--recipe", kit, "--file", file, "--knob", "gate.entropy", "--values", "0.5,4", "--write")
    recipe = Recipe.load(kit)
    assert recipe.settings == {"gate": {"entropy": gate["chosen"]}}
    assert set(recipe.evidence["tune"]) == {"alpha", "gate.entropy"}
    assert recipe.evidence["test"] == said["test"]
    assert all(0 <= point["open"] <= 1 for point in gate["curve"])
    proxytune.ProxyTunedModel.from_pretrained(kit).save_pretrained(tmp_path / "copy")
    assert Recipe.load(tmp_path / "copy").evidence == recipe.evidence


def test_choices_and_conversations(run, members, tmp_path):
    choices = tmp_path / "choices.jsonl"
    lines = [
        {"prompt": p, "choices": [c, " no", " yes"], "answer": answer}
        for (p, c), answer in zip(PAIRS[:4], (0, 2, " no", 0), strict=True)
    ]
    choices.write_text("".join(json.dumps(line) + "\n" for line in lines))
    said = found(run, *members, "--file", choices, "--values", "0,1")
    assert said["metric"] == "accuracy"
    assert (said["items"], said["written"]) == (4, None)
    chats = tmp_path / "chats.jsonl"
    pairs = tmp_path / "pairs.jsonl"
    turns = [[{"role": "user", "content": p}, {"role": "assistant", "content": c}] for p, c in PAIRS[:3]]
    chats.write_text("".join(json.dumps({"messages": t}) + "\n" for t in turns))
    pairs.write_text("".join(json.dumps({"prompt": p, "completion": c}) + "\n" for p, c in PAIRS[:3]))
    as_chat = found(run, *members, "--file", chats, "--values", "0,1")
    as_pairs = found(run, *members, "--file", pairs, "--values", "0,1", "--chat")
    assert as_chat["curve"] == as_pairs["curve"]
    assert as_chat["curve"] != found(run, *members, "--file", pairs, "--values", "0,1")["curve"]


def test_answers_that_the_model_writes(run, family, members, tmp_path):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(family / "large-base")
    folder = {name: str(family / name) for name in ("large-base", "tiny-tuned", "tiny-base")}
    pair = {"expert": folder["tiny-tuned"], "antiexpert": folder["tiny-base"]}
    model = proxytune.wrap(folder["large-base"], **pair, alpha=1.0, dtype=torch.float32)
    lines = []
    for prompt, _ in PAIRS[:5]:
        batch = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
        ids = model.generate(**batch, do_sample=False, max_new_tokens=6)[0, batch["input_ids"].shape[1] :]
        text = tokenizer.decode(ids, skip_special_tokens=True)
        lines.append({"prompt": prompt, "answer": text.split()[0][:3].upper() if text.split() else "-"})
    lines[4]["answer"] = "something else"
    path = tmp_path / "written.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    words = ("--answer", r"^\s*(\S{1,3})", "--max-new-tokens", 6, "--batch-size", 3)
    said = found(run, *members, "--file", path, "--values", "0,1", *words)
    assert (said["metric"], said["tokens"]) == ("accuracy", 0)
    assert [point["score"] for point in said["curve"] if point["value"] == 1] == [0.8]
    assert next(point["score"] for point in said["curve"] if point["value"] == 0) < 0.8
    ended = run("tune", *members, "--file", path, "--values", "0,1", *words, "--knob", "temperature")
    assert ended.code == 2
    assert "knob: expected a number of the formula where answers are written" in ended.err
    assert "--answer: expected a regular expression" in run("tune", *members, "--file", path, "--answer", "(").err


def point(value: float, items: int, score: float, half: float) -> Point:
    return Point(value, items, Interval(score, score - half, score + half))


def made(points: list[Point], best: float, chosen: float) -> Tuning:
    knob = knob_of(ProxyTuning())
    return Tuning(
        knob=knob,
        metric="accuracy",
        points=tuple(points),
        best=best,
        chosen=chosen,
        error=0.02,
        items=40,
        tokens=200,
        formula=ProxyTuning(alpha=chosen),
        seed=0,
    )


def test_the_curve_is_drawn_to_scale():
    curve = made([point(0, 16, 0.1, 0.05), point(0.5, 40, 0.79, 0.1), point(1, 40, 0.8, 0.1)], 1.0, 0.5)
    head, *lines = command.curve_lines(curve)
    assert head.split() == ["alpha", "share", "right", "[95", "%]", "items"]
    assert lines[0].split()[-2:] == ["◂", "dropped"]
    assert lines[1].endswith("chosen")
    assert lines[2].endswith("best")
    columns = [lines[i].index("●") for i in (1, 2)]
    assert columns[1] - columns[0] in (1, 2), "0.01 of 0.21, over 31 columns"
    assert lines[1].index("├") < columns[0] < lines[1].index("┤")
    told = command.summary_lines(curve, None)
    assert told[0] == "chosen    alpha = 0.5: 0.7900 share right"
    assert "the chosen one is 0.0100 behind, within the standard error 0.0200" in told[1]
    assert told[2] == "note      the best is at the end of the values: try some beyond 1"
    assert "makes no difference" in command.summary_lines(made([point(0, 40, 1, 0), point(1, 40, 1, 0)], 0, 0), None)[1]


def test_on_the_terminal_and_as_a_picture(run, kit, file, tmp_path):
    picture = tmp_path / "curve.png"
    ended = run("tune", "--recipe", kit, "--file", file, "--values", "0,0.5,1", "--plot", picture, "--write")
    assert ended.code == 0, ended.err
    assert len(ended.out.splitlines()) >= 1 + 3 + 2
    assert "chosen    alpha = " in ended.out
    assert f"written to {kit / RECIPE_FILE}" in ended.out
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_a_threshold_of_another_alpha_is_noted(run, kit, file):
    data = json.loads((kit / RECIPE_FILE).read_text())
    data["fork_threshold"] = {"share": 0.2, "nats": 0.4, "tokens": 100, "alpha": 0.125}
    (kit / RECIPE_FILE).write_text(json.dumps(data))
    ended = run("tune", "--recipe", kit, "--file", file, "--values", "0,0.5", "--write")
    assert ended.code == 0, ended.err
    assert "fork threshold was calibrated at α = 0.125: run proxytune calibrate again" in ended.err


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("0,0.5,1", [0.0, 0.5, 1.0]),
        ("0:1:0.25", [0.0, 0.25, 0.5, 0.75, 1.0]),
        ("0:0.3:0.1", [0.0, 0.1, 0.2, 0.3]),
        ("1:0:-0.5", [1.0, 0.5, 0.0]),
    ],
)
def test_values_are_read(text, want):
    assert command._values(text) == want


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--values", "1"], "--values: expected 2 to 1000 numbers"),
        (["--values", "a,b"], "--values: expected 2 to 1000 numbers"),
        (["--values", "0:1:0"], "--values: expected 2 to 1000 numbers"),
        (["--values", "0,nan"], "--values: expected 2 to 1000 numbers"),
        (["--knob", "betta"], "knob: expected 'alpha', 'gate.entropy', 'gate.top1' or 'temperature'; got 'betta'"),
        (["--alpha", 1], "--alpha: expected no α where it is what is chosen"),
        (["--write", "--knob", "temperature"], "--write: expected a number of the formula"),
        (["--write", "--knob", "gate.top1", "--alpha", 2], "--write: expected the recipe's own α, 0.5"),
        (["--plot", "out.xyz"], "--plot: expected a file name that ends in"),
    ],
)
def test_wrong_calls_are_told(run, kit, file, words, message):
    ended = run("tune", "--recipe", kit, "--file", file, *words)
    assert ended.code == 2
    assert message in ended.err


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            '{"prompt": "x"}',
            'line 1: expected a right "completion", "choices" and the right "answer", or an "answer" alone',
        ),
        ('{"prompt": "x", "answer": true}', 'line 1: expected a text or a number under "answer"; got true'),
        (
            '{"prompt": "x", "answer": 1}\n{"prompt": "x", "completion": "y"}',
            'line 2: expected an "answer" alone, as in',
        ),
        (
            '{"prompt": "x", "completion": "y"}\n{"prompt": "x", "answer": 1}',
            'line 1: expected an "answer" alone, as in',
        ),
        ('{"prompt": "x", "choices": ["a"], "answer": 0}', 'line 1: expected at least two texts under "choices"'),
        ('{"prompt": "x", "choices": ["a", "b"], "answer": 2}', 'or its number, from 0, under "answer"'),
        ('{"prompt": "x", "choices": ["a", "b"], "answer": "c"}', 'got choices=["a", "b"], answer="c"'),
        ('{"prompt": "x", "choices": ["a", "b"]}', "answer=null"),
        ('{"prompt": "x", "completion": "y"}', "items: expected at least two"),
        (
            '{"prompt": "x", "completion": "y"}\n{"prompt": "x", "choices": ["a", "b"], "answer": 0}',
            "some of each kind",
        ),
        ('{"messages": [{"role": "user", "content": "x"}]}', "ends with the assistant's turn"),
    ],
)
def test_wrong_items_are_told_by_line(run, members, tmp_path, content, message):
    path = tmp_path / "items.jsonl"
    path.write_text(content + "\n")
    ended = run("tune", *members, "--file", path)
    assert ended.code == 2
    assert message in ended.err


def test_test_data_is_refused_and_other_files(run, kit, members, file, tmp_path, monkeypatch):
    test = tmp_path / "test.jsonl"
    turns = [{"role": "user", "content": PAIRS[4][0].upper()}, {"role": "assistant", "content": "x"}]
    test.write_text(json.dumps({"prompt": "new"}) + "\n" + json.dumps({"messages": turns}) + "\n")
    ended = run("tune", "--recipe", kit, "--file", file, "--test", test)
    assert ended.code == 2
    assert f"{file}, line 5, which is also {test}, line 2" in ended.err
    for words, message in (
        (["--file", tmp_path / "items.txt"], "--file: expected a file of JSON lines, .jsonl"),
        (["--file", "-"], "--file: expected a file of JSON lines, .jsonl"),
        (["--file", tmp_path / "none.jsonl"], "no such file"),
        ([], "Missing option '--file'"),
        (["--file", file, *members, "--write"], "--write: expected --recipe"),
    ):
        ended = run("tune", *([] if "--base" in words else ["--recipe", kit]), *words)
        assert ended.code == 2, words
        assert message in ended.err, ended.err
    there = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n, *r: None if n == "matplotlib" else there(n, *r))
    ended = run("tune", "--recipe", kit, "--file", file, "--plot", "x.png")
    assert "pip install matplotlib, or pip install '.[plot]' in the checkout" in ended.err


@pytest.mark.parametrize("evidence", [{"tune": []}, {"test": {}}, {"test": ["a.jsonl"]}, {"test": [{"file": "a"}]}])
def test_evidence_of_another_form_is_refused(kit, evidence):
    data = json.loads((kit / RECIPE_FILE).read_text()) | {"format_version": 2, "evidence": evidence}
    (kit / RECIPE_FILE).write_text(json.dumps(data))
    with pytest.raises(RecipeError, match=r"recipe key 'evidence': expected an object under \"tune\", .*; got tune="):
        Recipe.load(kit)


def test_a_run_can_be_resumed_after_tuning_to_the_same_value(run, kit, file, tmp_path):
    out = tmp_path / "scores.jsonl"
    call = ["score", "--recipe", kit, "--file", file, "--dtype", "float32", "--out", out]
    assert run(*call).code == 0
    write_tuned(kit, ProxyTuning(alpha=0.5), "alpha", {"chosen": 0.5})
    ended = run(*call, "--resume")
    assert ended.code == 0, ended.err
    assert "the run is complete" in ended.err


def test_a_recipe_that_is_refused_stays(kit, tmp_path):
    with pytest.raises(RecipeError, match="no file at"):
        write_tuned(tmp_path / "nowhere", ProxyTuning(), "alpha", {})
    before = (kit / RECIPE_FILE).read_text()
    needs_more = ContrastiveDecoding(beta=1.0)
    with pytest.raises(RecipeError, match=r"a member for each role of the formula 'contrastive'; got no amateur"):
        write_tuned(kit, needs_more, "beta", {})
    assert (kit / RECIPE_FILE).read_text() == before
