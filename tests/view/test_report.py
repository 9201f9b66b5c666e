"""The report: what it says of policies whose losses are known, what it refuses, and that it is inert."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.simulated import assert_same, run, text

from proxytune.diagnostics import losses, ordered
from proxytune.diagnostics.losses import LOSSES
from proxytune.errors import InputError
from proxytune.stats.bootstrap import Interval
from proxytune.trace import Trace, graded, words_of
from proxytune.view.plots import Plot, Series, svg
from proxytune.view.report import CURES, report
from proxytune.view.report_text import html, markdown, summary, write

FAST: Any = {"draws": 100, "seed": 0}
ROOT = Path(__file__).parents[2]
EVIL = "</style><script>window.hacked = 1</script><img src=x onerror=alert(1)>\x1b[2J\u202e"


def policy(
    kind: str = "sound", *, seed: int = 0, prompts: int = 24, samples: int = 6, words: str | None = None
) -> Trace:
    """Right with chance ½. "collapsed": one wrong answer a prompt; "over-thinking": right as long as it is short."""
    rng = np.random.default_rng(seed)
    texts = []
    for prompt in range(prompts):
        for _ in range(samples):
            length = int(rng.choice([12, 40]))
            chance = {"over-thinking": 0.9 if length == 12 else 0.1}.get(kind, 0.5)
            right = bool(rng.random() < chance)
            wrong = "wrong" if kind == "collapsed" else f"wrong {rng.integers(50)}"
            texts.append(
                text(
                    prompt,
                    tokens=rng.integers(0, 1000, length),
                    entropy=rng.exponential(0.1 if kind == "collapsed" else 0.6, length),
                    logprobs=-rng.random(length),
                    answer="right" if right else wrong,
                    grade=float(right),
                    pieces=None if words is None else (words, *[""] * (length - 1)),
                )
            )
    return run(texts)


KINDS = ("sound", "collapsed", "over-thinking")


@pytest.fixture(scope="module")
def runs() -> dict[str, Trace]:
    """Three policies, under names that do not say what they are."""
    return dict(zip("abc", map(policy, KINDS), strict=True))


def test_each_loss_is_told_where_it_is_and_nowhere_else(runs: dict[str, Trace]) -> None:
    told = {name: {loss for loss, one in losses(trace, **FAST).items() if one.told} for name, trace in runs.items()}
    assert told == {"a": set(), "b": {"diversity"}, "c": {"over-thinking"}}


def test_losses_in_closed_form() -> None:
    rows = [("x", 0.0, 3), ("x", 0.0, 3), ("y", 0.0, 3), ("z", 1.0, 6)]
    trace = run([text(p, count, answer=a, grade=g) for p in range(6) for a, g, count in rows])
    found = losses(trace, **FAST)
    assert found["diversity"].value is not None
    assert found["diversity"].value.value == pytest.approx(1 / 3)  # of three pairs of wrong texts, one
    assert found["calibration"].value is not None
    assert found["calibration"].value.value == pytest.approx(2 / 12 - 1 / 4)
    assert found["over-thinking"].value is not None
    assert found["over-thinking"].value.value == pytest.approx(-3 / 6)  # the longest alone is right
    assert found["drift"].value is None
    assert "plain model is its own base" in found["drift"].says


def test_without_grades_there_is_no_number() -> None:
    bare = run([text(p, 4, answer=str(i)) for p in range(8) for i in range(3)])
    found = losses(bare, **FAST)
    assert [name for name, one in found.items() if one.value is not None] == ["degenerate texts"]
    assert "a grade for each text" in found["diversity"].says
    made = report({"bare": bare}, **FAST)
    refused = [part for part in made.parts if part.refused]
    assert {"Calibration", "Accuracy and length", "The chance of a right answer"} <= {part.title for part in refused}
    assert all(part.plot is None and not part.figures for part in refused)
    assert "The trace cannot say: diversity, calibration, over-thinking and drift" in made.lost[0]
    few = report({"few": run([text(p, 4, answer="1", grade=1.0) for p in range(3)])}, **FAST)
    assert all(not part.said for part in few.parts)
    with pytest.raises(InputError, match="at least one trace"):
        report({})
    with pytest.raises(InputError, match="a trace with texts"):
        report({"empty": run([])})


def test_runs_are_ranked_the_same_in_any_order_and_ties_are_said(runs: dict[str, Trace]) -> None:
    orders = {name: ordered(runs, name, **FAST) for name in LOSSES}
    assert orders["diversity"].runs[0] == "b"
    assert orders["diversity"].first
    assert orders["over-thinking"].runs[0] == "c"
    assert orders["over-thinking"].first
    assert orders["diversity"].apart == (True, False)
    assert " > " in orders["diversity"].says
    assert " ~ " in orders["diversity"].says
    assert orders["drift"].runs == ()
    assert orders["drift"].without == ("a", "b", "c")
    steps: list[tuple[str, int, int]] = []
    one = report(runs, **FAST, progress=lambda *step: steps.append(step))
    assert steps == [("losses", 0, 13), *(("diagnoses", done, 13) for done in range(1, 13))]
    assert len(one.parts) == 12
    other = report(dict(random.Random(1).sample(list(runs.items()), 3)), **FAST)
    assert html(one) == html(other)
    assert markdown(one) == markdown(other)
    assert list(one.runs)[-1] == "a"  # nothing is told of it
    assert_same(one.losses["b"]["diversity"].value, losses(runs["b"], **FAST)["diversity"].value)


def test_the_same_policy_twice_is_not_told_apart() -> None:
    level = 0
    for seed in range(20):
        twins = {"one": policy(seed=2 * seed, prompts=12), "two": policy(seed=2 * seed + 1, prompts=12)}
        level += ordered(twins, "over-thinking", draws=200).first
    assert level <= 3
    # Without a prompt in common they are compared as two samples.
    apart = policy("collapsed")
    moved = replace(apart, texts=tuple(replace(t, prompt_ids=t.prompt_ids + np.int32(99)) for t in apart))
    assert ordered({"a": policy(), "b": moved}, "diversity", **FAST).first


def test_what_to_do_names_tools_that_are_there(runs: dict[str, Trace]) -> None:
    assert set(CURES) == set(LOSSES)
    for cure in CURES.values():
        for _, page in cure.decoding:
            assert (ROOT / page).is_file(), page
    for word in ("entropy bonus", "Clip-Cov", "KL-Cov", "GPPO", "Brier reward", "SFT on diverse text"):
        assert any(word in cure.training for cure in CURES.values()), word
    made = report(runs, **FAST)
    assert {"diversity", "over-thinking"} <= {name for name, _, _ in made.todo}
    shown = summary(made)
    assert "b has lost diversity" in shown
    assert "a: nothing is told to be lost, by 24 prompts" in shown
    assert "proxytune/methods/thinking/README.md" in shown


def test_a_loss_at_its_mark_is_seldom_told() -> None:
    told = 0
    for seed in range(30):
        rng = np.random.default_rng(seed)  # four wrong answers, equally likely: 1/4
        trace = run([text(p, answer=str(rng.integers(4)), grade=0.0) for p in range(12) for _ in range(4)])
        told += losses(trace, draws=200)["diversity"].told
    assert told <= 3


class Page(HTMLParser):
    """The elements of a page, and the text in it."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: set[str] = set()
        self.words = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append(tag)
        self.attributes |= {name for name, _ in attrs}

    def handle_data(self, data: str) -> None:
        self.words += data


