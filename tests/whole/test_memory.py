"""What a composition takes: one row of float32 logits per text, parts of a long one, and no more than its members.

Counted by `live_bytes.counted` on the CPU; on a GPU by CUDA's own allocator.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from bench_memory import llama, weights
from live_bytes import counted
from support.tiny import build
from torch.nn.functional import cross_entropy
from transformers import DynamicCache, PreTrainedModel

import proxytune
from proxytune import FusedDecoding, ProxyTuningLogitsProcessor, ops
from proxytune.errors import InputError
from proxytune.models import chunked_forward as parting
from proxytune.models.members.cache_name import CACHE

ROWS, WIDTH = 16, 32_768
UNIT = ROWS * WIDTH * 4  # [B, V] in float32
PLAIN = {"check_vocabulary": False, "alpha": 0.5}


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    """The blocks that torch combines on the CPU are half a megabyte per thread; a `UNIT` is two."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)


def units(work: Callable[[], object]) -> float:
    """The most `[B, V]` tensors of float32 at once. The members' own logits, in bfloat16, are half as large."""
    with counted(least=UNIT) as live:
        work()
    return live.peak / UNIT


@pytest.fixture(scope="module")
def members() -> dict[str, PreTrainedModel]:
    roles = ("base", "expert", "antiexpert")
    return {role: build("llama", seed, WIDTH).bfloat16() for seed, role in enumerate(roles)}


def test_a_combination_makes_one_row(members: dict[str, PreTrainedModel]) -> None:
    rows = [torch.randn(ROWS, WIDTH).to(dtype) for dtype in (torch.bfloat16, torch.float32, torch.bfloat16)]
    for alpha in (1.0, 0.5, -2.0):
        assert units(lambda a=alpha: ops.combine(rows, (a, -a))) == 1
        assert units(lambda a=alpha: ops.step(rows, (1.0, a, -a), want=("scores",))) == 1
    # In a graph, values may not be looked at, and what compiles the model fuses these: there the counter sees several.
    graph = [rows[0].requires_grad_(), *rows[1:]]
    with torch.enable_grad():
        assert torch.equal(ops.combine(graph, (0.5, -0.5)), ops.combine(rows, (0.5, -0.5)))
    logits = rows[1].clone()
    want = logits.log_softmax(-1)
    assert units(lambda: ops.normalise_(logits)) == 0
    torch.testing.assert_close(logits, want, atol=2e-6, rtol=0)


def test_infinities_are_masked_in_parts_as_in_the_whole() -> None:
    rows = [torch.randn(ROWS, WIDTH) for _ in range(3)]
    for number, (row, value) in enumerate(zip(rows, (-torch.inf, torch.inf, torch.nan), strict=True)):
        row[3, 1000 * number : 1000 * number + 2000] = value
        row[number, 5] = -torch.inf
    narrow = [rows[0], rows[1][:, :-300], rows[2]]
    base, expert, antiexpert = narrow
    found = ops.combine(narrow, (0.5, -0.5))
    width = expert.shape[1]
    silent = (base == -torch.inf)[:, :width] | (expert == -torch.inf) | (antiexpert[:, :width] == -torch.inf)
    delta = expert * 0.5 - antiexpert[:, :width] * 0.5
    want = base.clone()
    want[:, :width] += delta.masked_fill(delta == -torch.inf, torch.nan).masked_fill(silent, 0.0)
    assert torch.equal(found.nan_to_num(nan=7e7), want.nan_to_num(nan=7e7))
    assert want.isnan().any()


@pytest.mark.smoke
def test_a_decode_step_makes_one_row(members: dict[str, PreTrainedModel]) -> None:
    model, base = proxytune.wrap(**members, **PLAIN), members["base"]
    ids = torch.randint(3, 240, (ROWS, 6))
    run = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 3, "eos_token_id": None}
    cache = DynamicCache(config=model.config)
    assert units(lambda: model(ids, **{CACHE: cache}, logits_to_keep=1)) == 1
    assert units(lambda: model(ids[:, :1], **{CACHE: cache})) == 1
    # The fused loop makes none at all: blocks of them.
    for settings in ({"do_sample": False}, {"do_sample": True, "top_k": 50, "top_p": 0.9, "temperature": 0.7}):
        assert units(lambda s=settings: model.generate(ids, custom_generate=FusedDecoding(seed=0), **run, **s)) == 0
    # In transformers' loop, one more than what that makes of the base's own.
    for settings in ({"do_sample": False}, {"do_sample": True}):
        alone = units(lambda s=settings: base.generate(ids, **run, **s))
        assert units(lambda s=settings: model.generate(ids, **run, **s)) == alone + 1
        companions = (members["expert"], members["antiexpert"], 0.5)
        attached = ProxyTuningLogitsProcessor(*companions, check_vocabulary=False)
        with attached.attach(base):
            assert units(lambda s=settings: base.generate(ids, **run, **s)) <= alone + 1
        dropped = ProxyTuningLogitsProcessor(*companions, check_vocabulary=False, attention_mask=run["attention_mask"])
        assert units(lambda s=settings, p=dropped: base.generate(ids, logits_processor=[p], **run, **s)) <= alone + 1


