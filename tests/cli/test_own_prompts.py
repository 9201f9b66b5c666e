"""Recipes whose members read a prompt of their own: it is made from each line, or stands in it."""

import json

import pytest
import torch
from transformers import AutoTokenizer

import proxytune
from proxytune.formulas import ContextAware, PromptView, Schedule, View

LINES = ["<c>Dedu Fegeb likes tea.</c>What does Dedu Fegeb like?", "Hi"]
NEW = "max_new_tokens=6"


@pytest.fixture(scope="module")
def base(family):
    return family / "large-base"


def recipe_of(base, place, alpha=2.0, prompt=None):
    view = PromptView(without=("<c>", "</c>")) if prompt is None else prompt
    model = proxytune.wrap(base, formula=ContextAware(alpha=alpha), members={"no_context": View(prompt=view)})
    model.save_pretrained(place)
    return place


@pytest.fixture(scope="module")
def recipe(base, tmp_path_factory):
    return recipe_of(base, tmp_path_factory.mktemp("recipe"))


@pytest.fixture(scope="module")
def by_hand(recipe, base):
    model, tokenizer = proxytune.ProxyTunedModel.from_pretrained(recipe), AutoTokenizer.from_pretrained(base)

    def complete(text, own, chat=False):
        if chat:
            text, own = (
                tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
                if isinstance(turns, list)
                else turns
                for turns in (text, own)
            )
        ids, theirs = (tokenizer(t, return_tensors="pt", add_special_tokens=not chat)["input_ids"] for t in (text, own))
        out = model.generate(ids, prompts={"no_context": theirs}, do_sample=False, max_new_tokens=6)
        return tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)

    return complete


def user(text):
    return [{"role": "user", "content": text}]


def test_generate_makes_them_from_each_line(run, recipe, by_hand):
    wanted = [by_hand(LINES[0], "What does Dedu Fegeb like?"), by_hand("Hi", "Hi")]
    ended = run("generate", "--recipe", recipe, *LINES, NEW)
    assert [line["completion"] for line in ended.lines] == wanted, ended.err
    wanted = by_hand(user(LINES[0]), user("What does Dedu Fegeb like?"), chat=True)
    assert run("generate", "--recipe", recipe, "--chat", LINES[0], NEW).lines[0]["completion"] == wanted
    assert wanted != by_hand(user(LINES[0]), user(LINES[0]), chat=True)


def test_a_line_can_have_them(run, recipe, by_hand, tmp_path):
    lines = [
        {"prompt": LINES[0], "prompts": {"no_context": "Like?"}, "id": 7},
        {"prompt": LINES[0], "prompts": {"no_context": user("Tea?")}},
    ]
    file = tmp_path / "lines.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    ended = run("generate", "--recipe", recipe, "--chat", "--file", file, NEW)
    wanted = [by_hand(user(LINES[0]), user(own), chat=True) for own in ("Like?", "Tea?")]
    assert [line["completion"] for line in ended.lines] == wanted, ended.err
    assert ended.lines[0]["prompts"] == {"no_context": "Like?"}
    file.write_text(json.dumps(lines[0]) + "\n")
    assert run("generate", "--recipe", recipe, "--file", file, NEW).lines[0]["completion"] == by_hand(LINES[0], "Like?")


@pytest.mark.filterwarnings("ignore::proxytune.errors.CalibrationWarning")  # few tokens
def test_sample_calibrate_and_score(run, recipe, by_hand, tmp_path):
    words = ("sample", "--recipe", recipe, "--json", LINES[0], LINES[1], "max_new_tokens=6", "temperature=0.001")
    ended = run(*words, "--no-forks", "--branches", 2, "--budget", 60)
    assert [leaf["text"] for leaf in ended.lines[0]["leaves"]] == [by_hand(LINES[0], "What does Dedu Fegeb like?")] * 2
    ended = run(*words, "--where", "start", "--branches", 1, "--seed", 3)
    assert ended.lines[0]["leaves"][0]["text"] == by_hand(LINES[0], "What does Dedu Fegeb like?")
    ended = run("calibrate", "--recipe", recipe, *LINES, "--samples", 8, "--json", "--max-new-tokens", 6)
    assert json.loads(ended.out)["tokens"] > 8, ended.err
    file = tmp_path / "lines.jsonl"
    scored = [{"prompt": LINES[0], "completion": " tea"}, {"prompt": LINES[0], "completion": " tea"}]
    scored[1]["prompts"] = {"no_context": "What does Dedu Fegeb like?"}
    file.write_text("".join(json.dumps(line) + "\n" for line in scored))
    ended = run("score", "--recipe", recipe, "--file", file)
    assert ended.lines[0]["logprob"] == ended.lines[1]["logprob"], ended.err


