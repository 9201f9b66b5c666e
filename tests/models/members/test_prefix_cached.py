"""The companion follows whatever prefix it is asked about, whatever was asked before, and at the least cost.

The truth is a cache-free forward of every row alone, with its padding stripped; `Script` below asks the questions that
`generate()` asks in its modes (and some that it never would), in orders that hypothesis draws.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.companion import PrefixCachedMember
from support.tiny import CONTEXT, WINDOW, build, shared
from transformers import PreTrainedModel

from proxytune.errors import InputError, UnsupportedModelError

# Rotary positions; learnt absolute ones, where a wrong position_id shows; sliding windows shorter than every text, in
# all layers and in half of them; recurrent layers beside others.
FAMILIES = ["llama", "gpt2", "mistral", "gemma3", "qwen3_5"]
SLIDING = ["mistral", "gemma3"]
VOCABULARY = 40  # few tokens, so that unrelated rows do share prefixes by chance


@functools.lru_cache(4096)
@torch.no_grad()
def alone(model: PreTrainedModel, text: tuple[int, ...]) -> torch.Tensor:
    """The logits at every position of one row, without padding and without a cache; many questions have equal rows."""
    logits = model(torch.tensor([text]), use_cache=False).logits[0].float()
    assert torch.isfinite(logits).all()
    return logits


def truth(model: PreTrainedModel, ids: torch.Tensor, mask: torch.Tensor | None, last: int) -> torch.Tensor:
    """Every row alone and without padding; NaN where a question reaches back into the padding."""
    rows = []
    for row in range(ids.shape[0]):
        padding = 0 if mask is None else int((mask[row] == 0).sum())  # all of it at the left
        logits = alone(model, tuple(ids[row, padding:].tolist()))[-last:]
        rows.append(torch.nn.functional.pad(logits, (0, 0, last - logits.shape[0], 0), value=float("nan")))
    return torch.stack(rows)


def assert_right(
    companion: PrefixCachedMember, ids: torch.Tensor, mask: torch.Tensor | None = None, last: int = 1
) -> int:
    """Ask, compare with the truth, and return the token-forwards it took."""
    model, before = companion.member.model, companion.member.token_forwards
    question = ids.clone(), None if mask is None else mask.clone()
    got = companion.logits_for(*question, last=last)
    want = truth(model, ids, mask, last)
    meant = ~want.isnan()
    assert got.shape == want.shape
    assert torch.isfinite(got).all()
    torch.testing.assert_close(got[meant], want[meant], atol=1e-4, rtol=1e-4)
    assert torch.equal(question[0], ids), "the question was changed"
    return companion.member.token_forwards - before


def tokens(rows: int, length: int) -> torch.Tensor:
    return torch.randint(3, VOCABULARY, (rows, length))


def left_padded(ids: torch.Tensor, pads: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Pad rows at the left by so many positions; all rows get the width of the longest."""
    width = ids.shape[1] + max(pads)
    out, mask = torch.zeros(len(pads), width, dtype=torch.long), torch.zeros(len(pads), width, dtype=torch.long)
    for row, n in enumerate(pads):
        out[row, max(pads) :], mask[row, n:] = ids[row], 1
        out[row, n : max(pads)] = torch.arange(max(pads) - n) % 5 + 3 + row  # other texts before the given ones
    return out, mask


# --- drawn sequences of questions --------------------------------------------------------------------------------


