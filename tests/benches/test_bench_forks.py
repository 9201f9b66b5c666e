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
    assert sampling.TEMPERATURES is bench("_latent.methods").TEMPERATURES
    assert len(sampling.TEMPERATURES) == 20
    monkeypatch.setattr(sampling, "TEMPERATURES", (0.5, 1.0))
    monkeypatch.setattr(sampling, "EXEC", (0.4,))
    monkeypatch.setattr(sampling, "FORK", (1.0,))
    found = sampling.temperatures(subjects["large-tuned"], 0.36, seed=0, chosen_on=3, judged_on=3, few=1, many=2)
    chosen = found["test"]["k=1"]["chosen temperature"]
    assert chosen["at the end of the sweep"] is True  # of these two, each is an end
    grid = [(one["exec"], one["fork"]) for one in found["validation"]]
    assert grid == [(0.5, 0.5), (1.0, 1.0), *((0.4, fork) for fork in dict.fromkeys((1.0, chosen["temperature"])))]
    assert finite(found)
    differences = found["test"]["k=1"]["differences"]
    assert {name: len(some) for name, some in differences.items()} == {"chosen temperature": 3, "temperature 1": 3}
    for given in (0.5, 1.0):
        spread = sampling.spreads(subjects["large-tuned"], 0.36, seed=0, count=3, samples=32, chosen=given)
        assert finite(spread)
        for name, method in spread["methods"].items():
            size = int(name.rpartition(", ")[2])
            as_many = method["independent samples for as many tokens"]["temperature 1"]
            assert as_many < (size * 1.5 if "siblings" in name else size)
            for both in method["differences"].values():
                assert [len(some) for some in both.values()] == [3, 3]
                assert (both["chosen temperature"] == both["temperature 1"]) or given != 1.0


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


def kept() -> Any:
    return json.loads((BENCHES / "results" / "forks.json").read_text(encoding="utf-8"))


def test_the_pages_tables_are_made_of_the_committed_record() -> None:
    record = kept()
    assert finite(record)
    assert record["seeds"] == [0, 1, 2]
    block = bench("_forks.report").forks_block(record)
    assert "nan" not in block
    for table in block.split("\n\n"):
        rows = [line for line in table.split("\n") if line.startswith("|")]
        assert len({row.count("|") for row in rows}) <= 1


def test_the_better_of_both_references_follows_from_the_committed_differences() -> None:
    sampling, common = bench("_forks.sampling"), bench("_forks.common")
    record, shown = kept(), 0
    table = "\n".join(bench("_forks.report").sampling_table(record))
    for model in ("tuned", "collapsed"):
        over = record["over seeds"][model]
        cells = [*over["two temperatures"].values(), *(one for row in over["methods"].values() for one in row.values())]
        assert len(cells) == 3 + 2 * 10
        for cell in cells:
            differences = cell["differences"]
            means = {name: np.mean(values) for name, values in differences.items()}
            assert set(means) == {sampling.CHOSEN, sampling.AT_ONE}
            assert cell["better reference"] == min(means, key=lambda name: means[name])
            for name, values in differences.items():
                assert len(values) == record["sizes"]["spreads"]["count"]
                assert cell[name] == common.record(common.mean_interval(values))
            shown += cell["better reference"] == sampling.AT_ONE
    assert table.count("*") == shown


def test_the_report_says_where_a_choice_is_at_an_end_of_the_sweep() -> None:
    report, record = bench("_forks.report"), kept()
    swept = bench("_latent.methods").TEMPERATURES
    runs = [run["temperatures"] for model in ("tuned", "collapsed") for run in record["per seed"][model]]
    for run in runs:
        assert [one["exec"] for one in run["validation"] if one["exec"] == one["fork"]] == list(swept)
        for test in run["test"].values():
            chosen = test["chosen temperature"]
            assert chosen["at the end of the sweep"] == (chosen["temperature"] in (swept[0], swept[-1]))
            chosen["temperature"] = 0.7
    assert "No chosen temperature, for any k, is at an end of the sweep." in report.reference_sentence(record)
    runs[4]["test"]["k=16"]["chosen temperature"]["temperature"] = 4.0
    said = report.reference_sentence(record)
    assert "Chosen temperatures at an end of the sweep: collapsed twin, k = 16: 4 in 1 of 3." in said


def test_parts_that_are_not_measured_again_stay_as_they_are(tmp_path: Path, monkeypatch: Any) -> None:
    forks, record = bench("bench_forks"), kept()
    assert forks.together(tmp_path, forks.SEEDS, kept()) == record
    assert forks.text(record) == (BENCHES / "results" / "forks.json").read_text(encoding="utf-8")
    # One part anew: it replaces that part, and only if it is there for all seeds.
    monkeypatch.setattr(forks, "versions", lambda: {"torch": "another"})
    (tmp_path / "parts").mkdir()
    for seed in forks.SEEDS:
        assert forks.together(tmp_path, forks.SEEDS, kept()) == record
        found = kept()["per seed"]["tuned"][seed]
        two = {"chosen temperature": [0.25 + seed, 0.5], "temperature 1": [0.0, -0.5]}
        for test in found["temperatures"]["test"].values():
            test["differences"] = two
        for method in found["spreads"]["methods"].values():
            method["differences"] = {"coverage": two, "distinct solutions": two}
        forks.part("tuned", seed, tmp_path).write_text(json.dumps(found | {"versions": forks.versions()}))
    new = forks.together(tmp_path, forks.SEEDS, kept())
    assert new["measured"].pop("tuned")["torch"] == "another"
    cell = new["over seeds"].pop("tuned")["methods"]["start, 16"]["coverage"]
    assert cell["differences"] == {"chosen temperature": [1.25, 0.5], "temperature 1": [0.0, -0.5]}
    assert cell["better reference"] == "temperature 1"
    assert new["per seed"] == record["per seed"]
    for part in ("measured", "over seeds"):
        record[part].pop("tuned")
        assert new[part] == record[part]
    assert new["trained"] == record["trained"]
    # What is kept must be of the sizes that the record names.
    monkeypatch.setitem(forks.SIZES, "votes", {"problems": 1, "trees": 1})
    with pytest.raises(SystemExit, match="detection, votes, collapsed, .* measure them again"):
        forks.together(tmp_path, forks.SEEDS, kept())
