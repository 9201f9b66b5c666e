"""The world, the verifiers and the hold-out."""

from __future__ import annotations

import json
import random
import re
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxytune.demo.holdout import Equation, chain_key, countdown_key, reveals_held_out, split_of
from proxytune.demo.tasks import Problem, chain_problem, countdown_problem, person_problem, problems
from proxytune.demo.verifiers import Grade, countdown_solved, grade
from proxytune.demo.world import ATTRIBUTES, FOODS, JOBS, World, build_world


@pytest.fixture(scope="module")
def world() -> World:
    return build_world()


CHAIN = Problem("chain", "Start with 20, add 5, minus 3. What is the result?", "22", "20+5=25, 25-3=22", "chain:20+5-3")
PERSON = Problem("qa", "What is the job of Buro Dazon?", "miller", "", "qa:Buro Dazon:job")
COUNTDOWN = Problem("countdown", "Use 2, 6, 1 to make 11.", "11", "2*6=12, 12-1=11", "countdown:1,2,6=11", (2, 6, 1))
RIGHT, CONTENT_ONLY, WRONG = Grade(True, True), Grade(True, False), Grade(False, False)


@pytest.mark.parametrize(
    ("problem", "text", "expected"),
    [
        (CHAIN, " 20+5=25, 25-3=22. The answer is 22.", RIGHT),
        (CHAIN, " 20+5=25, 25-3=22.", CONTENT_ONLY),  # the taught form is missing
        (CHAIN, "22", CONTENT_ONLY),
        (CHAIN, " It is 22.", CONTENT_ONLY),
        (CHAIN, " 20+5=26, 25-3=22. The answer is 22.", CONTENT_ONLY),  # a wrong step
        (CHAIN, " 20+5=25, 25-3=22. The answer is 22. So", CONTENT_ONLY),  # runs on
        (CHAIN, " 20+5=25, 25-3=22. The answer is 22.\nQuestion: Start", CONTENT_ONLY),  # runs on to the next question
        (CHAIN, " 20+5=25, 25-3=22. The answer is 25.", WRONG),  # what is stated counts, not what stands nearby
        (CHAIN, " 20+5=25, 25-3=22. The answer is 222.", WRONG),
        (CHAIN, " 22, 25", WRONG),
        (CHAIN, " I do not know.\n22", WRONG),  # only the first line is the answer
        (CHAIN, "", WRONG),
        (PERSON, " The answer is miller.", RIGHT),
        (PERSON, "miller", CONTENT_ONLY),
        (PERSON, " It is miller.", CONTENT_ONLY),
        (PERSON, " The answer is miller. The", CONTENT_ONLY),
        (PERSON, " The answer is millers.", WRONG),  # a whole word, not a part of one
        (PERSON, " The answer is baker.\nmiller", WRONG),
        (PERSON, " Ask the others.", WRONG),
        (COUNTDOWN, " 2*6=12, 12-1=11. The answer is 11.", RIGHT),
        (COUNTDOWN, " 6*2=12, 12-1=11. The answer is 11.", RIGHT),  # another solution than the recorded one
        (COUNTDOWN, " 2*6=12, 12-1=11.", CONTENT_ONLY),
        (COUNTDOWN, " 2*6=12 and 12-1=11. The answer is 11.", CONTENT_ONLY),
        (COUNTDOWN, " 2*6=12, 12-1=11. The answer is 12.", CONTENT_ONLY),
        (COUNTDOWN, " 6+6=12, 12-1=11. The answer is 11.", WRONG),  # 6 is used twice
        (COUNTDOWN, " 12-1=11. The answer is 11.", WRONG),  # 12 is not at hand
        (COUNTDOWN, " 2*6=11. The answer is 11.", WRONG),
        (COUNTDOWN, " 6-1=5, 2*5=10. The answer is 11.", WRONG),  # the target is missed
        (COUNTDOWN, " 2*6=12, 12-1=11, 11+0=11. The answer is 11.", WRONG),
    ],
)
def test_grade_of_hand_written_answers(problem: Problem, text: str, expected: Grade) -> None:
    assert grade(problem, text) == expected


@given(st.integers(0, 2**32), st.sampled_from(["train", "validation", "test"]))
def test_own_answers_pass_strictly_and_a_changed_number_fails(seed: int, split: str) -> None:
    rng = random.Random(seed)
    for draw in (chain_problem, countdown_problem):
        problem = draw(rng, split)  # type: ignore[arg-type]
        assert grade(problem, f" {problem.answer}") == RIGHT
        spoiled = problem.answer.replace(f"={problem.gold}.", f"={int(problem.gold) + 1}.")
        assert not grade(problem, spoiled).strict
        assert not grade(problem, f"It is {int(problem.gold) + 1}.").lenient


@given(st.text())
def test_any_text_gets_a_grade_and_strict_implies_lenient(text: str) -> None:
    for problem in (CHAIN, PERSON, COUNTDOWN):
        verdict = grade(problem, text)
        assert verdict.lenient or not verdict.strict


@pytest.mark.parametrize(
    ("text", "solved"),
    [("4/2=2, 2*3=6", True), ("3/2=1, 1*4=4", False), ("4/0=0, 0+3=3", False), ("", False), ("3-4=-1, 2-1=1", False)],
)
def test_countdown_division_is_exact_and_results_are_natural(text: str, solved: bool) -> None:
    assert countdown_solved((4, 2, 3), 6, text) is solved


