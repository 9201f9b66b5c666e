"""Speculation changes nothing but the time: its tokens are those of the cache-free reference, whatever the draft."""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from support.reference import next_logits
from support.speculation import (
    ALPHA,
    FAMILIES,
    SAMPLE,
    SEED,
    WARPERS,
    alone,
    composed,
    draft,
    members,
    near,
    prompts,
    slow,
    slow_row,
    steered,
)
from support.tiny import PAD, build, shared

import proxytune
from proxytune import SpeculativeDecoding
from proxytune.costs.speculation import DraftCosts
from proxytune.errors import NumericalError
from proxytune.methods.speculation import ModelDraft, PromptLookupDraft
from proxytune.methods.speculation.round import Proposal

NEW = 16  # beyond prompts of up to 12: windows of 8 slide in the prompt, in the text, and under drafts
# Every draft, and every kind of length: greedily all, by coupling those that are often right.
DRAFTS = [
    ("expert", 0, False),
    ("expert", 1, False),
    ("expert", 3, True),
    ("expert", 7, False),
    ("expert", "auto", True),
    ("good", 3, False),
    ("good", "auto", True),
    ("bad", 2, False),
    ("short", 3, False),
    ("lookup", 7, True),
    ("bigrams", "auto", False),
]
CHEAP = DraftCosts(round=1.0, draft=0.05)  # by their bytes, models of one size had better not draft at all
SMOKE = [pytest.param(f, marks=pytest.mark.smoke) if f == "gemma3" else f for f in FAMILIES]


def run(model: Any, ids: torch.Tensor, mask: torch.Tensor | None, loop: Any, **kwargs: Any) -> Any:
    return model.generate(
        ids,
        attention_mask=mask,
        custom_generate=loop,
        **{"max_new_tokens": NEW, "pad_token_id": PAD, "return_dict_in_generate": True} | kwargs,
    )


@functools.cache
def expected(kind: str, sampled: bool, alpha: float = ALPHA) -> torch.Tensor:
    return slow(steered(kind, alpha), *prompts(), NEW, warpers=WARPERS if sampled else None)


@pytest.mark.parametrize(("name", "tokens", "sampled"), DRAFTS)
@pytest.mark.parametrize("kind", SMOKE)
def test_tokens_are_those_of_the_cache_free_reference(kind: str, name: str, tokens: Any, sampled: bool) -> None:
    model, (ids, mask) = composed(kind), prompts()
    loop = SpeculativeDecoding(draft=draft(name, kind), draft_tokens=tokens, accept="coupled", seed=SEED, costs=CHEAP)
    out = run(model, ids, mask, loop, eos_token_id=None, **SAMPLE if sampled else {"do_sample": False})
    assert torch.equal(out.sequences, expected(kind, sampled))
    assert out.rounds == len(out.draft_lengths) + 1
    if tokens == 0:
        assert out.rounds == NEW
        assert not out.drafted.any()
    if name in ("expert", "good") and tokens != 0:
        assert out.accepted.sum() > 8, "nothing of a draft is tested"
        assert out.rejected.sum() > 2
        assert out.rounds < NEW


@pytest.mark.parametrize("rows", [1, 9])
@pytest.mark.parametrize("kind", ["mistral", "gpt2"])
def test_batches_of_one_and_of_many(kind: str, rows: int) -> None:
    ids, mask = prompts(rows, seed=rows)
    want = slow(steered(kind), ids, mask, NEW, ends=[41])
    loop = SpeculativeDecoding(draft_tokens=3)
    out = run(composed(kind), ids, mask, loop, do_sample=False, eos_token_id=41)
    assert torch.equal(out.sequences, want)


@pytest.mark.smoke
@pytest.mark.parametrize("alpha", [0.0, -0.5, 2.5])
def test_other_strengths(alpha: float) -> None:
    model, (ids, mask) = composed("qwen3", alpha), prompts()
    for name in ("expert", "good"):
        loop = SpeculativeDecoding(draft=draft(name, "qwen3"), draft_tokens=3, accept="coupled", seed=SEED)
        got = run(model, ids, mask, loop, eos_token_id=None, **SAMPLE).sequences
        assert torch.equal(got, expected("qwen3", True, alpha))


@pytest.mark.parametrize("vocab", [250, 262])
def test_members_of_other_families_and_widths(vocab: int) -> None:
    # The expert drafts ids that the base has no row for, or cannot draft some that it has; it is seldom right.
    trio = [shared("llama", 1), shared("gpt2", 2, vocab), shared("mistral", 3, vocab)]
    model = proxytune.wrap(trio[0], expert=trio[1], antiexpert=trio[2], alpha=ALPHA, check_vocabulary=False)
    ids, mask = prompts()
    want = slow(functools.partial(next_logits, trio, ALPHA), ids, mask, NEW, warpers=WARPERS)
    for d in ("expert", ModelDraft(trio[0])):
        loop = SpeculativeDecoding(draft=d, draft_tokens=3, accept="coupled", seed=SEED)
        assert torch.equal(run(model, ids, mask, loop, eos_token_id=None, **SAMPLE).sequences, want)


