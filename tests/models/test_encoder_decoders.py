"""Three encoder-decoders as one model, against a slow reference: each row alone, the whole target anew, no cache."""

import copy
import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support.fake_streams import streams
from support.tiny import build, tokenizer
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    BartConfig,
    BartModel,
    BlenderbotConfig,
    DynamicCache,
    EncoderDecoderCache,
    FSMTConfig,
    LEDConfig,
    LEDForConditionalGeneration,
    LongT5Config,
    ProphetNetConfig,
    SwitchTransformersConfig,
    T5Config,
    T5EncoderModel,
    T5GemmaConfig,
    T5Model,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

import proxytune
from proxytune import ProxyTunedModel, ProxyTuningLogitsProcessor
from proxytune.cli.models import load
from proxytune.errors import (
    CacheError,
    InputError,
    MemberError,
    UnsupportedModeError,
    UnsupportedModelError,
    VocabularyMismatchError,
)
from proxytune.models.member_tokenizers import check_vocabularies
from proxytune.models.members.cache_name import CACHE, cache_of

PAD, START, EOS, V = 0, 0, 2, 48
SOURCES = torch.tensor([[5, 9, 23, 41, 7, EOS], [11, 17, EOS, PAD, PAD, PAD]])
MASK = (SOURCES != PAD).long()
NEW = 4
FAMILIES = ["t5", "bart"]
GREEDY = {"do_sample": False}
SAMPLE = {"do_sample": True, "num_return_sequences": 2}
BEAMS = {"do_sample": False, "num_beams": 3, "num_return_sequences": 2}


def made(kind: str, seed: int, size: int = 1) -> Any:
    """A random encoder-decoder; `size` changes widths, heads and layers."""
    torch.manual_seed(seed)
    ids = {"pad_token_id": PAD, "eos_token_id": EOS, "decoder_start_token_id": START, "bos_token_id": 1}
    t5 = {"d_model": 16 * size, "d_kv": 8, "d_ff": 24, "num_layers": size, "num_heads": 2 * size}
    heads = {"encoder_attention_heads": 2 * size, "decoder_attention_heads": 2 * size, "encoder_layers": size}
    bart = {**heads, "d_model": 16 * size, "decoder_layers": size + 1, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24}
    bart |= {"max_position_embeddings": 16, "forced_eos_token_id": None}
    config: Any
    match kind:
        case "t5":  # companions have more layers in the decoder
            config = T5Config(**t5, vocab_size=V, num_decoder_layers=2, **ids)
        case "switch":
            config = SwitchTransformersConfig(**t5, vocab_size=V, num_decoder_layers=size, num_experts=2, **ids)
        case "longt5" | "longt5 in blocks":
            attention = "local" if kind == "longt5" else "transient-global"
            config = LongT5Config(**t5, vocab_size=V, encoder_attention_type=attention, global_block_size=2, **ids)
        case "bart":
            config = BartConfig(**bart, vocab_size=V, **ids)
        case "blenderbot":  # makes no decoder_input_ids of labels by itself
            config = BlenderbotConfig(**bart, vocab_size=V, **ids)
        case "t5gemma":  # a config for each side, and layers with windows
            heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "num_hidden_layers": 2 * size}
            sizes = {"hidden_size": 16 * size, "intermediate_size": 24, "sliding_window": 3, "vocab_size": V}
            ids |= {"pad_token_id": V - 1}  # without a cache, it takes a target's first token for padding if that is it
            both = {**heads, **sizes, **ids}
            config = T5GemmaConfig(encoder=dict(both), decoder=dict(both), vocab_size=V, **ids)
        case "fsmt":  # has no causal mask, or logits of the last token alone, over a cache
            config = FSMTConfig(**bart, langs=["en", "de"], src_vocab_size=V, tgt_vocab_size=V, **ids)
        case "prophetnet":  # upstream, a cache changes what it writes
            sides = {
                f"num_{side}_{what}": 2 for side in ("encoder", "decoder") for what in ("layers", "attention_heads")
            }
            config = ProphetNetConfig(**sides, hidden_size=16, vocab_size=V, max_position_embeddings=16, **ids)
    model = AutoModelForSeq2SeqLM.from_config(config, dtype=torch.float32)
    for name, weight in model.named_parameters():
        if weight.ndim > 1 and "embed_positions" not in name:
            weight.data.normal_(0, 0.5 if "shared" in name else 1.3 / weight.shape[-1] ** 0.5)
    return model.eval()


