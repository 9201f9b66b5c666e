"""`proxytune generate` against the library called directly, and every way to call it wrongly."""

from __future__ import annotations

import io
import json
import shutil

import pytest
import torch
from transformers import AutoTokenizer, GenerationConfig

import proxytune
from proxytune import FusedDecoding
from proxytune.cli import encoding, settings, terminal
from proxytune.cli import generate as command
from proxytune.cli import prompts as inputs
from proxytune.errors import InputError

PROMPTS = ["Question: Start with 3", "Question: Who", "x"]


@pytest.fixture
def model(family):
    folder = {name: str(family / name) for name in ("large-base", "tiny-tuned", "tiny-base")}
    return proxytune.wrap(folder["large-base"], expert=folder["tiny-tuned"], antiexpert=folder["tiny-base"], alpha=1.0)


@pytest.fixture
def tokenizer(family):
    return AutoTokenizer.from_pretrained(family / "large-base")


def complete_alone(model, tokenizer, prompt, **settings):
    """The reference: one prompt, no padding, the library's own generate()."""
    batch = tokenizer(prompt, return_tensors="pt")
    ids = model.generate(**batch, **settings)[0, batch["input_ids"].shape[1] :]
    return tokenizer.decode(ids, skip_special_tokens=True), len(ids)


@pytest.mark.smoke
@pytest.mark.parametrize("batch_size", [1, 2, 8])  # one by one; a padded batch and a rest; everything at once
def test_lines_equal_the_library_prompt_by_prompt(run, members, model, tokenizer, batch_size):
    ended = run("generate", *PROMPTS, "max_new_tokens=6", *members, "--batch-size", batch_size)
    assert ended.code == 0, ended.err
    assert ended.err == ""
    expected = [complete_alone(model, tokenizer, prompt, max_new_tokens=6) for prompt in PROMPTS]
    assert [(line["prompt"], line["completion"], line["tokens"]) for line in ended.lines] == [
        (prompt, text, count) for prompt, (text, count) in zip(PROMPTS, expected, strict=True)
    ]


def test_alpha_reaches_the_model(run, members, model, tokenizer):
    def completions(alpha):
        lines = run("generate", *PROMPTS, "max_new_tokens=8", "--alpha", alpha, *members).lines
        return [line["completion"] for line in lines]

    for alpha in (0.0, 2.5):
        model.alpha = alpha
        assert completions(alpha) == [complete_alone(model, tokenizer, p, max_new_tokens=8)[0] for p in PROMPTS]
    assert completions(0.0) != completions(2.5)
    assert completions(0.0) == [complete_alone(model.base, tokenizer, p, max_new_tokens=8)[0] for p in PROMPTS]


def test_the_seed_decides_a_sample(run, members, model, tokenizer):
    words = ["generate", "x", *members, "max_new_tokens=12", "do_sample=true", "temperature=2.0"]

    def sample(seed):
        return run(*words, "--seed", seed).lines[0]["completion"]

    assert sample(3) == sample(3)
    assert len({sample(seed) for seed in range(4)}) > 1
    settings = {"max_new_tokens": 12, "do_sample": True, "temperature": 2.0, "custom_generate": FusedDecoding(seed=3)}
    expected, _ = complete_alone(model, tokenizer, "x", **settings)
    assert sample(3) == expected


def test_several_samples_of_a_prompt_stay_with_it(run, members):
    lines = run(*("generate", "x", "y", *members), "max_new_tokens=3", "do_sample=true", "num_return_sequences=3").lines
    assert [line["prompt"] for line in lines] == ["x"] * 3 + ["y"] * 3


def test_chat_is_the_template_of_one_user_turn(run, members):
    asked = run("generate", "Who?", "--chat", "max_new_tokens=5", *members).lines[0]
    written = run("generate", "Question: Who?\nAnswer:", "max_new_tokens=5", *members).lines[0]
    assert asked["completion"] == written["completion"]
    assert asked["prompt"] == "Who?"


def test_a_recipe_is_saved_and_read_again(run, members, tmp_path):
    first = run("generate", *PROMPTS, *members, "--alpha", "0.5", "--save-recipe", tmp_path / "r", "max_new_tokens=5")
    for recipe in (tmp_path / "r", tmp_path / "r" / "proxytune_config.json"):
        assert run("generate", *PROMPTS, "--recipe", recipe, "max_new_tokens=5").lines == first.lines
    other = run("generate", *PROMPTS, "--recipe", tmp_path / "r", "--alpha", "3", "max_new_tokens=5")
    direct = run("generate", *PROMPTS, *members, "--alpha", "3", "max_new_tokens=5")
    assert other.lines == direct.lines != first.lines


