"""The studies: routes whose law is enumerated, answers that swing with their length, and the policy gradient."""

from __future__ import annotations

import math
import random
import re
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lab.family.family import Architecture
from lab.family.tokenizer import build_tokenizer
from lab.family.training import IGNORED, TrainingPlan
from lab.studies.collapse import RewardPlan, reward_batches
from lab.studies.pondering import KINDS, WRONG, Kind, Ponder, draw_ponder, ponder_examples, ponders
from lab.studies.route_law import route_law
from lab.studies.routes import ADDED_IF_EVEN, ADDED_IF_ODD, Route, draw_route, route_examples, routes
from lab.studies.studies import STUDIES, StudyRecipe, bundled_study, load_study, train_studies
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerFast

from proxytune import SiblingDecoding
from proxytune.demo.bundle import bundled, load_family
from proxytune.demo.holdout import split_of
from proxytune.demo.instructions import prompt_of
from proxytune.demo.tasks import problems
from proxytune.demo.verifiers import countdown_solved, grade
from proxytune.demo.world import build_world
from proxytune.errors import LabError


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return build_tokenizer(build_world())


@pytest.fixture(scope="module")
def random_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    return Architecture(16, 2, 2, 32).build(len(tokenizer), seed=3).eval()


def worked(text: str) -> list[tuple[int, str, int, int]]:
    """The equations of a text, by a reader of our own."""
    found = re.findall(r"(\d+)([+-])(\d+)=(\d+)", text)
    return [(int(left), sign, int(right), int(result)) for left, sign, right, result in found]


# --- routes -----------------------------------------------------------------------------------------------------------


def test_the_paths_of_a_route_are_all_there_are_and_add_up() -> None:
    for route in routes("validation", 20):
        texts = [path.text for path in route.paths]
        assert len(set(texts)) == 2 ** len(route.numbers) == len(texts)
        assert math.fsum(path.taught for path in route.paths) == pytest.approx(1.0, abs=1e-12)
        for path in route.paths:
            value, probability = route.start, 1.0
            for (left, sign, right, result), number in zip(worked(path.text), route.numbers, strict=True):
                assert (left, right) == (value, number)
                value = value + number if sign == "+" else value - number
                added = {0: ADDED_IF_EVEN, 1: ADDED_IF_ODD}[number % 2]
                probability *= added if sign == "+" else 1 - added
                assert result == value
                assert 0 <= value <= 50
            assert path.text.endswith(f"The answer is {value}.")
            assert path.answer == value == route.read(path.text)
            assert path.taught == pytest.approx(probability)


def test_what_is_no_path_has_no_answer() -> None:
    route = Route(25, (4, 7, 2, 5))
    right = route.path("+-+-").text
    assert route.read(right) == 19
    for wrong in (right + " ", right[1:], right.replace("=29", "=28"), right.replace("19.", "18."), "", right + right):
        assert route.read(wrong) is None


def test_routes_are_held_out_and_the_same_everywhere() -> None:
    test = routes("test", 50)
    assert len({route.key for route in test}) == 50
    assert {split_of(route.key) for route in test} == {"test"}
    assert routes("test", 50) == test
    rng = random.Random(0)
    assert {split_of(draw_route(rng, "train").key) for _ in range(50)} == {"train"}


def test_training_routes_follow_the_taught_law() -> None:
    added: dict[int, list[bool]] = {0: [], 1: []}
    for route, path in route_examples(random.Random(5), 2000):
        for number, sign in zip(route.numbers, path.signs, strict=True):
            added[number % 2].append(sign == "+")
    for parity, expected in ((0, ADDED_IF_EVEN), (1, ADDED_IF_ODD)):
        rate, count = np.mean(added[parity]), len(added[parity])
        assert abs(rate - expected) < 4 * math.sqrt(expected * (1 - expected) / count)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_the_law_of_a_route_is_what_the_model_gives_its_paths(
    random_model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, temperature: float
) -> None:
    route = routes("test", 1)[0]
    law = route_law(random_model, tokenizer, route, temperature=temperature)
    signs = {tokenizer.convert_tokens_to_ids(sign) for sign in "+-"}
    for number in (0, 5, len(route.paths) - 1):
        path = route.paths[number]
        prompt = tokenizer(prompt_of(route.question), add_special_tokens=False)["input_ids"]
        answer = [*tokenizer(path.text, add_special_tokens=False)["input_ids"], 1]
        logprob, entropies = 0.0, []
        for length in range(len(answer)):  # one position at a time, without a cache
            with torch.inference_mode():
                logits = random_model(torch.tensor([prompt + answer[:length]]), use_cache=False).logits[0, -1].double()
            logprob += float((logits / temperature).log_softmax(-1)[answer[length]])
            p = logits.softmax(-1)
            entropies.append(float(-(p * p.log()).sum()))
        assert law.paths[number] == pytest.approx(math.exp(logprob), rel=1e-4)
        np.testing.assert_allclose(law.entropies[number], entropies, rtol=1e-4)
        assert law.ids[number] == tuple(answer)
        assert law.read(answer) == path.answer
        assert law.read(answer[:-1]) is None  # not finished
        assert [token in signs for token in answer] == law.forks[number].tolist()
    assert sum(forks.sum() for forks in law.forks) == len(route.numbers) * len(route.paths)
    answers = law.answers()
    assert math.fsum(answers.values()) == pytest.approx(1.0)
    assert answers[None] == pytest.approx(1.0 - float(law.paths.sum()))
    assert 0.5 < law.taught() <= 1.0  # a random model knows no routes