def test_the_page_is_inert_and_needs_nothing_else(tmp_path: Path) -> None:
    loops = run(
        [
            text(p, tokens=np.full(20, 7), answer=EVIL, grade=0.0, pieces=(EVIL, *[""] * 19))
            for p in range(6)
            for _ in range(2)
        ]
    )
    made = report({EVIL: loops, "other": policy("collapsed")}, **FAST)
    assert EVIL in made.examples[EVIL][0]
    page = html(made)
    seen = Page(page)
    assert not {"script", "img", "link", "iframe", "object", "form", "base"} & set(seen.tags)
    assert not {name for name in seen.attributes if name.startswith("on") or name in ("src", "style", "srcdoc")}
    assert all(target.startswith("#") for target in re.findall(r'href="([^"]*)"', page))
    assert "default-src 'none'; style-src 'sha256-" in page
    assert "</style><script>window.hacked = 1</script>" in seen.words  # as text
    assert "\x1b" not in page + markdown(made) + summary(made)
    assert "\u202e" not in page + markdown(made)
    assert "<script>" not in markdown(made).replace("\\<script\\>", "")
    assert write(made, tmp_path / "r.html").read_text(encoding="utf-8") == page
    assert write(made, tmp_path / "r.md").read_text(encoding="utf-8") == markdown(made)
    for wrong in ("r.txt", "none/r.html"):
        with pytest.raises(InputError):
            write(made, tmp_path / wrong)


