"""What speculation leaves in caches, where it runs out of positions, what it costs, and how often the host waits."""

import copy
from typing import Any

import pytest
import torch
from support.speculation import composed, draft, members, near, prompts, slow, steered
from support.tiny import PAD, build
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache, StoppingCriteria

import proxytune
from proxytune import SpeculativeDecoding, ops
from proxytune.costs.speculation import DraftCosts
from proxytune.errors import CacheError, InputError, UnsupportedModeError
from proxytune.methods.speculation import BigramDraft, ModelDraft, PromptLookupDraft
from proxytune.methods.speculation.draft_length import DraftLength
from proxytune.methods.speculation.progress import RowProgress
from proxytune.methods.speculation.ragged_cache import refuse_cache
from proxytune.models.members.cache_name import CACHE

NEW = 14


def run(model: Any, ids: torch.Tensor, mask: Any = None, loop: Any = None, **kwargs: Any) -> Any:
    loops = {} if loop is None else {"custom_generate": loop}
    settings = {"max_new_tokens": NEW, "pad_token_id": PAD, "do_sample": False, "eos_token_id": None} | kwargs
    return model.generate(ids, attention_mask=mask, **settings, **loops)


# --- caches ---------------------------------------------------------------------------------------------------------


@pytest.mark.smoke
@pytest.mark.parametrize("kind", ["gemma3", "gpt2"])
@pytest.mark.parametrize("pads", [0, 4])
def test_a_conversation_with_the_cache_passed_on(kind: str, pads: int) -> None:
    model = composed(kind)
    ids, mask = prompts(1)
    ids = torch.nn.functional.pad(ids, (pads, 0), value=PAD)
    mask = torch.nn.functional.pad(mask, (pads, 0))
    loop, cache = SpeculativeDecoding(draft_tokens=3), None
    for turn in range(3):
        want = run(model, ids, mask)
        out = run(model, ids, mask, loop, **{CACHE: cache}, return_dict_in_generate=True)
        assert torch.equal(out.sequences, want), f"turn {turn}"
        cache = out.past_key_values
        assert int(cache.get_seq_length()) == want.shape[1] - 1
        assert not any(getattr(layer, "record_past", False) for layer in cache.layers)
        ids = torch.cat([want, torch.randint(3, 240, (1, 4))], 1)
        mask = torch.nn.functional.pad(mask, (0, ids.shape[1] - mask.shape[1]), value=1)
    # Plain decoding takes it over too, and so does speculation that gets only what the cache has not seen.
    assert torch.equal(run(model, ids, mask, **{CACHE: copy.deepcopy(cache)}), run(model, ids, mask))
    new = ids[:, int(cache.get_seq_length()) :]
    got = run(model, new, mask, loop, **{CACHE: copy.deepcopy(cache)})
    assert torch.equal(got[:, new.shape[1] :], run(model, ids, mask)[:, ids.shape[1] :])
    with pytest.raises(InputError, match="input_ids: expected the ids of the whole text, for a draft with a cache"):
        run(model, new, mask, SpeculativeDecoding(draft=draft("good", kind)), **{CACHE: cache})


@pytest.mark.smoke
@pytest.mark.parametrize("kind", ["mistral", "llama"])
def test_a_batchs_cache_is_not_for_going_on_from(kind: str) -> None:
    # Its rows are not where the sequences have them: who made it must not go on from it unawares.
    model, (ids, mask) = composed(kind), prompts()
    for one in (model, model.base):
        cache = DynamicCache(config=one.config)
        loop = SpeculativeDecoding(draft=PromptLookupDraft(1, 1), draft_tokens=3)
        out = run(one, ids, mask, loop, **{CACHE: cache}, return_dict_in_generate=True)
        assert out.past_key_values is None
        assert int(cache.get_seq_length()) == 0
        longer = torch.cat([out.sequences, ids[:, -3:]], 1)
        more = torch.nn.functional.pad(mask, (0, NEW + 3), value=1)
        assert torch.equal(run(one, longer, more, **{CACHE: cache}), run(one, longer, more))


class Interrupts(StoppingCriteria):
    """Ctrl-C, between a pass over drafts and the verdict about them."""

    def __init__(self) -> None:
        self.left = 18

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        self.left -= 1
        if not self.left:
            raise KeyboardInterrupt
        return torch.zeros(len(input_ids), dtype=torch.bool)