def test_prompts_from_a_file_stdin_and_json(run, members, tmp_path, monkeypatch):
    plain, lines = tmp_path / "prompts.txt", tmp_path / "prompts.jsonl"
    plain.write_text("\n".join(PROMPTS) + "\n")
    lines.write_text("".join(json.dumps({"prompt": prompt, "id": 1}) + "\n" for prompt in PROMPTS))
    expected = run("generate", *PROMPTS, *members, "max_new_tokens=3").lines
    assert run("generate", "--file", plain, *members, "max_new_tokens=3").lines == expected
    found = run("generate", "--file", lines, *members, "max_new_tokens=3").lines
    assert found == [line | {"id": 1} for line in expected]
    for words in ([], ["--file", "-"]):
        monkeypatch.setattr("sys.stdin", io.StringIO(plain.read_text()))
        assert run("generate", *words, *members, "max_new_tokens=3").lines == expected


def test_lines_go_to_a_file_one_by_one(run, members, tmp_path, monkeypatch):
    out = tmp_path / "out.jsonl"
    seen = []
    real = command._complete

    def watching(*arguments, **options):
        seen.append(out.read_text().count("\n"))
        return real(*arguments, **options)

    monkeypatch.setattr(command, "_complete", watching)
    ended = run("generate", *PROMPTS, *members, "max_new_tokens=2", "--out", out, "--batch-size", "1")
    assert ended.out == ""
    assert seen == [0, 1, 2], "a line is on disk before the next batch begins"
    assert [json.loads(line)["prompt"] for line in out.read_text().splitlines()] == PROMPTS


def test_a_terminal_gets_the_text_as_it_comes(run, members, monkeypatch):
    expected = run("generate", *PROMPTS, *members, "max_new_tokens=6").lines
    monkeypatch.setattr(terminal, "is_terminal", lambda stream: True)
    streamed = run("generate", *PROMPTS, *members, "max_new_tokens=6")
    # Untrained models write control characters too; a terminal gets pictures of them.
    assert streamed.out == "".join(f"{line['prompt']}{terminal.safe(line['completion'])}\n" for line in expected)
    assert run("generate", *PROMPTS, *members, "max_new_tokens=6", "--json").lines == expected
    # Beams cannot be streamed: the text comes when it is done.
    beams = run("generate", *PROMPTS, *members, "max_new_tokens=6", "num_beams=2")
    assert beams.code == 0, beams.err
    expected = run("generate", *PROMPTS, *members, "max_new_tokens=6", "num_beams=2", "--json").lines
    assert beams.out == "".join(f"{line['prompt']}{terminal.safe(line['completion'])}\n" for line in expected)


def test_a_model_s_own_settings_count(run, family, tmp_path, monkeypatch):
    words = []
    for role, member in (("--base", "large-base"), ("--expert", "tiny-tuned"), ("--antiexpert", "tiny-base")):
        shutil.copytree(family / member, tmp_path / member)
        words += [role, str(tmp_path / member)]
    plain = run("generate", "x", *words, "max_new_tokens=12").lines[0]
    letter = next(sign for sign in plain["completion"] if sign.isalpha())
    saved = tmp_path / "large-base" / "generation_config.json"
    saved.write_text(json.dumps(json.loads(saved.read_text()) | {"num_beams": 2, "stop_strings": [letter]}))
    own = run("generate", "x", *words, "max_new_tokens=12").lines[0]
    assert own["finish"] == "stop"
    assert letter in own["completion"]
    monkeypatch.setattr(terminal, "is_terminal", lambda stream: True)
    assert run("generate", "x", *words, "max_new_tokens=12").code == 0, "beams cannot be streamed"


def test_a_path_that_cannot_be_written_is_found_before_loading(run, members, tmp_path, monkeypatch):
    monkeypatch.setattr(command, "load", lambda *_: pytest.fail("a model was loaded"))
    ended = run("generate", "x", *members, "--out", tmp_path / "none" / "out.jsonl")
    assert ended.code == 2
    assert "out.jsonl: no such file or directory. Make the folder" in ended.err


def test_a_model_cannot_command_the_terminal():
    assert terminal.safe("a\x1b[2Jb\r\x07\x7f\x9b") == "a␛[2Jb␍␇␡\ufffd"
    assert terminal.safe("tab\tline\nπ 漢") == "tab\tline\nπ 漢"


