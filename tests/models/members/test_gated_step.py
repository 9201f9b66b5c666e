"""A gate over static caches, compiled: the tokens of dynamic caches, and companions that run only where it opens."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from support.graphs import Graphs
from support.tiny import PAD, build
from transformers import CompileConfig, StaticCache, StoppingCriteria

import proxytune
from proxytune import FusedDecoding, SpeculativeDecoding
from proxytune.formulas import Gate, ProxyTuning, Schedule
from proxytune.models.members.cache_name import CACHE

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")

ROLES = ("base", "expert", "antiexpert")
PROMPT, NEW = 12, 24
STATIC = {"cache_implementation": "static"}
FUSED = {"do_sample": True, "top_k": 40, "custom_generate": FusedDecoding(seed=3)}
EAGER = CompileConfig(backend="eager", mode=None, fullgraph=True)


@functools.cache
def members(family: str = "llama", layers: int = 1) -> dict[str, Any]:
    found = {role: build(family, seed) for seed, role in enumerate(ROLES, 1)}
    for model in found.values():
        if family == "llama":
            model.model.layers = model.model.layers[:layers]
            model.config.num_hidden_layers = layers
    return found


def gated(entropy: float, family: str = "llama", **formula: Any) -> Any:
    formula = {"alpha": 0.7, "gate": Gate(entropy=entropy)} | formula
    return proxytune.wrap(**members(family), formula=ProxyTuning(**formula), check_vocabulary=False, self_test=False)


def run(model: Any, **kwargs: Any) -> Any:
    ids = torch.randint(3, 240, (3, PROMPT), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    ids[-1, :5], mask[-1, :5] = PAD, 0
    torch.manual_seed(7)
    return model.generate(
        ids, attention_mask=mask, **{"max_new_tokens": NEW, "eos_token_id": None, "do_sample": False} | kwargs
    )


@pytest.fixture
def graphs() -> Iterator[Graphs]:
    torch.compiler.reset()
    yield Graphs()
    torch.compiler.reset()


def passes(model: Any) -> list[int]:
    found = list(model.passes.values())
    for member in model.members:
        member.passes = 0
    return found


@pytest.mark.parametrize(
    "mode",
    [
        FUSED,
        pytest.param({}, marks=pytest.mark.slow),
        pytest.param(FUSED | {"repetition_penalty": 1.2}, marks=pytest.mark.slow),
    ],
    ids=["fused", "greedy", "processor"],
)
def test_the_tokens_of_dynamic_caches_from_two_graphs(mode: dict[str, Any], graphs: Graphs) -> None:
    model = gated(4.5)
    want = run(model, **mode)
    base, asked, _ = passes(model)
    assert base == NEW
    assert 4 <= asked <= NEW // 2, asked
    model.compile_members(graphs.config)
    assert torch.equal(run(model, **mode, **STATIC), want)
    # All read the prompt; then each step is a graph of the base, and another one where some row asks.
    opened = graphs.runs - (NEW - 1)
    assert passes(model) == [NEW, opened + 1, opened + 1]
    assert asked - 1 <= opened <= asked
    assert graphs.compiled <= 5
    places = copy.deepcopy(graphs.places)
    with torch.compiler.set_stance("fail_on_recompile"):
        assert torch.equal(run(model, **mode, **STATIC), want)
        assert graphs.places == places, "CUDA would record anew"
        model.formula = ProxyTuning(alpha=0.4, gate=Gate(entropy=4.49))
        other = run(model, **mode, **STATIC)
    model.compile_members(roles=())
    assert torch.equal(run(model, **mode), other)


@pytest.mark.slow
@pytest.mark.parametrize(("family", "entropy"), [("gemma3", 4.0), ("gpt2", 4.4)])
def test_windows_and_tables_of_positions(family: str, entropy: float, graphs: Graphs) -> None:
    model = gated(entropy, family)
    want = run(model, **FUSED)
    assert 2 <= passes(model)[1] <= NEW - 2
    model.compile_members(graphs.config)
    assert torch.equal(run(model, **FUSED, **STATIC), want)
    assert model._gated.hindrance is None
    assert graphs.runs == NEW - 1 + passes(model)[1] - 1


def test_after_64_steps_and_at_the_end_companions_read_what_they_missed(graphs: Graphs) -> None:
    model = gated(9.0)
    model.compile_members(graphs.config)
    cache = StaticCache(config=model.config, max_cache_len=120)
    out = run(model, max_new_tokens=70, **{CACHE: cache}, return_dict_in_generate=True)
    assert graphs.runs == 69
    assert passes(model) == [70, 3, 3]
    assert {int(layer.cumulative_length) for layer in cache.layers} == {PROMPT + 69}
    model.compile_members(roles=())
    model.formula = ProxyTuning(alpha=0.7)  # everywhere from here on
    mask = torch.ones_like(out.sequences)
    mask[-1, :5] = 0
    settings = {"attention_mask": mask, "max_new_tokens": 5, "eos_token_id": None, "do_sample": False}
    assert torch.equal(
        model.generate(out.sequences, **settings, **{CACHE: cache}), model.generate(out.sequences, **settings)
    )


def test_an_interrupted_call_empties_the_cache() -> None:
    class Interrupts(StoppingCriteria):
        def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
            if input_ids.shape[1] > 18:
                raise KeyboardInterrupt
            return torch.zeros(len(input_ids), dtype=torch.bool)

    model = gated(9.0)
    model.compile_members(EAGER)
    cache = StaticCache(config=model.config, max_cache_len=40)
    with pytest.raises(KeyboardInterrupt):
        run(model, **{CACHE: cache}, stopping_criteria=[Interrupts()])
    assert {int(layer.get_seq_length()) for layer in cache.layers} == {0}
    assert torch.equal(run(model, **{CACHE: cache}), run(model))


def test_where_companions_run_along_and_why() -> None:
    model, scheduled = gated(4.6), gated(4.6, alpha=Schedule.linear(1, 0, 3))
    cases: list[tuple[Any, dict[str, Any], str]] = [
        (model, {"num_beams": 2}, "beam search, which moves rows or takes tokens back"),
        (scheduled, {}, "a schedule, a mask or log-probabilities in the formula"),
    ]
    for one, mode, why in cases:
        settings = {"max_new_tokens": 2} | mode
        want = run(one, **settings)
        one.compile_members(EAGER)
        passes(one)
        assert torch.equal(run(one, **settings, **STATIC), want)
        assert one._gated.hindrance == why
        assert len({*passes(one)}) == 1


@pytest.mark.slow
def test_drafts_keep_all_members_in_step() -> None:
    loop, model = SpeculativeDecoding(draft_tokens=2, seed=5), gated(4.6)
    want = run(model, custom_generate=loop, max_new_tokens=6)
    model.compile_members(EAGER)
    assert torch.equal(run(model, custom_generate=loop, max_new_tokens=6, **STATIC), want)