@pytest.mark.parametrize("rows", [1, 4])
def test_an_interruption_leaves_no_drafts_in_the_cache(rows: int) -> None:
    model, (ids, mask) = composed("mistral"), prompts(rows)
    want = run(model, ids, mask)
    cache = DynamicCache(config=model.config)
    loop = SpeculativeDecoding(
        draft=PromptLookupDraft(longest=2, shortest=1), draft_tokens=4
    )  # as many columns in each layer
    with pytest.raises(KeyboardInterrupt):
        run(model, ids, mask, loop, **{CACHE: cache}, stopping_criteria=[Interrupts()], max_new_tokens=40)
    assert {layer.get_seq_length() for layer in cache.layers} == {0}
    assert not any(layer.record_past for layer in cache.layers)  # mistral has windows throughout
    assert torch.equal(run(model, ids, mask, **{CACHE: cache}), want)


def test_a_batch_goes_on_from_a_filled_cache() -> None:
    model, (ids, mask) = composed("mistral"), prompts()
    first = run(model, ids, mask, return_dict_in_generate=True)
    text = torch.cat([first.sequences, ids[:, -4:]], 1)
    longer = torch.nn.functional.pad(mask, (0, NEW + 4), value=1)
    want = run(model, text, longer)
    for draft_ in ("expert", PromptLookupDraft(2, 1)):
        loop = SpeculativeDecoding(draft=draft_, draft_tokens=3)
        assert torch.equal(run(model, text, longer, loop, **{CACHE: copy.deepcopy(first.past_key_values)}), want)


def test_prompts_in_chunks() -> None:
    model, (ids, mask) = composed("gemma3"), prompts()
    for name in ("expert", "good"):
        loop = SpeculativeDecoding(draft=draft(name, "gemma3"), draft_tokens=3)
        assert torch.equal(run(model, ids, mask, loop, prefill_chunk_size=5), run(model, ids, mask))


@pytest.mark.smoke
@pytest.mark.parametrize(("settings", "got"), [({"use_cache": False}, r"none \(use_cache=False\)")])
def test_caches_that_nothing_can_be_taken_out_of(settings: dict[str, Any], got: str) -> None:
    for model in (composed("llama"), composed("llama").base):
        loop = SpeculativeDecoding(draft=PromptLookupDraft())
        with pytest.raises(CacheError, match=f"{CACHE}: expected a DynamicCache or StaticCache, .*; got {got}"):
            run(model, *prompts(), loop, **settings)


def test_offloaded_and_recurrent_caches() -> None:
    cache = DynamicCache()
    refuse_cache(cache)
    cache.offloading = True
    with pytest.raises(CacheError, match="got a DynamicCache of offloaded layers"):
        refuse_cache(cache)
    with pytest.raises(UnsupportedModeError, match="for the model: .* conv layers. Pass one prompt at a time"):
        run(build("lfm2", 1), *prompts(), SpeculativeDecoding(draft=PromptLookupDraft()))
    draft = SpeculativeDecoding(draft=ModelDraft(build("mamba", 1)))
    with pytest.raises(UnsupportedModeError, match="in a batch for the draft: .* linear_attention layers"):
        run(build("llama", 1), *prompts(), draft)


# --- positions ------------------------------------------------------------------------------------------------------


@pytest.mark.smoke
@pytest.mark.parametrize("name", ["expert", "lookup", "own"])
def test_rows_that_have_ended_do_not_run_out_of_positions(name: str) -> None:
    """A long row ends early; the others go on for longer than its positions would last."""
    trio = [near("gpt2", seed, noise, context=40) for seed, noise in ((0, 0.0), (2, 0.1), (3, 0.1))]
    model = proxytune.wrap(trio[0], expert=trio[1], antiexpert=trio[2], alpha=0.5, check_vocabulary=False)
    ids, mask = prompts(4, 34)
    for row in range(1, 4):
        ids[row, :29], mask[row, :29] = PAD, 0
    first = int(run(model, ids[:1], mask[:1], max_new_tokens=2)[0, -1])
    alone = [run(model, ids[r : r + 1, 29:], None, max_new_tokens=34, eos_token_id=first) for r in range(1, 4)]
    loop = SpeculativeDecoding(
        draft={"expert": "expert", "lookup": PromptLookupDraft(1, 1), "own": ModelDraft(trio[0])}[name], draft_tokens=9
    )
    out = run(model, ids, mask, loop, max_new_tokens=34, eos_token_id=first)
    assert out[0, 34:].tolist()[:3] == [*run(model, ids[:1], mask[:1], max_new_tokens=2)[0, -2:].tolist(), PAD]
    for row, want in zip(out[1:, 34:], alone, strict=True):
        n = want.shape[1] - 5
        assert torch.equal(row[:n], want[0, 5:])
        assert (row[n:] == PAD).all()


