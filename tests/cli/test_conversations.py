"""Conversations, system prompts, carried keys, settings as options, and samples in a file."""

from __future__ import annotations

import io
import json

import pytest
from transformers import AutoTokenizer, GenerationConfig

from proxytune.cli import generate as command
from proxytune.cli import setting_table, settings
from proxytune.cli.encoding import check_chat, encode
from proxytune.cli.prompts import Prompt, read_prompts
from proxytune.errors import InputError

TURNS = [
    {"role": "user", "content": "Who?"},
    {"role": "assistant", "content": "I."},
    {"role": "user", "content": "Where?"},
]
TEMPLATE = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"


@pytest.fixture
def tokenizer(family):
    found = AutoTokenizer.from_pretrained(family / "large-base", padding_side="left")
    found.chat_template = TEMPLATE
    return found


def test_a_conversation_is_written_in_the_template_and_repeated_in_the_output(run, members, tmp_path):
    file = tmp_path / "chat.jsonl"
    lines = [{"id": 7, "messages": TURNS, "tags": ["a"]}, {"messages": TURNS[:1], "id": None}]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    ended = run("generate", "--file", file, *members, "--max-new-tokens", 5)
    assert (ended.code, ended.err) == (0, "")
    written = ["Question: Who?\nAnswer: I.\nQuestion: Where?\nAnswer:", "Question: Who?\nAnswer:"]
    plain = run("generate", *written, *members, "max_new_tokens=5").lines
    own = [{key: line[key] for key in ("completion", "tokens", "finish")} for line in plain]
    assert ended.lines == [line | answer for line, answer in zip(lines, own, strict=True)]


def test_system_prompts(tokenizer):
    one, own = Prompt({"prompt": "Who?"}, "prompts.txt, line 3"), Prompt({"prompt": "Who?", "system": "B"})
    chat = Prompt({"messages": TURNS})
    texts = ["[system]A[user]Who?", "[system]B[user]Who?", "[system]A[user]Who?[assistant]I.[user]Where?"]
    found = encode(tokenizer, [one, own, chat], True, "A")
    expected = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False)
    assert found["input_ids"].tolist() == expected["input_ids"].tolist()
    check_chat(tokenizer, [one, own, chat], "A")
    tokenizer.chat_template = "{{ messages[-1].content }}"  # writes the last turn only
    with pytest.raises(InputError, match=r"prompts.txt, line 3: .* leaves out or changes that of the system, 'A'"):
        check_chat(tokenizer, [one], "A")


def test_turns_of_other_programs(tokenizer, monkeypatch):
    """A content of text parts, and calls of functions, whose arguments are objects in templates."""
    parts = [{"type": "text", "text": text} for text in ("Who?", "When?")]
    call = {"id": "1", "type": "function", "function": {"name": "find", "arguments": '{"who": 1}'}}
    turns = [{"role": "user", "content": parts}, {"role": "assistant", "content": None, "tool_calls": [call]}]
    line = {"messages": [*turns, {"role": "tool", "content": "I."}], "messages_id": 3}
    monkeypatch.setattr("sys.stdin", io.StringIO(json.dumps(line)))
    [prompt] = read_prompts("-")
    assert prompt.line == line
    calls = "{% for c in m.tool_calls or [] %}{{ c.function.name }}{{ c.function.arguments.who + 1 }}{% endfor %}"
    tokenizer.chat_template = TEMPLATE.replace("{{ m.content }}", "{{ m.content or '' }}" + calls)
    check_chat(tokenizer, [prompt], None)
    written = "[user]Who?\nWhen?[assistant]find2[tool]I."
    expected = tokenizer(written, add_special_tokens=False)["input_ids"]
    assert encode(tokenizer, [prompt], True)["input_ids"].tolist() == [expected]


