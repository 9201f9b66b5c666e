"""The forks bench: its arithmetic against brute force, and every part at a miniature size on the bundled models."""

from __future__ import annotations

import importlib
import json
import sys
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lab.studies.studies import bundled_study
from transformers import AutoTokenizer, LlamaForCausalLM

from proxytune.demo.bundle import bundled
from proxytune.demo.tasks import problems
from proxytune.demo.world import build_world

BENCHES = Path(__file__).resolve().parents[2] / "benches"


def bench(name: str) -> Any:
    if str(BENCHES) not in sys.path:
        sys.path.insert(0, str(BENCHES))
    return importlib.import_module(name)


@pytest.fixture(scope="module")
def subjects() -> dict[str, Any]:
    def opened(name: Any) -> Any:
        place = bundled_study(name) if name == "routes" else bundled(name)
        model = LlamaForCausalLM.from_pretrained(place, dtype=torch.float32).eval()
        return bench("_forks.common").Subject(name, 0, model, AutoTokenizer.from_pretrained(place))

    return {name: opened(name) for name in ("routes", "large-tuned")}


def finite(record: Any) -> bool:
    if isinstance(record, dict):
        return all(finite(value) for value in record.values())
    if isinstance(record, list):
        return all(finite(value) for value in record)
    return not isinstance(record, float) or bool(np.isfinite(record))


def test_coverage_and_solutions_are_means_over_all_choices_of_samples() -> None:
    sampling = bench("_forks.sampling")
    written = ["a", "a", "b", None, None, "c", None]
    right = {text: written.count(text) for text in "abc"}
    answers = sampling.Answers(len(written), right, 70)
    for k in range(1, len(written) + 1):
        chosen = [{written[at] for at in some} - {None} for some in combinations(range(len(written)), k)]
        assert answers.coverage(k) == pytest.approx(np.mean([bool(some) for some in chosen]))
        assert answers.solutions(k) == pytest.approx(np.mean([len(some) for some in chosen]))
    assert answers.coverage(2.25) == pytest.approx(0.75 * answers.coverage(2) + 0.25 * answers.coverage(3))
    assert answers.solutions(0.5) == pytest.approx(0.5 * answers.solutions(1))


def test_answers_are_graded_strictly_and_counted_by_their_text() -> None:
    sampling = bench("_forks.sampling")
    problem = problems("countdown", "test", 1, build_world())[0]
    answers = sampling.Answers.of(problem, [f" {problem.answer}", f" {problem.answer}", " I do not know."], 30)
    assert (answers.samples, answers.tokens) == (3, 30)
    assert answers.right == {f" {problem.answer}": 2}


def test_an_interval_covers_its_mean_and_is_paired() -> None:
    common = bench("_forks.common")
    rng = np.random.default_rng(0)
    first = rng.random(400)
    second = first + 0.01  # a small gain on every problem
    found = common.mean_interval(second - first)
    assert found.low == pytest.approx(0.01)
    assert found.high == pytest.approx(0.01)
    covered = [0.5 in common.mean_interval(rng.random(60), seed=seed, draws=500) for seed in range(100)]
    assert 0.86 < np.mean(covered) <= 1.0


def test_independent_samples_do_not_depend_on_the_batch(subjects: dict[str, Any], monkeypatch: Any) -> None:
    common = bench("_forks.common")
    prompts = ["Question: Use 1, 2, 3 to make 6.\nAnswer:", "Question: Start with 1, add 2, add 3.\nAnswer:"]
    whole = common.independent(subjects["large-tuned"], prompts, 4, seed=1, max_new_tokens=12)
    monkeypatch.setattr(common, "ROWS", 3)
    assert common.independent(subjects["large-tuned"], prompts, 4, seed=1, max_new_tokens=12) == whole
    assert [len(some) for some in whole] == [4, 4]


def test_detection_and_votes_in_small(subjects: dict[str, Any]) -> None:
    votes = bench("_forks.votes")
    found = votes.detection(subjects["routes"], problems=4, samples=4)
    assert found["auroc of the entropy"] > 0.99
    assert found["target share as taught"]["recall"] > 0.9
    assert found["target share 20 %"]["precision"] < found["target share as taught"]["precision"]
    voted = votes.votes(subjects["routes"], 0.2, problems=1, trees=40)
    assert finite(voted)
    assert voted["tokens of a tree"] < voted["tokens of as many samples"]
    assert voted["share of the trees' forks at signs"] > 0.99
    # Equal votes over children drawn without replacement are too flat, and by far more than the draws scatter.
    equal, exact = voted["by"]["equal"], voted["by"]["exact"]
    assert equal["the same in standard errors of the draws"] < -8
    assert abs(exact["the same in standard errors of the draws"]) < 4


def test_countdown_parts_in_small(subjects: dict[str, Any], monkeypatch: Any) -> None:
    sampling = bench("_forks.sampling")
    assert len(sampling.SETTINGS) == len(set(sampling.SETTINGS)) == 26
    monkeypatch.setattr(sampling, "SETTINGS", ((0.5, 0.5), (1.0, 1.0), (0.4, 1.0)))
    found = sampling.temperatures(subjects["large-tuned"], 0.36, seed=0, chosen_on=3, judged_on=3, few=1, many=2)
    assert len(found["validation"]) == 3
    assert finite(found)
    assert len(found["test"]["k=1"]["differences"]) == 3
    spread = sampling.spreads(subjects["large-tuned"], 0.36, seed=0, count=3, samples=32, best_temperature=0.5)
    assert finite(spread)
    for name, method in spread["methods"].items():
        size = int(name.rpartition(", ")[2])
        assert method["independent samples for as many tokens"] < (size * 1.5 if "siblings" in name else size)


def test_pondering_parts_in_small(subjects: dict[str, Any], monkeypatch: Any) -> None:
    # Of a model that knows nothing of pondering: every part has to cope with answers that are all alike or none.
    pondering = bench("_forks.pondering")
    monkeypatch.setattr(pondering, "MAX_NEW_TOKENS", 60)
    tuned = subjects["large-tuned"]
    found = pondering._length(tuned, pondering.ponders("worsens", "test", 2), 2, extra=1)
    assert finite(found)
    drawn = pondering.draw(tuned, "worsens", "test", 3, 4)
    assert [len(one.samples) for one in drawn] == [4, 4, 4]
    for one in drawn:
        assert one.spent(4) == one.prompt + sum(one.tokens)
        assert [len(sample.confidences) for sample in one.samples] == one.tokens
    assert finite(pondering._votes(drawn, 2, how="majority"))
    online = [partial(pondering._online, eta=eta) for eta in (90.0, 10.0)]
    for rule in (pondering._settled, *online):
        found = pondering._stopped(drawn, rule)
        assert finite(found)
        assert 0 < found["share of the tokens"]["value"] <= 1


def test_the_readme_s_tables_are_made_of_the_committed_record() -> None:
    place = BENCHES / "results" / "forks.json"
    record = json.loads(place.read_text(encoding="utf-8"))
    assert finite(record)
    assert record["seeds"] == [0, 1, 2]
    block = bench("_forks.report").forks_block(record)
    assert "nan" not in block
    for table in block.split("\n\n"):
        rows = [line for line in table.split("\n") if line.startswith("|")]
        assert len({row.count("|") for row in rows}) <= 1