def test_a_row_may_use_its_context_up_while_another_has_ended() -> None:
    trio = [near("gpt2", seed, noise, context=34) for seed, noise in ((0, 0.0), (2, 0.1), (3, 0.1))]
    model = proxytune.wrap(trio[0], expert=trio[1], antiexpert=trio[2], alpha=0.5, check_vocabulary=False)
    ids, mask = prompts(3, 20)
    for loop in (
        SpeculativeDecoding(draft_tokens=5),
        SpeculativeDecoding(draft=PromptLookupDraft(1, 1), draft_tokens=7),
    ):
        assert torch.equal(run(model, ids, mask, loop, max_new_tokens=14), run(model, ids, mask, max_new_tokens=14))
    with pytest.raises(InputError, match="length for the base: expected at most 34 tokens"):
        run(model, ids, mask, SpeculativeDecoding(draft_tokens=5), max_new_tokens=16)


@pytest.mark.parametrize("rows", [1, 2])
def test_positions_of_ones_own(rows: int) -> None:
    ids, mask = prompts(rows)
    places = (mask.cumsum(1) - 1).clamp(min=0) + torch.tensor([[7], [3]])[:rows]
    for model, d in ((composed("gpt2"), "expert"), (members("gpt2")[0], PromptLookupDraft(1, 1))):
        want = run(model, ids, mask, position_ids=places)
        assert not torch.equal(want, run(model, ids, mask))
        assert torch.equal(run(model, ids, mask, SpeculativeDecoding(draft=d), position_ids=places), want)


@pytest.mark.smoke
def test_a_draft_with_a_shorter_context_falls_silent() -> None:
    model, (ids, mask) = composed("llama"), prompts()
    loop = SpeculativeDecoding(draft=ModelDraft(near("llama", 4, 0.1, context=18)), draft_tokens=3)
    out = run(model, ids, mask, loop, return_dict_in_generate=True)
    assert torch.equal(out.sequences, run(model, ids, mask))
    assert out.draft_lengths[0] == 3
    assert out.draft_lengths[-2:] == [0, 0]
    with pytest.raises(InputError, match="length for the draft: expected at most 11 tokens"):
        run(model, ids, mask, SpeculativeDecoding(draft=ModelDraft(near("llama", 4, 0.1, context=11))))


@pytest.mark.parametrize("settings", [{}, {"do_sample": True, "top_k": 80}])
def test_a_draft_that_knows_fewer_ids_than_the_text_has(settings: dict[str, Any]) -> None:
    model, (ids, mask) = composed("llama"), prompts()
    assert int(ids.max()) > 60
    loop = SpeculativeDecoding(draft=draft("short", "llama"), draft_tokens=2, seed=1)
    out = run(model, ids, mask, loop, **settings)
    assert int(out[:, 12:].max()) > 60
    if not settings:
        assert torch.equal(out, run(model, ids, mask))


# --- work -----------------------------------------------------------------------------------------------------------


@pytest.mark.smoke
def test_what_each_member_runs_over(monkeypatch: pytest.MonkeyPatch) -> None:
    model, (ids, mask) = composed("llama"), prompts()
    got: list[list[int]] = []
    inner = RowProgress.commit

    def commit(rows: RowProgress, result: Any) -> Any:
        found = inner(rows, result)
        got.append(found.kept)
        return found

    monkeypatch.setattr(RowProgress, "commit", commit)
    passes: dict[str, list[torch.Tensor]] = {m.role: [] for m in model.members}
    hooks = [
        m.model.register_forward_pre_hook(
            lambda mod, args, kwargs, role=m.role: passes[role].append(kwargs["input_ids"].clone()), with_kwargs=True
        )
        for m in model.members
    ]
    before = model.token_forwards
    try:
        out = run(model, ids, mask, SpeculativeDecoding(draft_tokens=3), return_dict_in_generate=True)
    finally:
        for hook in hooks:
            hook.remove()
    assert len(passes["base"]) == len(passes["antiexpert"]) == out.rounds
    own = iter(passes["expert"][1:])
    singly = 0
    rounds = zip(out.draft_lengths, passes["base"][1:], passes["antiexpert"][1:], got[1:], strict=True)
    for k, base, anti, new in rounds:
        assert base.shape == (4, k + 1)
        assert torch.equal(base, anti)
        # Over the last draft only if some row has come to a token behind it; without drafts that is every round.
        singles = [next(own) for _ in range(k + (max(new) == k + 1))]
        singly += len(singles)
        assert all(x.shape == (4, 1) for x in singles)
        # What a row has no room for is drafted, and not shown to the others.
        shown = base[:, : len(singles)]
        assert ((torch.cat(singles, 1) == shown) | (shown == PAD)).all()
    assert next(own, None) is None
    assert len({max(new) - k for k, new in zip(out.draft_lengths, got[1:], strict=True)}) > 1  # both happened
    assert not (passes["base"][1] == PAD).any()
    spent = {role: n - before[role] for role, n in model.token_forwards.items()}
    tokens = 4 * (12 + sum(k + 1 for k in out.draft_lengths))
    assert spent == {"base": tokens, "expert": 4 * (12 + singly), "antiexpert": tokens}


