"""Speculation and assisted decoding with recurrent and hybrid members, one prompt at a time."""

import functools
from dataclasses import replace
from typing import Any

import pytest
import torch
from support.reference import next_logits
from support.speculation import SAMPLE, SEED, WARPERS, alone, near, p_value, slow_row
from support.tiny import PAD, build

import proxytune
from proxytune import SpeculativeDecoding
from proxytune.costs.speculation import DraftCosts
from proxytune.methods.speculation import ModelDraft, PromptLookupDraft
from proxytune.models.members.cache_name import CACHE
from proxytune.models.members.rewind import rewindable_layers

ALPHA, NEW, DRAWS = 0.7, 14, 150
# The kind of base and of companions: recurrent layers in all, in the base, in the companions; single tokens only.
MEMBERS = [("qwen3_5", "qwen3_5"), ("lfm2", "llama"), ("llama", "mamba"), ("jamba", "qwen3_5")]
CHEAP = DraftCosts(round=1.0, draft=0.05)
IDS = torch.tensor([[7, 30, 8, 91, 7, 30, 8, 12, 7, 30]])


@functools.cache
def trio(base: str, companion: str) -> Any:
    members = near(base, 0, 0.0), near(companion, 2, 0.1), near(companion, 3, 0.1)
    return proxytune.wrap(
        members[0],
        expert=members[1],
        antiexpert=members[2],
        alpha=ALPHA,
        end_tokens="union",
        check_vocabulary=False,
    )


@functools.cache
def wanted(base: str, companion: str, sampled: bool) -> torch.Tensor:
    model = trio(base, companion)
    logits = functools.partial(next_logits, [model.base, model.expert, model.antiexpert], ALPHA)
    return slow_row(logits, IDS[0], NEW, warpers=WARPERS if sampled else None)


def run(model: Any, loop: Any = None, ids: torch.Tensor = IDS, **kwargs: Any) -> Any:
    settings = {"max_new_tokens": NEW, "eos_token_id": None, "pad_token_id": PAD, "return_dict_in_generate": True}
    return model.generate(ids, custom_generate=loop, **settings | {"do_sample": False} | kwargs)


@pytest.mark.smoke
@pytest.mark.parametrize("draft", ["expert", "good", "recurrent", "lookup"])
@pytest.mark.parametrize("kinds", MEMBERS, ids="-".join)
def test_tokens_are_those_of_the_cache_free_reference(kinds: tuple[str, str], draft: str) -> None:
    model = trio(*kinds)
    drafts = {
        "expert": lambda: "expert",
        "good": lambda: ModelDraft(near(kinds[0], 4, 0.1)),
        "recurrent": lambda: ModelDraft(build("mamba", 4)),
        "lookup": lambda: PromptLookupDraft(1, 1),
    }
    sampled = draft in ("expert", "lookup")
    loop = SpeculativeDecoding(draft=drafts[draft](), draft_tokens=3, accept="coupled", seed=SEED)
    out = run(model, loop, **SAMPLE if sampled else {})
    assert torch.equal(out.sequences[0, IDS.shape[1] :], wanted(*kinds, sampled))


@pytest.mark.parametrize("kind", ["qwen3_5", "mamba"])
@pytest.mark.parametrize("composed", [True, False], ids=["composed", "plain"])
def test_the_returned_cache_goes_on(kind: str, composed: bool) -> None:
    model = trio(kind, kind) if composed else near(kind, 0, 0.0)
    loop = SpeculativeDecoding(draft=ModelDraft(build("llama", 9)), draft_tokens=3)
    long = run(model, max_new_tokens=2 * NEW).sequences
    for new in (NEW, NEW + 1, NEW + 2):  # after a round's end, and at tokens that are read again
        out = run(model, loop, max_new_tokens=new)
        assert torch.equal(out.sequences, long[:, : IDS.shape[1] + new])
        again = run(model, ids=out.sequences, max_new_tokens=5, **{CACHE: out[CACHE]})
        assert torch.equal(again.sequences, long[:, : IDS.shape[1] + new + 5])
        assert composed or not rewindable_layers(out[CACHE])


@pytest.mark.parametrize("kinds", MEMBERS, ids="-".join)
def test_assisted_decoding(kinds: tuple[str, str]) -> None:
    model = trio(*kinds)
    third = build("llama", 9)
    third.generation_config.num_assistant_tokens = 3
    for assist in ({"assistant_model": third}, {"prompt_lookup_num_tokens": 3}, {"assistant_model": model.expert}):
        got = run(model, **assist).sequences[0, IDS.shape[1] :]
        assert torch.equal(got, wanted(*kinds, False)), assist


@functools.cache
def small(kind: str, seed: int) -> Any:
    model = build(kind, seed, 6)
    model.lm_head.weight.data.mul_(0.5)  # flat enough for many outcomes
    return model


def test_the_law_of_the_first_tokens() -> None:
    """χ² of two tokens: the prompt's, and a draft that was accepted, or the one after a rejection."""
    model, text = small("qwen3_5", 41), torch.tensor([3, 5, 4, 3])
    loop = SpeculativeDecoding(draft=ModelDraft(small("llama", 42)), draft_tokens=1)
    law, logits = torch.zeros(6, 6, dtype=torch.float64), alone(model)
    for a in range(6):
        first = logits(text).double().softmax(-1)[a]
        law[a] = first * logits(torch.tensor([*text.tolist(), a])).double().softmax(-1)
    counts, rejected = torch.zeros_like(law), 0
    for seed in range(DRAWS):
        out = run(model, replace(loop, seed=seed), text[None], do_sample=True, top_k=0, max_new_tokens=3)
        counts[tuple(out.sequences[0, 4:6].tolist())] += 1
        rejected += int(out.rejected.sum())
    assert rejected > DRAWS / 5, "states were gone back to"
    assert p_value(counts, law) > 1e-4


@pytest.mark.parametrize("kinds", MEMBERS, ids="-".join)
def test_a_step_costs_one_token_forward_of_each_member(kinds: tuple[str, str]) -> None:
    model = trio(*kinds)
    before = model.token_forwards
    run(model, ids=IDS.repeat(2, 1), max_new_tokens=4)
    counts = {role: n - before[role] for role, n in model.token_forwards.items()}
    assert counts == dict.fromkeys(("base", "expert", "antiexpert"), 2 * (IDS.shape[1] + 3))


@pytest.mark.parametrize("kinds", [*MEMBERS, ("llama", "gpt2"), ("mistral", "llama")], ids="-".join)
@pytest.mark.parametrize("filled_by", ["greedy", "speculation"])
def test_assisted_decoding_goes_on_from_a_cache(kinds: tuple[str, str], filled_by: str) -> None:
    """transformers reads the whole text again after the cached one (also of a plain model)."""
    model = trio(*kinds)
    loop = SpeculativeDecoding(draft=PromptLookupDraft(1, 1), draft_tokens=3) if filled_by == "speculation" else None
    first = run(model, loop, max_new_tokens=5)
    ids = torch.cat([first.sequences, torch.tensor([[9, 33]])], 1)
    want = run(model, ids=ids, use_cache=False, max_new_tokens=6).sequences
    got = run(model, ids=ids, prompt_lookup_num_tokens=3, max_new_tokens=6, **{CACHE: first[CACHE]})
    assert torch.equal(got.sequences, want)
    more = run(model, ids=got.sequences, max_new_tokens=3, **{CACHE: got[CACHE]}).sequences
    assert torch.equal(more, run(model, ids=want, use_cache=False, max_new_tokens=3).sequences)
