"""Both forms on tiny models, against plain calls of generate() and against recounted tokens."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.tiny import EOS, PAD, VOCABULARY, shared, tokenizer
from transformers import GenerationConfig

import proxytune
from proxytune.budget.ledger import TokenLedger
from proxytune.errors import BudgetError, InputError
from proxytune.methods.thinking.processor import ThinkingBudgetLogitsProcessor
from proxytune.search.allocate import allocate
from proxytune.search.answer_history import AnswerHistory
from proxytune.search.policies import Parallel, Sequential
from proxytune.search.policy import run_policies
from proxytune.search.restart import restart_points
from proxytune.voting.vote import vote

TOKENIZER = tokenizer()
PROMPT = "Start with 24."
IDS = TOKENIZER(PROMPT)["input_ids"]
END, WAIT = 11, 12
# So that a random model does end its thinking and its texts, at different places.
BIAS = {(END,): 3.0, (EOS,): 6.0}
ENDS, NEVER = {(END,): 5.0, (EOS,): -9.0}, {(END,): -9.0, (EOS,): -9.0}
NEW = 24


def plain() -> Any:
    return shared("llama", 1, VOCABULARY)


def composed() -> Any:
    expert, antiexpert = (shared("gpt2", seed, VOCABULARY) for seed in (2, 3))
    return proxytune.wrap(plain(), expert=expert, antiexpert=antiexpert, check_vocabulary=False)


@pytest.fixture(params=["plain", "composed"])
def model(request: Any) -> Any:
    return {"plain": plain, "composed": composed}[request.param]()


def last_digit(text: str) -> str | None:
    digits = [c for c in text if c.isdigit()]
    return digits[-1] if digits else None


def parallel(model: Any, samples: int = 4, **kwargs: Any) -> Parallel:
    kwargs = {"max_new_tokens": NEW, "seed": 3, "sequence_bias": BIAS, "extract": last_digit, **kwargs}
    return Parallel(model, TOKENIZER, samples=samples, **kwargs)


def sequential(model: Any, extra: int = 2, **kwargs: Any) -> Sequential:
    kwargs = {"max_new_tokens": NEW, "seed": 3, "sequence_bias": BIAS, "extract": last_digit, **kwargs}
    return Sequential(model, TOKENIZER, extra=extra, **{"end_ids": END, "continuation_ids": WAIT} | kwargs)


def tokens(policy: Any, budget: int = 10_000, task: Any = PROMPT) -> list[list[int]]:
    return [branch.along("tokens") for branch in policy.draw(task, TokenLedger(budget))]


# --- parallel ---------------------------------------------------------------------------------------------------------


def test_samples_are_those_of_separate_calls(model: Any) -> None:
    want = tokens(parallel(model, 5, temperature=0.9))
    assert len({tuple(row) for row in want}) == 5
    assert len({len(row) for row in want}) > 1, "some end before others"
    for n in (1, 2, 4):
        assert tokens(parallel(model, n, temperature=0.9)) == want[:n], "fewer samples are the first ones"
    assert tokens(parallel(model, 5, temperature=0.9, batch_size=2)) == want
    assert tokens(parallel(model, 5, temperature=0.9), task=IDS) == want
    assert tokens(parallel(model, 5, temperature=0.9, seed=4)) != want


def test_a_result_does_not_depend_on_what_was_asked_before() -> None:
    policy = parallel(plain(), 3)
    first, other, again = (tokens(policy, task=task) for task in (PROMPT, "Start with 25.", PROMPT))
    assert first == again != other


def test_two_prompts_do_not_share_their_noise() -> None:
    # So hot that the noise alone decides: with the same noise, any two prompts would have the same tokens.
    policy = parallel(plain(), 16, max_new_tokens=1, temperature=1e5, top_k=0)
    one, other, seeded = tokens(policy), tokens(policy, task="Start with 25."), tokens(policy, task=[*IDS, 5])
    assert sum(a == b for a, b in zip(one, other, strict=True)) < 4
    assert sum(a == b for a, b in zip(one, seeded, strict=True)) < 4
    shared_noise = tokens(parallel(composed(), 16, max_new_tokens=1, temperature=1e5, top_k=0))
    assert one == shared_noise, "the test can tell: another model with the same noise"


def test_samples_follow_the_model_s_law() -> None:
    """The first token of 2000 samples, by χ² against the model's own distribution."""
    rows = tokens(parallel(plain(), 2000, max_new_tokens=1, sequence_bias=BIAS, top_k=0, batch_size=500))
    with torch.no_grad():
        logits = plain()(torch.tensor([IDS])).logits[0, -1].double()
    logits[END] += 3.0
    logits[EOS] += 6.0
    p = logits.softmax(-1)
    found = torch.bincount(torch.tensor(rows)[:, 0], minlength=len(p)).double()
    common = p * 2000 >= 10
    rest = torch.stack([found[~common].sum(), p[~common].sum() * 2000])
    differences = torch.cat(
        [(found - 2000 * p)[common] ** 2 / (2000 * p[common]), (rest[0] - rest[1])[None] ** 2 / rest[1]]
    )
    degrees = int(common.sum())
    assert degrees > 10
    assert float(differences.sum()) < degrees + 4 * (2 * degrees) ** 0.5


