"""Constraints in every loop, against a function of the ids; engines' own processors are right or refused."""

from __future__ import annotations

import importlib
import re
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from support.constraints import (
    EOS,
    LOOPS,
    PAD,
    A,
    B,
    C,
    CopiedPairs,
    OfIds,
    Pairs,
    Resettable,
    RowMatchers,
    settings_of,
    violations,
)
from support.recursion import model_of
from support.speculation import composed, members, prompts
from support.tiny import tokenizer
from transformers import LogitsProcessor

import proxytune
from proxytune.errors import InputError, NumericalError, UnsupportedModeError
from proxytune.generation import ConstraintLogitsProcessor, constraints

DOORS = ("composed", "attached", "plain")
ONE_TEXT = ("`assistant_model`", "`prompt_lookup_num_tokens`")
MAKE: dict[str, Any] = {
    "a matcher": Pairs,
    "a matcher that copies itself": CopiedPairs,
    "a processor": RowMatchers,
    "a processor with reset()": Resettable(),
}


CASES = [
    (loop, door)
    for loop in LOOPS
    for door in (DOORS if loop != "`RecursionDecoding`" else ("recurrent",))
    if door != "attached" or "Latent" not in loop  # refused
]


def run(loop: str, door: str, processor: Any, length: int = 10, **more: Any) -> tuple[torch.Tensor, int]:
    """The sequences after prompts of a length, and the length."""
    given = settings_of(loop, plain=door != "composed") | more
    ids, mask = prompts(1 if loop in ONE_TEXT else 3, length)
    ids, mask = ids.clamp(max=95), mask if length > 9 else torch.ones_like(mask)  # what a recurrent model embeds
    base, expert, antiexpert = members("llama")
    model = {"composed": composed("llama"), "recurrent": model_of()}.get(door, base)
    steering = proxytune.ProxyTuningLogitsProcessor(expert, antiexpert, check_vocabulary=False)
    torch.manual_seed(4)
    with steering.attach(base) if door == "attached" else nullcontext():
        out = model.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=8,
            eos_token_id=EOS,
            pad_token_id=PAD,
            logits_processor=[processor],
            **given,
        )
    return out, length


@pytest.mark.parametrize(("loop", "door"), CASES)
def test_a_constraint_holds_in_every_loop_as_a_function_of_the_ids_does(loop: str, door: str) -> None:
    # Of the two engines one cannot copy itself: its matchers are moved on, and made anew.
    processor = ConstraintLogitsProcessor([Pairs, CopiedPairs][DOORS.index(door) % 2 if door in DOORS else 0])
    for length in (10, 6):  # a second call with the same processor
        got, start = run(loop, door, processor, length)
        want, _ = run(loop, door, OfIds(start), length)
        assert torch.equal(got, want)
        assert violations(got, start) == []
        assert (got[:, start:] == C).any(), "some texts are whole"


@pytest.mark.parametrize("what", MAKE)
@pytest.mark.parametrize("loop", ["greedy", "`SiblingDecoding`", "`SpeculativeDecoding`"])
def test_engines_of_every_kind(what: str, loop: str) -> None:
    processor = ConstraintLogitsProcessor(MAKE[what])
    for length in (10, 6):
        got, start = run(loop, "composed", processor, length)
        assert torch.equal(got, run(loop, "composed", OfIds(start), length)[0])


def test_texts_end_at_different_lengths() -> None:
    out, start = run("`SiblingDecoding`", "composed", ConstraintLogitsProcessor(Pairs))
    assert len({row.index(C) for row in out[:, start:].tolist() if C in row}) > 1


# --- the page's table ------------------------------------------------------------------------------------------------

PAGE = Path(proxytune.__file__).parent / "generation" / "README.md"


def table() -> dict[str, list[str]]:
    """Loop → the page's words for an engine's own processor: for its first call, and for a second."""
    section = PAGE.read_text(encoding="utf-8").split("## Constraints")[1].split("\n## ")[0]
    rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in re.findall(r"^\|.*\|$", section, re.M)]
    found = {}
    for names, function, wrapped, own in rows[2:]:
        assert (function, wrapped) == ("yes", "yes"), "shown by the test above"
        found |= {name: own.split(" · ") for name in names.split(" · ")}
    return found


def test_the_page_has_every_loop() -> None:
    assert sorted(table()) == sorted(LOOPS)