# --- a long text in parts ------------------------------------------------------------------------------------------


@pytest.fixture
def short_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parting, "PART", 32)


@pytest.mark.usefixtures("short_parts")
@pytest.mark.parametrize("labelled", [False, True])
def test_scoring_takes_what_it_returns_and_a_part(labelled: bool) -> None:
    width, ids = 8_192, torch.randint(3, 240, (2, 256))
    roles = {role: build("llama", seed, width).bfloat16() for seed, role in enumerate(("base", "expert", "antiexpert"))}
    model = proxytune.wrap(**roles, **PLAIN)
    with counted() as live:
        out = model(ids, labels=ids if labelled else None, use_cache=False)
    # Beside a part's combined logits those of the members in bfloat16 and a block, or what the loss makes of them.
    part = 32 * width * 4
    assert out.logits is not None
    assert out.logits.numel() * 4 <= live.peak <= out.logits.numel() * 4 + 5 * part
    assert 5 * part < out.logits.numel() * 4 / 3


@pytest.mark.usefixtures("short_parts")
@pytest.mark.parametrize(
    "kind", ["llama", "gpt2", "mistral", "gemma3"]
)  # full layers, windows, both, learned positions
@pytest.mark.parametrize("mode", ["plain", "padded", "past", "no-cache", "static"])
def test_parts_are_lossless(kind: str, mode: str) -> None:
    roles = {role: build(kind, seed) for seed, role in enumerate(("base", "expert", "antiexpert"))}
    model = proxytune.wrap(**roles, **PLAIN)
    ids = torch.randint(3, 240, (2, 77))  # 16 positions a part, and 13 at the end
    mask = torch.ones_like(ids)
    if mode == "padded":
        mask[0, :20] = 0  # a whole part of padding
    logits = {role: m(ids, attention_mask=mask, **positions(m, mask)).logits for role, m in roles.items()}
    want = logits["base"] + 0.5 * (logits["expert"] - logits["antiexpert"])  # [B, T, V]
    labels = ids.masked_fill(mask == 0, -100)
    labels[1, 30:70] = -100  # two parts without one
    loss = cross_entropy(want[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
    with torch.no_grad():
        if mode == "past":
            cache = DynamicCache(config=model.config)
            model(ids[:, :9], **{CACHE: cache})
            out = model(ids[:, 9:], attention_mask=mask, **{CACHE: cache}, labels=labels[:, 9:])
            loss = cross_entropy(want[:, 9:-1].flatten(0, 1), labels[:, 10:].flatten(), ignore_index=-100)
            want, mask = want[:, 9:], mask[:, 9:]
        elif mode == "static":
            out = model(ids, attention_mask=mask, **{CACHE: static(model, 90)}, labels=labels)
        else:
            out = model(ids, attention_mask=mask, labels=labels, use_cache=mode != "no-cache")
        assert out.logits is not None
        there = mask == 1
        torch.testing.assert_close(out.logits[there], want[there], atol=2e-4, rtol=1e-4)
        torch.testing.assert_close(out.loss, loss, atol=1e-5, rtol=1e-5)
        assert (out.past_key_values is None) == (mode == "no-cache")
        if out.past_key_values is not None:
            assert out.past_key_values.get_seq_length() == 77
    # With a gradient wanted the text goes through at once, and the gradient is there.
    model(ids, labels=labels).loss.backward()
    assert all(m.get_input_embeddings().weight.grad is not None for m in roles.values())


@pytest.mark.usefixtures("short_parts")
def test_what_cannot_be_scored_is_refused_before_the_first_part() -> None:
    kinds = {"base": build("llama", 0), "expert": build("llama", 1, context=40), "antiexpert": build("llama", 2)}
    model = proxytune.wrap(**kinds, **PLAIN)
    ids = torch.randint(3, 240, (2, 45))
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        with pytest.raises(InputError, match="length for the expert: expected at most 40 tokens .*; got 45"):
            model(ids, **{CACHE: cache})
        assert cache.get_seq_length() == 0
        for labels in (ids[:, :31], ids[:1, :40]):  # in parts, the first would be the loss of a part of the text
            with pytest.raises(InputError, match=r"labels: expected the shape of input_ids, \[2, 40\]; got \["):
                model(ids[:, :40], labels=labels)
    assert model.token_forwards == {"base": 0, "expert": 0, "antiexpert": 0}


def positions(model: PreTrainedModel, mask: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}


def static(model: Any, length: int) -> Any:
    from transformers import StaticCache

    return StaticCache(config=model.config, max_cache_len=length)


def test_short_texts_are_not_parted(members: dict[str, PreTrainedModel], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("proxytune.models.members_pass.forward_in_parts", lambda *_, **__: pytest.fail("in parts"))
    model = proxytune.wrap(**members, **PLAIN)
    with torch.no_grad():
        model(torch.randint(3, 240, (2, 4)))
        model(torch.randint(3, 240, (8, 200)), logits_to_keep=1)


# --- the whole composition ------------------------------------------------------------------------------------------


LOOPS = {"transformers": None, "fused": FusedDecoding(seed=0)}


@pytest.mark.slow
def test_a_composition_takes_no_more_than_its_members() -> None:
    """Weights, caches and activations together: at most 5 % above the sum of what the members take alone."""
    # Width, vocabulary and text of half the size of a text of 512: weights and activations keep their ratio.
    torch.set_num_threads(1)  # the blocks of the combination hardly count here, and two workers have two cores
    base, expert, antiexpert = llama(1, 384, 8, 16_000), llama(2, 128, 4, 16_000), llama(3, 128, 4, 16_000)
    roles = {"base": base, "expert": expert, "antiexpert": antiexpert}
    model = proxytune.wrap(**roles, **PLAIN)

    def peak(model: Any, ids: torch.Tensor, **run: Any) -> int:
        with counted() as live:
            model.generate(ids, **run)
        return live.peak

    for rows in (1, 8):
        ids = torch.randint(3, 16_000, (rows, 256))
        run: dict[str, Any] = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 3, "do_sample": False}
        alone = {role: weights(m) + peak(m, ids, **run) for role, m in roles.items()}
        every = sum(map(weights, roles.values()))
        for loop in LOOPS.values():
            for chunk in (None, 64):
                together = every + peak(model, ids, prefill_chunk_size=chunk, custom_generate=loop, **run)
                share = together / sum(alone.values())
                assert share <= 1.05
                # One member's activations at a time: also less than the base alone with the others' weights and caches.
                held = sum(weights(roles[r]) for r in ("expert", "antiexpert"))
                caches = 2 * 2 * rows * 259 * 4 * 64 * 2  # members, keys and values, rows, tokens, layers, sizes, bytes
                assert together <= 1.02 * (alone["base"] + held + caches)
        processor = ProxyTuningLogitsProcessor(roles["expert"], roles["antiexpert"], 0.5, check_vocabulary=False)
        with processor.attach(roles["base"]):
            assert every + peak(roles["base"], ids, **run) <= 1.05 * sum(alone.values())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_composition_takes_no_more_than_its_members_on_a_gpu() -> None:
    roles = {"base": llama(1, 1536, 16), "expert": llama(2, 512, 8), "antiexpert": llama(3, 512, 8)}

    def peak(model: Any, ids: torch.Tensor, **run: Any) -> int:
        model.generate(ids, **run)  # once before: the libraries' workspaces
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        model.generate(ids, **run)
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated()

    for rows in (1, 8):
        ids = torch.randint(3, 32_000, (rows, 512), device="cuda")
        run: dict[str, Any] = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 8, "do_sample": False}
        alone = 0
        for member in roles.values():
            before = torch.cuda.memory_allocated()
            alone += peak(member.cuda(), ids, **run) - before
            member.cpu()
        before = torch.cuda.memory_allocated()
        model = proxytune.wrap(**{role: member.cuda() for role, member in roles.items()}, **PLAIN)
        for loop in LOOPS.values():
            together = peak(model, ids, custom_generate=loop, **run) - before
            assert together <= 1.05 * alone
        for member in roles.values():
            member.cpu()