def test_finish_tells_a_stop_from_a_limit(run, members, model, tokenizer):
    prompt = tokenizer("x", return_tensors="pt")
    ids = model.generate(**prompt, max_new_tokens=12)[0, prompt["input_ids"].shape[1] :].tolist()
    # A token that is a whole word and has not occurred before; the untrained models write half characters as well.
    place = next(
        i for i, token in enumerate(ids) if tokenizer.decode([token]).strip().isalpha() and token not in ids[:i]
    )
    word = tokenizer.decode([ids[place]])

    def ending(*flags):
        line = run("generate", "x", *members, "max_new_tokens=12", *flags).lines[0]
        return line["finish"], line["tokens"]

    assert ending() == ("length", 12)
    assert ending(f"eos_token_id={ids[place]}") == ("stop", place + 1)
    assert ending(f"stop_strings={json.dumps([word])}") == ("stop", place + 1)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], ([], {})),
        (["a", "b"], (["a", "b"], {})),
        (["a", "top_k=5"], (["a"], {"top_k": 5})),
        (["x=1", "a", "top_k=5"], (["x=1", "a"], {"top_k": 5})),  # only the last ones can be settings
        (["2 + 2=4"], (["2 + 2=4"], {})),  # no identifier before the sign
        (["top_k=5", "top_p=0.5"], ([], {"top_k": 5, "top_p": 0.5})),
    ],
)
def test_settings_stand_after_the_prompts(words, expected):
    assert settings.split_arguments(words) == expected


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("5", 5),
        ("0.7", 0.7),
        ("1e-3", 1e-3),
        ("true", True),
        ("True", True),
        ("False", False),
        ("null", None),
        (".5", 0.5),
        ("-.25", -0.25),
        (".", "."),
        ("None", None),
        ("[1, 2]", [1, 2]),
        ('["a"]', ["a"]),
        ('{"a": 1}', {"a": 1}),
        ("dynamic", "dynamic"),
        ("", ""),
        ("[1", "[1"),
    ],
)
def test_values_are_json_or_else_text(text, value):
    parsed = settings.parse_value(text)
    assert parsed == value
    assert type(parsed) is type(value)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({"max_new_token": 3}, "max_new_tokens"),
        ({"temprature": 1.0}, "temperature"),
        ({"zzzzzz": 1}, "--file"),
        ({"transformers_version": "1"}, "transformers_version"),
    ],
)
def test_unknown_settings_are_refused_by_name(flags, expected):
    with pytest.raises(InputError, match=expected):
        settings.check_settings(flags)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({"max_new_tokens": -1}, "max_new_tokens"),
        ({"max_new_tokens": "many"}, "max_new_tokens"),
        ({"num_return_sequences": 2}, "num_return_sequences"),
        ({"temperature": 5, "top_k": 3}, "Greedy decoding would ignore temperature, top_k. Add do_sample=true"),
        ({"do_sample": False, "top_p": 0.9}, "Greedy decoding would ignore top_p"),
    ],
)
def test_wrong_values_are_refused_by_name(flags, expected):
    with pytest.raises(InputError, match=expected):
        settings.merged_settings(GenerationConfig(), flags)


def test_a_models_own_settings_count():
    own = GenerationConfig(do_sample=True, temperature=0.3, max_new_tokens=7)
    merged = settings.merged_settings(own, {"num_return_sequences": 2, "top_k": 3})
    assert (merged.do_sample, merged.temperature, merged.max_new_tokens) == (True, 0.3, 7)
    assert (merged.num_return_sequences, merged.top_k) == (2, 3)
    assert own.num_return_sequences != 2, "the model's are not changed"


def test_every_mistake_is_found_before_a_model_is_loaded(run, members, tmp_path, monkeypatch):
    def refuse(*_):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(command, "load", refuse)
    blank, broken, wrong = tmp_path / "blank.txt", tmp_path / "broken.jsonl", tmp_path / "wrong.jsonl"
    blank.write_text("a\n\nb\n")
    broken.write_text('{"prompt": "a"}\n{"prompt"\n')
    wrong.write_text('{"text": "a"}\n')
    (tmp_path / "empty.txt").write_text("")
    for words, expected in (
        (["", *members], "prompt 1"),
        (["a", " ", *members], "prompt 2"),
        (["--file", blank, *members], f"{blank}, line 2"),
        (["--file", broken, *members], "line 2"),
        (["--file", wrong, *members], "line 1"),
        (["--file", tmp_path / "empty.txt", *members], "empty.txt"),
        (["a", "top_q=1", *members], "top_p"),
        (["a", "top_k=1", "top_k=2", *members], "top_k"),
        (["a", *members[:4]], "--antiexpert"),
        (["a", *members[:2]], "--expert, --antiexpert"),
        (["a"], "--recipe"),
        (["a", "--recipe", tmp_path, *members], "--recipe and --base"),
    ):
        ended = run("generate", *words)
        assert ended.code == 2, words
        assert ended.err.count("\n") == 1
        assert expected in ended.err, words