# --- rows that come differently far ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["gemma3", "gpt2"])
def test_rows_that_accept_very_different_numbers_for_long(kind: str) -> None:
    """Two rows of four have a draft that knows their text by heart, the others one that is always wrong."""
    model, (ids, mask) = composed(kind), prompts()
    new = 40
    want = slow(steered(kind), ids, mask, new)

    class ByHeart(PromptLookupDraft):
        def begin(self, start: Any) -> Any:
            inner = super().begin(start)
            inner.propose = propose
            return inner

    def propose(count: int, rows: Any, draw: Any) -> Proposal:
        texts = rows.texts
        begun = torch.tensor(texts.counts)[:, None] + 12 + torch.arange(count)
        right = want.gather(1, begun.clamp(max=12 + new - 1))
        # A round of every kind: all right, all wrong, none drafted, and right up to some token.
        which = [1, 3, sum(texts.counts) % 4, 0]
        leads = texts.counts[0] < 20 or texts.counts[1] > 20  # then the row that led falls behind
        for row, good in enumerate((count if leads else 0, 0 if leads else count, 0, which[2])):
            right[row, good:] = (right[row, good:] + 1) % 240
        right[2] = -1 if sum(texts.counts) % 3 else right[2]
        return Proposal(right)

    out = run(model, ids, mask, SpeculativeDecoding(draft=ByHeart(), draft_tokens=6), do_sample=False,
              eos_token_id=None, max_new_tokens=new)  # fmt: skip
    assert torch.equal(out.sequences, want)
    assert out.accepted[0] > 20
    assert out.accepted[1] > 8
    assert out.accepted[2] == 0
    assert 0 < out.accepted[3] < 30
    assert out.rounds == new, "the slowest row takes a token per round"


def test_texts_that_repeat_themselves_under_prompt_lookup() -> None:
    model = build("llama", 1)
    with torch.no_grad():  # the last token alone decides: some rows fall into a cycle, at different times
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.mul_(0.05)
    ids, mask = prompts(6, seed=3)
    want = slow(alone(model), ids, mask, 80)
    out = run(model, ids, mask, SpeculativeDecoding(draft=PromptLookupDraft(3, 1), draft_tokens=8), do_sample=False,
              eos_token_id=None, max_new_tokens=80)  # fmt: skip
    assert torch.equal(out.sequences, want)
    assert out.accepted.max() > 20
    assert out.rounds < 75


# --- plain models ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampled", [False, True], ids=["greedy", "coupled"])
@pytest.mark.parametrize("name", ["good", "short", "lookup", "bigrams"])
@pytest.mark.parametrize("kind", [pytest.param("llama", marks=pytest.mark.smoke), "gemma3"])
def test_plain_models(kind: str, name: str, sampled: bool) -> None:
    model, (ids, mask) = members(kind)[0], prompts()
    want = slow(alone(model), ids, mask, NEW, warpers=WARPERS if sampled else None)
    loop = SpeculativeDecoding(draft=draft(name, kind), draft_tokens=3, accept="coupled", seed=SEED)
    settings = SAMPLE if sampled else {"do_sample": False}
    assert torch.equal(run(model, ids, mask, loop, eos_token_id=None, **settings).sequences, want)


# --- draws are keyed ------------------------------------------------------------------------------------------------


@pytest.mark.smoke
@pytest.mark.parametrize("accept", ["rejection", "coupled"])
@pytest.mark.parametrize("name", ["expert", "good", "lookup"])
def test_a_row_alone_is_the_row_in_a_batch(name: str, accept: Any) -> None:
    model, (ids, mask) = composed("mistral"), prompts()

    def loop(**keys: Any) -> SpeculativeDecoding:
        return SpeculativeDecoding(draft=draft(name, "mistral"), draft_tokens=3, accept=accept, seed=SEED, **keys)

    keys = {"stream_ids": [3, 9, 9, 4], "branch_ids": torch.tensor([0, 0, 7, 1])}
    batch = run(model, ids, mask, loop(**keys), eos_token_id=None, **SAMPLE).sequences
    for row, stream, branch in zip(range(4), keys["stream_ids"], keys["branch_ids"].tolist(), strict=True):
        text = ids[row][mask[row].bool()][None]
        own = loop(stream_ids=[stream], branch_ids=torch.tensor([branch]))
        got = run(model, text, None, own, eos_token_id=None, **SAMPLE).sequences
        assert torch.equal(got[0, text.shape[1] :], batch[row, 12:]), f"row {row}"
    if accept == "coupled":
        text = ids[2][mask[2].bool()]
        want = slow_row(steered("mistral"), text, NEW, row=9, branch=7, warpers=WARPERS)
        assert torch.equal(batch[2, 12:], want)


