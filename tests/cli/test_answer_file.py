"""`proxytune generate --resume`: a file cut anywhere becomes the uninterrupted run's, and every other file is refused.

The cuts stand for a kill: bytes reach a file in order, so what a killed process leaves is a beginning of what it would
have written. Real kills are in `test_long_runs.py`.
"""

from __future__ import annotations

import fcntl
import json
import os

import pytest
import torch
from packaging.version import Version

from proxytune.cli import generate as command
from proxytune.cli.prompts import Prompt

PROMPTS = ["Question: Start with 3", "Question: Who", "x", "Zoë\u2028y", "Answer", "Start with 12, plus", "who"]
MODES = {
    "greedy": ["max_new_tokens=5"],
    "sampling": ["do_sample=true", "temperature=1.5", "max_new_tokens=5", "--seed", "7"],
    "several": ["do_sample=true", "num_return_sequences=3", "max_new_tokens=4", "top_k=40"],
    "beams": ["num_beams=3", "num_return_sequences=2", "max_new_tokens=4"],
    "beam-sampling": ["num_beams=2", "do_sample=true", "temperature=3.0", "max_new_tokens=4"],
    "latent": ["do_sample=true", "max_new_tokens=4", "--latent", "gumbel", "--tau", "2.0"],
    "fewer": ["max_new_tokens=5", "--batch-size", "1"],
}


@pytest.fixture
def words(members, tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in PROMPTS))
    return ["generate", "--file", str(prompts), *members, "--batch-size", "2", "--out", str(tmp_path / "out.jsonl")]


def with_flags(words, flags):
    """Settings stand at the end."""
    return [*words, *(f for f in flags if "=" not in f), *(f for f in flags if "=" in f)]


@pytest.mark.parametrize("mode", MODES)
def test_a_cut_file_becomes_the_uninterrupted_one(run, words, tmp_path, mode):
    flags = MODES[mode]
    if "--batch-size" in flags:
        words = [word for word in words if word not in ("--batch-size", "2")]
    words, out = with_flags(words, flags), tmp_path / "out.jsonl"
    ended = run(*words)
    assert (ended.code, ended.out, ended.err) == (0, "", "")
    whole = out.read_bytes()
    ends = [i + 1 for i, byte in enumerate(whole) if byte == ord("\n")]
    per_prompt = len(ends) // len(PROMPTS)
    assert [json.loads(line)["prompt"] for line in whole.splitlines()] == [
        p for p in PROMPTS for _ in range(per_prompt)
    ]
    # Before anything; inside the first line; behind it, in the middle of a batch; a line but for its line feed; at a
    # batch's end; inside a character of several bytes; inside the last line; all.
    cuts = [0, 5, ends[0], ends[1] - 1, ends[2 * per_prompt - 1], whole.index("ë".encode()) + 1, len(whole) - 3]
    for cut in cuts:
        out.write_bytes(whole[:cut])
        ended = run(*words, "--resume")
        lines = whole[:cut].count(b"\n")
        said = f"note: {lines} lines already written\n" if lines else ""
        assert (ended.code, ended.out, ended.err) == (0, "", said), cut
        assert out.read_bytes() == whole, cut


def test_only_what_is_missing_is_generated(run, words, tmp_path, monkeypatch):
    out, seen = tmp_path / "out.jsonl", []
    words = [*words, "max_new_tokens=2"]
    run(*words)
    whole = out.read_bytes()
    real = command._complete

    def watching(*arguments, **options):
        seen.append(arguments[6:8])
        return real(*arguments, **options)

    monkeypatch.setattr(command, "_complete", watching)
    out.write_bytes(b"".join(whole.splitlines(True)[:3]))
    run(*words, "--resume")
    # From the batch that was cut on, and that one as a whole: in low precision its padding is part of the rounding.
    assert seen == [(first, [Prompt({"prompt": p}) for p in PROMPTS[first : first + 2]]) for first in (2, 4, 6)]
    assert out.read_bytes() == whole


