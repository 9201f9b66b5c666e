"""The bar that the long commands share: what it says, at which pace, and that only a terminal sees it."""

from __future__ import annotations

import re
import sys

import pytest

from proxytune.cli import main, terminal
from proxytune.demo import measure as measuring
from proxytune.throughput import run as throughput

CONTROL = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]")


@pytest.fixture
def on_terminal(monkeypatch):
    """stderr is a terminal of 80 columns; stdout is not one."""
    monkeypatch.setattr(terminal, "is_terminal", lambda stream: stream is sys.stderr)
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "80")


@pytest.fixture
def clock(monkeypatch):
    """`time.monotonic` of the bar, set by hand."""
    now = [100.0]
    monkeypatch.setattr(terminal.time, "monotonic", lambda: now[0])
    return now


def drawn(err: str) -> list[str]:
    """The lines that the terminal was sent, one for each time the bar was drawn."""
    return [line for line in re.split(r"[\r\n]+", CONTROL.sub("", err)) if line.strip()]


def test_the_time_left_follows_from_the_pace_so_far(clock):
    with terminal.Bar("answers") as bar:
        bar.show("a", 1000, 4000)  # of which 1000 were done in an earlier run
        assert bar.count(clock[0]) == "1,000 of 4,000 answers", "no pace yet"
        clock[0] += 10
        bar.show("b", 2000, 4000)
        assert bar.count(clock[0]) == "2,000 of 4,000 answers, about 0:20 left"
        assert bar.count(clock[0] + 5) == "2,000 of 4,000 answers, about 0:15 left"
        assert bar.count(clock[0] + 50) == "2,000 of 4,000 answers, about 0:00 left"
        clock[0] += 190
        bar.show("c", 3000.9, 4000)
        assert bar.count(clock[0]) == "3,000 of 4,000 answers, about 1:40 left", "a unit counts when it is done"
    bar = terminal.Bar("prompts", left="at most")
    bar.show("", 0, 2)
    clock[0] += 3
    bar.show("", 0, 2, underway=0.5)
    assert bar.count(clock[0]) == "0 of 2 prompts, at most 0:09 left"


def test_without_a_terminal_a_line_says_it_now_and_then(clock, capsys, monkeypatch):
    def run():
        with terminal.Bar("prompts") as bar:
            for done in range(0, 80, 4):
                bar.show("completing", done, 2000)
                clock[0] += 10
        return capsys.readouterr()

    out, err = run()
    assert out == ""
    assert err.splitlines()[0] == "completing: 12 of 2,000 prompts, 24/min, about 82:50 left"
    assert len(err.splitlines()) == 6  # of 190 seconds
    monkeypatch.setattr(terminal, "silent", True)
    assert run() == ("", "")


@pytest.mark.parametrize(
    ("done", "seconds", "said"), [(400, 10, "40/s"), (25, 10, "2.5/s"), (5, 10, "30/min"), (1, 100, "36.0/h")]
)
def test_the_rate_is_said_where_there_is_room(clock, done, seconds, said):
    bar = terminal.Bar("texts")
    bar.show("", 0, 4000)
    clock[0] += seconds
    bar.show("", done, 4000)
    assert f" texts, {said}, about " in bar.count(clock[0], wide=True)
    assert said not in bar.count(clock[0])


def test_quiet_is_taken_anywhere(monkeypatch, capsys):
    for words in (["--quiet", "doctor", "--help"], ["doctor", "--help", "--quiet"], ["doctor", "--help"]):
        with pytest.raises(SystemExit, match="0"):
            main(words)
        assert terminal.silent == ("--quiet" in words)


def test_a_terminal_of_80_columns_sees_it_on_one_line(on_terminal, capsys):
    with terminal.Bar("rounds", still=True) as bar:
        bar.show("scaled trio, 8→40, batch 1: speculation, 0.7 planted, counted", 123, 4567)
        bar.show("short", 124, 4567)
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = drawn(captured.err)
    assert any("loading" in line for line in lines)
    assert any("scaled trio" in line and "…" in line and "123 of 4,567 rounds" in line for line in lines)
    assert any("short" in line and "124 of 4,567 rounds, about " in line for line in lines)
    assert all(len(line.rstrip()) <= 80 for line in lines)
    assert "━" in captured.err


def test_a_narrow_terminal_sees_numbers_and_the_bar(on_terminal, capsys, clock, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    with terminal.Bar("answers", still=True) as bar:
        bar.show("proxy", 1000, 3059)
        clock[0] += 10
        bar.show("proxy", 2000, 3059)
    last = drawn(capsys.readouterr().err)[-1]
    assert "━" in last
    assert "2,000/3,059, 0:11" in last
    assert len(last.rstrip()) <= 40


def test_nothing_is_drawn_elsewhere_or_while_paused(on_terminal, capsys, monkeypatch):
    with terminal.Bar("rounds", still=True) as bar:
        bar.show("one", 1, 3)
        bar.pause()
        capsys.readouterr()
        sys.stdout.write("a line\n")
        bar.show("two", 2, 3)
        assert "two" not in capsys.readouterr().err
        bar.go_on()
        assert "two" in capsys.readouterr().err
    capsys.readouterr()
    monkeypatch.setattr(terminal, "is_terminal", lambda stream: False)
    with terminal.Bar("rounds") as bar:
        bar.show("one", 1, 3)
        bar.pause()
        bar.go_on()
        assert bar.count(0.0) == "1 of 3 rounds"
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "")


