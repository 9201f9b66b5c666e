"""The puzzles: solvers and verifiers against code of our own, splits, training text, and the models trained on them."""

from __future__ import annotations

import json
from itertools import permutations, product
from pathlib import Path
from typing import Any

import lab.puzzles.models as puzzlers
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lab.__main__ import app
from lab.family.training import IGNORED, TrainingPlan
from lab.puzzles.models import PUZZLERS, PuzzlerRecipe, build_puzzler, load_puzzler, train_puzzlers
from lab.puzzles.puzzle import TWINS, Instance, keyed_generator
from lab.puzzles.puzzles import PUZZLES, PuzzleName, puzzle_batches, sample_puzzle, score_puzzle
from lab.puzzles.vocabulary import BOS, EOS, PAD, THINK_BEGIN, THINK_END, WORDS, build_puzzle_tokenizer
from transformers import HrmTextForCausalLM, LlamaForCausalLM, PreTrainedTokenizerFast
from typer.testing import CliRunner

from proxytune.demo.holdout import countdown_key, split_of
from proxytune.errors import LabError

NAMES: tuple[PuzzleName, ...] = ("colouring", "queens", "countdown")
SIGNS = {"+": lambda a, b: a + b, "-": lambda a, b: a - b, "*": lambda a, b: a * b}


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return build_puzzle_tokenizer()


def some(name: PuzzleName, count: int = 12, seed: int = 3) -> list[Instance]:
    """Training instances."""
    drawn = PUZZLES[name].draw(count, keyed_generator(f"test:{seed}"), "train")
    return [tuple(row) for row in drawn.tolist()]


def said(ids: Any) -> str:
    return " ".join(WORDS[token] for token in ids)


# --- solvers against brute force on the texts -------------------------------------------------------------------------


def colourings(prompt: str) -> set[str]:
    bits = prompt.split()[2:-1]
    edges = [(a, b) for a in range(5) for b in range(a + 1, 5)]
    assert len(bits) == len(edges) == 10
    edges = [edge for edge, bit in zip(edges, bits, strict=True) if bit == "#"]
    every = product(("red", "green", "blue"), repeat=5)
    return {" ".join(colours) for colours in every if all(colours[a] != colours[b] for a, b in edges)}


def queens(prompt: str) -> set[str]:
    squares = prompt.split()[2:-1]
    found = set()
    for columns in permutations(range(6)):
        diagonals = {column - row for row, column in enumerate(columns)}
        others = {column + row for row, column in enumerate(columns)}
        free = all(squares[6 * row + column] == "." for row, column in enumerate(columns))
        if len(diagonals) == len(others) == 6 and free:
            found.add(" ".join("abcdef"[column] for column in columns))
    return found


def expressions(prompt: str) -> set[str]:
    *numbers, target = map(int, prompt.split()[2:-1])
    found = set()
    for a, b, c in permutations(numbers):
        for first, second in product(SIGNS, repeat=2):
            middle = SIGNS[first](a, b)
            for left, right in ((middle, c), (c, middle)):
                result = SIGNS[second](left, right)
                inside = 0 <= middle <= 99 and result == target
                if inside and a >= b and left >= right:
                    found.add(f"{a} {first} {b} = {middle} ; {left} {second} {right} = {result}")
    return found


@pytest.mark.parametrize(("name", "brute"), [("colouring", colourings), ("queens", queens), ("countdown", expressions)])
def test_the_solver_finds_what_brute_force_finds(name: PuzzleName, brute: Any) -> None:
    puzzle = PUZZLES[name]
    for instance in some(name, 40):
        prompt = puzzle.prompts(torch.tensor([instance]))[0].tolist()
        assert len(prompt) == puzzle.prompt_length
        solutions = [said(solution) for solution in puzzle.solutions(instance)]
        assert len(solutions) == len(set(solutions)) > 0
        assert set(solutions) == brute(said(prompt))