def test_a_finished_run_loads_no_model(run, words, tmp_path, monkeypatch):
    run(*words, "max_new_tokens=2")
    whole = (tmp_path / "out.jsonl").read_bytes()
    monkeypatch.setattr(command, "load", lambda *_: pytest.fail("a model was loaded"))
    ended = run(*words, "max_new_tokens=2", "--resume")
    assert (ended.code, ended.err) == (0, "note: 7 lines already written, the run is complete\n")
    assert (tmp_path / "out.jsonl").read_bytes() == whole


def test_prompts_may_be_added(run, words, tmp_path):
    out, prompts = tmp_path / "out.jsonl", tmp_path / "prompts.jsonl"
    words = [*words, "--dtype", "float32", "max_new_tokens=4"]  # one batch is padded otherwise, which rounds otherwise
    run(*words)
    whole, lines = out.read_bytes(), prompts.read_text()
    prompts.write_text("".join(lines.splitlines(True)[:3]))
    out.unlink()
    run(*words)
    assert out.read_bytes() == b"".join(whole.splitlines(True)[:3])
    prompts.write_text(lines)
    assert run(*words, "--resume").code == 0
    assert out.read_bytes() == whole
    assert json.loads((tmp_path / "out.jsonl.run.json").read_text())["lines"] == 7


def test_samples_do_not_depend_on_the_batches(run, words, tmp_path):
    flags = ["--dtype", "float32", "do_sample=true", "num_return_sequences=2", "max_new_tokens=5"]
    found = []
    for size in (1, 3):
        assert run(*words, "--overwrite", "--batch-size", size, *flags).code == 0
        found.append((tmp_path / "out.jsonl").read_bytes())
    assert found[0] == found[1]
    assert len(set(found[0].splitlines())) > len(PROMPTS)
    run(*words, "--overwrite", "--seed", "1", *flags)
    assert (tmp_path / "out.jsonl").read_bytes() != found[0]


@pytest.mark.parametrize("flags", [["num_beams=2"], ["num_return_sequences=2"]])
def test_each_batch_has_draws_of_its_own(run, members, flags):
    words = ["generate", *["x"] * 4, *members, "--batch-size", "1", "do_sample=true", "max_new_tokens=8"]
    lines = [line["completion"] for line in run(*words, "temperature=3.0", *flags).lines]
    assert len(set(lines)) == len(lines)


def test_what_another_call_wrote_is_refused_by_name(run, words, members, family, tmp_path, monkeypatch):
    out, prompts = tmp_path / "out.jsonl", tmp_path / "prompts.jsonl"
    flags = ["do_sample=true", "max_new_tokens=3"]
    assert run(*words, *flags, "--seed", "4").code == 0
    cut = b"".join(out.read_bytes().splitlines(True)[:4]) + b'{"pro'
    out.write_bytes(cut)
    monkeypatch.setattr(command, "load", lambda *_: pytest.fail("a model was loaded"))
    same = [*words, "--resume", "--seed", "4"]
    for given, expected in (
        ([*words, "--resume", "--seed", "5", *flags], "--resume with seed: expected 4, with which"),
        ([*same, "--batch-size", "3", *flags], "--resume with batch_size: expected 2"),
        ([*same, "--alpha", "2", *flags], "--resume with recipe.alpha: expected 1.0"),
        ([*same, "--expert", str(family / "tiny-base"), *flags], "--resume with recipe.expert.id: expected"),
        ([*same, "--dtype", "float32", *flags], "--resume with dtype"),
        ([*same, "--chat", *flags], "--resume with chat: expected false"),
        ([*same, "--latent", "mean", *flags], "--resume with latent: expected null"),
        ([*same, flags[0], "max_new_tokens=4"], "--resume with generation.max_new_tokens: expected 3"),
        ([*same, *flags, "top_k=5"], "--resume with generation.top_k: expected null"),
        ([*same, flags[1]], "--resume with generation.do_sample: expected true"),
        # Without --resume, the four lines would be gone.
        ([*words, *flags], "--out: expected a new file; got"),
    ):
        ended = run(*given)
        assert ended.code == 2, given
        assert ended.err.count("\n") == 1
        assert expected in ended.err, ended.err
        assert out.read_bytes() == cut, given
    for lines, expected in (
        ([*PROMPTS[:2], "another", *PROMPTS[2:]], 'prompt 3, "another"; got one to "x"'),
        (PROMPTS[:3], "line 4 of"),
        ([PROMPTS[1], PROMPTS[0], *PROMPTS[2:]], "line 1 of"),
    ):
        prompts.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in lines))
        ended = run(*same, *flags)
        assert ended.code == 2
        assert expected in ended.err, ended.err
        assert out.read_bytes() == cut, given


