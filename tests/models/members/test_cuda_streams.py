"""Companions beside the base: the same tokens, and every stream waits for what it reads."""

import contextlib
import copy
import pickle
from typing import Any

import pytest
import torch
from support.fake_streams import Stream, streams
from support.reference import Reference
from support.tiny import build, shared
from transformers import PreTrainedModel

import proxytune
from proxytune import FusedDecoding, ProxyTunedModel, ProxyTuningLogitsProcessor, SpeculativeDecoding
from proxytune.models.members import cuda_streams as overlapping
from proxytune.models.members.cuda_streams import CompanionStreams, ForkJoin, StreamOrder, may_overlap, tensors_of

ALPHA, NEW = 0.7, 6
# A sliding window of 8 among the companions: their layers are cut, rolled back and refilled.
KINDS = {"base": ("llama", 256), "expert": ("mistral", 250), "antiexpert": ("mistral", 250)}
MODES: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "temperature": 0.8, "top_k": 30},
    "beams": {"do_sample": False, "num_beams": 3},
    "return-2": {"do_sample": True, "num_return_sequences": 2},
    "static": {"do_sample": False, "cache_implementation": "static"},
    "chunked": {"do_sample": False, "prefill_chunk_size": 5},
    "no-cache": {"do_sample": False, "use_cache": False},
    "prompt-lookup": {"do_sample": False, "prompt_lookup_num_tokens": 3},
}
CACHE_ONLY = ("cache_implementation", "prefill_chunk_size", "use_cache", "prompt_lookup_num_tokens")


@pytest.fixture(scope="module")
def members() -> dict[str, PreTrainedModel]:
    return {role: shared(kind, seed, vocab) for seed, (role, (kind, vocab)) in enumerate(KINDS.items(), 1)}