def test_countdown_of_equal_numbers_lists_every_expression_once() -> None:
    # Two pairs of equal numbers are one expression; a sum of three in another order is another expression.
    found = [said(solution) for solution in PUZZLES["countdown"].solutions((2, 2, 2, 6))]
    assert sorted(found) == ["2 * 2 = 4 ; 4 + 2 = 6", "2 + 2 = 4 ; 4 + 2 = 6"]
    assert len(PUZZLES["countdown"].solutions((1, 2, 3, 6))) == 6
    assert PUZZLES["countdown"].solutions((1, 1, 1, 99)) == ()


# --- verifiers --------------------------------------------------------------------------------------------------------


def complete(name: PuzzleName, solution: tuple[int, ...]) -> list[int]:
    """A whole answer with this solution; the scratchpad is not looked at."""
    return [*((THINK_BEGIN, THINK_END) if name == "countdown" else ()), *solution, EOS]


@pytest.mark.parametrize("name", NAMES)
def test_the_verifier_accepts_every_solution(name: PuzzleName) -> None:
    puzzle = PUZZLES[name]
    for instance in some(name):
        for solution in puzzle.solutions(instance):
            answer = complete(name, solution)
            assert puzzle.read(instance, answer) == solution
            assert puzzle.read(instance, [*answer, PAD, PAD]) == solution
            assert puzzle.read(instance, answer[:-1]) is None, "not finished"
            assert puzzle.read(instance, [*answer, EOS]) is None
            assert puzzle.read(instance, [*answer[:-2], EOS]) is None
            assert puzzle.read(instance, [*answer[:-1], answer[-2], EOS]) is None


@given(name=st.sampled_from(NAMES), pick=st.integers(0, 10**6), place=st.integers(0, 10), token=st.integers(0, 125))
@settings(max_examples=300, deadline=None)
def test_a_changed_token_is_wrong_unless_it_makes_another_solution(
    name: PuzzleName, pick: int, place: int, token: int
) -> None:
    puzzle = PUZZLES[name]
    instances = some(name)
    instance = instances[pick % len(instances)]
    solutions = puzzle.solutions(instance)
    changed = list(solutions[pick % len(solutions)])
    changed[place % len(changed)] = token
    verdict = puzzle.read(instance, complete(name, tuple(changed)))
    assert verdict == (tuple(changed) if tuple(changed) in solutions else None)


def test_operands_of_sums_and_products_may_stand_either_way() -> None:
    read, instance = PUZZLES["countdown"].read, (3, 4, 5, 7)

    def verdict(text: str) -> str | None:
        solution = read(instance, [*map(WORDS.index, text.split()), EOS])
        return None if solution is None else said(solution)

    canonical = "4 * 3 = 12 ; 12 - 5 = 7"
    assert verdict(f"<think> </think> {canonical}") == canonical
    assert verdict("<think> </think> 3 * 4 = 12 ; 12 - 5 = 7") == canonical
    assert verdict(f"<think> + red </think> {canonical}") == canonical  # the scratchpad is not verified
    for wrong in (
        "3 * 4 = 12 ; 5 - 12 = 7",
        "3 * 4 = 12 ; 12 - 5 = 8",
        "3 * 4 = 13 ; 12 - 5 = 7",
        "3 * 4 = 12 ; 4 + 3 = 7",  # does not use the first step
        "5 + 4 = 9 ; 9 - 2 = 7",  # a number that is not there
        "3 * 4 = 12 | 12 - 5 = 7",
        f"{canonical} </think>",
        "",
    ):
        assert verdict(f"<think> </think> {wrong}") is None
    assert verdict(canonical) is None
    assert verdict(f"<think> {canonical}") is None
    assert verdict(f"</think> {canonical}") is None