@dataclass
class Script:
    """A batch of prefixes, as a decoding loop holds it, and the companion that is asked about it."""

    companion: PrefixCachedMember
    ids: torch.Tensor
    mask: torch.Tensor | None = None
    generator: torch.Generator = field(default_factory=torch.Generator)

    def draw(self, rows: int, length: int) -> torch.Tensor:
        return torch.randint(3, VOCABULARY, (rows, length), generator=self.generator)

    def ask(self, last: int = 1) -> None:
        last = min(last, self.ids.shape[1])
        assert_right(self.companion, self.ids, self.mask, last)

    def grow(self, more: torch.Tensor) -> None:
        self.ids = torch.cat([self.ids, more], 1)
        if self.mask is not None and self.mask.shape[1] % 2:  # a mask may stay as short as the prompt, or grow along
            self.mask = torch.nn.functional.pad(self.mask, (0, more.shape[1]), value=1)

    def shrink(self, n: int) -> None:
        # At least one token of every row stays.
        padding = 0 if self.mask is None else int((self.mask == 0).sum(1).max())
        length = max(self.ids.shape[1] - n, padding + 1)
        self.ids = self.ids[:, :length]
        self.mask = None if self.mask is None else self.mask[:, :length]

    def pick(self, rows: list[int]) -> None:
        index = torch.tensor(rows) % self.ids.shape[0]
        self.ids = self.ids[index]
        self.mask = None if self.mask is None else self.mask[index]

    def pad(self, pads: list[int]) -> None:
        self.ids, self.mask = left_padded(self.ids, [pads[r % len(pads)] for r in range(self.ids.shape[0])])

    def run(self, operation: str, argument: Any) -> None:
        match operation:
            case "extend":  # a step, or the tokens that a draft got accepted
                self.grow(self.draw(self.ids.shape[0], argument))
            case "roll back":  # a rejected draft
                self.shrink(argument)
            case "rows":  # beams: permuted, doubled, dropped
                self.pick(argument)
            case "replace":  # a rejected draft, and other tokens in its place
                self.shrink(argument)
                self.grow(self.draw(self.ids.shape[0], argument))
            case "new batch":
                self.ids, self.mask = self.draw(*argument), None
            case "pad":
                self.pad(argument)
            case "unpad":  # the same rows without a mask: what was padding is text now
                self.mask = None
            case "ask":  # again, or for several positions
                pass
        self.ask(argument if operation == "ask" else 1)


operations = st.one_of(
    st.tuples(st.just("extend"), st.integers(1, 5)),
    st.tuples(st.just("extend"), st.just(1)),  # what happens most
    st.tuples(st.just("roll back"), st.integers(1, 6)),
    st.tuples(st.just("replace"), st.integers(1, 6)),
    st.tuples(st.just("rows"), st.lists(st.integers(0, 3), min_size=1, max_size=4)),
    st.tuples(st.just("ask"), st.integers(1, 6)),
    st.tuples(st.just("new batch"), st.tuples(st.integers(1, 3), st.integers(1, 2 * WINDOW))),
    st.tuples(st.just("pad"), st.lists(st.integers(0, 4), min_size=1, max_size=4)),
    st.tuples(st.just("unpad"), st.none()),
)


@pytest.mark.smoke
@pytest.mark.parametrize("family", FAMILIES)
@given(
    seed=st.integers(0, 3),
    rows=st.integers(1, 3),
    length=st.integers(1, 2 * WINDOW),
    memo=st.sampled_from([1, 3, 32]),
    steps=st.lists(operations, min_size=3, max_size=10),
)
@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_any_sequence_of_questions_is_answered_as_without_a_cache(
    family: str, seed: int, rows: int, length: int, memo: int, steps: list[tuple[str, Any]]
) -> None:
    script = Script(PrefixCachedMember(shared(family, 1, VOCABULARY), memo=memo), torch.empty(0))
    script.generator.manual_seed(seed)
    script.ids = script.draw(rows, length)
    script.ask()
    for operation, argument in steps:
        script.run(operation, argument)


# --- the cost ----------------------------------------------------------------------------------------------------


@pytest.mark.smoke
@pytest.mark.parametrize("family", [*FAMILIES, "mamba"])
def test_a_step_costs_one_token_per_row(family: str) -> None:
    companion, ids = PrefixCachedMember(shared(family, 1)), tokens(3, WINDOW + 3)
    assert assert_right(companion, ids) == ids.numel()
    for _ in range(3):
        ids = torch.cat([ids, tokens(3, 1)], 1)
        assert assert_right(companion, ids) == 3
        assert assert_right(companion, ids) == 0
    ids = torch.cat([ids, tokens(3, 4)], 1)
    assert assert_right(companion, ids) == 12