def test_what_is_refused(run, recipe, base, members, tmp_path):
    file = tmp_path / "lines.jsonl"

    def with_line(line, *words, recipe=recipe):
        file.write_text(json.dumps(line) + "\n")
        return run("generate", "--recipe", recipe, "--file", file, *words, NEW).err

    assert 'line 1, "prompts": expected prompts of members that read their own: no_context; got one of no' in with_line(
        {"prompt": "Hi", "prompts": {"no": "x"}}
    )
    for wrong in ("x", ["x"], {"no_context": 3}):
        assert 'line 1: expected under "prompts", role → a text or turns' in with_line(
            {"prompt": "Hi", "prompts": wrong}
        )
    assert "the no_context's prompt: expected --chat with a conversation" in with_line(
        {"prompt": "Hi", "prompts": {"no_context": user("x")}}
    )
    assert "the no_context's prompt: expected some text; got ' '" in with_line(
        {"prompt": "Hi", "prompts": {"no_context": " "}}
    )
    err = with_line({"prompt": "Hi <c>x"})
    assert "line 1, for the no_context: a prompt: expected '</c>' after '<c>'" in err
    file.write_text(json.dumps({"prompt": "Hi", "prompts": {"no_context": "x"}}) + "\n")
    err = run("generate", *members, "--file", file, NEW).err
    assert "members that read their own: none does; got one of no_context" in err
    bare = recipe_of(base, tmp_path / "bare", prompt=True)
    err = run("generate", "--recipe", bare, "Hi", NEW).err
    assert f"the no_context of {bare}: expected a prompt view" in err
    assert '"members": {"no_context": {"of": "base", "prompt": {"drop": ["system"]}}}, or give each line its' in err
    file.write_text(json.dumps({"prompt": "Hi", "prompts": {"no_context": "x"}}) + "\n")
    assert run("generate", "--recipe", bare, "--file", file, NEW).code == 0  # each line says it
    assert (
        "--texts: expected a recipe whose members all read" in run("calibrate", "--recipe", recipe, "--texts", file).err
    )


@pytest.mark.filterwarnings("ignore::proxytune.errors.CalibrationWarning")
def test_a_schedule_of_the_recipe(run, base, tmp_path):
    recipe = recipe_of(base, tmp_path / "recipe", alpha=Schedule.linear(2.0, 0.0, 4))
    assert json.loads((recipe / "proxytune_config.json").read_text())["alpha"] == "linear(2, 0, 4)"
    ended = run("calibrate", "--recipe", recipe, *LINES, "--samples", 8, "--json", "--max-new-tokens", 6, "--write")
    assert json.loads(ended.out)["fork_threshold"]["alpha"] is None, ended.err
    assert run("sample", "--recipe", recipe, *LINES, "--branches", 2, NEW).code == 0
    ended = run("calibrate", "--recipe", recipe, *LINES, "--alpha", 1, "--write")
    assert "expected the recipe's own α, linear(2, 0, 4)" in ended.err
    ended = run("generate", "--recipe", recipe, LINES[0], "--alpha", 0, NEW)
    plain = AutoTokenizer.from_pretrained(base)
    ids = plain(LINES[0], return_tensors="pt")["input_ids"]
    with torch.no_grad():
        out = proxytune.ProxyTunedModel.from_pretrained(recipe).base.generate(ids, do_sample=False, max_new_tokens=6)
    assert ended.lines[0]["completion"] == plain.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