@pytest.mark.parametrize("loop", LOOPS)
def test_an_engines_own_processor_is_right_or_refused_as_the_page_says(loop: str) -> None:
    door = "recurrent" if loop == "`RecursionDecoding`" else "composed"
    for processor, words in ((RowMatchers(), table()[loop]), (Resettable(), table()[loop][:1] * 2)):
        for word, length in zip(words, (10, 6), strict=True):
            if word == "yes":
                got, start = run(loop, door, processor, length)
                assert violations(got, start) == []
            else:
                name = type(processor).__name__
                with pytest.raises(UnsupportedModeError, match=f"{name}: expected a function .* Wrap it in proxytune"):
                    run(loop, door, processor, length)


@pytest.mark.parametrize("loop", ["greedy", "beams", "`prompt_lookup_num_tokens`", "`SpeculativeDecoding`"])
def test_attached_models_refuse_the_same(loop: str) -> None:
    processor = RowMatchers()
    if loop == "greedy":
        assert violations(*run(loop, "attached", processor)) == []
    with pytest.raises(UnsupportedModeError, match="RowMatchers: expected a function of the ids"):
        run(loop, "attached", processor, 6)


class Adds(LogitsProcessor):
    """A function of the ids, unless told otherwise, that counts its calls."""

    def __init__(self, of_row: bool = False, longest: int = 99) -> None:
        self.calls, self.of_row, self.longest = 0, of_row, longest

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        if input_ids.shape[1] > self.longest:
            raise KeyError("its own")
        rows = torch.arange(len(scores)) if self.of_row else input_ids[:, -1]
        return scores + (torch.arange(scores.shape[1]) % 7 == rows[:, None] % 7)


class Vouched(Adds):
    function_of_ids = True


@pytest.mark.parametrize("loop", ["beams", "`ForkDecoding`", "`SpeculativeDecoding`, prompt lookup"])
def test_a_function_of_the_ids_is_asked_again_and_may_keep_what_it_likes(loop: str) -> None:
    asked, vouched = Adds(), Vouched()
    one, two = run(loop, "composed", asked)[0], run(loop, "composed", vouched)[0]
    assert torch.equal(one, two)
    assert 0 < asked.calls - vouched.calls <= 9
    assert torch.equal(run(loop, "composed", asked)[0], one), "a second call"
    with pytest.raises(KeyError, match="its own"):
        run(loop, "composed", Adds(longest=12))


def test_a_rows_place_must_not_matter_in_a_tree() -> None:
    with pytest.raises(UnsupportedModeError, match="Adds: expected a function of the ids: ForkDecoding moves rows"):
        run("`ForkDecoding`", "composed", Adds(of_row=True))
    run("`FusedDecoding`", "composed", Adds(of_row=True))


# --- engines, where they are installed -------------------------------------------------------------------------------


def test_llguidance_and_xgrammar() -> None:
    llguidance, hf = pytest.importorskip("llguidance"), pytest.importorskip("llguidance.hf")
    letters = tokenizer()
    spelled = letters("ab", add_special_tokens=False).input_ids
    grammar = llguidance.LLMatcher.grammar_from_regex("(ab|ba){1,3}c")
    table = hf.from_tokenizer(letters)
    made = [ConstraintLogitsProcessor(lambda: llguidance.LLMatcher(table, grammar))]
    with suppress(ImportError):
        xgrammar = importlib.import_module("xgrammar")
        info = xgrammar.TokenizerInfo.from_huggingface(letters, vocab_size=259)
        compiled = xgrammar.GrammarCompiler(info).compile_regex("(ab|ba){1,3}c")
        made.append(ConstraintLogitsProcessor(lambda: xgrammar.GrammarMatcher(compiled)))
    a, b = spelled
    for one in (each.for_prompts(2, ends=[EOS]) for each in made):
        for text in ([], [a], [a, b], [b, a, a, b], [a, b, b + 1], [a]):
            got = one(torch.tensor([[5, 6, *text]]), torch.zeros(1, 259)).isfinite().nonzero()[:, 1].tolist()
            by_hand = Pairs([{a: A, b: B, b + 1: C}[token] for token in text]).allowed()
            assert got == sorted({A: a, B: b, C: b + 1, EOS: EOS}[token] for token in by_hand)


# --- one processor ---------------------------------------------------------------------------------------------------


def allowed(processor: Any, *rows: list[int]) -> list[list[int]]:
    out = processor(torch.tensor(rows), torch.zeros(len(rows), 30))
    return [row.isfinite().nonzero().flatten().tolist() for row in out]


PROMPT = [5, 6]