# --- pondering --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_attempts_are_wrong_as_often_as_they_should_be(kind: Kind) -> None:
    rng, count = random.Random(1), 600
    asked = ponders(kind, "validation", 60)
    for number, expected in enumerate(WRONG[kind]):
        wrong = 0
        for index in range(count):
            problem = asked[index % len(asked)]
            steps = problem.attempt(rng, number)
            if steps != problem.steps:
                wrong += 1
                if kind == "improves":
                    assert steps == problem.steps[:-1]
                else:
                    assert len(steps) == len(problem.steps)
                    assert any(step.result != problem.steps[at].result for at, step in enumerate(steps))
                    assert all(0 <= step.result <= 50 for step in steps)
                    assert all(after.left == before.result for before, after in pairwise(steps))
        assert abs(wrong / count - expected) < 4 * math.sqrt(expected * (1 - expected) / count)


def test_an_answer_says_what_its_last_attempt_came_to() -> None:
    attempts: Counter[int] = Counter()
    for problem, text in ponder_examples(random.Random(2), 500):
        equations = worked(text.rpartition(" So ")[2])
        assert problem.read(text) == equations[-1][3]
        attempts[text.count(" So ") + 1] += 1
        assert (problem.kind == "worsens") == bool(re.search("plus|minus", problem.question))
        assert problem.steps[-1].result == problem.gold
        assert len(problem.steps) <= 3
    assert set(attempts) == set(range(1, 7))
    assert attempts[1] > attempts[2] > attempts[3]


@pytest.mark.parametrize(
    "text", ["", " 1+1=2.", " The answer is x.", " The answer is 5", " The answer is 5. So 1+1=2", "The answer is 5."]
)
def test_what_does_not_end_with_an_answer_has_none(text: str) -> None:
    assert Ponder.read(text) is None
    assert Ponder.read(text + " The answer is 12.") == 12


def test_ponders_are_held_out() -> None:
    for kind in KINDS:
        found = ponders(kind, "test", 30)
        assert len({problem.question for problem in found}) == 30
        assert {problem.kind for problem in found} == {kind}
    rng = random.Random(3)
    trained = {draw_ponder(rng, "train").question for _ in range(300)}
    assert not trained & {problem.question for kind in KINDS for problem in ponders(kind, "test", 100)}


# --- the policy gradient ----------------------------------------------------------------------------------------------


def test_a_batch_of_rewards_has_the_gradient_of_reinforce() -> None:
    model, tokenizer = load_family(Path(bundled("large-tuned")).parent)
    tuned = model["large-tuned"]
    plan = RewardPlan(problems=3, samples=6)
    input_ids, labels, advantages = reward_batches(tuned, tokenizer, plan, seed=4)(0)
    assert input_ids.shape == labels.shape == advantages.shape
    each = advantages[:, 0].view(3, 6)
    assert torch.isfinite(advantages).all()
    torch.testing.assert_close(each.sum(1), torch.zeros(3))
    assert each.abs().max() > 0, "take another seed: no problem has both right and wrong answers"
    for row in range(18):
        scored = labels[row] != IGNORED
        answer = tokenizer.decode(labels[row][scored], skip_special_tokens=True)
        question = tokenizer.decode(input_ids[row])
        numbers, target = re.findall(r"Use (\d+), (\d+), (\d+) to make (\d+)\.", question)[0][:3], 0
        target = int(re.findall(r"to make (\d+)\.", question)[0])
        right = countdown_solved(tuple(map(int, numbers)), target, answer.split(" The")[0])
        others = each.flatten()[row]
        assert (others > 0) <= right  # only a right answer is made likelier
        assert (others < 0) <= (not right)
        # What is scored follows what was read: labels are the ids shifted by one.
        first = int(scored.nonzero()[0])
        assert torch.equal(
            labels[row, first : first + scored.sum() - 1], input_ids[row, first + 1 : first + scored.sum()]
        )
        assert int(labels[row][scored][-1]) == tokenizer.eos_token_id or scored.sum() == plan.max_new_tokens


def test_the_draws_of_a_step_depend_on_its_number_and_the_seed_only() -> None:
    model, tokenizer = load_family(Path(bundled("large-tuned")).parent)
    plan = RewardPlan(problems=2, samples=2)
    batches = reward_batches(model["large-tuned"], tokenizer, plan, seed=4)
    first = batches(7)
    batches(8)
    assert all(torch.equal(a, b) for a, b in zip(first, batches(7), strict=True))
    other = reward_batches(model["large-tuned"], tokenizer, plan, seed=5)(7)
    assert first[0].shape != other[0].shape or not torch.equal(first[0], other[0])


