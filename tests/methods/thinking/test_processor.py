"""Thinking budgets, against the loop of the paper: draw, look, put a continuation for the end, force it at the cap."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.reference import next_logits
from support.tiny import EOS, PAD, shared
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

import proxytune
from proxytune import ProxyTuningLogitsProcessor
from proxytune.errors import InputError
from proxytune.methods.thinking.processor import ThinkingBudgetLogitsProcessor

BEGIN, END, WAIT, AND, OPEN, SLASH = 10, 11, 12, 13, 14, 15
# So that a random model really wants to end, often but not always.
BIAS = 3.0
NEW = 40
GREEDY: dict[str, Any] = {"do_sample": False, "max_new_tokens": NEW, "sequence_bias": {(END,): BIAS}}


def model() -> PreTrainedModel:
    return shared("llama", 1)


def budget(length: int | None, end: Sequence[int] = (END,), **kwargs: Any) -> ThinkingBudgetLogitsProcessor:
    kwargs = {"continuation_ids": [WAIT], "eos_token_id": EOS, **kwargs}
    return ThinkingBudgetLogitsProcessor(end, prompt_length=length, **kwargs)


def prompts(seed: int = 0, rows: int = 1, length: int = 6) -> torch.Tensor:
    return torch.randint(20, 240, (rows, length), generator=torch.Generator().manual_seed(seed))


def paper_loop(
    members: list[PreTrainedModel],
    prompt: list[int],
    *,
    extra: int,
    cap: int | None,
    wait: Sequence[int] = (WAIT,),
    alpha: float = 0.0,
    bias: float = BIAS,
) -> list[int]:
    """Greedy, with a state: whether thinking goes on, and what is still to be said."""
    text: list[int] = []
    thinking, queue = True, []
    while len(text) < NEW and EOS not in text:
        if thinking and cap is not None and len(text) == cap:
            queue, thinking = [END], False
        if not queue:
            prefix = torch.tensor(prompt + text)
            row = next_logits(members, alpha, prefix) if alpha else members[0](prefix[None]).logits[0, -1].detach()
            row[END] += bias
            token = int(row.argmax())
            if thinking and token in (END, EOS):
                used = sum(text[i : i + len(wait)] == list(wait) for i in range(len(text)))
                if used < extra:
                    queue = list(wait)
                else:
                    thinking = False
            queue = queue or [token]
        text.append(queue.pop(0))
    return text


def thinking_of(row: Sequence[int]) -> list[int] | None:
    """A row's thinking, if it was ended by END."""
    row = list(row)
    return row[: row.index(END)] if END in row else None


# --- against the loop ------------------------------------------------------------------------------------------------


# Caps before, between and after the natural ends; a continuation of two tokens may be cut by the cap.
@pytest.mark.parametrize("wait", [(WAIT,), (WAIT, AND)])
@pytest.mark.parametrize("cap", [None, 0, 1, 3, 7, 17])
@pytest.mark.parametrize("extra", [0, 1, 3])
def test_greedy_is_the_paper_s_loop(extra: int, cap: int | None, wait: tuple[int, ...]) -> None:
    for seed in range(3):
        ids = prompts(seed)
        one = budget(6, extra=extra, max_thinking_tokens=cap, continuation_ids=wait)
        got = model().generate(ids, logits_processor=[one], **GREEDY)[0, 6:].tolist()
        want = paper_loop([model()], ids[0].tolist(), extra=extra, cap=cap, wait=wait)
        assert got == want


def test_the_loop_does_suppress_and_does_reach_its_cap() -> None:
    """What the test above compares is not the trivial case."""
    plain = [paper_loop([model()], prompts(seed)[0].tolist(), extra=0, cap=None) for seed in range(3)]
    more = [paper_loop([model()], prompts(seed)[0].tolist(), extra=3, cap=None) for seed in range(3)]
    ended = [(thinking_of(row), thinking_of(other)) for row, other in zip(plain, more, strict=True)]
    assert all(short is not None and long is not None and len(short) < len(long) for short, long in ended)
    assert all((long or []).count(WAIT) >= 3 for _, long in ended)