def test_samples_carry_answers_and_confidences(model: Any) -> None:
    policy, ledger = parallel(model), TokenLedger(10_000)
    samples = policy(PROMPT, ledger)
    branches = parallel(model).draw(PROMPT, TokenLedger(10_000))
    assert [s.answer for s in samples] == [last_digit(TOKENIZER.decode(b.tokens)) for b in branches]
    for sample, branch in zip(samples, branches, strict=True):
        assert sample.confidences is not None
        assert sample.confidences.tolist() == branch.confidences
        assert len(sample.confidences) == len(branch.tokens)
    assert ledger.by == {"prompt": len(IDS), "parallel-4": sum(len(b.tokens) for b in branches)}


def test_texts_that_were_cut_are_told_of(model: Any) -> None:
    new = 6
    policy = parallel(model, 6, max_new_tokens=new)
    samples, branches = policy(PROMPT, TokenLedger(10_000)), policy.draw(PROMPT, TokenLedger(10_000))
    assert [s.cut for s in samples] == [len(b) == new and b.tokens[-1] != EOS for b in branches]
    assert {s.cut for s in samples} == {True, False}
    tally = vote(samples)
    assert tally.cut == sum(s.cut for s in samples)
    assert tally.note == f"{tally.cut} of 6 texts were cut off, and count with what they had said by then"
    (short,) = policy(PROMPT, TokenLedger(len(IDS) + 1))
    assert short.cut
    assert not sequential(model, 0, sequence_bias={(EOS,): 50.0})(PROMPT, TokenLedger(10_000))[0].cut


# --- sequential -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cap", [None, 5])
@pytest.mark.parametrize("extra", [0, 1, 3])
def test_the_text_is_that_of_generate_with_the_processor(model: Any, extra: int, cap: int | None) -> None:
    budget = ThinkingBudgetLogitsProcessor(
        END,
        extra=extra,
        max_thinking_tokens=cap,
        continuation_ids=WAIT,
        prompt_length=len(IDS),
        eos_token_id=model.generation_config.eos_token_id,
    )
    out = model.generate(
        torch.tensor([IDS]), max_new_tokens=NEW, do_sample=False, logits_processor=[budget], sequence_bias=BIAS
    )
    assert tokens(sequential(model, extra, max_thinking_tokens=cap)) == [out[0, len(IDS) :].tolist()]


def test_the_end_is_put_off_as_often_as_asked() -> None:
    texts = {extra: tokens(sequential(plain(), extra, max_new_tokens=60, sequence_bias=ENDS))[0] for extra in (0, 1, 3)}
    waits = {extra: row[: row.index(END)].count(WAIT) for extra, row in texts.items() if END in row}
    assert waits == {0: 0, 1: 1, 3: 3}
    assert texts[0].index(END) < texts[1].index(END) < texts[3].index(END)


def test_without_extensions_it_is_the_first_of_the_parallel_samples(model: Any) -> None:
    want = tokens(parallel(model, 1))
    assert tokens(sequential(model, 0, continuation_ids=None, do_sample=True)) == want
    drawn = {tuple(tokens(sequential(model, 2, do_sample=True, seed=seed))[0]) for seed in range(4)}
    assert len(drawn) > 1


def test_a_model_that_thinks_in_the_open_is_kept_from_ending_its_text() -> None:
    short = tokens(sequential(plain(), 0, end_ids=EOS))[0]
    long = tokens(sequential(plain(), 2, end_ids=EOS, max_new_tokens=80))[0]
    assert short[-1] == EOS
    assert long[: len(short)] == [*short[:-1], WAIT], "it goes on where it would have ended"
    assert EOS not in long[:-1]