# --- splits -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_held_out_instances_are_disjoint_different_and_repeatable(name: PuzzleName) -> None:
    puzzle = PUZZLES[name]
    splits = {split: puzzle.held_out(split, 50) for split in ("validation", "test")}
    keys = {split: {puzzle.key(instance) for instance in found} for split, found in splits.items()}
    assert all(len(found) == 50 for found in keys.values())
    keys["train"] = {puzzle.key(instance) for instance in some(name, 500)}
    for split, found in keys.items():
        assert {split_of(key) for key in found} == {split}
    for found in splits.values():
        assert min(len(puzzle.solutions(instance)) for instance in found) >= 2
    assert puzzle.held_out("test", 50) == splits["test"]
    assert puzzle.held_out("test", 50, seed=1) != splits["test"]


def test_more_instances_than_there_are_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lab.puzzles.puzzle._ROUNDS", 2)
    with pytest.raises(LabError, match=r"'countdown': expected at most the \d+ .* got count=100000\. Ask for fewer"):
        PUZZLES["countdown"].held_out("test", 100_000)


# --- training text ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_training_text_is_right_and_only_the_varied_twin_varies(name: PuzzleName) -> None:
    puzzle = PUZZLES[name]
    instances = some(name, 6, seed=4)
    for instance in instances:
        rows = torch.tensor([instance]).expand(400, -1)
        texts = {twin: puzzle.answers(rows, twin, keyed_generator(twin)) for twin in TWINS}
        for answers in texts.values():
            assert answers.shape == (400, puzzle.answer_length)
            assert all(puzzle.read(instance, ids) is not None for ids in answers.tolist())
        solutions = puzzle.solutions(instance)
        assert len(set(map(tuple, texts["collapsed"].tolist()))) == 1
        assert puzzle.read(instance, texts["collapsed"][0].tolist()) == solutions[0]
        drawn = [puzzle.read(instance, ids) for ids in texts["varied"].tolist()]
        if len(solutions) <= 12:  # uniform: each solution within four standard deviations
            share = 1 / len(solutions)
            for solution in solutions:
                assert abs(drawn.count(solution) - 400 * share) <= 4 * (400 * share * (1 - share)) ** 0.5
        else:
            assert len(set(drawn)) > 12


def test_scratchpads_miss_up_to_two_times_and_give_no_held_out_solution_away() -> None:
    puzzle = PUZZLES["countdown"]
    instances = puzzle.draw(600, keyed_generator("scratchpads"), "train")
    lengths = {0: 0, 1: 0, 2: 0}
    answers = puzzle.answers(instances, "varied", keyed_generator("draws"))
    for instance, ids in zip(instances.tolist(), answers.tolist(), strict=True):
        thought, _, answer = said(token for token in ids if token != PAD).partition(" </think> ")
        *misses, hit = thought.removeprefix("<think> ").split(" | ")
        assert answer == f"{hit} <eos>"
        lengths[len(misses)] += 1
        for miss in misses:
            value = int(miss.split()[-1])
            assert value != instance[3]
            assert miss in expressions(" ".join(("<bos>", "<countdown>", *map(str, instance[:3]), str(value), "x")))
            assert split_of(countdown_key(instance[:3], value)) == "train"
    assert all(abs(count - 200) < 4 * (600 * 2 / 9) ** 0.5 for count in lengths.values())