def prompts(mode: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Two rows, one padded at the left; one row that repeats itself for a lookup, which takes no more."""
    ids = torch.randint(3, 240, (2, 12), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    if mode == "prompt-lookup":
        return ids[:1, :4].repeat(1, 3), mask[:1]
    ids[1, :5], mask[1, :5] = 0, 0
    return ids, mask


def run(model: Any, mode: str, **kwargs: Any) -> torch.Tensor:
    ids, mask = prompts(mode)
    torch.manual_seed(7)
    return model.generate(ids, attention_mask=mask, max_new_tokens=NEW, eos_token_id=None, **MODES[mode], **kwargs)


def expected(members: dict[str, PreTrainedModel], mode: str) -> torch.Tensor:
    ids, mask = prompts(mode)
    torch.manual_seed(7)
    settings = {k: v for k, v in MODES[mode].items() if k not in CACHE_ONLY}
    reference = Reference(list(members.values()), ALPHA)
    return reference.generate(ids, attention_mask=mask, max_new_tokens=NEW, eos_token_id=None, **settings)


def composed(members: dict[str, PreTrainedModel]) -> ProxyTunedModel:
    return proxytune.wrap(**members, alpha=ALPHA, check_vocabulary=False)


def processor_of(members: dict[str, PreTrainedModel]) -> ProxyTuningLogitsProcessor:
    return ProxyTuningLogitsProcessor(members["expert"], members["antiexpert"], ALPHA, check_vocabulary=False)


@pytest.mark.parametrize("mode", MODES)
def test_the_composed_model_on_side_streams(
    members: dict[str, PreTrainedModel], mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    want, model = expected(members, mode), composed(members)
    with streams(monkeypatch) as books:
        got = run(model, mode)
    assert torch.equal(got, want)
    assert len(books.streams) == 3, "one side stream per companion"
    assert books.crossings > 0
    assert min(books.operations[s.name] for s in books.streams) > 50


@pytest.mark.parametrize("mode", MODES)
def test_an_attached_processor_on_side_streams(
    members: dict[str, PreTrainedModel], mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    want, processor = expected(members, mode), processor_of(members)
    with processor.attach(members["base"]), streams(monkeypatch) as books:
        got = run(members["base"], mode)
        again = run(members["base"], mode)  # the companions' caches are still those of the first
    assert torch.equal(got, want)
    assert torch.equal(again, want)
    assert len(books.streams) == (1 if mode == "no-cache" else 3)


@pytest.mark.parametrize("loop", [FusedDecoding(seed=0), SpeculativeDecoding(seed=0)], ids=["fused", "speculative"])
def test_loops_of_our_own_on_side_streams(
    members: dict[str, PreTrainedModel], loop: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    want, model = expected(members, "greedy"), composed(members)
    with streams(monkeypatch) as books:
        assert torch.equal(run(model, "greedy", custom_generate=loop), want)
    assert books.crossings > 0


def test_companions_run_on_their_own_streams_and_the_base_is_launched_first(
    members: dict[str, PreTrainedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[str, str]] = []
    with streams(monkeypatch) as books:
        handles = [
            m.register_forward_pre_hook(lambda *_, role=role: seen.append((role, books.current.name)))
            for role, m in members.items()
        ]
        run(composed(members), "greedy")
        for handle in handles:
            handle.remove()
    assert seen == [("base", "main"), ("expert", "side 1"), ("antiexpert", "side 2")] * NEW


def test_an_attached_processor_begins_before_the_base_from_the_second_token_on(
    members: dict[str, PreTrainedModel],
) -> None:
    def order(overlap: bool) -> list[str]:
        seen: list[str] = []
        handles = [m.register_forward_pre_hook(lambda *_, role=role: seen.append(role)) for role, m in members.items()]
        processor = processor_of(members)
        processor.overlap = overlap
        with processor.attach(members["base"]):
            run(members["base"], "beams")
        for handle in handles:
            handle.remove()
        return seen

    prompt, step = ["base", "expert", "antiexpert"], ["expert", "antiexpert", "base"]
    assert order(overlap=True) == prompt + step * (NEW - 1)
    assert order(overlap=False) == prompt * NEW


def test_in_turn_there_are_no_side_streams(
    members: dict[str, PreTrainedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, processor = composed(members), processor_of(members)
    model.overlap = processor.overlap = False
    with streams(monkeypatch) as books:
        run(model, "greedy")
        with processor.attach(members["base"]):
            run(members["base"], "greedy")
    assert books.streams == [books.main]


def test_an_error_in_a_companion_leaves_nothing_behind(
    members: dict[str, PreTrainedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = composed(members)

    def fail(*_: Any) -> None:
        raise RuntimeError("out of memory")

    with streams(monkeypatch) as books:
        handle = members["antiexpert"].register_forward_hook(fail)
        with pytest.raises(RuntimeError, match="out of memory"):
            run(model, "greedy")
        handle.remove()
        assert books.current is books.main
        for side in books.streams[1:]:
            assert books.main.seen[side.name] == side.seen[side.name], "it is waited for all the same"
        assert torch.equal(run(model, "greedy"), expected(members, "greedy"))


def test_detaching_puts_back_what_was_there() -> None:
    base = build("llama", 1)
    processor = processor_of({"expert": shared("llama", 2), "antiexpert": shared("llama", 3)})
    with processor.attach(base):
        twin = copy.deepcopy(base)
        assert "prepare_inputs_for_generation" in vars(base)
    assert "prepare_inputs_for_generation" not in vars(base)
    assert twin.generate(torch.tensor([[5, 6]]), max_new_tokens=2).shape == (1, 4)

    original = base.prepare_inputs_for_generation
    base.prepare_inputs_for_generation = lambda *args, **kwargs: original(*args, **kwargs)
    mine = base.prepare_inputs_for_generation
    with processor.attach(base):
        assert base.prepare_inputs_for_generation is not mine
    assert base.prepare_inputs_for_generation is mine
    # Somebody else's on top stays, and then the processor has no part in it.
    with processor.attach(base):
        inner = base.prepare_inputs_for_generation
        base.prepare_inputs_for_generation = lambda *args, **kwargs: inner(*args, **kwargs)
    before = processor.token_forwards
    base.generate(torch.tensor([[5, 6]]), max_new_tokens=2)
    assert processor.token_forwards == before


def test_copies_start_without_streams(members: dict[str, PreTrainedModel]) -> None:
    model = composed(members)
    model._sides._streams["expert", torch.device("cpu")] = object()
    for twin in (copy.deepcopy(model._sides), pickle.loads(pickle.dumps(model._sides))):
        assert isinstance(twin, CompanionStreams)
        assert twin._streams == {}
    assert pickle.loads(pickle.dumps(StreamOrder()))._done is None


def test_a_cpu_never_overlaps() -> None:
    assert not may_overlap(torch.device("cpu"))
    with ForkJoin(CompanionStreams()) as fork:
        fork.open(torch.device("cpu"))
        assert fork.run("expert", torch.device("cpu"), lambda: torch.ones(1), []) == 1
    assert list(tensors_of(None)) == []


# --- the test's own instrument ---------------------------------------------------------------------------------------


WRONG: dict[str, tuple[Any, str, Any, str]] = {
    "the current stream does not wait": (ForkJoin, "__exit__", lambda *_: None, "main does not wait for side 1"),
    "no stream waits": (Stream, "wait_event", lambda *_: None, "side 1 does not wait for main"),
    "nothing is recorded": (overlapping, "_record", lambda *_: None, "main may be given memory that side 1 still"),
    "companions take no turns": (
        StreamOrder,
        "on",
        lambda *_: contextlib.nullcontext(),
        "main may be given memory that side 1 still reads",
    ),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_the_books_find_what_is_wrong(
    members: dict[str, PreTrainedModel], wrong: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    owner, name, instead, message = WRONG[wrong]
    monkeypatch.setattr(owner, name, instead)
    processor = processor_of(members)

    def steer() -> None:
        if owner is ForkJoin:
            run(composed(members), "greedy")
        with processor.attach(members["base"]):
            run(members["base"], "greedy")

    with streams(monkeypatch), pytest.raises(AssertionError, match=message):
        steer()


# --- on a GPU ---------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("mode", MODES)
def test_real_streams(mode: str) -> None:
    # Float64, so that no two tokens tie to within a rounding; wide enough for kernels to be under way together.
    members = {r: build(k, s, v, hidden=512).double().cuda() for s, (r, (k, v)) in enumerate(KINDS.items(), 1)}
    ids, mask = (x.cuda() for x in prompts(mode))
    settings = {"max_new_tokens": 40, "eos_token_id": None, **MODES[mode]}
    model, processor = composed(members), processor_of(members)

    def steered(overlap: bool) -> list[torch.Tensor]:
        model.overlap = processor.overlap = overlap
        torch.manual_seed(7)
        first = model.generate(ids, attention_mask=mask, **settings)
        torch.manual_seed(7)
        with processor.attach(members["base"]):
            return [first, members["base"].generate(ids, attention_mask=mask, **settings)]

    want = steered(overlap=False)
    for _ in range(5):
        for got, tokens in zip(steered(overlap=True), want, strict=True):
            assert torch.equal(got, tokens)