def test_mistakes_found_on_loading_are_one_line(run, members, tmp_path):
    for words, expected in (
        (["a", "--alpha", "nan", *members], "alpha"),
        (["a", "--dtype", "float99", *members], "--dtype"),
        (["a", "--dtype", "int8", *members], "--dtype: expected 'auto', 'float32'"),
        (["a", "--device", "toaster", *members], "--device: expected"),
        (["a", "--device", "cuda:99", *members], "--device: expected"),
        (["a", "temperature=5", *members], "Add do_sample=true"),
        (["a", "--recipe", tmp_path], "proxytune_config.json"),
        (["a", *members[:4], "--antiexpert", tmp_path], "antiexpert"),
    ):
        ended = run("generate", *words)
        assert ended.code == 2, (words, ended.err)
        assert ended.err.count("\n") == 1, ended.err
        assert expected in ended.err, words


@pytest.mark.parametrize("name", ["generate", "sample", "calibrate", "--texts"])
def test_a_prompt_file_that_cannot_be_read_is_a_wrong_call(run, members, tmp_path, name, monkeypatch):
    latin, folder = tmp_path / "latin.txt", tmp_path / "folder"
    latin.write_bytes("Größe?\n".encode("latin-1"))
    folder.mkdir()
    option = "--texts" if name == "--texts" else "--file"
    words = ["calibrate" if name == "--texts" else name, *members, *(["--threshold", 1] if name == "sample" else [])]
    for file, expected in (
        (
            tmp_path / "none.txt",
            f"{option}: expected a file of prompts that can be read; got {tmp_path}/none.txt: no such",
        ),
        (
            tmp_path / "none.jsonl",
            f"{option}: expected a file of prompts that can be read; got {tmp_path}/none.jsonl: no",
        ),
        (folder, f"{option}: expected a file of prompts that can be read; got {folder}: is a directory"),
        (latin, f"prompts from {latin}: expected text in UTF-8; got byte 0xf6 at offset 2"),
    ):
        ended = run(*words, option, file)
        assert ended.code == 2, ended.err
        assert ended.err.startswith(f"error: {expected}"), ended.err
        assert ended.err.count("\n") == 1, ended.err
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(latin.read_bytes()), encoding="utf-8"))
    ended = run(*words, option, "-")
    assert (ended.code, ended.out) == (2, "")
    assert "error: prompts from stdin: expected text in UTF-8; got byte 0xf6" in ended.err


def test_a_missing_prompt_file_is_named_before_the_output(run, members, tmp_path):
    out = tmp_path / "out.jsonl"
    out.write_text("")
    ended = run("generate", "--file", tmp_path / "none.txt", "--out", out, *members)
    assert ended.code == 2
    assert "--file: expected a file of prompts" in ended.err


class Untouched(io.StringIO):
    """A stdin that nobody may wait for."""

    def read(self, *_: object) -> str:
        raise AssertionError("stdin was read")


@pytest.mark.parametrize("name", ["generate", "sample"])
def test_a_prompt_that_was_read_as_a_setting_is_named(run, members, monkeypatch, name):
    words = [name, *members, *(["--threshold", 1] if name == "sample" else [])]
    monkeypatch.setattr("sys.stdin", Untouched())
    for prompt in ("x=3 is what", "seed=3 is what", "temperatur=3 is what"):
        ended = run(*words, prompt)
        assert ended.code == 2
        key = prompt.partition("=")[0]
        expected = (
            f"error: generation setting '{key}': expected a field of transformers' GenerationConfig; got {prompt}. "
        )
        remedy = (
            "Arguments of the form key=value at the end are read as settings. Pass a prompt of this form with --file"
        )
        assert ended.err.startswith(expected + remedy), ended.err
    ended = run(*words, "top_k=3 is what")
    assert (
        "'top_k': expected a whole number, at least 0; got '3 is what'. Correct the value. Pass a prompt" in ended.err
    )
    # A setting whose value it may be: then the prompt is missing.
    read = "'stop_strings=3 is what' read as settings. "
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    ended = run(*words, "stop_strings=3 is what")
    assert f"prompts from stdin: expected at least one line; got nothing, and {read}" in ended.err
    monkeypatch.setattr(terminal, "is_terminal", lambda stream: True)
    ended = run(*words, "stop_strings=3 is what")
    assert f"prompts: expected at least one; got none, and {read}" in ended.err
    assert "Pass a prompt of this form with --file, on stdin, or after --." in ended.err
    assert "read as" not in run(*words).err


