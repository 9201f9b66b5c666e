"""Compiled decode steps: the tokens of the uncompiled members, one graph for all steps, and nothing else compiled."""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from support.graphs import Graphs
from support.reference import Reference
from support.tiny import PAD, build, shared
from transformers import CompileConfig, PreTrainedModel
from transformers.cache_utils import StaticCache

import proxytune
from proxytune import FusedDecoding, ProxyTunedModel
from proxytune.errors import CacheError, InputError, UnsupportedModelError
from proxytune.formulas import ProxyTuning, Schedule
from proxytune.models.members.cache_name import CACHE

# torch's compiler calls parts of torch by names that are deprecated.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")

ALPHA, PROMPT, NEW = 0.7, 12, 10
STATIC = {"cache_implementation": "static", "max_new_tokens": NEW, "eos_token_id": None}


@pytest.fixture
def graphs() -> Iterator[Graphs]:
    torch.compiler.reset()
    yield Graphs()
    torch.compiler.reset()


def members_of(base: str, small: str, layers: int = 1) -> dict[str, PreTrainedModel]:
    """One layer is compiled in half the time of two; Gemma has two, which are of two kinds."""
    kinds = {"base": base, "expert": small, "antiexpert": small}
    return {role: shared(kind, seed, layers=layers) for seed, (role, kind) in enumerate(kinds.items(), 1)}


def short() -> dict[str, PreTrainedModel]:
    return members_of("llama", "llama")


def composed(members: dict[str, PreTrainedModel]) -> ProxyTunedModel:
    return proxytune.wrap(**members, alpha=ALPHA, check_vocabulary=False)