def test_checkpoints_have_the_law_and_their_forks() -> None:
    steps = {f"step {i}": policy("collapsed" if i % 2 else "sound", seed=i, prompts=8) for i in range(4)}
    made = {part.title: part for part in report(steps, checkpoints=True, **FAST).parts}
    assert made["Entropy traded for reward"].plot is not None
    assert made["Forks before and after"].said
    two = {part.title: part for part in report(dict(list(steps.items())[:2]), checkpoints=True, **FAST).parts}
    assert "at least 4 checkpoints" in two["Entropy traded for reward"].refused["all checkpoints"]
    assert "Entropy traded for reward" not in {part.title for part in report(steps, **FAST).parts}


def test_a_plot_has_its_points_where_they_belong() -> None:
    def drawn(points: Sequence[tuple[float, Interval]], **settings: Any) -> str:
        return svg(Plot(x="x", y="a < b", series=(Series("one", tuple(points)),), **settings))

    made = drawn([(1.0, Interval(0.2, 0.1, 0.3)), (4.0, Interval(0.8, 0.7, float("inf")))], log_x=True, percent=True)
    xs, ys = (
        [float(one) for one in re.findall(rf'circle class="run0".*? {axis}="([\d.]+)"', made)] for axis in ("cx", "cy")
    )
    assert all(low < high for low, high in pairwise(xs))
    assert ys[0] > ys[1]  # up is more
    assert "a &lt; b" in made
    assert "80 %" in made
    assert "nan" not in made + drawn([(1.0, Interval(float("nan"), 0, 1)), (2.0, Interval(0.0, 0.0, 0.0))])
    assert drawn([]) == ""
    assert "polyline" not in drawn([(0.0, Interval(1, 1, 1)), (1.0, Interval(2, 1, 3))], ticks=("p", "q"))
    assert "diagonal" in drawn([(0.5, Interval(0.5, 0.4, 0.6))], diagonal=True)


def test_answers_and_grades_are_written_into_a_trace() -> None:
    trace = run([text(0, 3, pieces=(" The answer", " is 4.", "<|end|>")), text(1, 1, pieces=("</b>x",))])
    assert [words_of(one) for one in trace] == [" The answer is 4.", "</b>x"]
    done = graded(
        trace,
        lambda words: "4" if "4" in words else None,
        lambda one: None if one.answer is None else one.answer == "4",
    )
    assert [(one.answer, one.grade) for one in done] == [("4", 1.0), (None, None)]
    assert [one.answer for one in trace] == [None, None]
    assert [one.answer for one in graded(done)] == ["4", None]
    with pytest.raises(InputError, match="token ids alone"):
        graded(run([text(0, 3)]), str)