def test_a_batch_with_left_padding_and_a_budget_for_each_prompt() -> None:
    rows = [prompts(seed, length=length)[0].tolist() for seed, length in ((0, 9), (1, 4), (2, 7))]
    ids = torch.tensor([[PAD] * (9 - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (9 - len(row)) + [1] * len(row) for row in rows])
    extra, caps = [2, 0, 1], [None, 6, 12]
    one = budget(9, extra=extra, max_thinking_tokens=caps)
    got = model().generate(ids, attention_mask=mask, logits_processor=[one], **GREEDY)[:, 9:].tolist()
    for i, row in enumerate(rows):
        want = paper_loop([model()], row, extra=extra[i], cap=caps[i])
        assert got[i][: len(want)] == want
        assert set(got[i][len(want) :]) <= {PAD}


@pytest.mark.parametrize("attached", [True, False])
def test_composed_with_proxy_tuning(attached: bool) -> None:
    members, alpha = [shared("llama", 1), shared("gpt2", 2), shared("gpt2", 3)], 0.7
    ids = prompts(4)
    one = budget(6, extra=2, max_thinking_tokens=20)
    without_eos = budget(6, extra=2, max_thinking_tokens=20, eos_token_id=None)
    # A bias in the model's own place would come before the shift in one door and after it in the other.
    run = {**GREEDY, "sequence_bias": None}
    want = paper_loop(members, ids[0].tolist(), extra=2, cap=20, alpha=alpha, bias=0.0)
    if attached:
        steer = ProxyTuningLogitsProcessor(*members[1:], alpha, check_vocabulary=False)
        with steer.attach(members[0]):
            got = members[0].generate(ids, logits_processor=[one], **run)
    else:
        steered = proxytune.wrap(
            members[0], expert=members[1], antiexpert=members[2], alpha=alpha, check_vocabulary=False
        )
        got = steered.generate(ids, logits_processor=[one], **run)
        many = {**GREEDY, "num_beams": 3, "num_return_sequences": 3, "eos_token_id": None}
        beams = steered.generate(ids, logits_processor=[without_eos], **many)
        assert_within(beams[:, 6:], extra=2, cap=20)
    assert got[0, 6:].tolist() == want
    assert thinking_of(want) is not None


def test_assisted_decoding_takes_positions_back() -> None:
    ids = prompts(1)
    run = {**GREEDY, "logits_processor": [budget(6, extra=3, max_thinking_tokens=30)]}
    want = model().generate(ids, **run)
    for draft in (model(), shared("llama", 5)):  # one that is always right, and one that hardly ever is
        assert torch.equal(model().generate(ids, assistant_model=draft, **run), want)


# --- sampling and beams ----------------------------------------------------------------------------------------------


# Without an EOS, so that every row has an end of thinking to look at.
def assert_within(rows: torch.Tensor, *, extra: int, cap: int) -> None:
    for row in rows.tolist():
        thinking = thinking_of(row)
        assert thinking is not None
        assert len(thinking) <= cap
        assert len(thinking) == cap or thinking.count(WAIT) >= extra


@pytest.mark.parametrize("warpers", [{}, {"temperature": 0.5}, {"top_k": 5}, {"top_p": 0.8}])
def test_sampling_keeps_both_budgets(warpers: dict[str, Any]) -> None:
    run = {**GREEDY, "do_sample": True, "num_return_sequences": 24, "eos_token_id": None, "top_k": 0, **warpers}
    one = budget(6, extra=2, max_thinking_tokens=25, eos_token_id=None)
    got = model().generate(prompts(0), logits_processor=[one], **run)[:, 6:]
    assert_within(got, extra=2, cap=25)
    lengths = {len(thinking_of(row) or []) for row in got.tolist()}
    assert len(lengths) > 1, "some end by themselves"


def test_the_law_of_a_step_is_the_old_one_with_the_end_read_as_the_continuation() -> None:
    scores = torch.randn(1, 64) * 2
    p = scores.softmax(-1)[0]
    got = budget(0, extra=1)(torch.tensor([[30]]), scores).softmax(-1)[0]
    ends, lost = (END, EOS), float(p[[END, EOS, WAIT]].sum() - p[[END, EOS, WAIT]].max())
    others = [i for i in range(64) if i not in (*ends, WAIT)]
    torch.testing.assert_close(got[others], p[others] / (1 - lost))
    torch.testing.assert_close(got[WAIT], p[[END, EOS, WAIT]].max() / (1 - lost))
    assert float(got[list(ends)].sum()) == 0


@pytest.mark.parametrize("caps", [(3, 30), (8, 4), (30, 30)])
def test_beams_keep_both_budgets_and_are_scored_by_what_the_processor_says(caps: tuple[int, int]) -> None:
    ids, extra = prompts(2, rows=2), 2
    one = budget(6, extra=extra, max_thinking_tokens=caps, eos_token_id=None)
    run = {**GREEDY, "num_beams": 4, "num_return_sequences": 4, "eos_token_id": None, "length_penalty": 0.0}
    got = model().generate(ids, logits_processor=[one], output_scores=True, return_dict_in_generate=True, **run)
    for rows, cap in zip(got.sequences[:, 6:].split(4), caps, strict=True):
        assert_within(rows, extra=extra, cap=cap)
        lengths = [len(thinking_of(row) or []) for row in rows.tolist()]
        assert (max(lengths) == cap) == (cap < 10), "short caps are reached, long ones are not"
    # Each sequence's score, teacher-forced: a state that beams had mixed up would give another one.
    for row, score in enumerate(got.sequences_scores.tolist()):
        sequence, total = got.sequences[row : row + 1], 0.0
        alone = budget(6, extra=extra, max_thinking_tokens=caps[row // 4], eos_token_id=None)
        logits = model()(sequence).logits.detach()[0]
        for t in range(6, sequence.shape[1]):
            step = logits[t - 1 : t].log_softmax(-1)
            step[:, END] += BIAS
            total += float(alone(sequence[:, :t], step)[0, sequence[0, t]])
        assert total == pytest.approx(score, abs=2e-3)


# --- one row at a time -----------------------------------------------------------------------------------------------


def expected(row: list[int], start: int, extra: int, cap: int, end: list[int], wait: list[int]) -> tuple[str, int]:
    """What is due after a row, read from left to right: ("leave" | "force" | "exchange", token)."""
    done = 0
    for at in range(start, len(row)):
        if row[at] == EOS or row[: at + 1][-len(end) :] == end:
            return "leave", -1
        done += at + 1 - len(wait) >= start and row[at + 1 - len(wait) : at + 1] == wait
    begun = [n for n in range(1, len(end)) if row[-n:] == end[:n]]
    if len(row) - start >= cap:
        return "force", end[max(begun, default=0)]
    if done >= extra:
        return "leave", -1
    half = [n for n in range(1, len(wait)) if row[-n:] == wait[:n] and len(row) - n >= start]
    if half:
        return "force", wait[max(half)]
    return "exchange", end[-1] if len(end) == 1 or row[-(len(end) - 1) :] == end[:-1] else -1


# Rows of few different ids, so that patterns, halves of patterns and near misses are all common.
@settings(max_examples=300, deadline=None)
@given(
    st.lists(
        st.lists(st.sampled_from([END, WAIT, AND, OPEN, SLASH, EOS, 30]), min_size=7, max_size=7),
        min_size=1,
        max_size=3,
    ),
    st.integers(0, 7),
    st.integers(0, 3),
    st.integers(0, 9),
    st.sampled_from([[END], [OPEN, END], [OPEN, SLASH, END], [OPEN, OPEN, END]]),
    st.sampled_from([[WAIT], [WAIT, AND], [AND, WAIT, 30]]),
)
def test_each_row_is_read_as_from_left_to_right(
    rows: list[list[int]], start: int, extra: int, cap: int, end: list[int], wait: list[int]
) -> None:
    scores = torch.linspace(0, 3, 64).repeat(len(rows), 1)
    before = scores.clone()
    one = budget(start, end, extra=extra, max_thinking_tokens=cap, continuation_ids=wait)
    got = one(torch.tensor(rows), scores)
    assert torch.equal(scores, before), "not in place"
    for i, row in enumerate(rows):
        kind, token = expected(row, start, extra, cap, end, wait)
        if kind == "leave":
            assert torch.equal(got[i], before[i])
        elif kind == "force":
            assert got[i, token] == 0
            assert got[i].isfinite().sum() == 1
        else:
            gone = {EOS} | ({token} if token >= 0 else set())
            assert set(got[i].isinf().nonzero()[:, 0].tolist()) == gone
            want = max(float(before[i, t]) for t in (*gone, wait[0]))
            assert float(got[i, wait[0]] - got[i, 40]) == pytest.approx(want - float(before[i, 40]), abs=1e-5)
            assert float(got[i].logsumexp(-1)) == pytest.approx(0, abs=1e-5)


def test_thinking_that_begins_with_a_tag() -> None:
    scores = torch.zeros(1, 64)
    one = budget(None, begin_ids=[BEGIN], extra=1, max_thinking_tokens=4)

    def due(*row: int) -> str:
        got = one(torch.tensor([row]), scores)
        if torch.equal(got, scores):
            return "leave"
        return f"force {int(got.argmax())}" if got.isfinite().sum() == 1 else "exchange"

    assert due(30, 31) == "leave"  # not begun
    assert due(30, BEGIN) == "exchange"
    assert due(PAD, PAD, 30, BEGIN) == "exchange"
    assert due(BEGIN, WAIT, END, 30) == "leave"  # over
    assert due(BEGIN, WAIT, 30) == "leave"  # continued once
    assert due(WAIT, BEGIN, 30) == "exchange"  # what stood before does not count
    assert due(BEGIN, WAIT, END, 30, BEGIN, 31) == "exchange"  # an earlier turn does not count
    assert due(BEGIN, 30, 31, 32, 33) == f"force {END}"
    assert due(BEGIN, 30, BEGIN, 32, 33) == f"force {END}"  # beginning again does not renew the budget
    assert due(BEGIN, 30, EOS, PAD, PAD, PAD, PAD) == "leave"  # a finished row
    # The prompt's part of the thinking is not counted.
    one = budget(4, begin_ids=[BEGIN], extra=1, max_thinking_tokens=4)
    assert due(BEGIN, WAIT, 31, 32, 33) == "exchange"
    assert due(BEGIN, WAIT, 31, 32, 33, 34, 35, 36) == f"force {END}"


def test_the_prompt_s_last_token_is_not_the_first_of_a_continuation() -> None:
    scores = torch.zeros(1, 64)
    ids = torch.tensor([[30, WAIT]])
    for start, free in ((1, 1), (2, 63)):
        one = budget(start, extra=1, continuation_ids=[WAIT, AND], eos_token_id=None)
        assert one(ids, scores).isfinite().sum() == free


def test_a_prefix_that_is_beyond_the_cap_already_is_ended_at_once() -> None:
    one = budget(0, [OPEN, SLASH, END], max_thinking_tokens=2)
    row = [30, 31, 32, 33, OPEN]
    for want in (SLASH, END):  # what has begun is finished, not begun again
        assert int(one(torch.tensor([row]), torch.randn(1, 64)).argmax()) == want
        row.append(want)
    scores = torch.randn(1, 64)
    assert torch.equal(one(torch.tensor([row]), scores), scores)


def test_without_budgets_nothing_changes() -> None:
    ids = prompts(0)
    want = model().generate(ids, **GREEDY)
    assert torch.equal(model().generate(ids, logits_processor=[budget(6)], **GREEDY), want)


def test_forbidden_tokens() -> None:
    scores = torch.randn(1, 64)
    scores[0, [WAIT, END]] = -torch.inf
    ids = torch.tensor([[30]])
    assert budget(0, extra=1)(ids, scores)[0, WAIT] == scores.log_softmax(-1)[0, EOS].exp().log()
    forced = budget(0, max_thinking_tokens=0)(ids, scores)
    assert forced[0, END] == 0, "also a forbidden token is forced, with a finite score"
    nothing = torch.full((1, 64), -torch.inf)
    assert not budget(0, extra=1)(ids, nothing).isnan().any()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"end_ids": []}, "end_ids: expected a token id or several .*; got"),
        ({"end_ids": [-1]}, "end_ids: expected a token id"),
        ({"end_ids": "</think>"}, "end_ids: expected a token id"),
        ({"prompt_length": None}, "begin_ids or prompt_length, to know where thinking starts; got both None"),
        ({"prompt_length": -1}, "prompt_length: expected a whole number"),
        ({"extra": 1}, "continuation_ids: expected ids that replace a suppressed end"),
        ({"extra": -1}, "extra: expected a whole number"),
        ({"extra": [1, 0.5]}, "extra: expected a whole number"),
        ({"extra": []}, r"got \[\]"),
        ({"max_thinking_tokens": -1}, "max_thinking_tokens: expected a whole number"),
        ({"max_thinking_tokens": [3, True]}, "max_thinking_tokens: expected a whole number"),
        ({"extra": 1, "continuation_ids": [WAIT, END]}, "none of the tokens that end thinking"),
        ({"extra": 1, "continuation_ids": [EOS], "eos_token_id": EOS}, "none of the tokens that end thinking"),
        ({"extra": 1, "continuation_ids": [WAIT, AND, WAIT]}, "do not start as they end"),
    ],
)
def test_wrong_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        ThinkingBudgetLogitsProcessor(**{"end_ids": END, "prompt_length": 0, **settings})


