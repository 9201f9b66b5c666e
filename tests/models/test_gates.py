"""A gated shift is `softmax(z_b + α·1[H_b > h]·(z_e − z_a))` in every mode, and companions run only where it opens.

The truth is a cache-free reference in float64; where a mode has no such reference, companions that run along are one.
"""

from __future__ import annotations

import copy
import functools
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.fused import padded
from support.reference import Reference
from support.speculation import p_value
from support.tiny import build, shared

import proxytune
from proxytune import (
    ForkDecoding,
    ForkSamplingLogitsProcessor,
    FusedDecoding,
    LatentDecoding,
    ProxyTuningLogitsProcessor,
    SiblingDecoding,
    SpeculativeDecoding,
)
from proxytune.errors import CacheError, InputError
from proxytune.formulas import ClassifierFreeGuidance, DExperts, Gate, ProxyTuning, Schedule
from proxytune.methods.speculation import ModelDraft, PromptLookupDraft
from proxytune.models.gate_calibration import base_entropies, calibrate_gate
from proxytune.models.members.cache_name import CACHE, cache_of
from proxytune.models.members.composite_cache import is_lazy
from proxytune.models.scoring import score

ALPHA, NEW = 0.7, 10
GATES = {"entropy": Gate(entropy=4.35), "top1": Gate(top1=0.05)}
KINDS = (("llama", 1, 256), ("gpt2", 2, 250), ("llama", 3, 250))
SAMPLE: dict[str, Any] = {"do_sample": True, "top_k": 40}


def members() -> list[Any]:
    return [shared(*kind) for kind in KINDS]


@functools.cache
def model_of(gate: Gate | None = GATES["entropy"], alpha: Any = ALPHA) -> Any:
    base, expert, antiexpert = members()
    return proxytune.wrap(
        base, expert=expert, antiexpert=antiexpert, alpha=alpha, gate=gate, check_vocabulary=False, self_test=False
    )


def is_open(gate: Gate, z: torch.Tensor) -> bool:
    p = z.detach().double().softmax(-1)
    if gate.entropy is not None:
        return float(-(p * p.log()).nan_to_num().sum()) > gate.entropy
    return float(p.max()) < gate.top1


class Gated(Reference):
    """The law, written out, one prefix at a time."""

    gate: Gate

    @torch.no_grad()
    def after(self, ids: torch.Tensor) -> torch.Tensor:
        memo, prefix = self.__dict__["memo"], tuple(ids.tolist())
        if prefix not in memo:
            zb, ze, za = (m(ids[None], use_cache=False).logits[0, -1] for m in self.__dict__["members"])
            out = zb.clone()
            if is_open(self.gate, zb):
                out[:250] += self.alpha * (ze - za)
            out[250:] = -torch.inf
            memo[prefix] = out.float()
        return memo[prefix]


@functools.cache
def truth(name: str) -> Gated:
    model = Gated([copy.deepcopy(m).double() for m in members()], ALPHA)
    model.gate = GATES[name]
    return model


def run(model: Any, rows: slice = slice(None), seed: int = 3, **settings: Any) -> Any:
    ids, mask = padded()
    torch.manual_seed(seed)
    given = {"max_new_tokens": NEW, "eos_token_id": None, "do_sample": False}
    return model.generate(ids[rows], attention_mask=mask[rows], **given | settings)


def passes(model: Any, call: Callable[[], Any]) -> dict[str, list[int]]:
    """For each role how many columns each of its passes read."""
    seen: dict[str, list[int]] = {m.role: [] for m in model.members}
    hooks = [
        m.model.register_forward_pre_hook(
            lambda _, args, kwargs, role=m.role: seen[role].append(kwargs["input_ids"].shape[1]), with_kwargs=True
        )
        for m in model.members
    ]
    try:
        call()
    finally:
        for hook in hooks:
            hook.remove()
    return seen


# --- the law ---------------------------------------------------------------------------------------------------------