def test_the_same_seed_is_the_same_text_and_the_same_rounds() -> None:
    model, (ids, mask) = composed("llama"), prompts()
    one, again = (run(model, ids, mask, SpeculativeDecoding(seed=3, costs=CHEAP), **SAMPLE) for _ in range(2))
    assert torch.equal(one.sequences, again.sequences)
    assert one.draft_lengths == again.draft_lengths
    assert len(set(one.draft_lengths)) > 1, "the length never changed"
    other = run(model, ids, mask, SpeculativeDecoding(seed=4, costs=CHEAP), **SAMPLE)
    assert not torch.equal(one.sequences, other.sequences)
    for seeds in ((1, 1), (1, 2)):  # without a seed, torch's generator governs
        texts = []
        for seed in seeds:
            torch.manual_seed(seed)
            texts.append(
                run(model, ids, mask, SpeculativeDecoding(draft_tokens=1), max_new_tokens=4, **SAMPLE).sequences
            )
        assert torch.equal(*texts) == (seeds[0] == seeds[1])


# --- rows without a distribution ------------------------------------------------------------------------------------


@contextmanager
def spoiled(model: Any, row: int, after: int, value: float = float("nan")) -> Iterator[None]:
    """From some forward pass on, a row of logits is no number, or nothing can be drawn from it."""
    calls = [0]

    def spoil(module: Any, args: Any, output: Any) -> Any:
        calls[0] += 1
        if calls[0] > after:
            output.logits = output.logits.clone()
            output.logits[row, :, slice(None) if value == -torch.inf else slice(7, 8)] = value
        return output

    hook = model.register_forward_hook(spoil)
    try:
        yield
    finally:
        hook.remove()


class Never(PromptLookupDraft):
    """A draft that is impossible: the settings leave the likeliest 40 tokens, and id 1 is not among them."""

    def begin(self, start: Any) -> Any:
        inner = super().begin(start)
        inner.propose = lambda count, rows, draw: Proposal(rows.texts.last().expand(-1, count).clamp(max=1))
        return inner


@pytest.mark.smoke
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("settings", [{"do_sample": False}, SAMPLE, {**SAMPLE, "repetition_penalty": 1.1}])
def test_a_row_that_is_no_distribution(settings: dict[str, Any], value: float) -> None:
    model, (ids, mask) = composed("llama"), prompts()
    why = "−inf for every token" if value == -torch.inf else r"NaN or \+inf"
    loop = SpeculativeDecoding(draft=Never(), draft_tokens=2, seed=0)
    want = run(model, ids, mask, loop, eos_token_id=None, max_new_tokens=5, **settings)
    assert not want.accepted[1], "the step in the message is counted in rounds"
    with spoiled(model.base, 1, 4, value), pytest.raises(NumericalError, match=rf"row 1 of 4, step 4 .* got {why}"):
        run(model, ids, mask, loop, eos_token_id=None, **settings)
    # One step earlier, nothing is wrong; only a last token is drawn without a draft, by other words of the noise.
    with spoiled(model.base, 1, 4, value):
        short = run(model, ids, mask, loop, eos_token_id=None, max_new_tokens=4, **settings)
    assert torch.equal(short.sequences[1, :15], want.sequences[1, :15])


@pytest.mark.parametrize("settings", [{"do_sample": False}, SAMPLE])
@pytest.mark.parametrize("value", [float("nan"), -float("inf")])
def test_a_draft_that_says_nothing_of_a_row(settings: dict[str, Any], value: float) -> None:
    model, (ids, mask) = composed("llama"), prompts()
    aside = near("llama", 11, 0.1)
    loop = SpeculativeDecoding(draft=ModelDraft(aside), draft_tokens=3, accept="coupled", seed=SEED)
    clean = run(model, ids, mask, loop, eos_token_id=None, **settings)
    with spoiled(aside, 1, 0, value):
        out = run(model, ids, mask, loop, eos_token_id=None, **settings)
    assert torch.equal(out.sequences, clean.sequences)
    assert torch.equal(out.sequences, expected("llama", bool(settings["do_sample"])))
    assert out.accepted[1] == 0 < clean.accepted[1]
    if settings["do_sample"]:
        loop = SpeculativeDecoding(draft=ModelDraft(aside), draft_tokens=3, seed=SEED)
        with spoiled(aside, 1, 3, value):
            out = run(model, ids, mask, loop, eos_token_id=None, **settings)
        assert out.sequences.shape == (4, 12 + NEW)
        assert int(out.sequences.min()) >= 0


def test_companions_may_hear_of_a_third_model_that_is_the_base_itself() -> None:
    base, _, _ = members("llama")
    model, (ids, mask) = composed("llama"), prompts()
    out = run(model, ids, mask, SpeculativeDecoding(draft=ModelDraft(base), draft_tokens=3), do_sample=False,
              eos_token_id=None)  # fmt: skip
    assert torch.equal(out.sequences, expected("llama", False))
    own = run(base, ids, mask, SpeculativeDecoding(draft=ModelDraft(base), draft_tokens=5), do_sample=False,
              eos_token_id=None)  # fmt: skip
    assert own.rejected.sum() == 0, "a model agrees with itself"
    assert own.rounds == 4  # the prompt's token, then six each: 1 + 6 + 6 + 3
