"""`proxytune score` against log-probabilities taken by hand, and every way to call it wrongly."""

from __future__ import annotations

import json
import math
import re

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import proxytune
from proxytune.cli import terminal
from proxytune.models import scored_texts, scoring
from proxytune.recipe import RECIPE_FILE

PAIRS = [
    ("Question: Start with 3", " Answer: 3 + 4 is 7."),
    ("Who is there? ", "nobody"),
    ("x", " Start with 3, add 4, take away 2."),
]


@pytest.fixture(scope="module")
def tokenizer(family):
    return AutoTokenizer.from_pretrained(family / "large-base")


@pytest.fixture(scope="module")
def model(family):
    folder = {name: str(family / name) for name in ("large-base", "tiny-tuned", "tiny-base")}
    members = {"expert": folder["tiny-tuned"], "antiexpert": folder["tiny-base"]}
    return proxytune.wrap(folder["large-base"], **members, alpha=0.5, dtype=torch.float32)


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text(
        "".join(json.dumps({"id": i, "prompt": p, "completion": c}) + "\n" for i, (p, c) in enumerate(PAIRS))
    )
    return path


def by_hand(model, tokenizer, before: str, after: str) -> list[float]:
    """The log-probabilities of the tokens of `before + after` beyond those of `before`."""
    start = len(tokenizer(before.rstrip())["input_ids"]) if before else 1
    ids = tokenizer(before + after, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        logprobs = model(ids).logits[0].double().log_softmax(-1)
    return [float(logprobs[t - 1, ids[0, t]]) for t in range(start, ids.shape[1])]


def close(line, want):
    assert line["tokens"] == len(want)
    assert line["logprob"] == pytest.approx(sum(want), abs=2e-3)
    assert line["perplexity"] == pytest.approx(math.exp(-sum(want) / len(want)), rel=1e-3)


@pytest.mark.smoke
def test_completions_against_forward_passes_by_hand(run, members, model, tokenizer, file):
    ended = run("score", *members, "--alpha", 0.5, "--dtype", "float32", "--file", file, "--per-token")
    assert ended.code == 0, ended.err
    every = []
    for i, (line, pair) in enumerate(zip(ended.lines, PAIRS, strict=True)):
        want = by_hand(model, tokenizer, *pair)
        close(line, want)
        assert line["id"] == i
        assert line["logprobs"] == pytest.approx(want, abs=1e-3)
        assert tokenizer.decode(line["ids"]) == (" " * pair[0].endswith(" ")) + pair[1]
        every += want
    perplexity = math.exp(-sum(every) / len(every))
    assert f"note: perplexity {perplexity:.4g}" in ended.err
    assert f"over {len(every)} tokens in 3 texts" in ended.err
    short = run("score", *members, "--alpha", 0.5, "--dtype", "float32", "--file", file, "--summary", "--batch-size", 2)
    (found,) = short.lines
    assert found["perplexity"] == pytest.approx(perplexity, rel=1e-3)
    assert found["interval"][0] <= found["perplexity"] <= found["interval"][1]
    assert (found["tokens"], found["texts"]) == (len(every), 3)


def test_texts_conversations_and_a_base_alone(run, family, members, tokenizer, tmp_path):
    base = AutoModelForCausalLM.from_pretrained(family / "large-base", dtype=torch.float32)
    alone = ["--base", family / "large-base", "--dtype", "float32"]
    ended = run("score", *alone, "Start with 3, add 4.", "--", "x=5, or so")
    assert ended.code == 0, ended.err
    for line, text in zip(ended.lines, ("Start with 3, add 4.", "x=5, or so"), strict=True):
        assert line["prompt"] == text
        close(line, by_hand(base, tokenizer, "", text))
    chats = tmp_path / "chats.jsonl"
    turns = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": " Nobody."}]
    # As a conversation, and as a prompt that --chat makes one of.
    chats.write_text(json.dumps({"messages": turns}) + "\n")
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text(json.dumps({"prompt": "Who?", "completion": " Nobody."}) + "\n")
    expert = AutoTokenizer.from_pretrained(family / "tiny-tuned")
    if tokenizer.chat_template is None:
        tokenizer.chat_template = expert.chat_template
    before = tokenizer.apply_chat_template(turns[:1], tokenize=False, add_generation_prompt=True)
    ids = tokenizer(before + " Nobody.", add_special_tokens=False, return_tensors="pt")["input_ids"]
    start = len(tokenizer(before, add_special_tokens=False)["input_ids"])
    with torch.no_grad():
        logprobs = base(ids).logits[0].double().log_softmax(-1)
    want = [float(logprobs[t - 1, ids[0, t]]) for t in range(start, ids.shape[1])]
    for words in (["--file", chats], ["--chat", "--file", pairs]):
        ended = run("score", *members, "--alpha", 0, "--dtype", "float32", *words)
        assert ended.code == 0, ended.err
        close(ended.lines[0], want)


def test_a_recipe_says_how_other_prompts_are_made(run, family, tokenizer, tmp_path):
    folder = tmp_path / "kit"
    folder.mkdir()
    view = {"of": "base", "prompt": {"without": ["[", "]"]}}
    data = {"format_version": 2, "formula": "context-aware", "alpha": 0.5, "members": {"no_context": view}}
    (folder / RECIPE_FILE).write_text(json.dumps(data | {"base": {"id": str(family / "large-base")}}))
    pairs = tmp_path / "pairs.jsonl"
    lines = [
        {"prompt": "[Bo lives here.] Where is Bo?", "completion": " Here."},
        {"prompt": "[x] y", "completion": " z"},
    ]
    pairs.write_text("".join(json.dumps(line) + "\n" for line in lines))
    ended = run("score", "--recipe", folder, "--dtype", "float32", "--file", pairs)
    assert ended.code == 0, ended.err
    base = AutoModelForCausalLM.from_pretrained(family / "large-base", dtype=torch.float32)
    for line, without in zip(ended.lines, (" Where is Bo?", " y"), strict=True):
        ids = [scored_texts.encode_pair(tokenizer, p, line["completion"]) for p in (line["prompt"], without)]
        after = torch.tensor(ids[0][1])
        with torch.no_grad():
            z, other = (base(torch.tensor([[*p, *after[:-1]]])).logits[0, -len(after) :].double() for p, _ in ids)
        want = (1.5 * z - 0.5 * other).log_softmax(-1).gather(1, after[:, None])[:, 0]
        close(line, want.tolist())
    data["members"]["no_context"]["prompt"] = True
    (folder / RECIPE_FILE).write_text(json.dumps(data | {"base": {"id": str(family / "large-base")}}))
    ended = run("score", "--recipe", folder, "--file", pairs)
    assert ended.code == 2
    assert "the no_context of" in ended.err
    assert "expected a prompt view" in ended.err


def test_a_file_that_is_resumed_is_that_of_a_whole_run(run, members, file, tmp_path, monkeypatch):
    out, whole = tmp_path / "scores.jsonl", tmp_path / "whole.jsonl"
    call = ["score", *members, "--dtype", "float32", "--file", file, "--batch-size", 2]
    first = run(*call, "--out", whole)
    assert first.code == 0, first.err
    assert first.out == ""
    score, batches = scoring.score, []

    def stopped(*args, **options):
        if batches:
            raise RuntimeError("stopped")
        batches.append(1)
        return score(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(scoring, "score", stopped)
        assert run(*call, "--out", out).code == 1
    assert len(out.read_text().splitlines()) == 2
    ended = run(*call, "--out", out, "--resume")
    assert ended.code == 0, ended.err
    assert out.read_text() == whole.read_text()
    assert ended.err.splitlines()[-1] == first.err.splitlines()[-1]
    again = run(*call, "--out", out, "--resume")
    assert "the run is complete" in again.err
    assert again.err.splitlines()[-1] == first.err.splitlines()[-1]
    other = run(*call, "--out", out, "--resume", "--alpha", 0.25)
    assert other.code == 2
    assert "recipe.alpha" in other.err


def test_a_forbidden_token_is_null(run, members, file, monkeypatch):
    plain = scoring.score

    def forbids(*args, **options):
        scores = plain(*args, **options)
        scores.logprobs[1][0] = -torch.inf
        return scores

    monkeypatch.setattr(scoring, "score", forbids)
    ended = run("score", *members, "--file", file, "--per-token")
    assert ended.code == 0, ended.err
    assert (ended.lines[1]["logprob"], ended.lines[1]["perplexity"], ended.lines[1]["logprobs"][0]) == (
        None,
        None,
        None,
    )
    assert "perplexity infinite: a token is forbidden" in ended.err


def test_on_a_terminal(run, members, file, monkeypatch):
    monkeypatch.setattr(terminal, "is_terminal", lambda stream: True)
    ended = run("score", *members, "--file", file)
    lines = ended.out.splitlines()
    assert len(lines) == 4
    assert "nats" in lines[0]
    assert repr(PAIRS[0][1]) in lines[0]
    assert lines[-1].startswith("perplexity ")


@pytest.mark.parametrize(
    ("content", "words", "message"),
    [
        ('{"prompt": "x", "continuation": "y"}\n{"prompt": "x", "completion": "y"}', [], "lines of one kind"),
        ('{"prompt": "x", "completions": "y"}', [], 'line 1: expected the key "completion"; got "completions"'),
        ('{"prompt": "x", "completion": ""}', [], "line 1: expected a text under \"completion\", .*; got ''"),
        ('{"prompt": "x", "completion": 5}', [], 'line 1: expected a text under "completion", .*; got 5'),
        ('{"prompt": "x", "completion": "y", "logprob": 1}', [], 'expected no "logprob", which is a key of the output'),
        ('{"messages": [{"role": "user", "content": "x"}]}', [], "ends with the assistant's turn"),
        ('{"messages": [{"role": "assistant", "content": "x"}]}', [], "expected a user's turn before the assistant's"),
        ('{"prompt": "x"}', ["--chat"], '--chat: expected lines with a "completion"'),
        ('{"prompt": "x", "completion": "y"}', ["--system", "z"], "expected --chat with a system prompt"),
        ('{"prompt": "x"}', [], "line 1: expected at least two tokens without a prompt; got 1"),
        (
            '{"prompt": "x", "completion": "' + "y" * 600 + '"}',
            [],
            "line 1: expected at most .* tokens with its prompt",
        ),
        ('{"prompt": "x", "completion": "y"}', ["--out", "-"], "--out: expected the name of a file"),
    ],
)
def test_wrong_texts_are_told_by_line(run, members, tmp_path, content, words, message):
    path = tmp_path / "texts.jsonl"
    path.write_text(content + "\n")
    ended = run("score", *members, "--file", path, *words)
    assert ended.code == 2
    assert re.search(message, ended.err), ended.err


def test_wrong_models_are_told(run, family, members):
    for words, message in (
        ([], "expected --base, --expert and --antiexpert, or --recipe"),
        (["--base", family / "large-base", "--alpha", 1], "--alpha: expected an expert and an antiexpert"),
        ([*members, "--dtype", "int8"], "--dtype: expected"),
        ([*members, "--resume"], "--resume: expected --out with it"),
    ):
        ended = run("score", "some text", *words)
        assert ended.code == 2, words
        assert message in ended.err