class Reads(TorchDispatchMode):
    """Counts what would wait for a GPU outside of the decisions, which on the CPU read by design."""

    def __init__(self) -> None:
        super().__init__()
        self.reads = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.reads += func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("settings", [{}, {"do_sample": True, "top_k": 20}])
def test_the_host_waits_once_per_round(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = members("llama")[0], prompts(2)[0]
    lists = [0]
    inner = torch.Tensor.tolist

    def tolist(tensor: torch.Tensor) -> Any:
        lists[0] += 1
        return inner(tensor)

    def step(rows: Any, weights: Any = (1.0,), **kwargs: Any) -> ops.StepOutput:
        return ops.StepOutput(tokens=rows[0].argmax(-1, keepdim=True))

    def verify(rows: Any, weights: Any, *, drafted: torch.Tensor, **kwargs: Any) -> ops.VerifyOutput:
        tokens = rows[0].argmax(-1).view(len(drafted), -1)
        accepted = (drafted == tokens[:, :-1]).long().cumprod(1).sum(1)
        behind = torch.arange(tokens.shape[1]) > accepted[:, None]
        return ops.VerifyOutput(tokens.masked_fill(behind, -1), accepted)

    monkeypatch.setattr(ops, "step", step)
    monkeypatch.setattr(ops, "verify", verify)
    table = BigramDraft.of(model)
    monkeypatch.setattr(torch.Tensor, "tolist", tolist)
    found = []
    for new in (6, 14):
        lists[0], reads = 0, Reads()
        with reads:
            out = run(model, ids, torch.ones_like(ids), SpeculativeDecoding(draft=table, draft_tokens=2, seed=0),
                      max_new_tokens=new, return_dict_in_generate=True, **settings)  # fmt: skip
        found.append((out.rounds, lists[0], reads.reads))
    more = found[1][0] - found[0][0]
    assert more > 2
    assert found[1][1] - found[0][1] == more


# --- how many to draft ----------------------------------------------------------------------------------------------


@pytest.mark.smoke
def test_the_length_follows_the_acceptance() -> None:
    costs = DraftCosts(round=1.0, draft=0.1, position=0.05)

    def after(accepted: int, rejected: int, times: int) -> int:
        length = DraftLength(costs, None)
        for _ in range(times):
            length.learn(accepted, rejected)
        return length.choose(99)

    assert after(9, 0, 40) == 16
    assert after(1, 1, 40) in (2, 3)
    assert after(0, 1, 60) == 0
    assert after(9, 1, 20) > after(3, 1, 20) > after(1, 2, 20)
    # Where it does not pay, it rests, tries again with one, and comes back when the text becomes easier.
    length = DraftLength(costs, None)
    for _ in range(100):
        length.learn(0, 1)
    tried = [length.choose(99) for _ in range(51)]
    assert tried == ([0] * 16 + [1]) * 3
    for _ in range(100):
        length.learn(1, 0)
    assert length.choose(99) > 3
    assert length.choose(2) == 2
    assert DraftLength(costs, 5).choose(99) == 5
    assert DraftLength(costs, 5).choose(3) == 3


def test_slow_and_fast_agree_on_a_text_of_changing_lengths() -> None:
    model, (ids, mask) = composed("llama"), prompts()
    loop = SpeculativeDecoding(costs=DraftCosts(round=1.0, draft=0.05))
    out = run(model, ids, mask, loop, max_new_tokens=30, return_dict_in_generate=True)
    assert torch.equal(out.sequences, slow(steered("llama"), ids, mask, 30))
    assert len(set(out.draft_lengths)) > 2