def test_other_versions_are_refused(run, words, tmp_path, monkeypatch):
    run(*words, "max_new_tokens=2")
    note = tmp_path / "out.jsonl.run.json"
    # The last: another build of the same torch, whose rounding may differ.
    for library, other in (
        ("proxytune", "0.0"),
        ("torch", "0.0"),
        ("transformers", "0.0"),
        ("torch", f"{Version(torch.__version__).public}+other"),
    ):
        data = json.loads(note.read_text())
        found = data["settings"]["versions"]
        assert found["torch"] == str(torch.__version__)
        note.write_text(json.dumps(data | {"settings": data["settings"] | {"versions": found | {library: other}}}))
        ended = run(*words, "max_new_tokens=2", "--resume")
        assert ended.code == 2
        assert f"--resume with versions.{library}" in ended.err
        note.write_text(json.dumps(data))


def test_a_model_s_own_settings_are_compared(run, members, family, tmp_path):
    """They are known only once the model is loaded; here the base's change between two calls."""
    import shutil

    base, out = tmp_path / "base", tmp_path / "out.jsonl"
    shutil.copytree(family / "large-base", base)
    words = ["generate", "a", "b", *members, "--base", str(base), "--out", str(out), "--batch-size", "1"]
    words.append("max_new_tokens=3")
    assert run(*words).code == 0
    cut = out.read_bytes().splitlines(True)[0]
    out.write_bytes(cut)
    saved = base / "generation_config.json"
    saved.write_text(json.dumps(json.loads(saved.read_text()) | {"repetition_penalty": 1.5}))
    ended = run(*words, "--resume")
    assert ended.code == 2
    assert "--resume with repetition_penalty: expected" in ended.err
    assert out.read_bytes() == cut


def test_files_of_others_are_refused_and_left_alone(run, words, tmp_path):
    out, note = tmp_path / "out.jsonl", tmp_path / "out.jsonl.run.json"
    foreign = b"not\na run\n"
    out.write_bytes(foreign)
    ended = run(*words, "--resume")
    assert ended.code == 2
    assert "expected out.jsonl.run.json beside" in ended.err
    for text in ("{", "{}", '{"format_version": 1, "mine": 2}', '{"format_version": 9}'):
        note.write_text(text)
        for flags in (["--resume"], []):
            ended = run(*words, *flags)
            assert ended.code == 2, text
            assert ended.err.count("\n") == 1
            assert note.read_text() == text
    good = {"format_version": 1, "lines": 7, "lines_per_prompt": 1, "settings": {}, "resolved": {}}
    for wrong in ({"lines": 0}, {"lines_per_prompt": "1"}, {"settings": []}):
        note.write_text(json.dumps(good | wrong))
        assert run(*words, "--resume").code == 2
    assert out.read_bytes() == foreign
    # A line that is no answer, between those that are.
    out.unlink()
    note.unlink()
    run(*words, "max_new_tokens=2")
    lines = out.read_bytes().splitlines(True)
    for line in (b"\0\0\0\n", b"[]\n", b'{"prompt": 3}\n', b"\n"):
        out.write_bytes(b"".join([lines[0], line, *lines[2:4]]))
        ended = run(*words, "max_new_tokens=2", "--resume")
        assert ended.code == 2
        assert "line 2 of" in ended.err
        assert "no answer at all" in ended.err


def test_the_prompts_are_not_overwritten(run, members, tmp_path):
    prompts, link = tmp_path / "prompts.txt", tmp_path / "link"
    prompts.write_text("a\nb\n")
    link.symlink_to(prompts)
    for out in (prompts, link):
        ended = run("generate", "--file", str(prompts), *members, "--out", str(out), "max_new_tokens=2")
        assert ended.code == 2
        assert "--out: expected another file than that of the prompts" in ended.err
        assert prompts.read_text() == "a\nb\n"