@pytest.mark.parametrize("key", ["message", "messages_id", "conversation", "Prompt"])
def test_what_is_near_a_key_may_stand_beside_it(monkeypatch, key):
    monkeypatch.setattr("sys.stdin", io.StringIO(json.dumps({"prompt": "a", key: "b"}) + "\n\n"))
    assert [prompt.line for prompt in read_prompts("-")] == [{"prompt": "a", key: "b"}]


def test_options_are_settings(run, members):
    options = ["--max-new-tokens", 6, "--do-sample", "--temperature", 1.5, "--top-k=0"]
    flags = ["max_new_tokens=6", "do_sample=yes", "temperature=1.5", "top_k=0"]
    assert run("generate", "x", *members, *options).lines == run("generate", "x", *members, *flags).lines
    assert run("generate", "x", *members, "--max-new-tokens", 3, "--no-do-sample").lines[0]["tokens"] == 3
    plain = run("generate", *members, "--max-new-tokens", 2, "--", "x=5", "top_k=3", "--json")
    assert [line["prompt"] for line in plain.lines] == ["x=5", "top_k=3", "--json"]


def test_every_setting_is_a_field_of_the_installed_release():
    assert setting_table.SETTINGS.keys() <= GenerationConfig().to_dict().keys()


@pytest.mark.parametrize(("word", "value"), [("no", False), ("off", False), ("0", False), ("on", True), ("YES", True)])
def test_flags_in_words(word, value):
    assert settings.check_settings({"do_sample": settings.parse_value(word)}) == {"do_sample": value}


def test_a_length_given_counts_although_the_model_has_its_own():
    own = GenerationConfig(max_new_tokens=64)
    assert settings.merged_settings(own, {"max_length": 9}).max_new_tokens is None
    assert settings.merged_settings(own, {"max_new_tokens": None}).max_new_tokens is None


def test_samples_in_a_file_resume_as_an_uninterrupted_run(run, members, tmp_path):
    out, prompts = tmp_path / "out.jsonl", tmp_path / "prompts.jsonl"
    longer = "Question: Start with 3, add 4, take away 2, add 9, add 5, take away 1, add 8."
    lines = [{"prompt": text, "id": i} for i, text in enumerate(["x", "Question: Who", longer, "Answer"])]
    prompts.write_text("".join(json.dumps(line) + "\n" for line in lines))
    words = ["sample", "--file", prompts, *members, "--no-forks", "--branches", 2, "--batch-size", 2, "--budget", 24]
    words += ["max_new_tokens=3", "eos_token_id=none"]
    ended = run(*words, "--out", out)
    assert (ended.code, ended.out) == (1, ""), "one prompt is longer than the budget"
    whole = out.read_bytes()
    found = [json.loads(line) for line in whole.splitlines()]
    assert [line["id"] for line in found] == [0, 1, 2, 3]
    assert ["error" in line for line in found] == [False, False, True, False]
    assert found == run(*words, "--json").lines
    for kept in (1, 3, 4):
        out.write_bytes(b"".join(whole.splitlines(True)[:kept]) + b'{"pro'[: 5 * (kept < 4)])
        ended = run(*words, "--out", out, "--resume")
        assert ended.code == 1, "the error in the file counts"
        assert f"note: {kept} lines already written" in ended.err
        assert out.read_bytes() == whole
    prompts.write_text(prompts.read_text().replace('"id": 1', '"id": 9'))
    ended = run(*words, "--out", out, "--resume")
    assert (ended.code, "expected an answer to prompt 2, id 9; got one to id 1" in ended.err) == (2, True)


def test_an_interrupt_says_how_to_go_on(run, members, tmp_path, monkeypatch):
    out, real, calls = tmp_path / "out.jsonl", command._complete, []

    def interrupted(*arguments, **options):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*arguments, **options)

    monkeypatch.setattr(command, "_complete", interrupted)
    ended = run("generate", "x", "y", *members, "--out", out, "--batch-size", 1, "max_new_tokens=2")
    assert (ended.code, ended.out) == (130, "")
    assert ended.err == f"note: interrupted after 1 lines of {out}; --resume goes on from there\n"