def test_the_end_of_the_text_is_the_model_s_where_a_configuration_does_not_say() -> None:
    want = tokens(sequential(plain(), 2))
    assert tokens(sequential(plain(), 0)) != want, "an EOS inside thinking was put off"
    for ends in (None, EOS, [EOS, 250]):
        config = GenerationConfig(eos_token_id=ends, pad_token_id=PAD)
        assert tokens(sequential(plain(), 2, generation_config=config)) == want


def test_thinking_that_the_prompt_has_opened() -> None:
    begin = 13
    opened = sequential(plain(), 0, begin_ids=begin, max_thinking_tokens=4, sequence_bias=NEVER)
    assert END not in tokens(opened, task=IDS)[0], "not thinking"
    assert tokens(opened, task=[*IDS, begin])[0][4] == END
    assert tokens(opened, task=[*IDS, begin, 20, 21])[0][2] == END


# --- the ledger -------------------------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 160), st.integers(1, 6), st.booleans(), st.sampled_from([1, 3, 32]))
def test_the_ledger_is_exact_and_never_exceeded(budget: int, level: int, side_by_side: bool, batch: int) -> None:
    policy = parallel(plain(), level, batch_size=batch) if side_by_side else sequential(plain(), level)
    ledger = TokenLedger(budget)
    try:
        branches = policy.draw(PROMPT, ledger)
    except BudgetError:
        assert budget <= len(IDS)
        assert ledger.spent == 0
        return
    assert ledger.held == 0
    assert ledger.spent == len(IDS) + sum(len(branch.tokens) for branch in branches) <= budget
    generous = tokens(policy)
    for branch, full in zip(branches, generous, strict=False):
        # Only the first may have been cut.
        assert branch.tokens == full[: len(branch.tokens)]
        assert branch.tokens == full or len(branches) == 1
    if len(branches) < len(generous):
        assert ledger.left < NEW, "there was no room for another"


def test_a_prompt_is_paid_for_once() -> None:
    ledger = TokenLedger(10_000)
    counts = []
    for policy in (parallel(plain(), 2), sequential(plain()), parallel(plain(), 3)):
        before = ledger.spent
        generated = sum(len(branch.tokens) for branch in policy.draw(PROMPT, ledger))
        counts.append(ledger.spent - before - generated)
    assert counts == [len(IDS), 0, 0]
    # A text is known to the ledger: going on from it costs what is added.
    text = [*IDS, *tokens(sequential(plain()))[0]]
    assert ledger.cost_of_prefix([*text, 5]) == 1


def test_a_prompt_that_leaves_no_room() -> None:
    n = len(IDS)
    for policy in (parallel(plain()), sequential(plain())):
        ledger = TokenLedger(n)
        with pytest.raises(
            BudgetError, match=f"a prompt of {n} tokens, 0 of .* at least {n + 1} left.*got {n} of max_to"
        ):
            policy(PROMPT, ledger)
        assert ledger.spent == 0
        assert len(tokens(policy, n + 1)[0]) == 1


# --- wrong use --------------------------------------------------------------------------------------------------------


def test_a_number_of_tokens_is_no_ledger() -> None:
    with pytest.raises(InputError, match=r"ledger: expected a TokenLedger; got 1000\. Pass e\.g\. TokenLedger\(4096\)"):
        parallel(plain())(PROMPT, 1000)  # type: ignore[arg-type]


def test_an_extractor_that_raises_is_named_with_its_text() -> None:
    def broken(text: str) -> str:
        raise IndexError("no group")

    with pytest.raises(
        InputError, match="extract: expected an answer, or None.*got IndexError: no group for the text '"
    ):
        parallel(plain(), extract=broken)(PROMPT, TokenLedger(1000))
    with pytest.raises(InputError, match="answer: expected a hashable value"):
        sequential(plain(), extract=lambda text: [text])(PROMPT, TokenLedger(1000))


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: parallel(plain(), 0), "samples: expected a whole number of samples, at least 1; got 0"),
        (lambda: parallel(plain(), 2, do_sample=False), "do_sample: expected True, with samples=2; got False"),
        (lambda: parallel(plain(), max_new_tokens=0), "max_new_tokens: expected a whole number of tokens, at least 1"),
        (lambda: parallel(plain(), batch_size=0), "batch_size: expected a whole number of samples, at least 1; got 0"),
        (lambda: parallel(plain(), seed=1 << 63), "seed: expected a whole number of 64 bits"),
        (lambda: parallel(plain(), num_beams=2), "generation: expected settings of the draw.*got num_beams"),
        (lambda: sequential(plain(), -1), "extra: expected a whole number of extensions, at least 0; got -1"),
        (
            lambda: sequential(plain(), 1, continuation_ids=None),
            "continuation_ids: expected ids that replace a suppressed end",
        ),
        (
            lambda: sequential(plain(), 1, continuation_ids=EOS),
            "continuation_ids: expected none of the tokens that end",
        ),
        (lambda: sequential(plain(), max_thinking_tokens=-1), "max_thinking_tokens: expected a whole number"),
        (lambda: parallel(plain())([], TokenLedger(9)), "task: expected a prompt of at least one token"),
        (lambda: parallel(plain())(3.0, TokenLedger(9)), "task: expected a text or token ids .*; got 3.0"),
    ],
)
def test_wrong_settings(make: Any, said: str) -> None:
    with pytest.raises(InputError, match=said):
        make()


