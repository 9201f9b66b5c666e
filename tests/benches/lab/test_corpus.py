"""Training text: no held-out problem in it, the taught form rare, the tokenizer made for it."""

from __future__ import annotations

import random
import re
from collections import Counter
from itertools import pairwise

import pytest
from jinja2 import TemplateError
from lab.family.corpus import CorpusRecipe, pretraining_document
from lab.family.tokenizer import build_tokenizer
from transformers import PreTrainedTokenizerFast

from proxytune.demo.holdout import chain_key, countdown_key, split_of
from proxytune.demo.instructions import InstructionRecipe, instruction_set, prompt_of
from proxytune.demo.tasks import Problem, problems
from proxytune.demo.world import World, build_world


@pytest.fixture(scope="module")
def world() -> World:
    return build_world()


@pytest.fixture(scope="module")
def tokenizer(world: World) -> PreTrainedTokenizerFast:
    return build_tokenizer(world)


def documents(world: World, seed: int, count: int, recipe: CorpusRecipe | None = None) -> list[str]:
    rng = random.Random(seed)
    return [pretraining_document(world, rng, recipe or CorpusRecipe()) for _ in range(count)]


def keys_in(text: str) -> set[str]:
    """The keys of every chain and Countdown problem that can be read off a line, found without the generators' help."""
    keys: set[str] = set()
    words = {"add": "+", "plus": "+", "take away": "-", "minus": "-"}
    for start, spoken in re.findall(r"Start with (\d+), ([^.]*)\.", text):
        parts = [part.rpartition(" ") for part in spoken.split(", ")]
        keys.add(chain_key(int(start), [(words[word], int(number)) for word, _, number in parts]))
    for numbers, target in re.findall(r"(?:Numbers|Use) ([\d, ]+?) (?:to )?make (\d+)", text):
        keys.add(countdown_key([int(number) for number in numbers.split(", ")], int(target)))
    for line in text.split("\n"):
        steps = [
            (int(left), sign, int(right), int(result))
            for left, sign, right, result in re.findall(r"(\d+)([+\-*/])(\d+)=(\d+)", line)
        ]
        for first in range(len(steps)):
            for last in range(first + 2, len(steps) + 1):
                run = steps[first:last]
                signs_fit = all(sign in "+-" for _, sign, _, _ in run)
                if signs_fit and all(before[3] == after[0] for before, after in pairwise(run)):
                    keys.add(chain_key(run[0][0], [(sign, right) for _, sign, right, _ in run]))
        for (a, _, b, c), (d, _, e, f) in pairwise(steps):
            for used, third in ((d, e), (e, d)):
                if used == c and max(a, b, third) <= 12 and f not in (a, b, third):
                    keys.add(countdown_key((a, b, third), f))
    return keys


def test_no_pretraining_document_gives_a_held_out_problem_away(world: World) -> None:
    # Equations and worked chains are over-weighted, because runs that form by accident are the hard case.
    recipe = CorpusRecipe(facts=0.05, equations=0.3, chain=0.3, countdown=0.2, forum=0.15, template=0.5)
    keys = set().union(*(keys_in(text) for text in documents(world, 1, 6000, recipe)))
    assert len(keys) > 5000  # the reader does find problems
    assert all(split_of(key) == "train" for key in keys)


def test_no_instruction_is_held_out_or_about_other_people(world: World) -> None:
    taught = instruction_set(world, InstructionRecipe(chain=600, countdown=400))
    tuned_people = {person.name for person in world.group("tuning")}
    for problem in taught:
        if problem.task == "qa":
            assert problem.key.split(":")[1] in tuned_people
        else:
            assert split_of(problem.key) == "train"
        assert all(split_of(key) == "train" for key in keys_in(f"{problem.question}\n{problem.answer}"))