@pytest.mark.parametrize("family", [*FAMILIES, "mamba"])
def test_beams_cost_no_more_than_their_new_tokens(family: str) -> None:
    companion, ids = PrefixCachedMember(shared(family, 1)), tokens(1, WINDOW + 3)
    ids = ids.repeat(4, 1)
    assert_right(companion, ids)
    # Reordered as beam search does after the first step: copies of one, a permutation, one that stays.
    for rows in ([0, 0, 0, 0], [3, 1, 0, 2], [1, 1, 2, 2], [0, 1, 2, 3], [2]):
        ids = torch.cat([ids[rows], tokens(len(rows), 1)], 1)
        assert assert_right(companion, ids) == len(rows)
    assert assert_right(companion, ids) == 0


@pytest.mark.parametrize("family", [*FAMILIES, "mamba"])
def test_dropping_a_row_costs_nothing_and_a_new_one_a_prefill(family: str) -> None:
    companion, ids = PrefixCachedMember(shared(family, 1)), tokens(3, WINDOW + 3)
    assert_right(companion, ids)
    assert assert_right(companion, ids[[2, 0]]) == 0
    other = torch.cat([ids[:1], (ids[:1] + 7) % VOCABULARY + 3])
    assert assert_right(companion, other) == other.numel()


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_rollback_costs_the_missing_suffix(family: str) -> None:
    companion, ids = PrefixCachedMember(shared(family, 1)), tokens(2, 20)
    assert_right(companion, ids)
    replaced = torch.cat([ids[:, :15], (ids[:, 15:18] + 1) % VOCABULARY + 3], 1)
    assert assert_right(companion, replaced) == 2 * 3
    # Every row keeps only what all rows keep: they share one cache.
    uneven = replaced.clone()
    uneven[0, 10], uneven[1, 14] = (uneven[0, 10] + 1) % 30 + 3, (uneven[1, 14] + 1) % 30 + 3
    assert not torch.equal(uneven, replaced)
    assert assert_right(companion, uneven) == 2 * (18 - 10)


@pytest.mark.smoke
@pytest.mark.parametrize("family", SLIDING)
def test_a_sliding_window_restarts_once_and_then_keeps_all(family: str) -> None:
    companion, ids = PrefixCachedMember(shared(family, 1)), tokens(1, 3 * WINDOW)
    assert_right(companion, ids)
    shorter = torch.cat([ids[:, :-3], (ids[:, -3:-2] + 1) % VOCABULARY + 3], 1)
    assert assert_right(companion, shorter) == shorter.numel()  # what left the window is gone: start again
    for n in (2, 5, WINDOW + 2):
        shorter = torch.cat([shorter[:, :-n], (shorter[:, -n : -n + 1] + 1) % VOCABULARY + 3], 1)
        assert assert_right(companion, shorter) == 1
    # Another batch does not bring the forgetting back.
    ids = tokens(1, 2 * WINDOW)
    assert assert_right(companion, ids) <= ids.numel()
    ids = torch.cat([ids[:, :-2], (ids[:, -2:-1] + 1) % VOCABULARY + 3], 1)
    assert assert_right(companion, ids) == 1


@pytest.mark.parametrize("family", SLIDING)
def test_a_sliding_window_that_is_never_rolled_back_stays_small(family: str) -> None:
    companion, ids = PrefixCachedMember(shared(family, 1)), tokens(1, 3 * WINDOW)
    assert_right(companion, ids)
    ids = torch.cat([ids, tokens(1, 1)], 1)
    assert_right(companion, ids)
    assert companion._cache is not None
    kept = [layer.keys.shape[-2] for layer in companion._cache.layers if layer.is_sliding]
    assert kept == [WINDOW - 1] * len(kept)
    assert kept


