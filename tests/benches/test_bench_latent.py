"""The latent bench: its arithmetic against brute force and counted passes, its choices, and the committed record."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lab.puzzles.models import PuzzlerRecipe, build_puzzler
from lab.puzzles.puzzles import PUZZLES

BENCHES = Path(__file__).resolve().parents[2] / "benches"
RECIPE = PuzzlerRecipe(width=16, heads=2, feed_forward=24, layers={"llama": 1, "hrm": 1})


def bench(name: str) -> Any:
    if str(BENCHES) not in sys.path:
        sys.path.insert(0, str(BENCHES))
    return importlib.import_module(name)


@pytest.fixture(scope="module")
def models() -> dict[str, Any]:
    return {kind: build_puzzler(kind, RECIPE, seed=3).eval() for kind in ("llama", "hrm")}  # type: ignore[arg-type]


def answered(found: list[Any], passes: int = 10, **how: Any) -> Any:
    return bench("_latent.measures").Answered(found=found, passes=passes, solutions=how.pop("solutions", 4), **how)


def asked(model: Any, puzzle: Any = "colouring", count: int = 1, nats: float = 1.0) -> Any:
    of = PUZZLES[puzzle]
    return bench("_latent.methods").Asked(model, of, of.held_out("validation", count), (nats, nats / 2))


def finite(record: Any) -> bool:
    if isinstance(record, dict):
        return all(finite(value) for value in record.values())
    if isinstance(record, list):
        return all(finite(value) for value in record)
    return not isinstance(record, float) or bool(np.isfinite(record))


# --- metrics -------------------------------------------------------------------------------------------------------


def test_metrics_are_means_over_all_choices_of_samples() -> None:
    written = ["a", "a", "b", None, None, "c", None]
    one = answered(written)
    for k in range(1, len(written) + 1):
        chosen = [{written[at] for at in some} - {None} for some in combinations(range(len(written)), k)]
        assert one.at("pass@4", k) == pytest.approx(np.mean([bool(some) for some in chosen]))
        assert one.at("distinct@4", k) == pytest.approx(np.mean([len(some) for some in chosen]))
        assert one.at("coverage@16", k) == pytest.approx(np.mean([len(some) / 4 for some in chosen]))
        assert one.at("valid", k) == pytest.approx(4 / 7)
    assert one.at("distinct@4", 2.25) == pytest.approx(0.75 * one.at("distinct@4", 2) + 0.25 * one.at("distinct@4", 3))


def test_a_tree_is_taken_as_it_is() -> None:
    tree = answered(["a", "b", None, "a"], tree=True)
    for k in (1.0, 2.5, 4.0):
        assert [tree.at(f"{what}@4", k) for what in ("pass", "distinct", "coverage")] == [1.0, 2.0, 0.5]
    assert answered([None, None], tree=True).at("pass@4", 2) == 0.0


def test_the_uniform_bound_is_what_a_uniform_sampler_covers() -> None:
    rng = np.random.default_rng(0)
    for solutions, n in ((3, 4), (40, 16), (6, 1)):
        drawn = rng.integers(solutions, size=(4000, n))
        covered = [len(set(row)) / solutions for row in drawn.tolist()]
        bound = bench("_latent.measures").uniform_bound(solutions, n)
        assert np.mean(covered) == pytest.approx(bound, abs=4 * np.std(covered) / 4000**0.5 + 1e-9)


def test_a_selector_does_not_see_what_is_right() -> None:
    texts = [[5, 1], [7, 1], [7, 1], [6, 1]]
    one = answered(
        ["right", None, None, "other"],
        texts=texts,
        answers=[tuple(text) for text in texts],
        logprobs=[-2.0, -3.0, -3.0, -1.0],
    )
    assert one.at("vote@16", 4) == 0.0  # the commonest answer, which is wrong
    assert one.at("logprob@16", 4) == 1.0
    assert one.at("logprob@16", 2) == 1.0  # blocks of two: the first of one, the last of the other
    assert one.at("vote@16", 1) == 0.5


# --- equal passes --------------------------------------------------------------------------------------------------


def test_methods_are_compared_at_equal_passes() -> None:
    measures = bench("_latent.measures")
    reference = [answered(["a"] * 8 + [None] * 24, passes=32 * 6)]
    slow = [answered(["a"] * 8 + [None] * 24, passes=32 * 8)]
    pair = measures.compare(slow, reference, "pass@16")
    assert pair.samples == (12.0, 16.0)
    assert pair.passes == 96
    assert pair.differences[0] == pytest.approx(slow[0].at("pass@16", 12) - reference[0].at("pass@16", 16))
    few = [answered(["a"] + [None] * 15, passes=16 * 3)]  # too few were drawn: both get what there is
    pair = measures.compare(few, reference, "pass@16")
    assert pair.samples == (16.0, 8.0)
    tree = [answered(["a", None], passes=9, tree=True)]
    pair = measures.compare(tree, reference, "distinct@16")
    assert pair.samples == (2.0, 1.5)
    assert pair.method[0] == 1.0
    assert pair.reference[0] == pytest.approx(reference[0].at("distinct@16", 1.5))


@contextmanager
def counted(model: Any) -> Iterator[list[int]]:
    """Rows that go through a stack of layers, one number for each pass."""
    rows: list[int] = []
    inner = model.model
    stacks = [inner.H_module, inner.L_module] if hasattr(inner, "H_module") else [inner]

    def note(module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        found = output if isinstance(output, torch.Tensor) else output[0]
        rows.append(found.shape[0])

    handles = [stack.register_forward_hook(note, with_kwargs=True) for stack in stacks]
    try:
        yield rows
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("kind", ["llama", "hrm"])
def test_passes_are_those_that_run(models: dict[str, Any], kind: str) -> None:
    methods = bench("_latent.methods")
    one = asked(models[kind])
    each = bench("_latent.measures").stack_passes(models[kind].config)
    assert each == (6 if kind == "hrm" else 1)
    settings = [
        methods.Setting.of("temperature", 1.0),
        methods.Setting.of("latent", 1.0, kind="gumbel", tau=0.5),
        methods.Setting.of("tree", 1.0, leaves=4, share=0.2),
        methods.Setting.of("siblings", 1.0, leaves=4, repulsion=0.5, share=0.5),
    ]
    settings += [methods.Setting.of("recursion", 1.0, sigma=0.2, when="cycle")] if kind == "hrm" else []
    methods.draw(one, settings[1], 1, seed=5)  # what feeds embeddings tries a model out, once
    for setting in settings:
        with counted(models[kind]) as rows:
            found = methods.draw(one, setting, 1, seed=5)[0]
        # The prompt, once: in two parts where its cache is made beforehand. Of a recursion it counts.
        prompt = {"recursion": 0, "tree": 1, "siblings": 1}.get(setting.family, 2)
        prompt += setting.family == "temperature" and kind == "hrm"  # and a pass that reads the log-probabilities
        assert found.passes == sum(rows) - prompt * each, setting


def test_a_shared_prompt_changes_no_answer(models: dict[str, Any]) -> None:
    methods = bench("_latent.methods")
    one = asked(models["llama"], count=3)
    plain = methods.Setting.of("temperature", 1.0)
    onehot = methods.Setting.of("latent", 1.0, kind="onehot")
    together = methods.draw(one, plain, 4, seed=5)
    assert [a.found for a in methods.draw(one, onehot, 4, seed=5)] == [a.found for a in together]
    assert [a.passes for a in methods.draw(one, onehot, 4, seed=5)] == [a.passes for a in together]


# --- choices -------------------------------------------------------------------------------------------------------


def test_knobs_are_chosen_on_validation_and_judged_on_test(models: dict[str, Any], monkeypatch: Any) -> None:
    cells, methods = bench("_latent.cells"), bench("_latent.methods")
    validation = asked(models["llama"], count=2)
    of = PUZZLES["colouring"]
    test = methods.Asked(models["llama"], of, of.held_out("test", 3), (1.0, 0.5))
    seen: list[tuple[str, str]] = []
    good = {  # the best on validation is the worst on test
        "validation": {"T 0.3": 9, "T 1.3": 1, "T 0.3, gumbel, tau 0.5": 8, "T 1, gumbel, tau 1": 2},
        "test": {"T 0.3": 1, "T 1.3": 16, "T 0.3, gumbel, tau 0.5": 2, "T 1, gumbel, tau 1": 16},
    }

    def draw(one: Any, setting: Any, samples: int, seed: int) -> list[Any]:
        split = "validation" if one is validation else "test"
        assert seed == (7 if one is validation else 8)  # other draws
        seen.append((split, setting.label))
        right = good[split].get(setting.label, 0)
        tree = setting.family in ("tree", "siblings")
        found = [f"s{n}" if n < right else None for n in range(16)]
        return [answered(found, passes=96, solutions=20, tree=tree) for _ in one.instances]

    monkeypatch.setattr(cells, "draw", draw)
    record = cells.cell(validation, test, cells.Size(2, 16, 3, 16), seed=7)
    assert record["base temperature"] == 0.3
    for metric in ("valid", "coverage@16", "distinct@16"):
        row = record["test"][metric]
        assert row["temperature"]["setting"] == "T 0.3"
        assert row["latent"]["setting"] == "T 0.3, gumbel, tau 0.5"
    row = record["test"]["coverage@16"]
    assert row["temperature"]["values"] == [0.05] * 3
    assert row["temperature"]["differences"] == [0.0] * 3
    assert row["latent"]["differences"] == [0.05] * 3
    assert ("test", "T 1.3") not in seen  # what was not chosen is not even drawn
    assert len(record["uniform bound"]["coverage@16"]) == 3


def test_a_pooled_interval_resamples_within_seeds() -> None:
    measures = bench("_latent.measures")
    far = measures.pooled([[0.0] * 30, [1.0] * 50])  # nothing varies within a seed; both weigh alike
    assert (far.value, far.low, far.high) == (0.5, 0.5, 0.5)
    rng = np.random.default_rng(0)
    groups = [rng.normal(size=40) for _ in range(3)]
    found = measures.pooled(groups)
    error = np.sqrt(sum(np.var(group) / 40 for group in groups)) / 3
    assert found.high - found.low == pytest.approx(2 * 1.96 * error, rel=0.05)


@pytest.mark.parametrize(
    ("low", "high", "means", "said"),
    [
        (0.1, 0.3, [0.1, 0.2, 0.3], "win"),
        (0.1, 0.3, [-0.1, 0.4, 0.3], "null"),
        (-0.1, 0.3, [0.1, 0.2, 0.3], "null"),
        (-0.3, -0.1, [-0.1, -0.2, -0.3], "loss"),
        (0.0, 0.0, [0.0, 0.0, 0.0], "null"),
    ],
)
def test_a_win_needs_the_interval_and_every_seed(low: float, high: float, means: list[float], said: str) -> None:
    assert bench("_latent.verdicts").outcome({"low": low, "high": high}, means) == said


def test_verdicts_are_those_that_were_registered() -> None:
    verdict = bench("_latent.verdicts").verdict
    assert [verdict("H1", found) for found in (["win"] * 2, ["win", "null"], ["win", "loss"])] == [
        "supported",
        "supported in part",
        "mixed",
    ]
    assert [verdict("H2", found) for found in (["null"], ["null", "loss"])] == ["null", "contradicted"]
    assert [verdict("H4", found) for found in (["null", "loss"], ["win", "loss"])] == ["as expected", "not as expected"]


@pytest.mark.parametrize(("kind", "puzzle"), [("llama", "countdown"), ("hrm", "queens")])
def test_a_cell_in_small(models: dict[str, Any], monkeypatch: Any, kind: str, puzzle: str) -> None:
    cells, methods = bench("_latent.cells"), bench("_latent.methods")
    monkeypatch.setattr(cells, "TEMPERATURES", (0.5, 1.0))
    monkeypatch.setattr(methods, "MIXTURES", ({"kind": "gumbel", "tau": 0.25}, {"kind": "mean"}))
    monkeypatch.setattr(methods, "SIGMAS", (0.2,))
    monkeypatch.setattr(PUZZLES["countdown"], "answer_length", 12)  # these models never end by themselves
    record = bench("bench_latent").measure(models[kind], puzzle, 0, cells.Size(2, 16, 2, 16))
    families = set(methods.FAMILIES) - ({"scratchpad"} if puzzle == "queens" else {"recursion"})
    assert {row["family"] for row in record["validation"]} == families
    assert set(record["test"]["coverage@16"]) == families
    pooled = bench("_latent.verdicts").over_seeds([record, record])
    assert finite(pooled)
    assert json.loads(json.dumps(record)) == record
    assert ("vote@16" in record["test"]) == (kind == "hrm")


# --- the committed record ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def committed() -> Any:
    return json.loads((BENCHES / "results" / "latent.json").read_text(encoding="utf-8"))


def test_the_record_has_all_seeds_methods_intervals_and_verdicts(committed: Any) -> None:
    assert len(committed["seeds"]) >= 3
    assert len(committed["cells"]) == 12
    assert finite(committed)
    methods, measures = bench("_latent.methods"), bench("_latent.measures")
    for name, cell in committed["cells"].items():
        families = set(methods.FAMILIES)
        families -= set() if "countdown" in name else {"scratchpad"}
        families -= set() if name.startswith("hrm") else {"recursion"}
        for metric in measures.METRICS:
            assert set(cell["test"][metric]) == families, (name, metric)
            for found in cell["test"][metric].values():
                assert len(found["per seed"]) == len(committed["seeds"])
                for one in (found["− best temperature"], *found["per seed"]):
                    assert one["low"] <= one["value"] <= one["high"]
        for swept in cell["temperatures on validation"]:
            assert len(swept) == len(methods.TEMPERATURES)


def test_every_registered_hypothesis_has_the_verdict_of_its_cells(committed: Any) -> None:
    verdicts = bench("_latent.verdicts")
    assert committed["hypotheses"] == verdicts.verdicts(committed["cells"])
    registered = bench("bench_latent").__doc__
    for name in committed["hypotheses"]:
        assert f"\n{name}  " in registered
        assert committed["hypotheses"][name]["cells"]


def test_the_readme_s_tables_are_made_of_the_committed_record(committed: Any) -> None:
    block = bench("_latent.report").latent_block(committed)
    assert "nan" not in block
    assert len(bench("_pages.records").wrapped(block).splitlines()) <= 45
    for table in block.split("\n\n"):
        rows = [line for line in table.split("\n") if line.startswith("|")]
        assert len({row.count("|") for row in rows}) <= 1


def test_the_notes_table_is_made_of_the_committed_record(committed: Any) -> None:
    notes = (BENCHES / "lab" / "NOTES.md").read_text(encoding="utf-8")
    cells, puzzles = committed["cells"], ("colouring", "queens", "countdown")

    def shown(name: str, metric: str, digits: int) -> str:
        value = cells[name]["test"][metric]["temperature"]["value"]["value"]
        return f"{value:.{digits}f}".removeprefix("0")

    for kind, title in (("llama", "Llama"), ("hrm", "HRM")):
        for twin in ("varied", "collapsed"):
            names = [f"{kind}-{twin} {puzzle}" for puzzle in puzzles]
            found = " | ".join(f"{shown(name, 'valid', 3)} · {shown(name, 'distinct@16', 1)}" for name in names)
            assert f"| {title}, {twin} | {found} |\n" in notes
    counts = [np.mean(cells[f"llama-varied {puzzle}"]["solutions of an instance"]) for puzzle in puzzles]
    assert f"| solutions per instance | {' | '.join(f'{count:.1f}' for count in counts)} |\n" in notes
