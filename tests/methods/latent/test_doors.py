"""Both doors to latent steps: off they are plain decoding, they agree with each other, and wrong use is refused."""

from __future__ import annotations

import copy
import pickle
import threading
from typing import Any

import pytest
import torch
from support.latent_models import KeyedByIds, NoEmbeddings, gemma3n
from support.tiny import BOS, EOS, PAD, VOCABULARY, build, shared, tokenizer
from transformers import (
    LogitsProcessor,
    MinPLogitsWarper,
    PreTrainedModel,
    StoppingCriteria,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.generation.streamers import BaseStreamer

import proxytune
from proxytune import ForkDecoding, FusedDecoding, LatentDecoding, LatentLogitsProcessor, ProxyTuningLogitsProcessor
from proxytune.errors import InputError, UnsupportedModeError, UnsupportedModelError
from proxytune.methods.latent import LatentGates, LatentMixture
from proxytune.methods.latent.decoding import LatentOutput
from proxytune.models.members.cache_name import CACHE

NEW = 10
WARPED = {"do_sample": True, "temperature": 0.8, "top_k": 30, "top_p": 0.95, "min_p": 0.001}
WARPERS = [TemperatureLogitsWarper(0.8), TopKLogitsWarper(30), TopPLogitsWarper(0.95), MinPLogitsWarper(0.001)]
MODES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampling": WARPED,
    "return-3": {"do_sample": True, "num_return_sequences": 3, "top_k": 0},
    "beam-4": {"num_beams": 4},
    "beam-sampling": {"num_beams": 3, "do_sample": True, "top_k": 0},
    "penalties": {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
    "no-cache": {"use_cache": False},
    "no-cache-beam": {"use_cache": False, "num_beams": 3},
    "static-cache": {"cache_implementation": "static"},
    "chunked-prefill": {"prefill_chunk_size": 5},
}


def prompts(rows: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of 12, 7 and 3 tokens, padded at the left."""
    ids = torch.randint(3, 240, (3, 12), generator=torch.Generator().manual_seed(0))
    mask = torch.ones(3, 12, dtype=torch.long)
    for row, n in ((1, 5), (2, 9)):
        ids[row, :n], mask[row, :n] = PAD, 0
    return ids[:rows], mask[:rows]


def run(model: PreTrainedModel, rows: int = 3, **kwargs: Any) -> Any:
    ids, mask = prompts(rows)
    torch.manual_seed(7)
    return model.generate(ids, attention_mask=mask, **{"max_new_tokens": NEW, **kwargs})


def composed(dtype: torch.dtype = torch.float64) -> proxytune.ProxyTunedModel:
    members = [build("llama", 1), build("gpt2", 2, 250), build("gemma3", 3, 250)]
    base, expert, antiexpert = (m.to(dtype) for m in members)
    return proxytune.wrap(base, expert=expert, antiexpert=antiexpert, alpha=0.7, check_vocabulary=False)


# --- off is off -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "family", ["llama", "qwen3", "gpt2", "mistral", "gemma3", "lfm2", "mamba", "gemma3n", "composed"]
)
def test_onehot_is_plain_decoding_to_the_last_bit(family: str, mode: str) -> None:
    model = composed() if family == "composed" else gemma3n() if family == "gemma3n" else build(family, 1)
    model = model if family == "composed" else model.double()
    if family == "mamba" and mode == "chunked-prefill":
        pytest.skip("transformers itself refuses this mode")
    show = {"return_dict_in_generate": True, "output_scores": True}
    plain = run(model, **MODES[mode], **show)
    ours = run(model, **MODES[mode], **show, custom_generate=LatentDecoding("onehot"))
    assert torch.equal(ours.sequences, plain.sequences)
    for a, b in zip(ours.scores, plain.scores, strict=True):
        assert b.isfinite().any()
        assert torch.equal(a, b)
    with LatentLogitsProcessor("onehot").attach(model):
        assert torch.equal(run(model, **MODES[mode]), plain.sequences)


def test_gates_that_never_open_are_plain_decoding() -> None:
    model = shared("llama", 1)
    never = LatentGates(begin_ids=[255, 254], end_ids=[253])
    assert torch.equal(run(model, custom_generate=LatentDecoding("mean", never)), run(model))
    assert not torch.equal(run(model, custom_generate=LatentDecoding("mean")), run(model))


def test_the_second_look_up_of_a_model_is_mixed_too() -> None:
    model = gemma3n()
    sampler = LatentDecoding("moi")
    with_cache = run(model, return_dict_in_generate=True, output_logits=True, custom_generate=sampler)
    want = run(model, return_dict_in_generate=True, output_logits=True, custom_generate=sampler, use_cache=False)
    assert torch.equal(with_cache.sequences, want.sequences)
    # By hand: the first mixture, and what the model makes of it.
    ids, _ = prompts(1)
    out = run(model, 1, max_new_tokens=2, return_dict_in_generate=True, output_logits=True, custom_generate=sampler)
    p, best = out.logits[0][0].double().softmax(0).topk(10)
    p = p / p.sum()
    h = float(-(p * p.log()).sum() / torch.tensor(10.0).log())
    w = (h * p + (2 - h) * (best == out.sequences[0, 12])) / 2
    text = model.model
    mixed = {
        "inputs_embeds": (w[:, None] * text.embed_tokens(best[None])[0]).sum(0),
        "per_layer_inputs": (w[:, None, None] * text.get_per_layer_inputs(best[None])[0]).sum(0),
    }
    before = {"inputs_embeds": text.embed_tokens(ids), "per_layer_inputs": text.get_per_layer_inputs(ids)}
    joined = {k: torch.cat([before[k], mixed[k][None, None].float()], 1) for k in before}
    expected = model(**joined, use_cache=False).logits[0, -1]
    torch.testing.assert_close(out.logits[1][0].double(), expected.double(), atol=1e-4, rtol=1e-4)


# --- the doors agree --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("which", ["plain", pytest.param("composed", marks=pytest.mark.smoke)])
def test_attached_and_dropped_in_are_the_sampler(which: str, mode: str) -> None:
    model = composed(torch.float32) if which == "composed" else build("llama", 1)
    law, gates = LatentMixture(kind="gumbel", tau=0.5), LatentGates(min_entropy=0.1, max_run=4)
    want = run(model, **MODES[mode], custom_generate=LatentDecoding(law, gates, seed=5))
    assert not torch.equal(want, run(model, **MODES[mode]))
    with LatentLogitsProcessor(law, gates, seed=5).attach(model):
        assert torch.equal(run(model, **MODES[mode]), want)
        assert torch.equal(run(model, **MODES[mode]), want)  # a second call starts anew
    if mode == "beam-sampling":
        return  # with beams the warpers keep two tokens at least, as told below
    warpers = WARPERS if mode == "sampling" else []
    told = LatentLogitsProcessor(law, gates, warpers=warpers, seed=5)
    with told.attach(model):
        assert torch.equal(run(model, **MODES[mode], logits_processor=[told]), want)
    plain = run(model, **MODES[mode])
    assert not torch.equal(plain, want)
    assert "prepare_inputs_for_generation" not in vars(model)
    assert "_get_logits_processor" not in vars(model)


def test_warpers_that_it_was_not_told_are_refused() -> None:
    model = build("llama", 1)
    for warpers in ([], [TemperatureLogitsWarper(0.7), *WARPERS[1:]], WARPERS[:-1]):
        processor = LatentLogitsProcessor("gumbel", warpers=warpers, seed=0)
        with processor.attach(model), pytest.raises(InputError, match=r"warpers: expected .*temperature=0\.8.*; got"):
            run(model, **WARPED, logits_processor=[processor])
    # As generate() makes them for beams.
    beams = [TemperatureLogitsWarper(0.8), TopKLogitsWarper(30, min_tokens_to_keep=2)]
    processor = LatentLogitsProcessor("mean", warpers=beams)
    mode = {"do_sample": True, "num_beams": 3, "temperature": 0.8, "top_k": 30}
    want = run(model, **mode, custom_generate=LatentDecoding("mean"))
    with processor.attach(model):
        assert torch.equal(run(model, **mode, logits_processor=[processor]), want)


def test_a_processor_that_is_not_attached_says_so() -> None:
    model = shared("llama", 1)
    with pytest.raises(UnsupportedModeError, match=r"attach\(model\)"):
        run(model, logits_processor=[LatentLogitsProcessor("mean")])
    own = build("llama", 1)
    with LatentLogitsProcessor("mean").attach(own) as processor:
        with pytest.raises(UnsupportedModeError, match="another model"):
            run(model, logits_processor=[processor])
        with pytest.raises(InputError, match="attached"):
            processor.attach(model)
        with pytest.raises(InputError, match="alone"):
            run(own, logits_processor=[LatentLogitsProcessor("mean")])


def test_constraints_and_penalties_hold_and_scores_stay() -> None:
    model = shared("llama", 1)
    allowed = list(range(20, 60))
    out = run(
        model,
        num_beams=3,
        prefix_allowed_tokens_fn=lambda batch, ids: allowed,
        custom_generate=LatentDecoding("mean"),
    )
    assert all(token in (*allowed, PAD) for row in out[:, 12:].tolist() for token in row)
    assert len({tuple(row) for row in out[:, 12:].tolist()}) > 1


# --- keys -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["gumbel", "dirichlet", "multiplex", "gaussian"])
@pytest.mark.smoke
def test_a_row_does_not_depend_on_its_batch(kind: Any) -> None:
    model = build("llama", 1).double()
    ids, mask = prompts()
    loop = FusedDecoding(seed=9)
    settings = {"do_sample": True, "top_k": 0, "max_new_tokens": NEW}
    together = model.generate(
        ids, attention_mask=mask, custom_generate=LatentDecoding(kind, seed=4, loop=loop), **settings
    )
    for row in range(3):
        sampler = LatentDecoding(kind, seed=4, stream_ids=[row], loop=FusedDecoding(seed=9, stream_ids=[row]))
        start = int((1 - mask[row]).sum())  # without its padding
        alone = model.generate(ids[row : row + 1, start:], custom_generate=sampler, **settings)
        new = alone[0, 12 - start :]
        assert torch.equal(new, together[row, 12 : 12 + len(new)])
    other = model.generate(
        ids, attention_mask=mask, custom_generate=LatentDecoding(kind, seed=5, loop=loop), **settings
    )
    assert not torch.equal(other, together)


def test_without_a_seed_two_calls_differ_and_torchs_seed_repeats_them() -> None:
    model = shared("llama", 1)
    sampler = LatentDecoding("gumbel")
    ids, mask = prompts()

    def once() -> torch.Tensor:
        return model.generate(ids, attention_mask=mask, max_new_tokens=NEW, custom_generate=sampler)

    torch.manual_seed(1)
    first, second = once(), once()
    torch.manual_seed(1)
    assert torch.equal(once(), first)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("do_sample", [False, True])
def test_the_fused_loop_feeds_the_same_mixtures(do_sample: bool) -> None:
    model = composed()
    fused = LatentDecoding("gumbel", seed=3, loop=FusedDecoding(seed=2))
    ours = run(model, do_sample=do_sample, custom_generate=fused, use_cache=True)
    again = run(model, do_sample=do_sample, custom_generate=fused, use_cache=False)
    assert torch.equal(ours, again)
    if not do_sample:
        assert torch.equal(ours, run(model, custom_generate=LatentDecoding("gumbel", seed=3)))


# --- compiled forwards, streamers, records ----------------------------------------------------------------------------


def test_compiled_forward_passes_give_the_same_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import CompileConfig

    model = build("llama", 1)
    compiled: list[int] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Any:
        compiled.append(len(inputs))
        return graph.forward

    config = CompileConfig(backend=backend, mode=None, fullgraph=False)
    config._compile_all_devices = True  # else transformers compiles for GPUs only
    sampler = LatentDecoding("gumbel", seed=2)
    want = run(model, custom_generate=sampler, cache_implementation="static", disable_compile=True)
    assert not compiled
    torch._dynamo.reset()
    got = run(model, custom_generate=sampler, cache_implementation="static", compile_config=config)
    assert compiled
    assert torch.equal(got, want)
    torch._dynamo.reset()


class Kept(BaseStreamer):
    def __init__(self) -> None:
        self.put_: list[torch.Tensor] = []
        self.ended = False

    def put(self, value: torch.Tensor) -> None:
        self.put_.append(value)

    def end(self) -> None:
        self.ended = True


@pytest.mark.parametrize(("which", "where"), [("plain", "sampler"), ("composed", "sampler"), ("composed", "generate")])
def test_streaming(which: str, where: str) -> None:
    model = composed() if which == "composed" else shared("llama", 1)
    kept = Kept()
    given = {"streamer": kept} if where == "generate" else {}
    own = {"streamer": kept} if where == "sampler" else {}
    out = run(model, 1, **given, custom_generate=LatentDecoding("gumbel", seed=1, **own))
    assert torch.equal(torch.cat([x.flatten() for x in kept.put_]), out[0])
    assert kept.ended


def test_what_transformers_hands_no_callable_of_a_plain_model() -> None:
    """The streamer and the assistant of generate(): the text is right, the streamer gets the prompt alone."""
    model, sampler = shared("llama", 1), LatentDecoding("gumbel", seed=1)
    want = run(model, 1, custom_generate=sampler)
    kept = Kept()
    assert torch.equal(run(model, 1, streamer=kept, custom_generate=sampler), want)
    assert [x.tolist() for x in kept.put_] == [prompts(1)[0].tolist()]
    assert not kept.ended
    assert torch.equal(run(model, 1, assistant_model=build("llama", 4), custom_generate=sampler), want)
    kept, beams = Kept(), LatentDecoding("mean")
    want = run(model, 1, num_beams=2, custom_generate=beams)
    assert torch.equal(run(model, 1, num_beams=2, streamer=kept, custom_generate=beams), want)
    assert [x.tolist() for x in kept.put_] == [prompts(1)[0].expand(2, 12).tolist()]


def test_the_output_tells_which_steps_were_latent() -> None:
    model = build("llama", 1)
    sampler = LatentDecoding("mean", LatentGates(max_run=2))
    out = run(model, return_dict_in_generate=True, output_logits=True, custom_generate=sampler)
    assert isinstance(out, LatentOutput)
    assert out.soft.shape == out.entropy.shape == (3, NEW)
    for row in range(3):
        new = out.sequences[row, 12:].tolist()
        length = next((i + 1 for i, token in enumerate(new) if token == EOS), NEW)
        pattern = [i % 3 != 2 and new[i] not in (PAD, BOS, EOS) for i in range(length)]
        if not {PAD, BOS, EOS} & set(new[: length - 1]):
            assert out.soft[row, : length - 1].tolist() == pattern[: length - 1]
        assert not out.soft[row, length - 1 :].any()
        expected = torch.stack([torch.distributions.Categorical(logits=z[row].double()).entropy() for z in out.logits])
        torch.testing.assert_close(out.entropy[row, :length].double(), expected[:length], atol=1e-5, rtol=1e-5)
        assert out.entropy[row, length:].isnan().all()


def test_stop_criteria_end_it() -> None:
    class After(StoppingCriteria):
        def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
            return torch.full((len(input_ids),), input_ids.shape[1] >= 15)

    out = run(shared("llama", 1), stopping_criteria=[After()], custom_generate=LatentDecoding("gumbel", seed=1))
    assert out.shape[1] == 15


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")  # see test_peft.py
def test_a_peft_model_is_mixed_through_its_adapter() -> None:
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(build("llama", 1), peft.LoraConfig(target_modules=["q_proj", "embed_tokens"], r=4))
    torch.manual_seed(3)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    model = model.eval().double()
    ids, mask = prompts()

    def once(**kwargs: Any) -> torch.Tensor:
        return model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=NEW, **kwargs)

    plain = once()
    assert torch.equal(once(custom_generate=LatentDecoding("onehot")), plain)
    soft = once(custom_generate=LatentDecoding("mean"))
    assert not torch.equal(soft, plain)
    assert torch.equal(once(custom_generate=LatentDecoding("mean"), use_cache=False), soft)
    with LatentLogitsProcessor("mean").attach(model):
        assert torch.equal(once(), soft)
    with model.disable_adapter():
        assert not torch.equal(once(custom_generate=LatentDecoding("mean")), soft)


# --- wrong use --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", ["plain", "composed"])
def test_assisted_decoding_is_refused(which: str) -> None:
    model = composed(torch.float32) if which == "composed" else build("llama", 1)
    draft = build("llama", 4)
    for settings in ({"assistant_model": draft}, {"prompt_lookup_num_tokens": 3}):
        if which == "composed" or "assistant_model" not in settings:  # see above: a plain model hands none over
            with pytest.raises(UnsupportedModeError, match="assisted"):
                run(model, 1, **settings, custom_generate=LatentDecoding("mean"))
        with LatentLogitsProcessor("mean").attach(model), pytest.raises(UnsupportedModeError):
            run(model, 1, **settings)
    with LatentLogitsProcessor("mean").attach(draft), pytest.raises(UnsupportedModeError, match="drafts"):
        run(model, 1, assistant_model=draft)


def test_paged_caches_and_batching_are_refused() -> None:
    model = build("llama", 1)
    with LatentLogitsProcessor("mean").attach(model):
        with pytest.raises(UnsupportedModeError, match="continuous batching"):
            run(model, cache_implementation="paged")
        with pytest.raises(UnsupportedModeError, match="continuous batching"):
            model.generate_batch([[5, 6, 7]])
    with pytest.raises(UnsupportedModeError, match="continuous batching"):
        run(composed(torch.float32), cache_implementation="paged", custom_generate=LatentDecoding("mean"))


def test_encoder_decoders_are_refused() -> None:
    model = build("t5", 1)
    with pytest.raises(UnsupportedModeError, match="encoder-decoder"):
        run(model, custom_generate=LatentDecoding("mean"))
    with pytest.raises(UnsupportedModeError, match="encoder-decoder"):
        LatentLogitsProcessor("mean").attach(model)


def test_companions_that_read_ids_are_refused() -> None:
    base, expert, antiexpert = build("llama", 1), shared("gpt2", 2), shared("gpt2", 3)
    processor = ProxyTuningLogitsProcessor(expert, antiexpert, 0.7, check_vocabulary=False)
    with pytest.raises(UnsupportedModeError, match=r"proxytune\.wrap"):
        run(base, 1, logits_processor=[processor], custom_generate=LatentDecoding("mean"))
    with processor.attach(base):
        with pytest.raises(UnsupportedModeError, match=r"proxytune\.wrap"):
            run(base, 1, custom_generate=LatentDecoding("mean"))
        with pytest.raises(UnsupportedModeError, match=r"proxytune\.wrap"):
            LatentLogitsProcessor("mean").attach(base)
        # In its place again, and still attached.
        assert not torch.equal(run(base, 1), run(build("llama", 1), 1))
    with LatentLogitsProcessor("mean").attach(base), pytest.raises(InputError, match="not steered yet"):
        processor.attach(base)


def test_trees_are_refused_on_a_model_with_latent_steps() -> None:
    model = build("llama", 1)
    with LatentLogitsProcessor("mean").attach(model), pytest.raises(UnsupportedModeError, match="latent"):
        run(model, 1, do_sample=True, custom_generate=ForkDecoding(threshold=1.0))


def test_one_generation_at_a_time_on_a_model() -> None:
    model = build("llama", 1)
    with LatentLogitsProcessor("mean").attach(model):
        with pytest.raises(UnsupportedModeError, match="at a time"):
            run(model, custom_generate=LatentDecoding("mean"))
        with pytest.raises(UnsupportedModeError, match="at a time"):
            LatentLogitsProcessor("mean").attach(model)


def test_another_thread_decodes_as_ever_meanwhile() -> None:
    model, ids = build("llama", 1), prompts(1)[0]
    plain = model.generate(ids, max_new_tokens=6)
    found: list[torch.Tensor] = []

    class Meanwhile(LogitsProcessor):
        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            if not found:
                other = threading.Thread(target=lambda: found.append(model.generate(ids, max_new_tokens=6)))
                other.start()
                other.join()
            return scores

    soft = run(model, 1, custom_generate=LatentDecoding("mean"))
    again = run(model, 1, custom_generate=LatentDecoding("mean"), logits_processor=[Meanwhile()])
    assert torch.equal(again, soft)
    assert torch.equal(found[0], plain)


def test_nothing_stays_on_the_model_after_an_error_and_copies_go_without() -> None:
    class Broken(LogitsProcessor):
        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            if input_ids.shape[1] > 14:
                raise RuntimeError("broken")
            return scores

    model = build("llama", 1)
    plain = run(model)
    with pytest.raises(RuntimeError, match="broken"):
        run(model, logits_processor=[Broken()], custom_generate=LatentDecoding("mean"))
    assert "prepare_inputs_for_generation" not in vars(model)
    assert torch.equal(run(model), plain)
    with LatentLogitsProcessor("mean").attach(model):
        twin = copy.deepcopy(model)
        assert torch.equal(run(twin), plain)
        assert not torch.equal(run(model), plain)


def test_models_that_make_more_of_their_ids_are_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="their embedding alone"):
        run(KeyedByIds(), custom_generate=LatentDecoding("mean"))
    with pytest.raises(UnsupportedModelError, match="inputs_embeds"):
        run(NoEmbeddings(), custom_generate=LatentDecoding("mean"))


def test_wrong_settings_are_refused() -> None:
    model = shared("llama", 1)
    with pytest.raises(InputError, match="Did you mean 'gumbel'"):
        LatentDecoding("gumble")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="gates: expected a LatentGates"):
        LatentDecoding("mean", LatentMixture())  # type: ignore[arg-type]
    with pytest.raises(InputError, match="seed"):
        LatentDecoding("mean", seed=0.5)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="below 256"):
        run(model, custom_generate=LatentDecoding("mean", LatentGates(discrete_ids=[256])))
    with pytest.raises(InputError, match="stream_ids: .* each of 3 rows"):
        run(model, custom_generate=LatentDecoding("mean", stream_ids=[0, 1]))
    with pytest.raises(UnsupportedModeError, match="greedy decoding or sampling"):
        run(model, num_beams=3, custom_generate=LatentDecoding("mean", loop=FusedDecoding()))


def test_gates_by_text() -> None:
    words = tokenizer()
    words.add_tokens(["<think>", "</think>"])
    gates = LatentGates.for_tokenizer(words, "<think>…</think>", max_run=3)
    assert gates.begin_ids == (VOCABULARY,)
    assert gates.end_ids == (VOCABULARY + 1,)
    assert set(gates.discrete_ids) == {PAD, BOS, EOS}
    assert gates.max_run == 3
    assert LatentGates.for_tokenizer(words, "...</think>").begin_ids == ()
    assert LatentGates.for_tokenizer(words).end_ids == ()
    with pytest.raises(InputError, match=r"'<reason>', which is not a token"):
        LatentGates.for_tokenizer(words, "<reason>…</think>")
    for span in ("<think>", "<think>…", "a…b…c"):
        with pytest.raises(InputError, match="between them"):
            LatentGates.for_tokenizer(words, span)
    with pytest.raises(InputError, match="another"):
        LatentGates(begin_ids=5, end_ids=5)


# --- generations inside generations, other inputs, other places -------------------------------------------------------


class Nested(StoppingCriteria):
    """Looks ahead with the same model, and stops nothing."""

    def __init__(self, model: PreTrainedModel, tokens: int) -> None:
        self.model, self.tokens = model, tokens

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        self.model.generate(input_ids, max_new_tokens=self.tokens)
        return torch.zeros(len(input_ids), dtype=torch.bool)


class NestedProcessor(LogitsProcessor):
    def __init__(self, model: PreTrainedModel, tokens: int) -> None:
        self.nested = Nested(model, tokens)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.nested(input_ids, scores)
        return scores


@pytest.mark.parametrize("tokens", [1, 2])
@pytest.mark.parametrize("where", ["criterion", "processor"])
@pytest.mark.parametrize("door", ["sampler", "attached"])
@pytest.mark.smoke
def test_a_generation_inside_a_generation_changes_nothing(door: str, where: str, tokens: int) -> None:
    model = build("llama", 1)
    inside = (
        {"stopping_criteria": [Nested(model, tokens)]}
        if where == "criterion"
        else {"logits_processor": [NestedProcessor(model, tokens)]}
    )
    sampler = LatentDecoding("gumbel", seed=3)
    want = run(model, custom_generate=sampler)
    assert not torch.equal(want, run(model))
    if door == "sampler":
        assert torch.equal(run(model, custom_generate=sampler, **inside), want)
        return
    with LatentLogitsProcessor("gumbel", seed=3).attach(model):
        assert torch.equal(run(model, **inside), want)


@pytest.mark.parametrize("door", ["sampler", "attached"])
@pytest.mark.smoke
def test_weights_do_not_depend_on_how_the_prompt_was_given(door: str) -> None:
    model = build("llama", 1).double()
    ids, mask = prompts()
    embeds = model.get_input_embeddings()(ids)
    loop = FusedDecoding(seed=1)

    def once(rows: list[int], *args: Any, **kwargs: Any) -> Any:
        settings = {"max_new_tokens": 6, **kwargs}
        if door == "sampler":
            sampler = LatentDecoding("gumbel", seed=3, stream_ids=rows)
            return model.generate(*args, **settings, custom_generate=sampler)
        with LatentLogitsProcessor("gumbel", seed=3, stream_ids=rows).attach(model):
            return model.generate(*args, **settings, custom_generate=loop)

    want = once([0, 1, 2], ids, attention_mask=mask)[:, 12:]
    assert torch.equal(once([0, 1, 2], inputs_embeds=embeds, attention_mask=mask)[:, -6:], want)
    assert torch.equal(once([0], inputs_embeds=embeds[:1], attention_mask=mask[:1])[:, -6:], want[:1])
    assert torch.equal(once([0], inputs_embeds=embeds[:1])[:, -6:], want[:1])
    # A cache that holds the beginning of the prompt, and only the new ids.
    cache = model(ids[:1, :5], use_cache=True).past_key_values
    more = once([0], ids[:1, 5:], **{CACHE: cache}, attention_mask=mask[:1])
    assert torch.equal(more[:, 7:], want[:1])


def test_rows_that_a_criterion_ends_are_told_apart() -> None:
    class FirstRow(StoppingCriteria):
        def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
            return torch.tensor([input_ids.shape[1] >= 14, False, False])

    settings = {"eos_token_id": None, "return_dict_in_generate": True, "stopping_criteria": [FirstRow()]}
    out = run(build("llama", 1), **settings, custom_generate=LatentDecoding("mean"))
    assert out.soft[0].tolist() == [True] + [False] * (NEW - 1)
    assert out.entropy[0].isnan().tolist() == [False, False] + [True] * (NEW - 2)
    assert out.entropy[1:].isfinite().all()
    assert out.soft[1:, : NEW - 1].sum() > 10


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_an_offloaded_model_is_mixed_where_it_runs() -> None:
    from accelerate import cpu_offload

    want = run(build("llama", 1), custom_generate=LatentDecoding("gumbel", seed=3))
    model = cpu_offload(build("llama", 1), execution_device=torch.device("cpu"))
    assert model.get_input_embeddings().weight.device.type == "meta"
    assert torch.equal(run(model, custom_generate=LatentDecoding("gumbel", seed=3)), want)


def test_a_head_that_is_wider_than_the_embedding() -> None:
    model = build("llama", 1)
    head = model.lm_head.weight.data
    model.lm_head = torch.nn.Linear(32, 300, bias=False)
    model.lm_head.weight.data = torch.cat([head, torch.zeros(44, 32)])  # never the argmax, but among the candidates
    model.config.vocab_size = 300
    assert run(model)[:, 12:].max() < 256
    wide = run(model, custom_generate=LatentDecoding(LatentMixture(kind="mean", candidates=300)))
    all_known = LatentDecoding(LatentMixture(kind="mean", candidates=256))
    assert torch.equal(wide, run(build("llama", 1), custom_generate=all_known))


# --- wrong use, again -------------------------------------------------------------------------------------------------


def test_the_cold_stop_respects_constraints_and_onehot() -> None:
    model = build("llama", 1)
    cold = LatentGates(end_ids=[9], cold_steps=2, cold_entropy=50.0)
    free = run(model, custom_generate=LatentDecoding("mean", cold))
    assert (free[:, 12:] == 9).any(1).all()
    masked = run(model, custom_generate=LatentDecoding("mean", cold), suppress_tokens=[9])
    assert not (masked[:, 12:] == 9).any()
    few = run(
        model,
        custom_generate=LatentDecoding("mean", cold),
        prefix_allowed_tokens_fn=lambda batch, ids: [20, 21],
    )
    assert set(few[:, 12:].flatten().tolist()) <= {20, 21}
    assert torch.equal(run(model, custom_generate=LatentDecoding("onehot", cold)), run(model))


def test_guidance_is_refused() -> None:
    model = build("llama", 1)
    with pytest.raises(UnsupportedModeError, match="guidance_scale"):
        run(model, 1, guidance_scale=1.5, custom_generate=LatentDecoding("mean"))
    with LatentLogitsProcessor("mean").attach(model), pytest.raises(UnsupportedModeError, match="guidance"):
        run(model, 1, guidance_scale=1.5)


def test_a_streamer_with_beams_is_refused() -> None:
    model = build("llama", 1)
    for do_sample, error in ((False, ValueError), (True, UnsupportedModeError)):  # the first is transformers' own
        with pytest.raises(error, match="streamer"):
            run(
                composed(), 1, num_beams=2, do_sample=do_sample, streamer=Kept(), custom_generate=LatentDecoding("mean")
            )
    with pytest.raises(UnsupportedModeError, match="streamer"):
        run(model, 1, num_beams=2, custom_generate=LatentDecoding("mean", streamer=Kept()))


def test_a_model_that_was_first_seen_in_training_is_tried_out_later() -> None:
    model = KeyedByIds().train()
    run(model, 1, max_new_tokens=2, custom_generate=LatentDecoding("mean"))
    with pytest.raises(UnsupportedModelError, match="their embedding alone"):
        run(model.eval(), 1, custom_generate=LatentDecoding("mean"))


@pytest.mark.parametrize("masked", [-1e4, torch.finfo(torch.float32).min, -torch.inf])
def test_a_mask_in_the_head_hides_nothing(masked: float) -> None:
    model = KeyedByIds()
    model.register_forward_hook(lambda module, args, out: out.logits[..., 200:].fill_(masked) is None or out)
    with pytest.raises(UnsupportedModelError, match="their embedding alone"):
        run(model, 1, custom_generate=LatentDecoding("mean"))


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
def test_peft_models_that_learn_a_prompt_are_not_attached_to() -> None:
    peft = pytest.importorskip("peft")
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    model = peft.get_peft_model(build("llama", 1), config).eval()
    with pytest.raises(UnsupportedModelError, match="custom_generate"):
        LatentLogitsProcessor("mean").attach(model)


def test_somebody_else_s_method_in_the_hook_s_place_is_noticed() -> None:
    model = build("llama", 1)
    processor = LatentLogitsProcessor("mean").attach(model)
    model.prepare_inputs_for_generation = type(model).prepare_inputs_for_generation.__get__(model)
    with pytest.raises(UnsupportedModeError, match="another method in its place"):
        run(model)
    processor.detach()
    assert "_get_logits_processor" not in vars(model)
    run(model)


def test_an_attached_model_can_be_pickled_and_asked_by_hand() -> None:
    model = build("llama", 1)
    plain = run(model)
    with LatentLogitsProcessor("mean").attach(model):
        soft = run(model)
        assert torch.equal(run(pickle.loads(pickle.dumps(model))), soft)
        inputs = model.prepare_inputs_for_generation(prompts()[0], attention_mask=prompts()[1])
        assert inputs["input_ids"].shape == (3, 12)
    assert torch.equal(run(model), plain)


def test_settings_are_checked_where_they_are_given() -> None:
    for kind in (LatentDecoding, LatentLogitsProcessor):
        with pytest.raises(InputError, match="mixture: expected a LatentMixture; got 3"):
            kind(3)  # type: ignore[arg-type]
        with pytest.raises(InputError, match="gates: expected a LatentGates; got 3"):
            kind("mean", 3)  # type: ignore[arg-type]
        with pytest.raises(InputError, match="impl"):
            kind("mean", impl="cuda")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="end_ids"):
        LatentGates(end_ids=True)