def padded(rows: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(3, 240, (rows, PROMPT), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    ids[-1, :5], mask[-1, :5] = PAD, 0
    return ids, mask


def run(model: Any, **kwargs: Any) -> Any:
    ids, mask = padded()
    torch.manual_seed(7)
    return model.generate(ids, attention_mask=mask, **kwargs)


# How many graphs a step of the family has: sliding layers count their tokens on the host, and have one for the first
# length, and one in which the length is a variable.
FAMILIES = {"llama": 1, "qwen3": 1, "gpt2": 1, "gemma3": 2, "mistral": 2}


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_the_tokens_of_the_reference_from_one_graph(family: str, graphs: Graphs) -> None:
    # Of layers that are alike, too, one family has two.
    members, count = members_of(family, family, layers=2 if family == "llama" else 1), FAMILIES[family]
    torch.manual_seed(7)
    ids, mask = padded()
    want = Reference(list(members.values()), ALPHA).generate(
        ids, attention_mask=mask, max_new_tokens=NEW, eos_token_id=None, do_sample=False
    )
    model = composed(members)
    model.compile_members(graphs.config)
    assert torch.equal(run(model, do_sample=False, **STATIC), want)
    # The prompt gives the first token, and is not compiled. All members are in one graph.
    assert graphs.runs == NEW - 1
    assert graphs.compiled == count
    assert model._joint.hindrance is None
    with torch.compiler.set_stance("fail_on_recompile"):  # nor does a second generation compile anything
        assert torch.equal(run(model, do_sample=False, **STATIC), want)
    assert model.token_forwards == dict.fromkeys(members, 2 * 2 * (PROMPT + NEW - 1))


MODES: dict[str, dict[str, Any]] = {
    "sampling": {"do_sample": True, "temperature": 0.8, "top_k": 30},
    "return-2": {"do_sample": True, "num_return_sequences": 2},
    "beams": {"do_sample": False, "num_beams": 3},
    "chunked": {"do_sample": False, "prefill_chunk_size": 5},
    "fused": {"do_sample": True, "custom_generate": FusedDecoding(seed=3)},
    "fused, greedy": {"do_sample": False, "custom_generate": FusedDecoding()},
    "fused, truncated": {"do_sample": True, "top_k": 30, "top_p": 0.9, "custom_generate": FusedDecoding(seed=3)},
    "fused, a processor": {"do_sample": True, "repetition_penalty": 1.3, "custom_generate": FusedDecoding(seed=3)},
}


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_every_mode_is_that_of_the_uncompiled_model(mode: str, graphs: Graphs) -> None:
    model = composed(members_of("llama", "qwen3"))
    settings = {k: v for k, v in MODES[mode].items() if k != "prefill_chunk_size"}
    want = run(model, **settings, max_new_tokens=NEW, eos_token_id=None)  # with a dynamic cache
    model.compile_members(graphs.config)
    assert torch.equal(run(model, **MODES[mode], **STATIC), want)
    assert graphs.runs == NEW - 1
    # Reordering beams makes new tensors of the layers, which are no longer at their static address.
    assert graphs.compiled <= (2 if mode == "beams" else 1)


@pytest.mark.slow
def test_without_a_mask_positions_are_counted(graphs: Graphs) -> None:
    for family in ("llama", "gemma3"):
        model, (ids, _) = composed(members_of(family, "gpt2")), padded(1)
        ids = ids.clamp(min=3)
        with torch.no_grad():
            out = model.generate(ids, do_sample=False, output_logits=True, return_dict_in_generate=True, **STATIC)
            model.compile_members(graphs.config)
            cache = StaticCache(config=model.config, max_cache_len=PROMPT + NEW)
            model(ids, **{CACHE: cache})
            for step, want in enumerate(out.logits[1:]):
                got = model(out.sequences[:, PROMPT + step : PROMPT + step + 1], **{CACHE: cache}).logits[:, -1]
                torch.testing.assert_close(got, want, atol=2e-4, rtol=1e-4)


def test_only_one_token_in_a_static_cache_is_compiled(graphs: Graphs) -> None:
    model = composed(short())
    model.compile_members(graphs.config)
    run(model, max_new_tokens=4)  # a dynamic cache
    ids, mask = padded(1)
    model.generate(ids, attention_mask=mask, max_new_tokens=4, prompt_lookup_num_tokens=2)
    assert graphs.runs == 0
    ids, mask = padded()
    cache = StaticCache(config=model.config, max_cache_len=PROMPT + 2)
    with torch.no_grad():
        model(ids, attention_mask=mask, **{CACHE: cache})
    assert graphs.runs == 0, "a prompt"
    new, mask = ids[:, :1], torch.nn.functional.pad(mask, (0, 1), value=1)
    model(new, attention_mask=mask, **{CACHE: copy.deepcopy(cache)})
    assert graphs.runs == 0, "with derivatives"
    with torch.no_grad():
        model(new, attention_mask=mask, **{CACHE: cache})
    assert graphs.runs == 1


def test_the_draw_is_in_the_graph_and_other_settings_are_the_same_graph(
    graphs: Graphs, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = composed(short())

    def sampled(**settings: Any) -> torch.Tensor:
        loop = FusedDecoding(seed=3)
        return run(model, do_sample=True, custom_generate=loop, **settings, **STATIC | {"max_new_tokens": 4})

    kinds: list[dict[str, Any]] = [{"top_k": 20}, {"top_k": 30, "temperature": 0.7}, {"top_k": 40}, {"top_k": 50}]
    wanted = [sampled(**kind) for kind in kinds]
    model.compile_members(graphs.config)
    drawn: list[int] = []
    step = proxytune.ops.step

    def counted(*args: Any, **kwargs: Any) -> Any:
        if not torch.compiler.is_compiling():
            drawn.append(1)
        return step(*args, **kwargs)

    monkeypatch.setattr(proxytune.ops, "step", counted)
    for kind, want in zip(kinds, wanted, strict=True):
        assert torch.equal(sampled(**kind), want)
    assert len(drawn) == len(kinds), "the prompt's draw alone is outside"
    assert graphs.compiled == 2, "k is a number, then a variable"
    with torch.compiler.set_stance("fail_on_recompile"):
        model.alpha = ALPHA / 2
        assert not torch.equal(sampled(top_k=40), wanted[2])
    model.alpha = ALPHA


def test_a_second_generation_finds_all_in_its_place(graphs: Graphs) -> None:
    model = composed(short())
    model.compile_members(graphs.config)
    settings = STATIC | {"max_new_tokens": 3, "do_sample": True, "custom_generate": FusedDecoding(seed=3)}
    first = run(model, **settings)
    places = copy.deepcopy(graphs.places)
    model.alpha = ALPHA / 2
    try:
        other = run(model, **settings)
    finally:
        model.alpha = ALPHA
    assert torch.equal(run(model, **settings), first)
    assert graphs.places == places
    assert all(map(len, *places.values()))
    # What a caller holds is his.
    held = run(model, **settings, return_dict_in_generate=True)
    kept = [layer.keys.clone() for layer in held[CACHE].layers]
    model.alpha = ALPHA / 2
    try:
        assert torch.equal(run(model, **settings), other)
    finally:
        model.alpha = ALPHA
    assert all(torch.equal(layer.keys, keys) for layer, keys in zip(held[CACHE].layers, kept, strict=True))
    twin = copy.deepcopy(model)
    assert (model._kept.take("another batch"), twin._kept.take("another batch"), model._kept._kept) == (None,) * 3


def test_a_cache_kept_outside_autocast_is_not_taken_inside() -> None:
    model = composed(short())
    settings = STATIC | {"max_new_tokens": 1, "do_sample": False}  # the prompt alone: nothing is compiled
    outside = run(model, **settings)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = run(model, **settings)
    model.compile_members(CompileConfig(backend="eager", mode=None))
    assert torch.equal(run(model, **settings), outside)
    assert model._kept._kept is not None
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(run(model, **settings), inside)
    assert torch.equal(run(model, **settings), outside)


def test_what_a_graph_cannot_do_is_done_as_before(graphs: Graphs) -> None:
    models = short()
    falling = ProxyTuning(alpha=Schedule.linear(ALPHA, 0.0, 8))
    scheduled = proxytune.wrap(**models, formula=falling, check_vocabulary=False)
    recurrent = composed(models | {"base": shared("lfm2", 1)})
    for model, why, count in ((scheduled, "", 1), (recurrent, "the base, a Lfm2ForCausalLM (lfm2), which keeps", 3)):
        graphs.runs = 0
        static = STATIC | {"max_new_tokens": 3, "do_sample": False}
        want = run(model, **static)
        model.compile_members(graphs.config)
        assert torch.equal(run(model, **static), want)
        assert graphs.runs == count * 2
        assert (model._joint.hindrance or "").startswith(why)


def test_logits_that_are_kept_are_not_those_of_the_next_step() -> None:
    """A replayed graph of CUDA writes its outputs to the same memory each time."""
    torch.compiler.reset()

    def backend(module: torch.fx.GraphModule, example_inputs: Any) -> Callable[..., Any]:
        memory: list[torch.Tensor] = []

        def replay(*args: Any) -> Any:
            found = module.forward(*args)
            memory[:] = memory or [x.clone() for x in found]
            for held, x in zip(memory, found, strict=True):
                held.copy_(x)
            return tuple(memory)

        return replay

    model = composed(short())
    model.compile_members(CompileConfig(backend=backend, mode=None, fullgraph=True))
    cache = StaticCache(config=model.config, max_cache_len=20)
    ids = padded(1)[0]
    kept = []
    with torch.no_grad():
        model(ids, **{CACHE: cache})
        for last in (5, 6, 7):
            logits = model(torch.tensor([[last]]), **{CACHE: cache}).logits
            kept.append((logits, logits.clone()))
    assert model._joint.hindrance is None
    assert all(torch.equal(x, before) for x, before in kept)
    torch.compiler.reset()


def test_a_cache_of_another_model_is_refused() -> None:
    torch.compiler.reset()
    models = [composed(short()), composed({role: shared("llama", 9 + i, layers=1) for i, role in enumerate(short())})]
    for model in models:
        model.compile_members(CompileConfig(backend="eager", mode=None))
    first, second = models
    cache = StaticCache(config=first.config, max_cache_len=20)
    ids = first.generate(padded(1)[0], **{CACHE: cache}, max_new_tokens=3, eos_token_id=None, do_sample=False)
    given = {CACHE: cache, "position_ids": torch.tensor([[ids.shape[1] - 1]])}
    inputs = second.prepare_inputs_for_generation(ids, next_sequence_length=1, **given)
    with torch.no_grad(), pytest.raises(CacheError, match="another model"):
        second(**inputs)
    torch.compiler.reset()


def test_chosen_members_and_back_again(graphs: Graphs) -> None:
    model = composed(short())
    want = run(model, do_sample=False, **STATIC)
    model.compile_members(graphs.config, roles=["expert", "antiexpert"])
    assert torch.equal(run(model, do_sample=False, **STATIC), want)
    assert graphs.runs == 2 * (NEW - 1)
    model.compile_members(roles=())
    assert torch.equal(run(model, do_sample=False, **STATIC), want)
    assert graphs.runs == 2 * (NEW - 1)


def test_a_copy_compiles_its_own_members(graphs: Graphs) -> None:
    model = composed(copy.deepcopy(short()))
    model.compile_members(CompileConfig(backend="eager", mode=None))
    want = run(model, do_sample=False, **STATIC)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(run(twin, do_sample=False, **STATIC), want)


@pytest.mark.slow
def test_the_default_settings(graphs: Graphs) -> None:
    """Inductor's own code, not only its graphs."""
    model = composed(members_of("llama", "qwen3"))
    loop = {"do_sample": True, "top_p": 0.9, "custom_generate": FusedDecoding(seed=3)}
    greedy, sampled = run(model, do_sample=False, **STATIC), run(model, **loop, **STATIC)
    model.compile_members()
    assert torch.equal(run(model, do_sample=False, **STATIC), greedy)
    assert torch.equal(run(model, **loop, **STATIC), sampled)


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_graphs(graphs: Graphs) -> None:
    members = {r: build("llama", s, hidden=512).double().cuda() for s, r in enumerate(("base", "expert", "antiexpert"))}
    model = composed(members)
    ids, mask = (x.cuda() for x in padded())
    show = {"output_logits": True, "return_dict_in_generate": True, "do_sample": False, **STATIC}
    want = model.generate(ids, attention_mask=mask, **show)
    for roles in (None, ["expert", "antiexpert"], ["expert"]):
        model.compile_members(roles=roles)
        for _ in range(3):
            got = model.generate(ids, attention_mask=mask, **show)
            assert torch.equal(got.sequences, want.sequences)
            # Kept from step to step: a replay that overwrote them would show here.
            for ours, theirs in zip(got.logits, want.logits, strict=True):
                torch.testing.assert_close(ours, theirs)


def test_wrong_use() -> None:
    model = composed(members_of("llama", "llama"))
    with pytest.raises(InputError, match="roles of base, expert, antiexpert; got .'draft'"):
        model.compile_members(roles=["draft"])
    with pytest.raises(InputError, match="compile_members: expected .*; got 'expert'"):
        model.compile_members(roles="expert")
    with pytest.raises(InputError, match="compile_members: expected a CompileConfig.*; got 'reduce-overhead'"):
        model.compile_members("reduce-overhead")


def test_members_that_cannot_be_compiled_are_refused() -> None:
    members = members_of("llama", "llama") | {"base": build("llama", 1)}
    members["base"].hf_device_map = {"model": 0, "lm_head": "cpu"}
    model = composed(members)
    with pytest.raises(UnsupportedModelError, match="the base: expected a model that can be .*got .* on the cpu"):
        model.compile_members()
    assert all(m.step is None for m in model.members)
    model.compile_members(CompileConfig(backend="eager"), roles=["expert"])
    assert [m.step is None for m in model.members] == [True, False, True]


def test_an_offloaded_or_quantized_member_is_named_and_runs_uncompiled_beside_the_others(graphs: Graphs) -> None:
    accelerate = pytest.importorskip("accelerate")
    static = STATIC | {"max_new_tokens": 3, "do_sample": False}
    members = short() | {role: build("llama", seed, layers=1) for seed, role in ((1, "base"), (3, "antiexpert"))}
    model = composed(members)
    want = run(model, **static)
    accelerate.cpu_offload(members["base"], execution_device=torch.device("cpu"))
    members["antiexpert"].hf_quantizer = type("FourBits", (), {"is_compileable": False})()
    for roles, why in ((None, "weights that a hook"), (["expert", "antiexpert"], "the antiexpert: .*got FourBits")):
        with pytest.raises(UnsupportedModelError, match=why):
            model.compile_members(graphs.config, roles=roles)
    model.compile_members(graphs.config, roles=["expert"])
    assert torch.equal(run(model, **static), want)
    assert (graphs.compiled, graphs.runs) == (1, 2)