def composed(kind: str) -> ProxyTunedModel:
    members = {"expert": made(kind, 2), "antiexpert": made(kind, 3)}
    return proxytune.wrap(made(kind, 1, 2), **members, alpha=0.7, check_vocabulary=False)


@functools.cache
def shared(kind: str) -> ProxyTunedModel:
    return composed(kind)


@pytest.fixture(params=FAMILIES)
def model(request: pytest.FixtureRequest) -> ProxyTunedModel:
    return shared(request.param)


def run(model: Any, sources: torch.Tensor = SOURCES, mask: torch.Tensor | None = MASK, **kwargs: Any) -> Any:
    torch.manual_seed(0)
    return model.generate(
        input_ids=sources,
        attention_mask=mask,
        **{"max_new_tokens": NEW, "return_dict_in_generate": True, "output_logits": True, **kwargs},
    )


def row(index: int) -> torch.Tensor:
    return SOURCES[index : index + 1, : int(MASK[index].sum())]


@torch.no_grad()
def reference(model: ProxyTunedModel, source: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """The combined logits `[B, V]` after targets `[B, T]` of one source `[1, S]`, from one pass of each member."""
    source, weights = source.expand(len(target), -1), {"base": 1, "expert": model.alpha, "antiexpert": -model.alpha}
    passes = {r: getattr(model, r)(input_ids=source, decoder_input_ids=target, use_cache=False) for r in weights}
    return sum(weights[role] * out.logits[:, -1].float() for role, out in passes.items())  # type: ignore[return-value]


def close(logits: torch.Tensor, wanted: torch.Tensor) -> None:
    torch.testing.assert_close(logits, wanted, atol=2e-5, rtol=1e-5)


def assert_greedy(model: ProxyTunedModel) -> None:
    """Each step's logits and token are the reference's, until the text ends."""
    out = run(model, **GREEDY)
    for i in range(2):
        target = torch.full((1, 1), START)
        for logits in out.logits:
            wanted = reference(model, row(i), target)
            close(logits[i : i + 1], wanted)
            target = torch.cat([target, wanted.argmax(-1, keepdim=True)], 1)
            if int(target[0, -1]) == EOS:
                break
        assert out.sequences[i, : target.shape[1]].tolist() == target[0].tolist()


# --- what comes out --------------------------------------------------------------------------------------------------


def test_greedy_is_the_reference(model: ProxyTunedModel) -> None:
    assert_greedy(model)


def test_sampling_is_the_reference(model: ProxyTunedModel) -> None:
    out = run(model, **SAMPLE)
    torch.manual_seed(0)
    target, ended = torch.full((4, 1), START), torch.zeros(4, dtype=torch.bool)
    for logits in out.logits:
        wanted = torch.cat([reference(model, row(i), target[2 * i : 2 * i + 2]) for i in range(2)])
        close(logits[~ended], wanted[~ended])
        drawn = torch.multinomial(wanted.softmax(-1), 1).squeeze(1).masked_fill(ended, PAD)
        target, ended = torch.cat([target, drawn[:, None]], 1), ended | (drawn == EOS)
    assert out.sequences.tolist() == target.tolist()
    assert len({tuple(text) for text in target.tolist()}) == 4


def test_beams_are_the_reference(model: ProxyTunedModel) -> None:
    """Three beams of a fixed length, the two best of them, each source alone."""
    out = run(model, **BEAMS, suppress_tokens=[EOS], output_scores=True)
    for i in range(2):
        beams, scores = torch.full((1, 1), START), torch.zeros(1)
        for _ in range(NEW):
            steps = reference(model, row(i), beams).log_softmax(-1).index_fill(1, torch.tensor([EOS]), -torch.inf)
            scores, best = (scores[:, None] + steps).flatten().topk(3)
            beams = torch.cat([beams[best // V], (best % V)[:, None]], 1)
        assert out.sequences[2 * i : 2 * i + 2].tolist() == beams[:2].tolist()
        close(out.sequences_scores[2 * i : 2 * i + 2], scores[:2] / NEW)


@pytest.mark.parametrize("mode", [GREEDY, SAMPLE, BEAMS, {"do_sample": True, "num_beams": 2}], ids=str)
@pytest.mark.parametrize("kind", FAMILIES)
def test_alpha_zero_is_the_base_to_the_bit(kind: str, mode: dict[str, Any]) -> None:
    off = proxytune.wrap(
        *(getattr(shared(kind), role) for role in ("base", "expert", "antiexpert")), alpha=0, check_vocabulary=False
    )
    ours, plain = run(off, **mode), run(off.base, **mode)
    assert torch.equal(ours.sequences, plain.sequences)
    assert all(map(torch.equal, ours.logits, plain.logits))


@pytest.mark.parametrize("mode", [GREEDY, BEAMS], ids=str)
def test_ragged_rows_are_each_row_alone_also_without_a_cache(model: ProxyTunedModel, mode: dict[str, Any]) -> None:
    both, n = run(model, **mode).sequences, mode.get("num_return_sequences", 1)
    for i in range(2):
        alone = run(model, row(i), None, **mode, use_cache=i == 0).sequences
        width = min(alone.shape[1], both.shape[1])
        assert torch.equal(alone[:, :width], both[n * i : n * i + n, :width])


def test_each_source_is_read_once_and_each_token_once() -> None:
    model = shared("t5")
    before = dict(model.token_forwards)
    steps = run(model, **BEAMS, suppress_tokens=[EOS]).sequences.shape[1] - 1
    assert all(n - before[role] == SOURCES.numel() + 2 * 3 * steps for role, n in model.token_forwards.items())


@pytest.mark.parametrize("kind", ["switch", "t5gemma"])
def test_other_kinds_of_states_and_configs(kind: str) -> None:
    assert_greedy(composed(kind))


def test_encoder_outputs_and_a_target_that_is_begun(model: ProxyTunedModel) -> None:
    whole = run(model, **GREEDY).sequences
    states = model.get_encoder()(SOURCES, MASK)
    again = model.generate(encoder_outputs=states, attention_mask=MASK, max_new_tokens=NEW, **GREEDY)
    assert torch.equal(again, whole)
    begun = run(model, **GREEDY, decoder_input_ids=whole[:, :3], max_new_tokens=NEW - 2).sequences
    assert torch.equal(begun, whole)


def test_states_of_experts_that_another_composition_read() -> None:
    first = composed("switch")
    second = proxytune.wrap(first.base, first.expert, first.antiexpert, alpha=0.7, check_vocabulary=False)
    states = first.get_encoder()(SOURCES, MASK)
    out = second.generate(encoder_outputs=states, attention_mask=MASK, max_new_tokens=NEW, **GREEDY)
    assert torch.equal(out, run(first, **GREEDY).sequences)


@pytest.mark.parametrize("mode", [GREEDY, BEAMS], ids=str)
def test_companions_on_side_streams(mode: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    model, wanted = composed("t5"), run(shared("t5"), **mode).sequences
    with streams(monkeypatch) as books:
        assert torch.equal(run(model, **mode).sequences, wanted)
    assert len(books.streams) == 3, "one side stream per companion"
    assert books.crossings > 0


# --- forward ---------------------------------------------------------------------------------------------------------

LABELS = torch.tensor([[8, 9, 10, EOS], [4, EOS, -100, -100]])


@pytest.mark.parametrize("kind", [*FAMILIES, "blenderbot"])
def test_labels_give_the_log_likelihood_of_a_target(kind: str) -> None:
    model = shared(kind)
    with torch.no_grad():
        out = model(input_ids=SOURCES, attention_mask=MASK, labels=LABELS)
    losses = []
    for i, n in enumerate((4, 2)):
        target = torch.cat([torch.tensor([START]), LABELS[i, :n]])[None]
        rows = torch.cat([reference(model, row(i), target[:, : k + 1]) for k in range(n)])
        close(out.logits[i, :n], rows)
        losses += torch.nn.functional.cross_entropy(rows, LABELS[i, :n], reduction="none").tolist()
    assert float(out.loss) == pytest.approx(sum(losses) / 6, abs=1e-5)
    assert cache_of(out) is None


@torch.no_grad()
def test_a_loop_of_ones_own_goes_on_from_a_cache(model: ProxyTunedModel) -> None:
    text = run(model, **GREEDY).sequences[:, :4]
    states = model.get_encoder()(SOURCES, MASK)
    given = {"encoder_outputs": states, "attention_mask": MASK}
    whole = model(**given, decoder_input_ids=text, use_cache=False).logits
    cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
    steps = [model(**given, decoder_input_ids=part, **{CACHE: cache}).logits for part in text.split([2, 1, 1], 1)]
    close(torch.cat(steps, 1), whole)
    own = model.member_logits(SOURCES, MASK, decoder_input_ids=text)
    combined = own["base"] + model.alpha * (own["expert"] - own["antiexpert"])
    close(combined, whole)


# --- what is refused -------------------------------------------------------------------------------------------------

START_TWICE = torch.full((2, 2), START)
REFUSED: dict[str, tuple[type[Exception], str, dict[str, Any]]] = {
    "a static cache": (UnsupportedModeError, "cache_implementation='static'", {"cache_implementation": "static"}),
    "an offloaded cache": (UnsupportedModeError, "='offloaded'", {"cache_implementation": "offloaded"}),
    "prompt lookup": (UnsupportedModeError, "settings for assisted generation", {"prompt_lookup_num_tokens": 2}),
    "chunks": (UnsupportedModeError, "prefill_chunk_size=2", {"prefill_chunk_size": 2}),
    "guidance": (UnsupportedModeError, "guidance_scale=1.5", {"guidance_scale": 1.5}),
    "healing": (UnsupportedModeError, "token_healing=True", {"token_healing": True}),
    "adapters": (UnsupportedModeError, "adapter_names: .* got ..a., .b..", {"adapter_names": ["a", "b"]}),
    "embeddings": (InputError, "inputs_embeds: ", {"inputs_embeds": torch.zeros(2, 3, 16)}),
    "attentions": (InputError, "output_attentions=True", {"output_attentions": True}),
    "a cache of another kind": (CacheError, "a DynamicCache", {CACHE: DynamicCache()}),
    "a padded target": (
        InputError,
        "decoder_input_ids of one length",
        {"decoder_input_ids": START_TWICE, "decoder_attention_mask": torch.tensor([[1, 1], [0, 1]])},
    ),
    "a long source": (InputError, "length for the encoder of the base: expected at most 16 tokens", {"length": 17}),
    "a long target": (InputError, "length for the base: expected at most 16 tokens", {"max_new_tokens": 20}),
    "an unknown id": (InputError, f"id {V}, which the base", {"decoder_input_ids": START_TWICE + V}),
    "FusedDecoding": (UnsupportedModeError, "expected a decoder-only model", {"custom_generate": "FusedDecoding"}),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_in_generate(name: str) -> None:
    error, message, given = REFUSED[name]
    given, model = dict(given), shared("bart")
    sources = {"input_ids": SOURCES, "attention_mask": MASK} if "inputs_embeds" not in given else {}
    if length := given.pop("length", None):
        sources = {"input_ids": torch.full((1, length), 5)}
    if "custom_generate" in given:
        given["custom_generate"] = getattr(proxytune, given["custom_generate"])()
    if "max_new_tokens" in given:
        given["suppress_tokens"] = [EOS]
    with pytest.raises(error, match=message):
        model.generate(**sources, **{"max_new_tokens": 2, **GREEDY, **given})


def test_drafts_and_caches_of_other_calls_are_refused() -> None:
    model = shared("t5")
    with pytest.raises(UnsupportedModeError, match="settings for assisted generation"):
        run(model, **GREEDY, assistant_model=model.expert)
    first = run(model, **GREEDY, max_new_tokens=2)
    with pytest.raises(CacheError, match="an empty cache in generate.* got one that holds 2 tokens"):
        run(model, **GREEDY, decoder_input_ids=first.sequences, **{CACHE: cache_of(first)})
    plain = run(model.base, **GREEDY, max_new_tokens=2)
    with pytest.raises(CacheError, match="filled by another model"):
        model(input_ids=SOURCES, decoder_input_ids=START_TWICE[:, :1], **{CACHE: cache_of(plain)})
    with pytest.raises(InputError, match="the states of all members' encoders"):
        model.generate(encoder_outputs=model.base.get_encoder()(SOURCES), **GREEDY, max_new_tokens=2)
    with pytest.raises(UnsupportedModelError, match="compiled steps run over a static cache"):
        model.compile_members()


def test_what_is_refused_in_forward() -> None:
    model = shared("t5")
    with pytest.raises(InputError, match="the source as input_ids, and the target as decoder_input_ids or labels"):
        model(SOURCES)
    with pytest.raises(InputError, match="padding at the right; got padding before tokens"):
        model(SOURCES, decoder_input_ids=START_TWICE, decoder_attention_mask=torch.tensor([[0, 1], [1, 1]]))
    with pytest.raises(InputError, match=r"the shape of decoder_input_ids, \[2, 2\]; got \[2, 4\]"):
        model(SOURCES, decoder_input_ids=START_TWICE, labels=LABELS)
    for given, message in (
        ({"decoder_input_ids": START_TWICE + V}, f"^decoder_input_ids: .* id {V}, which the base"),
        ({"decoder_input_ids": START_TWICE[0]}, r"^decoder_input_ids: .*two dimensions .*; got shape \[2\]"),
        ({"decoder_input_ids": START_TWICE[:1].expand(3, 2)}, "^decoder_input_ids: expected .* the 2 sources; got 3"),
        ({"labels": START_TWICE, "decoder_inputs_embeds": torch.zeros(2, 2, 16)}, "^decoder_inputs_embeds: .*a Tensor"),
    ):
        with pytest.raises(InputError, match=message):
            model(SOURCES, **given)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.tensor([[3, 4], [3, V]]), f"id {V}, which the base"),  # no decoder reads the last one
        (torch.tensor([[3, -5], [3, 4]]), "id -5, which the base"),
        (torch.tensor([3, 4]), r"two dimensions .*; got shape \[2\]"),
        ([[3, 4], [3, 4]], "two dimensions .*; got a list"),
        (torch.tensor([[3, 4]] * 3), "one row for each of the 2 sources; got 3"),
    ],
    ids=str,
)
def test_labels_that_are_none_are_refused_by_their_name(model: ProxyTunedModel, labels: Any, message: str) -> None:
    with pytest.raises(InputError, match=f"^labels: .*{message}"):
        model(SOURCES, labels=labels)


@torch.no_grad()
def test_one_source_serves_several_targets(model: ProxyTunedModel) -> None:
    targets = torch.cat([torch.full((2, 1), START), LABELS[:, :1]], 1)
    close(model(row(0), decoder_input_ids=targets).logits[:, -1], reference(model, row(0), targets))


@pytest.mark.parametrize("kind", [T5Model, T5EncoderModel, BartModel], ids=str)
def test_models_without_a_head_are_sent_to_the_right_door(kind: Any) -> None:
    members = shared("bart" if kind is BartModel else "t5")
    headless = kind(copy.deepcopy(members.base.config))
    for roles in ((headless, members.expert, members.antiexpert), (members.base, headless, members.antiexpert)):
        with pytest.raises(
            UnsupportedModelError, match="got a .*Model .*no LM head. Load it with AutoModelForSeq2SeqLM"
        ):
            proxytune.wrap(*roles, check_vocabulary=False)


def test_arguments_of_single_families_are_refused_by_name() -> None:
    t5 = shared("t5")
    with pytest.raises(InputError, match=r"^decoder_inputs_embeds: .*decoder_input_ids; got a Tensor"):
        run(t5, decoder_inputs_embeds=torch.zeros(2, 1, 16))
    with pytest.raises(ValueError, match=r"not used by the model: \['global_attention_mask'\]"):  # as by a plain T5
        run(t5, global_attention_mask=MASK)
    sizes = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 8, "decoder_ffn_dim": 8}
    sizes |= {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "vocab_size": V, "attention_window": 2}
    ends = {"pad_token_id": PAD, "eos_token_id": EOS, "decoder_start_token_id": START}
    base, expert, antiexpert = (LEDForConditionalGeneration(LEDConfig(**sizes, **ends)).eval() for _ in range(3))
    led = proxytune.wrap(base, expert, antiexpert, check_vocabulary=False)
    for call in (run, lambda model, **given: model(SOURCES, MASK, labels=LABELS, **given)):
        with pytest.raises(InputError, match=r"^global_attention_mask: .*model.base.generate"):
            call(led, global_attention_mask=MASK)


def test_all_members_are_of_one_kind() -> None:
    base, expert, antiexpert = (getattr(shared("t5"), role) for role in ("base", "expert", "antiexpert"))
    plain = build("llama", 0, V)
    for members, message in (
        ((base, plain, antiexpert), r"the expert: expected an encoder-decoder; got Llama.*, a decoder-only model"),
        ((plain, expert, antiexpert), r"the expert: expected a decoder-only model; got T5.*, an encoder-decoder"),
    ):
        with pytest.raises(UnsupportedModelError, match=message):
            proxytune.wrap(*members, check_vocabulary=False)


def test_decoders_that_start_with_another_token_are_refused() -> None:
    other = made("t5", 5)
    other.generation_config.decoder_start_token_id = 3
    base, antiexpert = shared("t5").base, shared("t5").antiexpert
    with pytest.raises(MemberError, match=r"one token .*; got 0 \(base\), 3 \(expert\), 0 \(antiexpert\)"):
        proxytune.wrap(base, other, antiexpert, check_vocabulary=False)


def test_encoders_of_sound_are_refused() -> None:
    sizes = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "num_mel_bins": 8, "vocab_size": V}
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 0}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 8, "decoder_ffn_dim": 8}
    hears = WhisperForConditionalGeneration(WhisperConfig(**sizes, **heads, **ids))
    with pytest.raises(UnsupportedModelError, match="the base: .* got a Whisper.* that reads input_features"):
        proxytune.wrap(hears, shared("t5").expert, shared("t5").antiexpert, check_vocabulary=False)