# --- training ---------------------------------------------------------------------------------------------------------


def miniature() -> StudyRecipe:
    plans: Any = {name: TrainingPlan(2, 1e-3, optimizer="adamw", warmup=1, checkpoint_every=1) for name in STUDIES}
    return StudyRecipe(examples=16, rows=4, rewards=RewardPlan(problems=1, samples=2, max_new_tokens=4), plans=plans)


def test_studies_are_trained_resumed_and_opened(tmp_path: Path) -> None:
    trained = train_studies(tmp_path, seed=1, recipe=miniature())
    assert list(trained) == list(STUDIES)
    for name in STUDIES:
        model, tokenizer = load_study(name, tmp_path)
        assert model.dtype == torch.float32
        assert not model.training
        assert tokenizer.padding_side == "left"
        start = LlamaForCausalLM.from_pretrained(bundled("large-tuned" if name == "collapsed" else "large-base"))
        moved = max(
            float((a.float() - b).abs().max())
            for a, b in zip(start.state_dict().values(), model.state_dict().values(), strict=True)
        )
        assert moved < 0.1  # it starts from there
        if name != "collapsed":  # a step of two answers of four tokens has nothing to reward
            assert moved > 0
    written = (tmp_path / "routes" / "model.safetensors").stat().st_mtime_ns
    assert train_studies(tmp_path, seed=1, recipe=miniature()) == trained
    assert (tmp_path / "routes" / "model.safetensors").stat().st_mtime_ns == written
    with pytest.raises(LabError, match=r"expected checkpoints of this seed.*another seed"):
        train_studies(tmp_path, seed=2, recipe=miniature())


def test_a_missing_study_says_how_to_get_it(tmp_path: Path) -> None:
    with pytest.raises(LabError, match=r"python -m lab studies --out FOLDER"):
        load_study("ponder", tmp_path)


@pytest.mark.parametrize("study", ["routes", "collapsed"])
def test_a_bundled_study_opens_with_plain_auto_classes(study: Any) -> None:
    model = AutoModelForCausalLM.from_pretrained(bundled_study(study))
    tokenizer = AutoTokenizer.from_pretrained(bundled_study(study))
    assert model.dtype == torch.bfloat16
    assert tokenizer.get_vocab() == AutoTokenizer.from_pretrained(bundled("large-base")).get_vocab()
    assert tokenizer.padding_side == "left"
    assert (model.generation_config.eos_token_id, model.generation_config.pad_token_id) == (1, 0)
    assert sorted(path.suffix for path in bundled_study(study).iterdir()) == [".jinja", *[".json"] * 4, ".safetensors"]


def test_entropy_finds_the_forks_of_the_bundled_routes_and_nothing_else() -> None:
    model, tokenizer = load_study("routes")
    laws = [route_law(model, tokenizer, route) for route in routes("test", 10)]
    assert min(law.paths.sum() for law in laws) > 0.97  # it walks routes, and hardly writes anything else
    assert max(law.taught() for law in laws) < 0.25
    weights = np.concatenate(
        [np.repeat(p, len(ids)) for law in laws for p, ids in zip(law.paths, law.ids, strict=True)]
    )
    entropies = np.concatenate([e for law in laws for e in law.entropies])
    real = np.concatenate([f for law in laws for f in law.forks])
    detected = entropies > 0.2
    assert (weights * (detected & real)).sum() > 0.99 * (weights * detected).sum()  # precision
    assert (weights * (detected & real)).sum() > 0.99 * (weights * real).sum()  # recall


def test_the_policy_gradient_made_the_bundled_twin_better_at_one_and_narrower() -> None:
    asked = problems("countdown", "validation", 40, build_world())
    rates, solutions = {}, {}
    for name, model in (
        ("tuned", LlamaForCausalLM.from_pretrained(bundled("large-tuned"), dtype=torch.float32).eval()),
        ("collapsed", load_study("collapsed")[0]),
    ):
        tokenizer = AutoTokenizer.from_pretrained(bundled("large-tuned"))
        prompts = tokenizer([prompt_of(problem.question) for problem in asked], return_tensors="pt", padding=True)
        out = model.generate(
            **prompts,
            do_sample=True,
            temperature=1.0,
            top_k=0,
            custom_generate=SiblingDecoding(siblings=16, repulsion=0.0, seed=0),
            return_dict_in_generate=True,
        )
        right, different = 0, 0
        for problem, tree in zip(asked, out.trees, strict=True):
            texts = [tokenizer.decode(branch.along("tokens"), skip_special_tokens=True) for branch in tree]
            graded = [text for text in texts if grade(problem, text).strict]
            right += len(graded)
            different += len(set(graded)) if graded else 0
        rates[name], solutions[name] = right / (16 * len(asked)), different / max(1, right)
    # Recorded over three seeds: pass@1 rises by half or more, different solutions per right answer fall.
    assert rates["collapsed"] > rates["tuned"] + 0.05
    assert solutions["collapsed"] < solutions["tuned"]
