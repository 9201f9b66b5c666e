"""Members with indexed, compressed or looped layers, against every prefix anew without a cache."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from support.looped import looped
from support.looped import shared as shared_looped
from support.reference import Reference
from support.sparse import VOCAB, made
from support.tiny import PAD, build
from transformers import DynamicCache, StaticCache

import proxytune
from proxytune import ProxyTuningLogitsProcessor, SpeculativeDecoding
from proxytune.errors import UnsupportedModeError, UnsupportedModelError
from proxytune.methods.speculation.ragged_cache import RaggedCache, record
from proxytune.models.members.cache_name import CACHE, cache_of
from proxytune.models.members.composite_cache import cached_layers, empty_cache
from proxytune.models.members.member import Member

ALPHA, NEW, LENGTH = 0.7, 4, 12
PADDED = ["GlmMoeDsa", "Qwen4Exp"]
BY_COLUMN = ["DeepseekV4", "MiniMaxM3VL"]


@functools.cache
def large(vocab: int) -> Any:
    """A base larger than its companions."""
    return build("llama", 1, vocab, hidden=96)


def members_of(kind: str) -> tuple[Any, Any]:
    """Expert and antiexpert."""
    make = shared_looped if kind in ("inkling", "dory") else made
    return make(kind, 1), make(kind, 2)


def composed(kind: str, base: Any = None) -> tuple[Any, Reference]:
    expert, antiexpert = members_of(kind)
    base = large(expert.config.vocab_size) if base is None else base
    model = proxytune.wrap(base, expert=expert, antiexpert=antiexpert, alpha=ALPHA, check_vocabulary=False)
    return model, Reference([base, expert, antiexpert], ALPHA)


def prompts(kind: str, rows: int = 2) -> dict[str, torch.Tensor]:
    """Prompts longer than windows, blocks and what an index may choose; the second is padded by five if it can be."""
    ids = torch.randint(3, VOCAB, (2, LENGTH), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    if kind not in BY_COLUMN:
        ids[1, :5], mask[1, :5] = PAD, 0
    return {"input_ids": ids[:rows], "attention_mask": mask[:rows]}


GIVEN: dict[str, Any] = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None}


@pytest.mark.parametrize("kind", [*PADDED, *BY_COLUMN, "inkling", "dory"])
def test_companions_are_right(kind: str) -> None:
    model, reference = composed(kind)
    both, one = prompts(kind), prompts(kind, rows=1)
    given = {**GIVEN, "max_new_tokens": 2} if kind == "inkling" else GIVEN  # it is slow
    greedy = reference.generate(**both, **given)
    assert torch.equal(model.generate(**both, **given), greedy)
    beams = {**given, "num_beams": 2, "max_new_tokens": 2}
    assert torch.equal(model.generate(**both, **beams), reference.generate(**both, **beams))
    # Drafts are rejected, so that caches go back, composed and as companions that follow a changed prefix.
    loop = SpeculativeDecoding(draft="expert", draft_tokens=3)
    assert torch.equal(model.generate(**one, **given, custom_generate=loop), greedy[:1])
    weights = {"expert": model.expert, "antiexpert": model.antiexpert, "alpha": ALPHA}
    processor = ProxyTuningLogitsProcessor(**weights, check_vocabulary=False)
    drafts = {**given, "prompt_lookup_num_tokens": 3, "logits_processor": [processor]}
    assert torch.equal(model.base.generate(**one, **drafts), greedy[:1])


@torch.no_grad()
@pytest.mark.parametrize("kind", ["DeepseekV32", "MiniMaxM3VL", "DeepseekV4"])
def test_a_cache_goes_back_and_on(kind: str) -> None:
    member, ids = Member(made(kind), "base"), prompts("DeepseekV4")["input_ids"]
    cache = empty_cache(member.config)
    record(cache)
    member.forward(ids[:, :6], cache=cache)
    for rejected in (5, 1, 4):  # more and fewer than stand for one compressed entry
        member.forward(ids[:, -rejected:], cache=cache)
        cache.crop(-rejected)
    cache.reorder_cache(torch.tensor([1, 0]))
    went_on = torch.cat([member.forward(ids.flip(0)[:, n : n + 2], cache=cache) for n in (6, 8)], 1)
    torch.testing.assert_close(went_on, member.forward(ids.flip(0))[:, 6:10], rtol=0, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["DeepseekV32", "GlmMoeDsa"])
def test_an_index_moves_with_its_keys(kind: str) -> None:
    member, ids = Member(made(kind), "base"), prompts("DeepseekV4")["input_ids"]
    cache, columns = empty_cache(member.config), RaggedCache(torch.tensor([6, 6]), 6, None)
    member.forward(ids[:, :6], cache=cache)
    member.forward(ids[:, 6:10], cache=cache)
    columns.settle([(cache, 4)], kept=[4, 1], going=[True, True])  # the second row goes back by three
    new = torch.stack([ids[0, 10:], ids[1, 7:9]])
    logits = member.forward(new, attention_mask=columns.mask(2), position_ids=columns.positions(2), cache=cache)
    for row, text in ((0, ids[:1]), (1, ids[1:, :9])):
        torch.testing.assert_close(logits[row], member.forward(text)[0, -2:], rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", ["DeepseekV32", "dory"])
def test_rows_that_keep_different_numbers_of_drafts(kind: str) -> None:
    model, reference = composed(kind)
    loop = SpeculativeDecoding(draft="expert", draft_tokens=3)
    out = model.generate(**prompts(kind), **GIVEN, custom_generate=loop)
    assert torch.equal(out, reference.generate(**prompts(kind), **GIVEN))


@pytest.mark.filterwarnings("ignore:the expert is larger than the base")
def test_a_base_is_right() -> None:
    model, reference = composed("DeepseekV32", made("DeepseekV4"))
    given = prompts("DeepseekV4")
    assert torch.equal(model.generate(**given, **GIVEN), reference.generate(**given, **GIVEN))


def test_passes_of_a_loop_have_layers_of_their_own_in_a_composite_cache() -> None:
    model, reference = composed("dory")
    ids = prompts("dory", rows=1)["input_ids"]
    cache = DynamicCache(config=model.config)
    out = model(ids[:, :9], **{CACHE: cache})
    for i in range(9, LENGTH):
        out = model(ids[:, i : i + 1], **{CACHE: cache_of(out)})
        torch.testing.assert_close(out.logits[0, -1], reference.after(ids[0, : i + 1]), rtol=0, atol=1e-4)
    assert len(cache.layers) == 2 + 2 * 8  # llama's, and 4 layers, two of them in three passes
    assert cached_layers(model.expert.config) == 8


@pytest.mark.parametrize("kind", BY_COLUMN)
def test_padding_of_layers_that_group_tokens_by_column(kind: str) -> None:
    model, _ = composed(kind)
    given = prompts("DeepseekV32")
    with pytest.raises(UnsupportedModeError, match="left padding for the expert: .* by their column"):
        model.generate(**given, **GIVEN)
    processor = ProxyTuningLogitsProcessor(
        model.expert, antiexpert=model.antiexpert, alpha=ALPHA, check_vocabulary=False, **given_mask(given)
    )
    with pytest.raises(UnsupportedModeError, match="left padding for the expert"):
        model.base.generate(**given, **GIVEN, logits_processor=[processor])
    loop = SpeculativeDecoding(draft="expert", draft_tokens=3)
    with pytest.raises(UnsupportedModeError, match="speculation in a batch for the expert"):
        model.generate(**prompts(kind), **GIVEN, custom_generate=loop)


def given_mask(given: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {"attention_mask": given["attention_mask"]}


def test_compressed_layers_have_no_static_cache() -> None:
    model, _ = composed("DeepseekV4")
    with pytest.raises(UnsupportedModeError, match="a static cache for the expert: .* compressed_sparse_attention"):
        model.generate(**prompts("DeepseekV4"), **GIVEN, cache_implementation="static")
    cache = StaticCache(config=model.base.config, max_cache_len=32)
    with pytest.raises(UnsupportedModeError, match="a static cache for the expert"):
        model(prompts("DeepseekV4")["input_ids"], **{CACHE: cache})


def test_a_static_cache_on_which_a_model_fails() -> None:
    model, _ = composed("inkling")
    with pytest.raises(UnsupportedModeError, match=r"a static cache for the expert: .* fails there \(RuntimeError"):
        model.generate(**prompts("inkling"), **GIVEN, cache_implementation="static")


def test_a_loop_that_reads_what_its_last_pass_wrote() -> None:
    one = looped("dory", 1, recurrent_kv_cache_mode="last_loop")
    base = large(one.config.vocab_size)
    with pytest.raises(UnsupportedModelError, match="six tokens in one pass, and in two passes over a cache"):
        proxytune.wrap(base, expert=one, antiexpert=shared_looped("dory", 2), check_vocabulary=False)