@pytest.mark.parametrize("twin", TWINS)
def test_batches_score_the_answers_only_and_are_functions_of_the_step(twin: Any) -> None:
    rows: dict[PuzzleName, int] = {"colouring": 2, "queens": 3, "countdown": 4}
    batches = puzzle_batches(NAMES, rows, twin, seed=5)
    for step, (name, count) in enumerate(rows.items(), start=3):
        ids, labels = batches(step)
        batches(step + 1)
        assert all(torch.equal(a, b) for a, b in zip((ids, labels), batches(step), strict=True))
        assert not torch.equal(puzzle_batches(NAMES, rows, twin, seed=6)(step)[0][:, :6], ids[:, :6])
        other = puzzle_batches(NAMES, rows, TWINS[1 - TWINS.index(twin)], seed=5)(step)[0]
        puzzle = PUZZLES[name]
        # The twins see the same instances.
        assert torch.equal(ids[:, : puzzle.prompt_length], other[:, : puzzle.prompt_length])
        assert len(ids) == count
        for row in range(count):
            scored = labels[row] != IGNORED
            first = puzzle.prompt_length - 1
            assert int(scored.nonzero()[0]) == first
            answer = labels[row][scored].tolist()
            prompt = ids[row, : puzzle.prompt_length]
            assert prompt[0] == BOS
            # Bits have the ids of two neighbouring words, numbers those from the word 0 on.
            start = WORDS.index("0" if name == "countdown" else ".")
            assert puzzle.read(tuple((prompt[2:-1] - start).tolist()), answer) is not None
            assert ids[row, first + 1 : first + len(answer)].tolist() == answer[:-1]
            # An end of text that is a label only is not an input.
            assert set(ids[row, first + len(answer) :].tolist()) <= {EOS, PAD}


def test_text_and_ids_say_the_same(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    assert len(tokenizer) == len(set(WORDS)) == len(WORDS) < 160
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id) == (PAD, EOS, BOS)
    assert tokenizer(" ".join(WORDS))["input_ids"] == list(range(len(WORDS)))
    tokenizer.save_pretrained(tmp_path)
    for opened in (tokenizer, PreTrainedTokenizerFast.from_pretrained(tmp_path)):
        for name in NAMES:
            puzzle, instances = PUZZLES[name], torch.tensor(some(name))
            answers = puzzle.answers(instances, "varied", keyed_generator("text"))
            for ids in torch.cat([puzzle.prompts(instances), answers], 1).tolist():
                assert opened.decode(ids) == said(ids)
                assert opened(opened.decode(ids))["input_ids"] == ids
    thought = tokenizer.decode([THINK_BEGIN, THINK_END, EOS], skip_special_tokens=True)
    assert thought == "<think> </think>"


# --- models -----------------------------------------------------------------------------------------------------------


def miniature(steps: int = 2, every: int = 1) -> PuzzlerRecipe:
    plan = TrainingPlan(steps, 2e-2, warmup=1, checkpoint_every=every)
    return PuzzlerRecipe(
        width=16,
        heads=2,
        feed_forward=32,
        layers={"llama": 1, "hrm": 1},
        turns=NAMES,
        rows={"colouring": 4, "queens": 2, "countdown": 2},
        plans={"llama": plan, "hrm": plan},
    )


def test_all_parameters_of_the_hrm_get_gradients() -> None:
    model = build_puzzler("hrm", miniature(), seed=0)
    ids, labels = puzzle_batches(NAMES, miniature().rows, "varied", seed=0)(0)
    logits = model(input_ids=ids, use_cache=False).logits
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED).backward()
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert all(model.get_parameter(name).grad is not None for name in trained)
    assert model.config.L_bp_cycles == [2, 2]