def test_resume_needs_a_file(run, members):
    ended = run("generate", "a", *members, "--resume")
    assert ended.code == 2
    assert "--resume: expected --out" in ended.err
    ended = run("generate", "a", *members, "--resume", "--out", "/dev/null")
    assert ended.code == 2
    assert "a file on a disk" in ended.err


def test_nothing_there_is_a_fresh_start(run, words, tmp_path):
    out = tmp_path / "out.jsonl"
    assert run(*words, "max_new_tokens=2", "--resume").code == 0
    whole = out.read_bytes()
    assert whole.count(b"\n") == 7
    # Nothing but half a line, whatever wrote it; and a note of another run whose lines are gone.
    out.write_bytes(b"half a li")
    ended = run(*words, "max_new_tokens=3", "--resume")
    assert (ended.code, ended.err) == (0, "")
    assert out.read_bytes().count(b"\n") == 7
    assert json.loads((tmp_path / "out.jsonl.run.json").read_text())["settings"]["generation"] == {"max_new_tokens": 3}
    out.unlink()
    assert run(*words, "max_new_tokens=2").code == 0
    assert out.read_bytes() == whole


def test_a_file_is_overwritten_only_if_told_so(run, words, tmp_path, monkeypatch):
    out = tmp_path / "out.jsonl"
    run(*words, "max_new_tokens=2")
    whole = out.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(command, "load", lambda *_: pytest.fail("a model was loaded"))
        for content, got in (
            (whole, "a finished run of 7 lines. Choose another file; or pass --resume to add answers to further"),
            (
                whole[: whole.index(b"\n") + 1],
                "an unfinished run with 1 of 7 lines. Choose another file; or pass --res",
            ),
            (b"my thesis", "an unfinished run with 0 of 7"),
        ):
            out.write_bytes(content)
            ended = run(*words, "max_new_tokens=3")
            assert (ended.code, ended.err.count("\n")) == (2, 1)
            assert f"--out: expected a new file; got {out}, {got}" in ended.err
            assert out.read_bytes() == content
    (tmp_path / "out.jsonl.run.json").unlink()
    assert f"got {out}, which holds something else. Choose another file; or pass --over" in run(*words).err
    out.write_bytes(whole)
    overwrite = [*words, "--overwrite"]
    with monkeypatch.context() as patch:
        patch.setattr(command, "load", lambda *_, **__: (_ for _ in ()).throw(RuntimeError("no such model")))
        assert run(*overwrite, "max_new_tokens=3").code == 1
    assert out.read_bytes() == whole, "what cannot be replaced stays"
    assert run(*overwrite, "max_new_tokens=3").code == 0
    longer = out.read_bytes()
    assert longer != whole
    assert longer.count(b"\n") == 7
    run(*overwrite, "max_new_tokens=2")
    assert out.read_bytes() == whole, "nothing of the longer ones is left behind it"


def test_one_run_at_a_time(run, words, tmp_path):
    out = tmp_path / "out.jsonl"
    run(*words, "max_new_tokens=2")
    whole = out.read_bytes()
    with open(out, "rb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        for flags in (["--resume"], []):
            ended = run(*words, *flags, "max_new_tokens=2")
            assert ended.code == 2
            assert "no other run writes to" in ended.err
    assert out.read_bytes() == whole


def test_what_is_no_file_is_written_to_without_a_note(run, words, tmp_path):
    reading, writing = os.pipe()
    assert run(*words, "--out", f"/dev/fd/{writing}", "max_new_tokens=2").code == 0
    os.close(writing)
    with open(reading, "rb") as pipe:
        found = pipe.read()
    assert [json.loads(line)["prompt"] for line in found.splitlines()] == PROMPTS
    link = tmp_path / "link.jsonl"
    (tmp_path / "far").mkdir()
    link.symlink_to(tmp_path / "far" / "out.jsonl")
    (tmp_path / "far" / "out.jsonl").touch()
    assert run(*words, "--out", link, "max_new_tokens=2").code == 0
    assert sorted(p.name for p in (tmp_path / "far").iterdir()) == ["out.jsonl", "out.jsonl.run.json"]
    assert (tmp_path / "far" / "out.jsonl").read_bytes() == found