LEFT = MASK.flip(1)


@pytest.mark.parametrize("kind", ["bart", "longt5 in blocks"])
def test_left_padded_sources_are_refused_before_any_encoder_runs(kind: str) -> None:
    model = shared(kind)
    before = model.token_forwards
    sources = SOURCES.flip(1)
    for call in (
        lambda: run(model, sources, LEFT),
        lambda: run(model, sources, LEFT.bool()),
        lambda: model(sources, LEFT, decoder_input_ids=START_TWICE),
        lambda: model.member_logits(sources, LEFT),
        lambda: model.get_encoder()(sources, LEFT),
    ):
        with pytest.raises(UnsupportedModeError, match=r"left padding for the base: .*Pad sources at the right"):
            call()
    assert model.token_forwards == before
    assert model.members[0].verdict.right is None
    run(model, **GREEDY)  # padding at the right changes nothing


@pytest.mark.parametrize("kind", ["t5", "longt5"])
def test_left_padded_sources_of_others_are_each_row_alone(kind: str) -> None:
    model, ends = shared(kind), MASK.sum(1).tolist()
    sources = torch.stack([r.roll(len(r) - n) for r, n in zip(SOURCES, ends, strict=True)])
    out = model(sources, LEFT, decoder_input_ids=START_TWICE, use_cache=False).logits
    for i in range(2):
        close(out[i : i + 1, -1], reference(model, row(i), START_TWICE[:1]))