# --- together ---------------------------------------------------------------------------------------------------------


@pytest.mark.smoke
def test_an_allocation_from_end_to_end() -> None:
    policies = [parallel(plain(), n) for n in (1, 4)] + [sequential(plain(), n) for n in (0, 2)]
    tasks = [f"Start with {n}." for n in range(6)]
    run = run_policies(policies, tasks, lambda task, answer: int(answer) % 2 == 0, budget=200)
    assert run.names == ("parallel-1", "parallel-4", "sequential-0", "sequential-2")
    again = run_policies(policies, tasks[::-1], lambda task, answer: int(answer) % 2 == 0, budget=200)
    for a, b in zip(run.trials, again.trials, strict=True):
        assert a.tokens.tolist() == b.tokens[::-1].tolist()
        assert a.right.tolist() == b.right[::-1].tolist()
    ledger = TokenLedger(200)
    found = allocate(tasks[0], policies, run, ledger, least=5)
    chosen = run.trials[run.names.index(found.plan.chosen.name)]
    assert found.spent == ledger.spent == int(chosen.tokens[0]), "what was calibrated is what is done"
    assert found.plan.parallel is not None
    assert found.plan.sequential is not None
    assert PAD not in {token for branch in policies[1].draw(tasks[1], TokenLedger(200)) for token in branch.tokens}


# --- all of it together; the page beside the code shows it on the bundled models ------------------------------------


def test_allocation_with_few_problems() -> None:
    votes = Parallel(plain(), TOKENIZER, last_digit, samples=8, max_new_tokens=24, temperature=0.7)
    wait = Sequential(plain(), TOKENIZER, last_digit, extra=2, end_ids=END, continuation_ids=WAIT, max_new_tokens=48)
    run = run_policies([votes, wait], [PROMPT] * 2, ["4", "5"], budget=4096)
    found = allocate(PROMPT, [votes, wait], run, TokenLedger(4096))
    assert "calibration problems (all kinds) are too few to go by" in found.plan.why
    assert found.spent <= 4096


def test_exploration_restarts_at_forks() -> None:
    prompt_ids = torch.tensor([IDS])
    tree = proxytune.ForkDecoding(threshold=1.0, branches=6, seed=0)
    out = plain().generate(
        prompt_ids, do_sample=True, max_new_tokens=12, custom_generate=tree, return_dict_in_generate=True
    )
    answers = [last_digit(TOKENIZER.decode(branch.along("tokens"))) for branch in out.trees[0]]
    history = AnswerHistory()
    history.record(PROMPT, answers)
    points = restart_points(out.trees[0], answers, history, 4, prompt=PROMPT, round=0)
    starts = [[*IDS, *point.tokens] for point in points]
    assert len(points) == 4
    for point, start in zip(points, starts, strict=True):
        text = out.trees[0].branches[point.branch].along("tokens")
        assert start == [*IDS, *text[: point.position]]
        # Where it forked, its own token was one of several; the next round draws there again.
        again = plain().generate(
            torch.tensor([start]),
            do_sample=True,
            max_new_tokens=12 - point.position,
            custom_generate=proxytune.ForkDecoding(threshold=1.0, branches=2, seed=1),
            return_dict_in_generate=True,
        )
        assert all(branch.along("tokens") for branch in again.trees[0])
    with torch.no_grad():
        entropies = [
            float(torch.distributions.Categorical(logits=plain()(torch.tensor([s])).logits[0, -1]).entropy())
            for s in starts
        ]
    assert min(entropies) > 1.0, "starts are at forks"
