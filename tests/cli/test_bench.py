"""`proxytune bench`: its tables, its JSON and its plot, on a set small enough for a test."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from typing import Any

import pytest
import torch

from proxytune.cli import bench as command
from proxytune.cli.plot_file import PLOT_KINDS
from proxytune.throughput import run as throughput
from proxytune.throughput.shapes import Shape, Trio
from proxytune.throughput.subjects import Cell, lab_subject, random_subject

TINY = Trio("tiny trio", Shape(96, 1, 2, 2, 64, 80), Shape(64, 1, 2, 1, 48, 72, tied=True))
CELLS = (Cell(4, 12), Cell(4, 6, 1, "sampled"))


def small(size: str, folder: Any) -> list[throughput.Plan]:
    """Two families, one of them trained, in the place of the command's own set."""
    assert size == "quick"
    return [
        throughput.Plan(lambda: lab_subject(folder), CELLS, 2, 0.0),
        throughput.Plan(
            lambda: random_subject(TINY, dtype=torch.float32), CELLS, 2, 0.0, (0.7,), CELLS[0], lengths=(0, 2)
        ),
    ]


@pytest.fixture(scope="module")
def reports() -> list[tuple[str, float, int]]:
    """What the measurement reported."""
    return []


@pytest.fixture(scope="module")
def record(family, reports) -> dict[str, Any]:
    return throughput.measure(small("quick", family), report=lambda *what: reports.append(what))


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch, record: dict[str, Any], family) -> list[Any]:
    """The command with what was measured once; what it asked for."""
    asked: list[Any] = []

    def plans(*words: Any) -> list[Any]:
        asked.append(words)
        return []

    monkeypatch.setattr(throughput, "cpu_plans", plans)
    monkeypatch.setattr(throughput, "measure", lambda plans, report: report("measuring", 0, 1) or record)
    return asked


def test_the_rounds_are_counted(record, reports) -> None:
    # Two families of two cells, each with a round that counts and two timed ones; three rounds of the cost model.
    assert {total for _, _, total in reports} == {15}
    done = [rounds for _, rounds, _ in reports]
    assert done == sorted(done)
    assert (done[0], done[-1]) == (0, 14), "the last one has begun"
    timed = {name: rounds for name, rounds, _ in reports}
    assert timed["lab, 4→12, batch 1: round 1"] == 1
    assert timed["lab, 4→6, batch 1, sampled: round 2"] == 5
    assert timed["tiny trio, 4→6, batch 1, sampled: round 2"] == 11
    assert timed["tiny trio: cost model, round 3"] == 14
    assert sum(0 < rounds < 1 for rounds in done) > 3, "within the round that counts, each method is reported"


def test_json_is_one_object_and_nothing_else(run, measured, record, family) -> None:
    ended = run("bench", "--json", "--family", family)
    assert ended.code == 0, ended.err
    assert json.loads(ended.out) == record
    assert measured == [("quick", family, None)]
    assert torch.get_num_threads() == 1


def test_full_asks_for_the_longer_set(run, measured) -> None:
    assert run("bench", "--full", "--json", "--alpha", "0.25").code == 0
    assert measured == [("full", None, 0.25)]


def test_a_family_without_a_record_takes_an_alpha(run, family, tmp_path, monkeypatch) -> None:
    for member in family.iterdir():
        if member.is_dir():
            (tmp_path / member.name).symlink_to(member)
    ended = run("bench", "--family", tmp_path)
    assert ended.code == 2
    assert "family.json with the chosen alpha; got none" in " ".join(ended.err.split())
    assert "or pass an alpha" in " ".join(ended.err.split())
    plan = throughput.cpu_plans("quick", tmp_path, 0.25)[0]
    assert plan.build().alpha == 0.25