@pytest.mark.parametrize("kind", ["prophetnet", "fsmt"])
def test_a_model_that_a_cache_changes_is_refused(kind: str) -> None:
    with pytest.raises(UnsupportedModelError, match=rf"\({kind}\) with logits (that differ by|of 3) .* over a cache"):
        composed(kind)


def test_processors_that_read_ids_have_no_source() -> None:
    base, expert, antiexpert = (getattr(shared("t5"), role) for role in ("base", "expert", "antiexpert"))
    with pytest.raises(UnsupportedModelError, match="decoder-only model; got T5.*composed by proxytune.wrap"):
        ProxyTuningLogitsProcessor(expert, antiexpert, check_vocabulary=False)
    processor = ProxyTuningLogitsProcessor(build("gpt2", 1, V), build("gpt2", 2, V), check_vocabulary=False)
    with pytest.raises(UnsupportedModelError, match="an encoder-decoder: the source is not among them"):
        processor.attach(base)


def test_a_second_vocabulary_for_what_is_written_is_compared() -> None:
    class Tokenizer:
        eos_token_id = None

        def __init__(self, *written: str) -> None:
            self.target_encoder = {token: i for i, token in enumerate(written)}

        def get_vocab(self) -> dict[str, int]:
            return {"ein": 0, "Wort": 1}

    tokenizers = {"base": Tokenizer("a", "word"), "expert": Tokenizer("un", "mot")}
    with pytest.raises(VocabularyMismatchError, match="id 0: 'a' in the base, 'un' in the expert"):
        check_vocabularies(dict.fromkeys(tokenizers), tokenizers)