def test_nothing_to_read_on_a_terminal(monkeypatch):
    monkeypatch.setattr(terminal, "is_terminal", lambda stream: True)
    with pytest.raises(InputError, match="at least one"):
        inputs.read_prompts(None)


def test_chat_needs_a_template(run, family, tmp_path, members):
    bare = AutoTokenizer.from_pretrained(family / "large-base")
    bare.chat_template = None
    with pytest.raises(InputError, match="chat template.*No member has one. Save that which the expert was tuned with"):
        encoding.check_chat(bare, [inputs.Prompt({"prompt": "a"})], None)


@pytest.fixture
def borrowing(family, tmp_path):
    """The usual case, a base without a chat template: options, and a function that changes a tokenizer."""

    def change(member, **attributes):
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / member)
        added = attributes.pop("added", [])
        tokenizer.add_special_tokens({"additional_special_tokens": added} if added else {})
        for name, value in attributes.items():
            setattr(tokenizer, name, value)
        (tmp_path / member / "chat_template.jinja").unlink(missing_ok=True)
        tokenizer.save_pretrained(tmp_path / member)

    options = []
    for role, member in (("base", "large-base"), ("expert", "tiny-tuned"), ("antiexpert", "tiny-base")):
        shutil.copytree(family / member, tmp_path / member)
        options += [f"--{role}", str(tmp_path / member)]
    change("large-base", chat_template=None)
    return options, change


NOTE = "note: --chat: the base's tokenizer has no chat template; the expert's is used.\n"


def test_chat_takes_the_experts_template_where_the_base_has_none(run, members, borrowing, tmp_path):
    options, change = borrowing
    words = ["generate", "Who?", "Where?", "--chat", "max_new_tokens=5"]
    expected = run(*words, *members)
    assert expected.err == ""
    ended = run(*words, *options, "--save-recipe", tmp_path / "saved")
    assert (ended.lines, ended.err) == (expected.lines, NOTE)
    # The tokenizer in the recipe's folder has it from then on; without that, the expert's is looked at.
    again = run(*words, "--recipe", tmp_path / "saved")
    assert (again.lines, again.err) == (expected.lines, "")
    for file in ("tokenizer_config.json", "chat_template.jinja"):
        (tmp_path / "saved" / file).unlink()
    again = run(*words, "--recipe", tmp_path / "saved")
    assert (again.lines, again.err) == (expected.lines, NOTE)
    for command_words in (
        ["sample", "Who?", "--no-forks", "max_new_tokens=5"],
        ["calibrate", "Who?", "--samples", 64, "--max-new-tokens", 32],
    ):
        ended = run(*command_words, "--chat", *options)
        assert (ended.code, ended.err.count(NOTE)) == (0, 1), ended.err
    change("tiny-tuned", chat_template=None)
    ended = run(*words, *options)
    assert ended.code == 2
    assert "--chat: expected a tokenizer with a chat template" in ended.err
    assert ended.err.count("\n") == 1


@pytest.mark.filterwarnings("ignore:the expert also ends its turn:proxytune.errors.SteeringWarning")
def test_a_borrowed_template_means_its_own_special_tokens(run, members, borrowing, tokenizer):
    options, change = borrowing
    end, pad = tokenizer.eos_token, tokenizer.pad_token
    assert end != pad
    change("tiny-tuned", chat_template="{{ eos_token }}{{ messages[0]['content'] }}", eos_token=pad)
    ended = run("generate", "Who?", "--chat", "max_new_tokens=5", *options)
    assert ended.code == 0, ended.err
    written = run("generate", f"{pad}Who?", "max_new_tokens=5", *members)
    assert ended.lines[0]["completion"] == written.lines[0]["completion"]
    assert written.lines != run("generate", f"{end}Who?", "max_new_tokens=5", *members).lines