def test_puzzlers_are_trained_resumed_and_opened(tmp_path: Path) -> None:
    recipe = miniature(30, every=10)
    reports = train_puzzlers(tmp_path / "whole", seed=1, models=PUZZLERS[:3], recipe=recipe)
    assert list(reports) == list(PUZZLERS[:3])
    for report in reports.values():
        assert report.loss < 4.3  # log 126 = 4.8 at the start
    written = json.loads((tmp_path / "whole/checkpoints/llama-varied.json").read_text())
    assert written["steps"] == 30
    assert written["loss"] == reports["llama-varied"].loss

    # A run that was cut off after 20 of the 30 steps ends with the same weights.
    checkpoints = tmp_path / "cut/checkpoints"

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        batches = puzzle_batches(*args, **kwargs)

        def batch(step: int) -> Any:
            if step == 25:
                raise KeyboardInterrupt
            return batches(step)

        return batch

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(puzzlers, "puzzle_batches", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train_puzzlers(tmp_path / "cut", seed=1, models=["hrm-varied"], recipe=recipe)
    assert torch.load(checkpoints / "hrm-varied.pt", weights_only=True)["step"] == 20
    train_puzzlers(tmp_path / "cut", seed=1, models=["hrm-varied"], recipe=recipe)
    whole, tokenizer = load_puzzler("hrm-varied", tmp_path / "whole")
    resumed, _ = load_puzzler("hrm-varied", tmp_path / "cut")
    assert isinstance(whole, HrmTextForCausalLM)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))
    assert not whole.training
    assert whole.dtype == torch.float32
    assert tokenizer.decode([THINK_BEGIN]) == "<think>"

    twin, _ = load_puzzler("llama-collapsed", tmp_path / "whole")
    assert isinstance(twin, LlamaForCausalLM)
    again = train_puzzlers(tmp_path / "whole", seed=1, models=["llama-varied"], recipe=recipe)
    assert again["llama-varied"] == reports["llama-varied"]  # nothing was trained again
    with pytest.raises(LabError, match=r"expected checkpoints of this seed.*another seed"):
        train_puzzlers(tmp_path / "whole", seed=2, recipe=recipe)
    with pytest.raises(LabError, match=r"expected checkpoints of this recipe"):
        train_puzzlers(tmp_path / "whole", seed=1, recipe=miniature(31))


def test_unknown_and_missing_models_say_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(LabError, match=r"expected one of llama-varied, .* got 'gpt'"):
        train_puzzlers(tmp_path, models=["gpt"])  # type: ignore[list-item]
    with pytest.raises(LabError, match=r"expected one of llama-varied, .* got 'gpt'"):
        load_puzzler("gpt", tmp_path)  # type: ignore[arg-type]
    with pytest.raises(LabError, match=r"python -m lab puzzles --out FOLDER"):
        load_puzzler("hrm-varied", tmp_path)


@pytest.mark.parametrize("kind", ["llama", "hrm"])
def test_a_model_is_sampled_and_scored(kind: Any) -> None:
    model = build_puzzler(kind, miniature(), seed=0).eval()
    puzzle = PUZZLES["queens"]
    instances = puzzle.held_out("validation", 3)
    verdicts = sample_puzzle(model, puzzle, instances, 2, seed=1)
    assert [len(row) for row in verdicts] == [2, 2, 2]
    state = torch.random.get_rng_state()
    assert sample_puzzle(model, puzzle, instances, 2, seed=1) == verdicts
    assert torch.equal(torch.random.get_rng_state(), state)  # the caller's numbers are left alone


def test_the_score_of_answers_that_are_known() -> None:
    puzzle = PUZZLES["queens"]
    instances = puzzle.held_out("validation", 3)
    first, second = puzzle.solutions(instances[0])[:2]
    (third, *_) = puzzle.solutions(instances[1])
    score = score_puzzle(puzzle, instances, [[first, first, second, None], [third, third, None, None], [None] * 4])
    assert (score.instances, score.samples, score.valid) == (3, 4, pytest.approx(5 / 12))
    assert score.solved == pytest.approx(2 / 3)
    assert score.distinct == pytest.approx(1.0)
    assert score.agreement == pytest.approx((1 / 3 + 1) / 2)
    assert score.solutions == pytest.approx(sum(len(puzzle.solutions(instance)) for instance in instances) / 3)


def test_the_command_trains_the_models_it_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(puzzlers, "PuzzlerRecipe", miniature)
    arguments = ["puzzles", "--out", str(tmp_path), "--seed", "2", "--model", "llama-varied"]
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert result.exit_code == 0
    assert "llama-varied: 2 steps" in result.stdout
    assert (tmp_path / "llama-varied/model.safetensors").exists()
    assert not (tmp_path / "hrm-varied").exists()
    with pytest.raises(LabError, match="expected one of llama-varied"):
        CliRunner().invoke(app, ["puzzles", "--out", str(tmp_path), "--model", "x"], catch_exceptions=False)