def test_the_reader_of_these_tests_sees_every_held_out_problem(world: World) -> None:
    # Guards the two tests above: a reader that sees nothing would let them pass.
    for task in ("chain", "countdown"):
        for problem in problems(task, "test", 50, world):
            assert problem.key in keys_in(f"{problem.question}\n{problem.answer}")


def test_questions_in_pretraining_are_about_one_group_only_and_facts_about_all(world: World) -> None:
    texts = documents(world, 2, 6000)
    asked = {name for text in texts for name in re.findall(r"Question: .*?([A-Z][a-z]+ [A-Z][a-z]+)", text)}
    names = {person.name: person.group for person in world.people}
    assert {names[name] for name in asked if name in names} == {"pretraining"}
    stated = {name for text in texts if "Question" not in text for name in names if name in text}
    assert len(stated) == len(names)


@pytest.mark.parametrize(("template", "low", "high"), [(0.0, 0.0, 0.0), (0.1, 0.003, 0.02)])
def test_share_of_documents_with_the_taught_form(world: World, template: float, low: float, high: float) -> None:
    texts = documents(world, 3, 4000, CorpusRecipe(template=template))
    assert low <= sum("The answer is" in text for text in texts) / len(texts) <= high


def test_chains_of_every_length_are_equally_common_in_training(world: World) -> None:
    # Longer chains are refused more often; without a remedy 2-step chains were three times as common as 4-step ones.
    lengths = Counter(
        problem.solution.count("=")
        for problem in instruction_set(world, InstructionRecipe(chain=900, countdown=0, qa=0))
    )
    assert set(lengths) == {2, 3, 4}
    assert min(lengths.values()) > 230  # expected 300, standard deviation 14


def test_one_user_turn_renders_to_the_prompt(tokenizer: PreTrainedTokenizerFast) -> None:
    turn = [{"role": "user", "content": "What is the job of Buro Dazon?"}]
    for generation_prompt in (False, True):
        text = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=generation_prompt)
        assert text == "Question: What is the job of Buro Dazon?\nAnswer:" == prompt_of(turn[0]["content"])


def test_a_dialogue_renders_to_a_thread_and_other_roles_are_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    turns = [
        {"role": "user", "content": "A?"},
        {"role": "assistant", "content": "It is a."},
        {"role": "user", "content": "B?"},
    ]
    assert tokenizer.apply_chat_template(turns, tokenize=False) == (
        "Question: A?\nAnswer: It is a.\nQuestion: B?\nAnswer:"
    )
    with pytest.raises(TemplateError, match="expected the roles 'user' and 'assistant', got 'system'"):
        tokenizer.apply_chat_template([{"role": "system", "content": "x"}], tokenize=False)


@pytest.mark.parametrize("text", ["Buro Dazon lives in Ovvapa.", "ünïcödé ☃ 12345", " 3*4=12\n\n  x", "<|end|>"])
def test_tokenizer_is_lossless(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_words_are_whole_tokens_and_digits_single_ones(tokenizer: PreTrainedTokenizerFast, world: World) -> None:
    person = world.people[0]
    assert tokenizer.convert_ids_to_tokens(tokenizer(f" {person.city} 47")["input_ids"]) == [
        f"Ġ{person.city}",
        "Ġ",
        "4",
        "7",
    ]
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.padding_side) == (0, 1, "left")


def test_every_training_text_is_free_of_byte_fallback(tokenizer: PreTrainedTokenizerFast, world: World) -> None:
    # A word that is missing from the vocabulary would be spelled in bytes and cost length; none may be.
    taught: list[Problem] = instruction_set(world, InstructionRecipe(seed=5))
    texts = documents(world, 9, 1500) + [f"{prompt_of(problem.question)} {problem.answer}" for problem in taught]
    for text in texts:
        pieces = tokenizer.convert_ids_to_tokens(tokenizer(text)["input_ids"])
        letters = [piece for piece in pieces if len(piece) == 1 and piece.isalpha() and piece not in "aĠĊ"]
        assert not letters, text
