"""A text in a terminal: with and without colours, narrow and wide, and what a model must not do to it."""

from __future__ import annotations

import re
from dataclasses import replace
from io import StringIO
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from support.traces import text_of, trace_of

from proxytune.errors import InputError
from proxytune.trace import Trace
from proxytune.view import look
from proxytune.view.words import name_of, share


def shown(trace: Trace, width: int = 80, *, colours: bool = False, **options: Any) -> str:
    out = StringIO()
    console = Console(
        file=out, width=width, force_terminal=colours, color_system="truecolor" if colours else None, markup=False
    )
    look(trace, console=console, **options)
    return out.getvalue()


@pytest.fixture
def trace() -> Trace:
    pieces = ("Wo", " wohnt", " 中文", "?", "\x1b[2J")
    return trace_of(
        text_of(
            prompt="Frage: ",
            pieces=pieces,
            names={i: f" n{i}" for i in range(99)} | {7: "\n"},
            kl=np.array([0.0, 3.0, 0.2, 0.0, 1.5], np.float32),
            base_rank=np.array([0, 2, 1, 0, 0], np.int32),
            fork=np.array([0, 1, 0, 0, 0], np.int8),
        )
    )


def test_changed_tokens_and_forks_are_marked_without_colours(trace: Trace) -> None:
    text, *rest = shown(trace, 200).split("\n\n")
    assert text == "Frage: Wo◆ [wohnt] [中文]?␛[2J"
    assert "\x1b" not in "".join(rest)
    assert "2 of 5 tokens changed, 0.94 nats a token" in rest[0]
    rows = [line.split() for line in rest[1].splitlines() if line.strip()[:1].isdigit()]
    assert [(row[0], row[2]) for row in rows] == [("2", "3.00"), ("5", "1.50"), ("3", "0.20")]  # the others did not
    still = trace_of(replace(trace[0], kl=np.full(5, 0.004, np.float32)))
    assert shown(still).strip().endswith("no position changed: every KL is below 0.005 nats")


def test_colours_say_how_much(trace: Trace) -> None:
    text = shown(trace, colours=True)
    assert "\x1b[2J" not in text
    assert "\x1b[4;31m wohnt\x1b[0m" in text  # underlined: not the base's first choice
    assert "[wohnt]" not in text


@pytest.mark.parametrize("width", [80, 60, 59, 30])
def test_no_line_is_wider_than_the_terminal(trace: Trace, width: int) -> None:
    from rich.cells import cell_len

    lines = shown(trace, width).splitlines()
    assert max(map(cell_len, lines)) <= width
    assert ("2. n" in "\n".join(lines)) == (width < 60) or width >= 60
    assert "wohnt" in "\n".join(lines)
    assert all(re.search(r"\w \S*\d %", line) for line in lines if "%" in line)  # none is broken after its token


def test_a_table_that_does_not_fit_becomes_lines(trace: Trace) -> None:
    wide = trace_of(replace(trace[0], names={i: f"n{i}" + 25 * "n" for i in range(99)}))
    assert "2. n" in shown(wide, 80)
    assert "2. n" not in shown(wide, 160)


def test_the_most_changed_positions_say_what_was_wanted(trace: Trace) -> None:
    text = trace[0]
    told = shown(trace, changed=1)
    assert told.count("%") == 8
    name, base = name_of(text, int(text.tokens[1])), float(text.logprobs[1] - text.shift[1])
    assert f"… {name} {share(base)}  " in told
    assert f"… {name} {share(float(text.logprobs[1]))} \n" in told
    for source in (0, 1):
        for token, logprob in zip(text.top_ids[1, source], text.top_logprobs[1, source], strict=True):
            assert f"{name_of(text, int(token))} {share(float(logprob))}" in told
    assert "most changed" not in shown(trace, changed=0)


def test_texts_without_a_tokenizer_or_tokens_are_shown() -> None:
    bare = trace_of(text_of(), text_of(0))
    assert re.findall(r"#?\d+", shown(bare).split("\n\n")[0]) == [f"#{token}" for token in bare[0].tokens]
    assert shown(bare, text=1).strip() == ""
    assert name_of(bare[0], 5) == "#5"
    assert name_of(bare[0], -1) == "–"
    with pytest.raises(InputError, match="It has 2 texts"):
        shown(bare, text=2)


def test_an_empty_trace_says_what_is_recorded() -> None:
    with pytest.raises(InputError, match="nothing was recorded.*a loop of your own"):
        shown(trace_of())


def test_a_token_in_no_list_is_named_by_its_piece(trace: Trace) -> None:
    text = replace(trace[0], names={}, top_ids=np.full((5, 4, 3), 100, np.int32))
    drawn = shown(trace_of(text))
    assert [name_of(text, int(token)) for token in text.tokens] == ["Wo", "wohnt", "中文", "?", "␛[2J"]
    assert re.findall(r"#\d+", drawn) == ["#100"] * drawn.count("#100")
    assert name_of(replace(text, pieces=("",) * 5), int(text.tokens[0])) == f"#{text.tokens[0]}"


@pytest.mark.parametrize("colours", [False, True])
def test_of_a_plain_model_nothing_changed(colours: bool) -> None:
    text = text_of(4, sources=2, base_rank=np.array([0, 2, 0, 1], np.int32), kl=np.zeros(4, np.float32))
    plain = Trace(sources=("combined", "base"), top=3, texts=(text,))
    told = re.sub(r"\x1b\[[\d;]*m", "", shown(plain, colours=colours)).split("\n\n")[1].strip()
    assert told == f"{'underlined' if colours else '[in brackets]'}: not its first choice · 2 of 4 tokens"


def test_shares_are_whole_percents_but_for_the_small() -> None:
    told = [share(x) for x in (0.0, np.log(0.006), np.log(0.004), -np.inf, np.nan)]
    assert told == ["100 %", "1 %", "<1 %", "0 %", "?"]