# --- folders ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("members")
    for role in ("base", "expert", "antiexpert"):
        getattr(shared("bart"), role).save_pretrained(place / role)
        tokenizer().save_pretrained(place / role)
    build("llama", 0, V).save_pretrained(place / "llama")
    return place


def test_a_recipe_opens_again(folder: Path) -> None:
    members = {role: folder / role for role in ("expert", "antiexpert")}
    first = proxytune.wrap(folder / "base", **members, alpha=0.7)
    wanted = run(shared("bart"), **GREEDY).sequences
    assert torch.equal(run(first, **GREEDY).sequences, wanted)
    first.save_pretrained(folder / "recipe")
    written = json.loads((folder / "recipe" / "config.json").read_text())
    assert written["is_encoder_decoder"]
    assert written["architectures"] == ["AutoModelForSeq2SeqLM"]
    for door in (AutoModelForSeq2SeqLM, AutoModelForCausalLM, ProxyTunedModel):
        again = door.from_pretrained(folder / "recipe")
        assert torch.equal(run(again, **GREEDY).sequences, wanted)
    with pytest.raises(UnsupportedModelError, match="members: expected decoder-only models; got encoder-decoders"):
        load(None, None, None, None, folder / "recipe", "cpu", "float32")


@pytest.mark.parametrize(("kind", "other"), [("base", "llama"), ("llama", "base")])
def test_mixed_folders_are_refused_before_weights_are_read(
    folder: Path, monkeypatch: pytest.MonkeyPatch, kind: str, other: str
) -> None:
    monkeypatch.setattr("proxytune.models.loading.open_member", None)
    with pytest.raises(UnsupportedModelError, match="the expert: expected an? .*; got '.*all three members or none"):
        proxytune.wrap(folder / kind, folder / other, folder / "antiexpert", check_vocabulary=False)