def spelling(*, merges: Sequence[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with these merges, `Ġ` being a space and `Ċ` a line break."""
    pairs = [(first, second) for first, second in (merge.split() for merge in merges)]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    names = [*alphabet, *(first + second for first, second in pairs)]
    backend = Tokenizer(models.BPE(vocab={name: i for i, name in enumerate(names)}, merges=pairs))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend)


def test_a_continuation_is_checked_by_the_tokenizer() -> None:
    def make(words: PreTrainedTokenizerFast, continuation: list[str]) -> ThinkingBudgetLogitsProcessor:
        ids = words.convert_tokens_to_ids(continuation)
        return ThinkingBudgetLogitsProcessor(0, extra=1, continuation_ids=ids, prompt_length=0, tokenizer=words)

    words = spelling(merges=["W a", "Ġ Wa", "Ġ y", "i Ċ"])
    # As the model would write them, after a word or at least after a line.
    assert make(words, ["ĠWa"]).continuation_ids == tuple(words.encode(" Wa"))
    make(words, ["Wa", "i", "t"])
    make(spelling(merges=["W a", ". Wa"]), ["Wa"])
    make(words, ["y", "Ġ"])
    for space in (["Ġ", "y"], ["Ġ"], ["Ċ", "Wa"]):
        with pytest.raises(InputError, match="a first token with more than white space.* begins with '( |.n)'"):
            make(words, space)
    for torn in (["W", "a"], ["Ġy", "W", "a"]):
        with pytest.raises(InputError, match="ids that the tokenizer makes of their text .*which it writes otherwise"):
            make(words, torn)
    # At the joint: the last letter of every text takes the first of the continuation.
    taken = spelling(merges=["s y", ". y", "Ċ y"])
    with pytest.raises(InputError, match="which it writes otherwise: .* after 'so it is'"):
        make(taken, ["y"])


def test_calls_that_do_not_fit_are_refused() -> None:
    ids, scores = torch.full((3, 4), 30), torch.zeros(3, 64)
    with pytest.raises(InputError, match="one for each prompt of 3 rows.*got 2"):
        budget(0, max_thinking_tokens=[1, 2])(ids, scores)
    with pytest.raises(InputError, match="prompt_length: expected at most the 4 ids of the prefix; got 5"):
        budget(5)(ids, scores)
    with pytest.raises(InputError, match="token ids below 12, the width of the scores; got 12"):
        budget(0)(ids, scores[:, :12])