@pytest.mark.parametrize("columns", ["80", "60"])
def test_the_tables_fit_80_columns_and_show_every_method(run, measured, record, monkeypatch, columns: str) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    monkeypatch.setenv("NO_COLOR", "1")
    ended = run("bench")
    assert ended.code == 0, ended.err
    assert "…" not in ended.out, "a column was cut off"
    assert max(len(line) for line in ended.out.splitlines()) <= 80
    for words in ("lab, float32: 4→12, batch 1", "tiny trio", "naive loop", "speculation, 0.7 planted", "│", "█"):
        assert words in ended.out
    for found in record["families"]:
        for name, one in found["cells"][0]["methods"].items():
            if one["status"] == "run":
                assert f"{one['over_tuned']['value']:.2f}" in ended.out, name
    assert "members' own passes" in ended.out
    assert "predicted" in ended.out
    last = " ".join(ended.out.rpartition("Took ")[2].split())
    assert last.count("Too few rounds to rank anything: 2") + last.count("This run was disturbed") == 2, (
        "one sentence a family, at the end"
    )
    assert "composite door = `model.generate()`" in " ".join(ended.out.split())


def test_the_plot_has_a_bar_for_each_method(run, measured, record, tmp_path) -> None:
    place = tmp_path / "out.svg"
    ended = run("bench", "--plot", place)
    assert ended.code == 0, ended.err
    drawn = place.read_text()
    for found in record["families"]:
        assert f"<!-- {found['name']}: 4→12, batch 1 -->" in drawn
    assert "<!-- speculation, 0.7 planted -->" in drawn
    place = tmp_path / "out.png"
    assert run("bench", "--plot", place).code == 0
    assert place.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(("name", "words"), [("out.nothing", "ends in one of"), ("no/folder/out.png", "exists")])
def test_a_plot_that_cannot_be_drawn_is_refused_before_anything_is_measured(
    run, measured, tmp_path, name: str, words: str
) -> None:
    ended = run("bench", "--plot", tmp_path / name)
    assert ended.code == 2
    assert words in ended.err
    assert measured == []


def test_without_matplotlib_the_error_names_the_extra(run, measured, monkeypatch, tmp_path) -> None:
    there = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "matplotlib" else there(name, *rest)
    )
    ended = run("bench", "--plot", tmp_path / "out.png")
    assert ended.code == 2
    assert "pip install matplotlib, or pip install '.[plot]' in the checkout" in ended.err
    assert measured == []


@pytest.mark.parametrize(
    ("name", "absent", "words"),
    [
        ("out.png", ("matplotlib",), "pip install matplotlib, or pip install '.[plot]' in the checkout"),
        ("out.nothing", (), "ends in one of"),
        ("no/folder/out.png", (), "exists"),
    ],
)
def test_a_wrong_plot_is_refused_before_anything_heavy_is_imported(tmp_path, name, absent, words) -> None:
    program = (
        "import sys\n"
        f"for name in {absent!r}: sys.modules[name] = None\n"
        "from proxytune.cli import main\n"
        "try: main(['bench', '--plot', sys.argv[1]])\n"
        "except SystemExit as ended: assert ended.code == 2, ended.code\n"
        "names = ('torch', 'transformers', 'numpy', 'accelerate', 'matplotlib')\n"
        "heavy = [name for name in names if sys.modules.get(name) is not None]\n"
        "assert not heavy, heavy\n"
    )
    ran = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / name)], capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr
    assert words in ran.stderr


def test_every_kind_of_plot_is_one_that_matplotlib_writes() -> None:
    from matplotlib.figure import Figure

    assert set(PLOT_KINDS) <= set(Figure().canvas.get_supported_filetypes())


def test_a_folder_without_a_family_is_a_clear_error(run, tmp_path) -> None:
    ended = run("bench", "--family", tmp_path)
    assert ended.code == 2
    assert "large-base" in ended.err


def test_the_bars_of_the_figures_are_the_figures(record) -> None:
    """From the picture's own objects, not from its pixels."""
    from matplotlib.figure import Figure

    kept: list[Any] = []
    saved = Figure.savefig
    try:
        Figure.savefig = lambda self, path: kept.append(self)
        command.draw(record, "nowhere")
    finally:
        Figure.savefig = saved
    for axes, found in zip(kept[0].axes, record["families"], strict=True):
        ran = [one for one in found["cells"][0]["methods"].values() if one["status"] == "run"]
        assert [bar.get_width() for bar in axes.patches] == [one["over_tuned"]["value"] for one in ran]