@pytest.mark.smoke
@pytest.mark.parametrize("name", GATES)
def test_every_position_of_a_text(name: str) -> None:
    ids, mask = padded()
    want = torch.stack(
        [truth(name)(ids[:, :n], attention_mask=mask[:, :n]).logits[:, 0] for n in range(10, ids.shape[1] + 1)], 1
    )
    model, close = model_of(GATES[name]), functools.partial(torch.testing.assert_close, atol=1e-4, rtol=1e-4)
    along = model(ids, attention_mask=mask, logits_to_keep=3)  # with gradients, companions run along
    close(along.logits.detach(), want)
    with torch.no_grad():
        assert not is_lazy(cache_of(along))
        close(model(ids, attention_mask=mask, use_cache=False).logits[:, -3:], want)
        waited = model(ids, attention_mask=mask)
        assert is_lazy(cache_of(waited))
        close(waited.logits[:, -3:], want)
        close(model(ids, attention_mask=mask, logits_to_keep=torch.tensor([11, 10])).logits, want[:, [2, 1]])
        first = model(ids[:, :9], attention_mask=mask[:, :9])
        again = {CACHE: cache_of(first), "attention_mask": mask}
        close(model(ids[:, 9:], **again).logits, want)


def test_scores_of_texts() -> None:
    ids = padded()[0][0]
    logits = torch.cat([truth("entropy")(ids[None, :n]).logits[:, 0] for n in range(1, len(ids))])
    want = logits.log_softmax(-1).gather(1, ids[1:, None])[:, 0]
    torch.testing.assert_close(score(model_of(), [ids]).logprobs[0].float(), want, atol=1e-4, rtol=1e-4)


MODES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampling": SAMPLE,
    "beams": {"num_beams": 3, "num_return_sequences": 2},
    "several": SAMPLE | {"num_return_sequences": 2},
    "chunks": {"prefill_chunk_size": 5},
}


@pytest.mark.smoke
@pytest.mark.parametrize("name", GATES)
@pytest.mark.parametrize("mode", MODES)
def test_modes_of_transformers(name: str, mode: str) -> None:
    want = run(truth(name), **{k: v for k, v in MODES[mode].items() if k != "prefill_chunk_size"})
    assert torch.equal(run(model_of(GATES[name]), **MODES[mode]), want)
    base, expert, antiexpert = members()
    steering = ProxyTuningLogitsProcessor(
        expert, antiexpert, ALPHA, gate=GATES[name], check_vocabulary=False, self_test=False
    )
    with steering.attach(base):
        assert torch.equal(run(base, **MODES[mode]), want)


LOOPS: dict[str, Any] = {
    "fused": FusedDecoding(seed=1),
    "expert drafts": SpeculativeDecoding(draft_tokens=3, seed=1),
    "coupled": SpeculativeDecoding(draft_tokens=2, accept="coupled", seed=1),
    "lookup drafts": SpeculativeDecoding(draft=PromptLookupDraft(shortest=1), draft_tokens=3, seed=1),
}


@pytest.mark.parametrize("name", LOOPS)
def test_greedy_tokens_of_the_loops(name: str) -> None:
    assert torch.equal(run(model_of(), custom_generate=LOOPS[name]), run(truth("entropy")))


def test_a_model_that_drafts_for_transformers() -> None:
    want = run(truth("entropy"), slice(0, 1), do_sample=False)
    assert torch.equal(run(model_of(), slice(0, 1), assistant_model=shared("llama", 1)), want)
    assert torch.equal(run(model_of(), slice(0, 1), prompt_lookup_num_tokens=3), want)
    assert torch.equal(run(model_of(), slice(0, 1), assistant_model=model_of().expert), want)


TREES: dict[str, Any] = {
    "forks": ForkDecoding(threshold=4.0, branches=4, seed=2),
    "siblings": SiblingDecoding(threshold=4.0, siblings=3, seed=2),
}