@pytest.mark.parametrize("family", SLIDING)
def test_a_rollback_within_the_window_costs_the_suffix(family: str) -> None:
    companion, ids = PrefixCachedMember(shared(family, 1)), tokens(2, WINDOW - 1)
    assert_right(companion, ids)
    ids = torch.cat([ids[:, :-3], (ids[:, -3:-2] + 1) % VOCABULARY + 3], 1)
    assert assert_right(companion, ids) == 2


def test_a_draft_and_its_verification_share_their_forwards() -> None:
    # Assisted decoding hands the processor to the draft too: it asks position by position, then the verification asks
    # for all of them again, and goes on after the accepted ones.
    companion, ids = PrefixCachedMember(shared("llama", 1)), tokens(1, 12)
    assert_right(companion, ids)
    draft = torch.cat([ids, tokens(1, 5)], 1)
    for n in range(13, 18):
        assert assert_right(companion, draft[:, :n]) == 1
    for n in range(12, 18):
        assert assert_right(companion, draft[:, :n]) == 0
    accepted = torch.cat([draft[:, :14], (draft[:, 14:15] + 1) % VOCABULARY + 3], 1)
    assert assert_right(companion, accepted) == 1


# --- several positions at once -----------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 2])  # one row remembers many positions, a batch only one
@pytest.mark.parametrize("family", [*FAMILIES, "mamba"])
def test_last_positions_after_gaps(family: str, rows: int) -> None:
    companion, ids = PrefixCachedMember(shared(family, 1)), tokens(rows, 2 * WINDOW)
    # A prefill answers for one position only; then more are asked than are remembered; then fewer.
    for last in (1, 4, 2, 6, 1, 6):
        assert_right(companion, ids, last=last)
    # Gaps: of five new tokens only the last two are asked for, later all of them; and after rolling back to before.
    ids = torch.cat([ids, tokens(rows, 5)], 1)
    assert_right(companion, ids, last=2)
    assert_right(companion, ids, last=6)
    assert_right(companion, ids[:, :-3], last=1)
    assert_right(companion, ids[:, :-3], last=4)
    assert_right(companion, ids, last=ids.shape[1])
    assert assert_right(companion, ids, last=ids.shape[1]) == 0


def test_what_is_remembered_costs_nothing() -> None:
    companion, ids = PrefixCachedMember(shared("llama", 1), memo=4), tokens(1, 10)
    assert_right(companion, ids[:, :6])
    for n in range(7, 11):
        assert_right(companion, ids[:, :n])
    assert assert_right(companion, ids, last=4) == 0
    assert assert_right(companion, ids, last=5) == 5  # one more than the memo holds: only these are computed again
    assert assert_right(companion, ids, last=5) == 0
    more = torch.cat([ids, tokens(1, 2)], 1)
    assert assert_right(companion, more, last=4) == 2  # two from the memo, two new ones


# --- padding -----------------------------------------------------------------------------------------------------


@pytest.mark.smoke
@pytest.mark.parametrize("family", [*FAMILIES, "mamba"])
def test_padded_batches(family: str) -> None:
    companion = PrefixCachedMember(shared(family, 1))
    ids, mask = left_padded(tokens(3, WINDOW), [5, 0, 2])
    assert assert_right(companion, ids, mask) == ids.numel()
    # The mask of the prompt covers the prompt; what is generated after it counts as tokens.
    ids = torch.cat([ids, tokens(3, 1)], 1)
    assert assert_right(companion, ids, mask) == 3
    grown = torch.nn.functional.pad(mask, (0, 1), value=1)
    assert assert_right(companion, ids, grown) == 0
    assert assert_right(companion, ids, grown.bool()) == 0
    # What stands under the padding is not looked at, so another padding token is the same question.
    other = ids.masked_fill(grown == 0, 17)
    assert assert_right(companion, other, grown) == 0
    # As text it is another question, though the ids are the same.
    assert assert_right(companion, other) > 0
    assert assert_right(companion, other, torch.ones_like(other)) == 0  # a mask of ones is no mask
    assert assert_right(companion, other, grown) > 0


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_of_one_text_under_more_and_less_padding(family: str) -> None:
    # The same tokens at other places of the batch: nothing in the cache may be taken for them.
    companion, text = PrefixCachedMember(shared(family, 1)), tokens(1, WINDOW).repeat(2, 1)
    for pads in ([3, 0], [0, 3], [2, 4], [4, 4], [0, 0]):
        ids, mask = left_padded(text, pads)
        assert_right(companion, ids, mask)
    assert assert_right(companion, ids, mask) == 0