def test_a_template_whose_tokens_the_base_does_not_have_is_refused(run, borrowing):
    options, change = borrowing
    template = "<|turn|>{{ messages[0]['content'] }}{% if tools %}<|tool|>{% endif %}"
    change("tiny-tuned", added=["<|turn|>", "<|tool|>"], chat_template=template)
    ended = run("generate", "Who?", "--chat", "max_new_tokens=5", *options)
    assert ended.code == 2
    assert "special tokens of the expert's chat template; got one without <|turn|>. Use a base" in ended.err
    # Those that a user turn does not write are not needed.
    change("tiny-tuned", chat_template=template.removeprefix("<|turn|>"))
    assert run("generate", "Who?", "--chat", "max_new_tokens=5", *options).code == 0


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ([5, 6, 1, 0, 0], ([5, 6, 1], True)),
        ([5, 6, 7], ([5, 6, 7], False)),
        ([5, 6, 0], ([5, 6, 0], False)),  # padding alone is no end
        ([5, 6, 9, 0], ([5, 6, 9], True)),  # a stop string ended it, so it was padded
        ([5, 9, 9, 9], ([5, 9], True)),  # with its own token
        ([5, 9, 1, 1], ([5, 9], True)),  # with an end token
        ([4, 0, 0], ([4], True)),  # a stop string that the prompt began
        ([1], ([1], True)),
        ([], ([], False)),
    ],
)
def test_a_row_ends_at_its_end(tokenizer, row, expected):
    prompt, (begin, stop) = [8, 3], tokenizer.convert_ids_to_tokens([3, 9])
    config = GenerationConfig(eos_token_id=1, pad_token_id=0, stop_strings=[stop, begin + tokenizer.decode([4])])
    assert command._cut(torch.tensor([prompt + row]), 2, config, tokenizer) == [expected]


def test_padding_is_no_part_of_an_answer(run, members, tokenizer):
    """Whichever token it is: one of the text, or one that ends it."""
    words = ["max_new_tokens=12", *members]
    text = run("generate", "x", *words).lines[0]["completion"]
    stop = next(sign for sign in text if sign.isalpha())

    def lines(size, pad):
        flags = (f"stop_strings={stop}", f"pad_token_id={pad}")
        return run("generate", *PROMPTS, *words, "--batch-size", size, *flags).lines

    alone = lines(1, tokenizer.pad_token_id)
    assert len({line["tokens"] for line in alone}) > 1
    for pad in (tokenizer.eos_token_id, *tokenizer(stop)["input_ids"]):
        assert lines(3, pad) == alone


def test_the_dtype_reaches_the_models(family):
    settings = (str(family / "large-base"), str(family / "tiny-tuned"), str(family / "tiny-base"), None, None, "cpu")
    model, _ = command.load(*settings, "bfloat16")
    assert {m.dtype for m in (model.base, model.expert, model.antiexpert)} == {torch.bfloat16}


@pytest.mark.parametrize("settings", [[], ["do_sample=true", "temperature=0.9", "top_k=0"]])
def test_speculation_changes_no_text(run, members, monkeypatch, settings):
    rounds = []
    loop = proxytune.SpeculativeDecoding

    class Watched(loop):
        def __call__(self, *args, **kwargs):
            kwargs["generation_config"].return_dict_in_generate = True
            out = super().__call__(*args, **kwargs)
            rounds.append((out.rounds, int(out.drafted.sum())))
            return out

    words = ["generate", *PROMPTS, "max_new_tokens=12", *settings, *members, "--seed", 3]
    plain = run(*words)
    monkeypatch.setattr("proxytune.methods.speculation.decoding.SpeculativeDecoding", Watched)
    monkeypatch.setattr("proxytune.costs.devices.DECIDING", 0.0)  # models so small would not be worth drafting for
    for size in (1, 2, 8):
        ended = run(*words, "--speculate", "--batch-size", size)
        assert ended.code == 0, ended.err
        assert ended.lines == plain.lines
    assert len(rounds) == 3 + 2 + 1
    assert all(drafted > 0 for _, drafted in rounds)  # it did run ahead


def test_speculation_is_refused_where_drafts_are_no_tokens(run, members):
    ended = run("generate", "x", *members, "--speculate", "--latent", "mean")
    assert (ended.code, "--speculate: expected no --latent" in ended.err) == (2, True)
    ended = run("generate", "x", *members, "--speculate", "num_beams=2")
    assert (ended.code, "beam search" in ended.err) == (2, True)