@pytest.mark.parametrize("make", [Pairs, CopiedPairs, RowMatchers, Resettable()])
def test_a_prefix_is_found_again_in_any_order(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constraints, "_KEPT", 2)  # the others are made anew
    processor = ConstraintLogitsProcessor(make).for_prompts(2)
    texts = [[], [A], [B], [A, B], [B, A], [A, B, B], [A, B, C], [A, B, B, A, A, B], [A, B, C, EOS]]
    for text in [*texts, *reversed(texts), *texts[::2], *texts[1::2]]:
        assert allowed(processor, [*PROMPT, *text]) == [sorted(Pairs(text).allowed())]


def test_a_token_that_is_not_allowed_frees_its_row_alone() -> None:
    processor = ConstraintLogitsProcessor(Pairs).for_prompts(2)
    free = list(range(30))
    assert allowed(processor, [*PROMPT, A, A], [*PROMPT, A, B]) == [free, [A, B, C]]
    assert allowed(processor, [*PROMPT, A, A, B], [*PROMPT, A, B, C]) == [free, [EOS]]


def test_on_a_plain_model_a_call_begins_where_no_text_goes_on() -> None:
    processor = ConstraintLogitsProcessor(Pairs)
    begun = [[A, B]]
    assert allowed(processor, PROMPT) == begun
    assert allowed(processor, [*PROMPT, A]) == [[B]]
    assert allowed(processor, [*PROMPT, 9, 9]) == begun, "another prompt that starts as the last one"
    assert allowed(processor, PROMPT) == begun
    assert allowed(processor, [*PROMPT, A]) == [[B]]
    processor.reset()
    assert allowed(processor, [*PROMPT, A]) == begun, "as it was told"
    covering = ConstraintLogitsProcessor(Pairs, prompt_length=2)
    assert allowed(covering.for_prompts(3), [*PROMPT, A]) == [[B]], "the prompt's end is covered"
    with pytest.raises(InputError, match=r"prompt_length: expected at most the 1 ids of the prefix; got 2\. Pass"):
        allowed(covering, [5])


def test_each_prompt_may_have_its_own() -> None:
    class OnlyB(Pairs):
        def allowed(self) -> list[int]:
            return [EOS] if self.text else [B]

    got, start = run("`SiblingDecoding`", "composed", ConstraintLogitsProcessor([Pairs, OnlyB, Pairs]))
    assert [row[0] for row in got[4:8, start:].tolist()] == [B] * 4
    assert violations(torch.cat([got[:4], got[8:]]), start) == []
    two = ConstraintLogitsProcessor([Pairs, OnlyB])
    assert allowed(two, PROMPT, PROMPT, PROMPT, PROMPT) == [[A, B], [A, B], [B], [B]], "beams"
    with pytest.raises(InputError, match=r"make: expected one function, or one for each prompt of 3 rows .*got 2 fun"):
        allowed(two, PROMPT, PROMPT, PROMPT)


def test_nothing_left_is_an_error() -> None:
    for loop in ("greedy", "`FusedDecoding`"):
        with pytest.raises(NumericalError, match="a token that the constraint allows; got −inf for all 2 of them"):
            run(loop, "composed", ConstraintLogitsProcessor(Pairs), bad_words_ids=[[A], [B]])
    out, start = run("beams", "composed", ConstraintLogitsProcessor(Pairs), bad_words_ids=[[A, B]])
    assert violations(out, start) == [], "a beam is dropped"


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (None, r"make: expected a function without arguments .*got None\. Pass e\.g\."),
        ([], r"got \[\]"),
        (lambda: 3, r"make: expected a function that makes a matcher .*got one that makes 3\."),
        (
            lambda: lambda ids, scores: scores + 1,
            r"function: expected a processor that masks ids .*changed scores, e\.g",
        ),
    ],
)
def test_what_makes_no_matcher_is_refused(make: Any, match: str) -> None:
    with pytest.raises(InputError, match=match):
        allowed(ConstraintLogitsProcessor(make), PROMPT)


def test_a_processor_that_runs_a_model_may_be_called_under_autocast_and_later_without() -> None:
    class Guided(LogitsProcessor):
        calls = 0

        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            self.calls += 1  # state, but not of the ids
            return scores + members("llama")[1](input_ids).logits[:, -1].to(scores.dtype)

    processor = Guided()
    with torch.autocast("cpu", torch.bfloat16):
        run("greedy", "composed", processor)
    run("greedy", "composed", processor)
    assert processor.calls == 17, "the first call was repeated"