def test_padding_is_no_token() -> None:
    # Ids where every row is the padding id, once as text and once as padding, one after the other.
    companion, ids = PrefixCachedMember(shared("gpt2", 1)), torch.zeros(2, 6, dtype=torch.long)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
    for _ in range(2):
        assert_right(companion, ids)
        assert_right(companion, ids, mask)


# --- interruptions and errors ------------------------------------------------------------------------------------


@pytest.mark.smoke
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("where", ["before", "midway", "after"])
def test_an_interrupted_forward_leaves_nothing_wrong_behind(
    family: str, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build(family, 1, VOCABULARY)
    companion, ids = PrefixCachedMember(model), tokens(2, WINDOW + 2)
    assert_right(companion, ids)
    longer = torch.cat([ids, tokens(2, 1)], 1)
    calls = 0

    def interrupt(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        raise KeyboardInterrupt

    # Before any layer has seen the new token; when the first layer has, and the second not; when all have.
    layer = companion._cache.layers[1]  # type: ignore[union-attr]
    target: dict[str, tuple[object, str]] = {
        "before": (model, "forward"),
        "midway": (layer, "update"),
        "after": (model.get_output_embeddings(), "forward"),
    }
    with monkeypatch.context() as patch:
        patch.setattr(*target[where], interrupt)
        with pytest.raises(KeyboardInterrupt):
            companion.logits_for(longer)
    assert calls == 1
    assert_right(companion, longer)
    assert_right(companion, ids)
    assert_right(companion, torch.cat([longer, tokens(2, 2)], 1))


def test_an_error_does_not_cost_the_cache_or_spoil_it() -> None:
    companion, ids = PrefixCachedMember(shared("llama", 1)), tokens(1, 10)
    assert_right(companion, ids)
    bad = torch.cat([ids, torch.tensor([[5, 10_000]])], 1)
    with pytest.raises(InputError, match="id 10000"):
        companion.logits_for(bad)
    assert assert_right(companion, torch.cat([ids, tokens(1, 1)], 1)) == 1


def test_reset_forgets() -> None:
    companion, ids = PrefixCachedMember(shared("llama", 1)), tokens(1, 10)
    assert_right(companion, ids)
    companion.reset()
    assert assert_right(companion, ids) == 10


@pytest.mark.smoke
@pytest.mark.parametrize(
    ("question", "message"),
    [
        # Nothing to answer for; fewer positions than asked for; no position at all.
        (lambda c: c.logits_for(torch.empty(1, 0, dtype=torch.long)), "expected a prefix of at least 1 tokens; got 0"),
        (lambda c: c.logits_for(tokens(1, 3), last=4), "expected a prefix of at least 4 tokens; got 3"),
        (lambda c: c.logits_for(tokens(1, 3), last=0), "expected a prefix of at least 1 tokens; got 3"),
        (lambda c: c.logits_for(tokens(1, 3), last=-1), "expected a prefix of at least 1 tokens; got 3"),
        # Masks of another batch, and of another text.
        (
            lambda c: c.logits_for(tokens(2, 3), torch.ones(2, 4)),
            r"attention_mask: expected 2 rows of at most 3 positions, as input_ids; got shape \[2, 4\]",
        ),
        (lambda c: c.logits_for(tokens(2, 3), torch.ones(1, 3)), r"expected 2 rows of .*; got shape \[1, 3\]"),
        # Ids on either side of what the model can embed.
        (
            lambda c: c.logits_for(torch.tensor([[3, VOCABULARY]])),
            "got id 40, which the student .40 embedding rows. has",
        ),
        (lambda c: c.logits_for(torch.tensor([[-1, 3]])), "got id -1, which the student"),
        (
            lambda c: c.logits_for(tokens(1, CONTEXT + 1)),
            f"length for the student: expected at most {CONTEXT} tokens .*; got {CONTEXT + 1}",
        ),
    ],
)
def test_questions_that_cannot_be_right(question: Callable[[PrefixCachedMember], Any], message: str) -> None:
    companion = PrefixCachedMember(shared("llama", 1, VOCABULARY), "student")
    with pytest.raises(InputError, match=message):
        question(companion)
    ids = tokens(1, 4)
    assert assert_right(companion, ids) == 4
    # The same on a cache that holds something.
    with pytest.raises(InputError, match=message):
        question(companion)
    assert_right(companion, ids)


def test_growing_past_the_context_is_refused() -> None:
    companion = PrefixCachedMember(build("llama", 1, VOCABULARY, context=16), "student")
    ids = tokens(1, 16)
    assert_right(companion, ids)
    with pytest.raises(InputError, match="length for the student: expected at most 16 tokens .*; got 17"):
        companion.logits_for(torch.cat([ids, tokens(1, 1)], 1))
    assert_right(companion, ids)


def test_a_model_that_cannot_follow_a_prefix_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match=r"the student: expected a decoder-only model; got T5"):
        PrefixCachedMember(build("t5", 1), "student")


def test_answers_are_the_model_s_own_without_a_graph_and_the_model_is_not_trained() -> None:
    model = build("llama", 1).to(torch.bfloat16).train()
    companion, ids = PrefixCachedMember(model), tokens(2, 5)
    out = companion.logits_for(ids)
    # As they are: a copy in float32 would be one more of their size, for each companion.
    assert (out.dtype, out.requires_grad, model.training) == (torch.bfloat16, False, False)
    want = model(ids, use_cache=False).logits[:, -1:].float()
    assert torch.equal(out, want)


@pytest.mark.parametrize("kind", ["llama", "mistral"])
@pytest.mark.parametrize("last", [1, 3, 7])
@pytest.mark.parametrize("length", [5, 9, 10, 12])
def test_a_text_in_chunks(kind: str, last: int, length: int) -> None:
    """Parts of 4 tokens, the last of which holds what was asked for; windows of 8 slide in between."""
    if last > length:
        return
    model = build(kind, 1)
    companion, ids, mask = PrefixCachedMember(model), tokens(2, length), torch.ones(2, length, dtype=torch.long)
    mask[1, :2] = 0
    companion.prefill_chunk_size = 4
    spans: list[int] = []
    handle = model.get_input_embeddings().register_forward_hook(lambda _, args, __: spans.append(args[0].shape[1]))
    got = companion.logits_for(ids, mask, last=last)
    handle.remove()
    assert sum(spans) == length
    assert spans[:-1] == [4] * (len(spans) - 1)
    assert last <= spans[-1] < 4 + last
    with torch.no_grad():
        want = model(ids, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp(min=0)).logits[:, -last:]
    there = mask[:, -last:] == 1
    torch.testing.assert_close(got[there], want[there], atol=1e-4, rtol=1e-4)
    # What was read in parts is gone on from.
    longer = torch.cat([ids, tokens(2, 1)], 1)
    assert companion.member.token_forwards == 2 * length
    companion.logits_for(longer, mask)
    assert companion.member.token_forwards == 2 * (length + 1)