def test_what_is_printed_beside_the_bar_stays_on_stdout(on_terminal, capsys):
    with terminal.Bar("rounds", still=True) as bar:
        bar.show("one", 1, 3)
        sys.stdout.write("a line\n")
    assert capsys.readouterr().out == "a line\n"


WORDS = ["max_new_tokens=3"]


@pytest.mark.filterwarnings("ignore::proxytune.errors.CalibrationWarning")
@pytest.mark.parametrize(
    ("words", "shown"),
    [
        (["generate", "a", "b", "c", "--batch-size", "2", *WORDS], ["completing", "0 of 3 prompts", "2 of 3 prompts"]),
        (["sample", "a", "b", "c", "--batch-size", "2", "--threshold", "1", *WORDS], ["0 of 3 prompts", "2 of 3"]),
        (["sample", "a", "b", "--threshold", "1", "--budget", "30", *WORDS], ["tokens left", "0 of 2 prompts, at mo"]),
        (
            ["calibrate", *"abc", "--batch-size", "2", "--samples", "20", "--max-new-tokens", "3"],
            ["sampling", "0 of 3 texts", "2 of 3 texts, about"],
        ),
    ],
)
def test_the_long_commands_show_it(run, members, on_terminal, words, shown):
    ended = run(*words, *members)
    assert ended.code == 0, ended.err
    lines = drawn(ended.err)
    assert any("loading" in line for line in lines)
    for part in shown:
        assert any(part in line for line in lines), (part, lines)
    assert "━" not in ended.out


@pytest.mark.filterwarnings("ignore::proxytune.errors.CalibrationWarning")
def test_texts_that_are_read_count_one_by_one(run, members, on_terminal, tmp_path, monkeypatch):
    texts = tmp_path / "texts.txt"
    texts.write_text("Start with 3, add 4, take away 2, add 9.\n" * 5)
    counts = []
    real = terminal.Bar.show
    monkeypatch.setattr(terminal.Bar, "show", lambda self, *what: (counts.append(what), real(self, *what)))
    assert run("calibrate", "--texts", texts, "--share", "0.5", *members).code == 0
    assert counts == [("reading", done, 5) for done in range(6)]


def test_a_streamed_text_has_no_bar_beside_it(run, members, on_terminal, monkeypatch):
    monkeypatch.setattr(terminal, "is_terminal", lambda stream: True)
    ended = run("generate", "a", "b", *members, *WORDS)
    assert ended.code == 0
    assert "prompts" not in ended.err


def test_demo_and_bench_show_what_they_are_told(run, family, on_terminal, monkeypatch):
    seen = []

    def told(*arguments, report=None):
        report = report or arguments[-1]
        report("a phase", 3, 12)
        seen.append(report.__self__)
        raise RuntimeError("enough")

    monkeypatch.setattr("proxytune.demo.measure.measure", told)
    monkeypatch.setattr(throughput, "measure", told)
    for command, unit in (("demo", "answers"), ("bench", "rounds")):
        ended = run(command, "--family", family)
        assert ended.code == 1
        assert any("a phase" in line and f"3 of 12 {unit}" in line for line in drawn(ended.err))
        assert "error: RuntimeError: enough" in CONTROL.sub("", ended.err)
    assert [bar._still for bar in seen] == [False, True], "nothing is drawn beside what is timed"


def test_the_demo_counts_the_answers_that_were_generated(family, monkeypatch):
    from transformers import GenerationMixin

    terminal.quiet()
    reports, answered, depth = [], [0], [0]
    real = GenerationMixin.generate

    def counting(self, *arguments, **options):
        depth[0] += 1
        try:
            return real(self, *arguments, **options)
        finally:
            depth[0] -= 1
            if depth[0] == 0:
                answered[0] += len(options["input_ids"])

    monkeypatch.setattr(GenerationMixin, "generate", counting)
    measuring.measure(family, 0.75, 3, lambda *what: reports.append((*what, answered[0])))
    # Five rows on three tasks of three problems; five models, five times on a batch of three; three models on three.
    total = 5 * 9 + 5 * 5 * 3 + 9
    assert [done for _, done, _, _ in reports] == [truly for _, _, _, truly in reports]
    assert reports[-1][1:3] == (total, total)
    assert {whole for _, _, whole, _ in reports} == {total}
    whats = list(dict.fromkeys(what for what, *_ in reports))
    assert whats == [
        "base, 0-shot", "base, 3-shot", "expert alone", "proxy, α = 0.75", "tuned directly", "speed", "three answers",
    ]  # fmt: skip