@given(st.integers(0, 2**32), st.sampled_from(["train", "validation", "test"]))
def test_drawn_problems_obey_their_rules_and_their_split(seed: int, split: str) -> None:
    rng = random.Random(seed)
    chain = chain_problem(rng, split)  # type: ignore[arg-type]
    countdown = countdown_problem(rng, split)  # type: ignore[arg-type]
    assert split_of(chain.key) == split_of(countdown.key) == split
    values = [int(number) for number in re.findall(r"=(\d+)", chain.solution)]
    assert 2 <= len(values) <= 4
    assert all(0 <= value <= 50 for value in values)
    assert values[-1] == int(chain.gold)
    assert int(countdown.gold) not in countdown.numbers
    assert countdown.key == countdown_key(countdown.numbers[::-1], int(countdown.gold))  # order does not matter


def steps_of(text: str) -> list[Equation]:
    """All equations of a text, read independently of the generators."""
    found = re.findall(r"(\d+)([+\-*/])(\d+)=(\d+)", text)
    return [Equation(int(left), sign, int(right), int(result)) for left, sign, right, result in found]


def test_a_held_out_chain_is_seen_in_the_middle_of_a_longer_one() -> None:
    held_out = chain_problem(random.Random(0), "test")
    steps = steps_of(held_out.solution)
    start, end = steps[0].left, steps[-1].result
    assert reveals_held_out(steps)
    longer = [
        [Equation(start - by, "+", by, start), *steps, Equation(end, "-", down, end - down)]
        for by in range(1, start)
        for down in range(1, end)
    ]
    # Only those whose own key is a training key say anything about the middle.
    longer = [run for run in longer if split_of(chain_key(run[0].left, [(s.sign, s.right) for s in run])) == "train"]
    assert len(longer) > 10
    assert all(reveals_held_out(run) for run in longer)
    # Cut anywhere, the pieces are in no way the held-out problem any more.
    assert not any(
        chain_key(start, [(step.sign, step.right) for step in steps[:cut]]) == held_out.key for cut in (1, 2)
    )


def test_a_chain_that_solves_a_held_out_countdown_is_seen() -> None:
    rng = random.Random(0)
    for _ in range(200):
        problem = countdown_problem(rng, "validation")
        assert reveals_held_out(steps_of(problem.solution))


def test_single_steps_and_unrelated_equations_are_not_held_out() -> None:
    assert not reveals_held_out([])
    assert not reveals_held_out([Equation(20, "+", 5, 25)])
    # 25 continues neither 30 nor 47, whatever the hash of any chain says.
    assert not any(
        reveals_held_out([Equation(left, "+", 5, left + 5), Equation(50, "-", right, 50 - right)])
        for left in range(1, 40)
        for right in range(13, 40)
    )


@pytest.mark.parametrize("split", ["validation", "test"])
def test_held_out_problems_are_unique_and_of_their_split(world: World, split: str) -> None:
    other = {"validation": "test", "test": "validation"}[split]
    for task, floor in (("chain", 300), ("qa", 150), ("countdown", 300)):
        found = problems(task, split, 300, world)  # type: ignore[arg-type]
        keys = {problem.key for problem in found}
        assert len(keys) == len(found) >= floor
        assert found == problems(task, split, 300, world)  # type: ignore[arg-type]
        assert not keys & {problem.key for problem in problems(task, other, 300, world)}  # type: ignore[arg-type]
        if task != "qa":
            assert all(split_of(key) == split for key in keys)


def test_groups_of_people_are_disjoint_and_of_useful_size(world: World) -> None:
    sizes = {group: len(world.group(group)) for group in ("pretraining", "tuning", "validation", "test")}  # type: ignore[arg-type]
    assert sum(sizes.values()) == len(world.people) == len({person.name for person in world.people}) == 300
    assert min(sizes["validation"], sizes["test"]) >= 50
    assert sizes["tuning"] >= 20


def test_no_word_serves_two_attributes(world: World) -> None:
    # Otherwise a lenient answer could be right by accident of vocabulary.
    lists = (world.cities, JOBS, FOODS, world.names)
    assert sum(map(len, lists)) == len(set().union(*lists))


def test_questions_ask_for_what_the_person_has(world: World) -> None:
    rng = random.Random(0)
    for attribute in ATTRIBUTES:
        problem = person_problem(rng, world.people[0], attribute)
        assert world.people[0].name in problem.question
        assert problem.gold == getattr(world.people[0], attribute)


def test_world_and_splits_do_not_depend_on_the_process() -> None:
    program = (
        "import json; from proxytune.demo.tasks import problems; from proxytune.demo.world import build_world;"
        "w = build_world();"
        "people = [[p.name, p.city, p.group] for p in w.people];"
        "print(json.dumps(people + [p.key for p in problems('chain', 'test', 50, w)]))"
    )
    first, second = (
        subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, check=True, env={"PYTHONHASHSEED": seed}
        ).stdout
        for seed in ("1", "2")
    )
    assert first == second
    assert len(json.loads(first)) == 350