@pytest.mark.parametrize("name", ["fused", "coupled", *TREES])
def test_samples_do_not_depend_on_when_companions_run(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = SAMPLE | {"custom_generate": (TREES | LOOPS)[name], "return_dict_in_generate": True}
    waited = run(model_of(), **settings)
    monkeypatch.setattr("proxytune.models.combined_logits.can_wait", lambda cache: False)
    assert torch.equal(waited.sequences, run(model_of(), **settings).sequences)


VOCAB, TEXT, ROWS = 6, torch.tensor([3, 5, 4, 3]), 3000


@functools.cache
def small(seed: int) -> Any:
    model = build("llama", seed, VOCAB)
    model.lm_head.weight.data.mul_(0.5)
    return model


@functools.cache
def enumerated(h: float) -> torch.Tensor:
    """`[V, V, V]`: the law of the next three tokens, and that the gate matters to it."""
    base, expert, antiexpert = (copy.deepcopy(small(s)).double() for s in (41, 42, 43))
    p, opened = torch.zeros(VOCAB, VOCAB, VOCAB, dtype=torch.float64), []
    for text in [(), *((a,) for a in range(VOCAB)), *((a, b) for a in range(VOCAB) for b in range(VOCAB))]:
        ids = torch.cat([TEXT, torch.tensor(text, dtype=torch.long)])[None]
        zb, ze, za = (m(ids, use_cache=False).logits[0, -1].detach() for m in (base, expert, antiexpert))
        opened.append(is_open(Gate(entropy=h), zb))
        here = (zb + 0.6 * (ze - za) * opened[-1]).softmax(-1)
        p[text] = here.view(-1, *[1] * (2 - len(text))) * (p[text] if text else 1.0)
    assert 0.2 < sum(opened) / len(opened) < 0.8
    return p


@pytest.mark.parametrize("name", ["fused", "expert drafts", "lookup drafts", "model drafts"])
def test_the_law_of_three_tokens(name: str) -> None:
    h = 1.35
    p = enumerated(h)
    model = proxytune.wrap(
        small(41), expert=small(42), antiexpert=small(43), alpha=0.6, gate=Gate(entropy=h), check_vocabulary=False
    )
    loops = LOOPS | {"model drafts": SpeculativeDecoding(draft=ModelDraft(small(44)), draft_tokens=2, seed=1)}
    out = model.generate(
        TEXT[None], attention_mask=torch.ones(1, 4, dtype=torch.long), do_sample=True, top_k=0, max_new_tokens=3,
        num_return_sequences=ROWS, eos_token_id=None, pad_token_id=0, custom_generate=loops[name],
    )  # fmt: skip
    counts = torch.bincount((out[:, 4:] * torch.tensor([36, 6, 1])).sum(1), minlength=VOCAB**3)
    assert p_value(counts, p) > 1e-3
    assert p_value(counts, p.flip(0)) < 1e-6, "another law is noticed"


# --- formulas --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "formula",
    [
        DExperts(alpha=1.0, gate=GATES["entropy"]),
        ProxyTuning(alpha=Schedule.linear(1.0, 0.0, 8), gate=GATES["entropy"]),
        ClassifierFreeGuidance(gate=GATES["entropy"]),
    ],
    ids=lambda f: f.name,
)
def test_masks_schedules_and_own_prompts(formula: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    base, expert, antiexpert = members()
    own = isinstance(formula, ClassifierFreeGuidance)
    companions = {} if own else {"expert": expert, "antiexpert": antiexpert}
    model = proxytune.wrap(base, **companions, formula=formula, check_vocabulary=False, self_test=False)
    settings = {"prompts": {"negative": [[7, 8, 9]] * 3}} if own else {}
    if own:
        settings["prompts"]["negative"] = torch.tensor(settings["prompts"]["negative"])
    waited = run(model, num_beams=2, **settings)
    fused = run(model, custom_generate=FusedDecoding(seed=1), **SAMPLE, **settings)
    monkeypatch.setattr("proxytune.models.combined_logits.can_wait", lambda cache: False)
    assert torch.equal(waited, run(model, num_beams=2, **settings))
    assert torch.equal(fused, run(model, custom_generate=FusedDecoding(seed=1), **SAMPLE, **settings))


# --- what runs -------------------------------------------------------------------------------------------------------


@pytest.mark.smoke
@pytest.mark.parametrize("door", ["composed", "attached"])
def test_companions_run_where_a_row_asks_and_read_each_token_once(door: str) -> None:
    base, expert, antiexpert = members()
    gate = GATES["entropy"]
    steering = ProxyTuningLogitsProcessor(expert, antiexpert, ALPHA, gate=gate, check_vocabulary=False, self_test=False)
    model = model_of(gate)
    out: Any = None

    def generate() -> None:
        nonlocal out
        if door == "composed":
            out = run(model, slice(0, 1), max_new_tokens=24)
            return
        with steering.attach(base):
            out = run(base, slice(0, 1), max_new_tokens=24)

    seen = passes(model, generate)
    zb = base(out[:, :-1]).logits[0, 11:]
    asked = [n for n, z in enumerate(zb, 12) if is_open(gate, z)]  # texts at whose end the gate is open
    assert 2 <= len(asked) < 20
    assert seen["expert"] == seen["antiexpert"] == [b - a for a, b in zip([0, *asked], asked, strict=False)]
    assert seen["base"] == [12, *[1] * 23]


def test_a_gate_that_never_opens_runs_nothing_else() -> None:
    shut = model_of(Gate(entropy=9.0))
    seen = passes(shut, lambda: run(shut, custom_generate=FusedDecoding(seed=1)))
    assert not seen["expert"]
    assert not seen["antiexpert"]
    assert torch.equal(run(shut), run(model_of(None, 0.0)))


# --- caches ----------------------------------------------------------------------------------------------------------


def test_a_cache_goes_on_whoever_filled_it() -> None:
    gated, ids = model_of(), padded()[0][:1]
    whole = run(gated, slice(0, 1), return_dict_in_generate=True)
    for first in (NEW - 4, NEW - 1):
        half = run(gated, slice(0, 1), max_new_tokens=first, return_dict_in_generate=True)
        kept = copy.deepcopy(cache_of(half))
        for cache in (cache_of(half), kept):
            rest = gated.generate(
                half.sequences, **{CACHE: cache}, max_new_tokens=NEW - first, eos_token_id=None, do_sample=False
            )
            assert torch.equal(rest, whole.sequences)
    cache = cache_of(run(gated, slice(0, 1), return_dict_in_generate=True))
    cache.crop(-(cache.get_seq_length() - 13))
    text = whole.sequences[:, :14]
    with torch.no_grad():
        torch.testing.assert_close(gated(text[:, 13:], **{CACHE: cache}).logits, gated(text).logits[:, -1:])
        # Without the gate its companions still read the text; drafts need them in it.
        want = gated(whole.sequences).logits
        formula, gated.formula = gated.formula, ProxyTuning(alpha=ALPHA)
        try:
            everywhere = gated(whole.sequences, use_cache=False).logits
            cache = cache_of(whole)
            torch.testing.assert_close(gated(whole.sequences[:, -1:], **{CACHE: cache}).logits, everywhere[:, -1:])
            eager = cache_of(gated(ids))
        finally:
            gated.formula = formula
        assert not torch.equal(want, everywhere)
        # A cache that was filled without a gate goes on with companions that run along.
        torch.testing.assert_close(gated(text[:, 12:], **{CACHE: eager}).logits[:, -1:], gated(text).logits[:, -1:])
    with pytest.raises(CacheError, match="got one that was filled under a gate"):
        gated.generate(
            whole.sequences, **{CACHE: cache_of(half)}, max_new_tokens=2, custom_generate=SpeculativeDecoding()
        )


def test_threads_take_no_turns() -> None:
    want = [run(model_of(), slice(i, i + 1)) for i in range(3)]
    got: list[Any] = [None] * 3

    def work(i: int) -> None:
        ids, mask = padded()
        got[i] = model_of().generate(
            ids[i : i + 1], attention_mask=mask[i : i + 1], max_new_tokens=NEW, eos_token_id=None, do_sample=False
        )

    threads = [threading.Thread(target=work, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(a, b) for a, b in zip(want, got, strict=True))


def test_latent_steps_and_static_caches_run_all_members_along() -> None:
    gated = model_of(Gate(entropy=9.0))
    run(gated, custom_generate=LatentDecoding("gumbel", seed=1))
    base, expert, antiexpert = (shared("llama", seed) for seed in (1, 2, 3))
    one = proxytune.wrap(base, expert=expert, antiexpert=antiexpert, gate=GATES["entropy"], check_vocabulary=False)
    assert torch.equal(run(one, cache_implementation="static"), run(one))


# --- forks, in the same call -----------------------------------------------------------------------------------------


def test_a_gate_and_fork_sampling_in_one_call() -> None:
    forks = ForkSamplingLogitsProcessor(4.0, fork_temperature=1.0, exec_temperature=0.3, record=True)
    gated = model_of()
    with forks.attach(gated):
        out = run(gated, **SAMPLE)
    share = float((forks.record().entropy > 4.0).float().mean())
    assert 0 < share < 1
    assert out.shape == (3, 12 + NEW)
    tree = run(gated, custom_generate=ForkDecoding(threshold=4.0, branches=3, seed=1), **SAMPLE)
    assert len(tree) == 9


# --- calibration -----------------------------------------------------------------------------------------------------


def test_a_share_has_to_be_calibrated() -> None:
    base, expert, antiexpert = members()
    model = proxytune.wrap(
        base, expert=expert, antiexpert=antiexpert, gate=Gate(share=0.3), check_vocabulary=False, self_test=False
    )
    for call in (lambda: run(model), lambda: model(padded()[0])):
        with pytest.raises(InputError, match=r"Gate\(share=0.3\): expected a gate that is calibrated.*calibrate_gate"):
            call()
    with pytest.raises(InputError, match="got entropy=None"):
        ProxyTuningLogitsProcessor(expert, antiexpert, gate=Gate(share=0.3))
    encoded = dict(zip(("input_ids", "attention_mask"), padded(), strict=True))
    with pytest.raises(
        InputError, match="expected prompts with at least 33 new tokens in all, for a share of 0.3; got 3"
    ):
        calibrate_gate(model, encoded, max_new_tokens=1)
    assert model.formula.gate == Gate(share=0.3)
    gate = calibrate_gate(model, encoded, max_new_tokens=16, eos_token_id=None)
    assert model.formula.gate == gate == Gate(**gate.to_json())
    assert gate.share == 0.3
    values = base_entropies(model, encoded, max_new_tokens=16, eos_token_id=None)
    assert len(values) == 48
    assert 0.05 < float((values > gate.entropy).float().mean()) < 0.6
    with pytest.raises(InputError, match="share: expected a share of the steps"):
        calibrate_gate(model_of(None), encoded)


@pytest.mark.parametrize(
    "given", [{}, {"entropy": 0.1, "top1": 0.5}, {"top1": 0.4, "share": 0.2}, {"entropy": -0.1}, {"share": 1.0}]
)
def test_gates_that_say_nothing_or_too_much(given: dict[str, float]) -> None:
    with pytest.raises(InputError):
        Gate(**given)


def test_a_processor_refuses_a_schedule() -> None:
    _, expert, antiexpert = members()
    with pytest.raises(InputError, match="alpha: expected a number"):
        ProxyTuningLogitsProcessor(expert, antiexpert, Schedule.linear(1.0, 0.0, 8))  # type: ignore[arg-type]
