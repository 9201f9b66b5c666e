"""Traces: what a text may hold, and that a file gives back what was written, also after a run that was killed."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
from support.traces import SOURCES, text_of, trace_of

from proxytune.errors import InputError
from proxytune.trace import FIELDS, Trace, TracedText, TraceWriter, load, save


def assert_same(a: Trace, b: Trace) -> None:
    assert (a.sources, a.top, a.about, len(a)) == (b.sources, b.top, b.about, len(b))
    for one, other in zip(a, b, strict=True):
        for field in fields(TracedText):
            x, y = getattr(one, field.name), getattr(other, field.name)
            if isinstance(x, np.ndarray):
                assert x.dtype == y.dtype
                np.testing.assert_array_equal(x, y)
            else:
                assert x == y, field.name


@pytest.fixture
def trace() -> Trace:
    tops = text_of(seed=2).top_logprobs.copy()
    tops[0, 1, 2] = -np.inf
    return trace_of(
        text_of(prompt="Wer?", pieces=("a", "b", "ü", "", "\n"), names={5: "x", 90000: "中"}, answer="ab", grade=1.0),
        text_of(0, seed=1, pieces=()),
        text_of(seed=2, given=True, top_logprobs=tops, facts={"group": "7", "votes": {"a": 3}}),
        model="tiny",
    )


def test_a_file_gives_back_what_was_written(trace: Trace, tmp_path: Path) -> None:
    file = save(trace, tmp_path / "run.npz")
    assert_same(load(file), trace)
    assert sorted(one.name for one in tmp_path.iterdir()) == ["run.jsonl", "run.npz"]
    with pytest.raises(InputError, match="expected a new file"):
        save(trace, file)


def test_texts_are_appended(trace: Trace, tmp_path: Path) -> None:
    file = tmp_path / "run.npz"
    for text in trace:
        TraceWriter(file, sources=SOURCES, top=3, about=trace.about).add([text])
    assert_same(load(file), trace)
    with pytest.raises(InputError, match="a trace of base, top 3"):
        TraceWriter(file, sources=["base"], top=3)


@pytest.mark.parametrize("lost", ["half a line", "the line"])
def test_a_run_that_was_killed_loses_the_text_it_was_writing(trace: Trace, tmp_path: Path, lost: str) -> None:
    file, lines = save(trace, tmp_path / "run.npz"), tmp_path / "run.jsonl"
    raw = lines.read_bytes()
    end = raw[:-1].rfind(b"\n") + 1
    lines.write_bytes(raw[: end + (9 if lost == "half a line" else 0)])
    assert_same(load(file), trace_of(*trace.texts[:2], model="tiny"))
    other = text_of(4, seed=9, given=True)
    TraceWriter(file, sources=SOURCES, top=3).add([other])  # over the arrays of the one that was lost
    assert_same(load(file), trace_of(*trace.texts[:2], other, model="tiny"))


def test_nothing_is_written_of_texts_that_json_cannot_hold(trace: Trace, tmp_path: Path) -> None:
    writer = TraceWriter(tmp_path / "run.npz", sources=SOURCES, top=3)
    for bad in ({"grade": float("nan")}, {"facts": {"x": object()}}, {"prompt": "\ud800"}):
        with pytest.raises(InputError, match="that JSON can hold"):
            writer.add([text_of(), text_of(**bad)])
    with pytest.raises(InputError, match=r"\[T, 4, 3\]"):
        writer.add([text_of(top=2)])
    assert len(load(writer.file)) == writer.count == 0
    assert not writer.file.exists()


def test_what_is_no_trace_is_refused_by_name(trace: Trace, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"expected NAME\.npz"):
        load(tmp_path / "run.json")
    with pytest.raises(InputError, match=r"no run\.jsonl"):
        load(tmp_path / "run.npz")
    file = save(trace, tmp_path / "run.npz")
    lines = tmp_path / "run.jsonl"
    head, *texts = lines.read_text().splitlines(keepends=True)
    for wrong, said in (
        (head.replace('"format_version": 1', '"format_version": 2'), "Upgrade proxytune"),
        ("[]\n", "a JSON object"),
        ("x\n", "a line of JSON"),
    ):
        lines.write_text(wrong + "".join(texts))
        with pytest.raises(InputError, match=said):
            load(file)
    lines.write_text(head + json.dumps({"promt": "x"}) + "\n")
    with pytest.raises(InputError, match="unknown 'promt'"):
        load(file)
    lines.write_text(head + "".join(texts) + "{}\n")  # one text more than there are arrays
    with pytest.raises(InputError, match="the arrays of the 4 texts"):
        load(file)
    lines.unlink()
    with pytest.raises(InputError, match="would be overwritten"):
        TraceWriter(file, sources=SOURCES, top=3)


def test_files_of_two_runs_are_not_taken_for_one(tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 2)):
        save(trace_of(text_of(seed=seed)), tmp_path / f"{name}.npz")
    (tmp_path / "a.jsonl").write_bytes((tmp_path / "b.jsonl").read_bytes())
    with pytest.raises(InputError, match="they are of another run"):
        load(tmp_path / "a.npz")


def test_two_writers_take_turns(tmp_path: Path) -> None:
    file = tmp_path / "run.npz"
    one, other = (TraceWriter(file, sources=SOURCES, top=3) for _ in range(2))
    for seed, writer in enumerate((one, other, one, one, other)):
        writer.add([text_of(seed=seed)])
    assert_same(load(file), trace_of(*(text_of(seed=seed) for seed in range(5))))
    code = (
        "import sys; sys.path.insert(0, 'tests')\n"
        "from support.traces import SOURCES, text_of\n"
        "from proxytune.trace import TraceWriter\n"
        f"for seed in range(8): TraceWriter({str(file)!r}, sources=SOURCES, top=3).add([text_of(seed=seed)])\n"
    )
    root = Path(__file__).resolve().parents[2]
    for done in [subprocess.Popen([sys.executable, "-c", code], cwd=root) for _ in range(2)]:
        assert done.wait() == 0
    assert len(load(file)) == 5 + 2 * 8


@pytest.mark.parametrize("name", FIELDS)
def test_an_array_of_another_kind_is_refused_by_name(name: str) -> None:
    whole = getattr(text_of(), name)
    for wrong in (whole[:4], whole.astype(np.float64), whole[..., None]):
        with pytest.raises(InputError, match=name):
            text_of(**{name: wrong})


def test_texts_of_a_prompt_are_found() -> None:
    other = np.arange(4, dtype=np.int32)
    a, b, c, d = text_of(), text_of(prompt_ids=other), text_of(seed=1), text_of(facts={"group": "g"})
    assert list(trace_of(a, b, c, d).groups().values()) == [[a, c], [b], [d]]


def test_a_trace_is_read_without_torch(trace: Trace, tmp_path: Path) -> None:
    file = save(trace, tmp_path / "run.npz")
    code = f"import sys, proxytune.trace as t; print(len(t.load({str(file)!r})), 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["3", "False"]
