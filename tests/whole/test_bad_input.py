"""Wrong use fails loudly: one clear error each, from the drawn tree, tested by its message."""

import copy
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny import CONTEXT, EOS, PAD, build, shared, tokenizer
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    LlamaForSequenceClassification,
    LlamaModel,
    PreTrainedModel,
    StaticCache,
    SynthIDTextWatermarkingConfig,
    pipeline,
)
from transformers.generation.logits_process import UnbatchedClassifierFreeGuidanceLogitsProcessor

import proxytune
from proxytune import FusedDecoding, ProxyTunedModel, ProxyTuningLogitsProcessor
from proxytune.demo import bundled
from proxytune.errors import (
    CacheError,
    InputError,
    MemberError,
    MemberNotFoundError,
    ProxytuneError,
    UnsupportedModeError,
    UnsupportedModelError,
)
from proxytune.methods.latent import LatentMixture
from proxytune.models.load_arguments import LOAD_ARGUMENTS
from proxytune.models.members import layer_kinds
from proxytune.models.members.cache_name import CACHE

GREEDY = {"do_sample": False, "max_new_tokens": 4}


def compose(**kwargs: Any) -> ProxyTunedModel:
    members = {"base": shared("llama", 1), "expert": shared("gpt2", 2), "antiexpert": shared("gpt2", 3)}
    return proxytune.wrap(**(members | kwargs), check_vocabulary=False)


def processor(**kwargs: Any) -> ProxyTuningLogitsProcessor:
    members = {"expert": shared("gpt2", 2), "antiexpert": shared("gpt2", 3)}
    return ProxyTuningLogitsProcessor(**(members | kwargs), check_vocabulary=False)


@pytest.fixture(params=["composed", "attached", "dropped in"])
def door(request: pytest.FixtureRequest) -> Any:
    """`generate(**kwargs)` through one of the doors."""
    if request.param == "composed":
        yield compose().generate
        return
    base = shared("llama", 1)
    if request.param == "attached":
        with processor().attach(base):
            yield base.generate
        return
    yield lambda *args, **kwargs: base.generate(*args, logits_processor=[processor()], **kwargs)


def prompt(rows: int = 1, length: int = 6) -> torch.Tensor:
    return torch.randint(3, 240, (rows, length))


# --- α and the members -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [float("nan"), float("inf"), float("-inf"), "1", None, True, [0.5]])
def test_alpha_must_be_finite(alpha: Any) -> None:
    match = r"alpha: expected a finite number .*; got " + re.escape(repr(alpha))
    with pytest.raises(InputError, match=match):
        processor(alpha=alpha)
    with pytest.raises(InputError, match=match):
        compose().alpha = alpha
    if alpha is not None:  # None is "not given" here
        with pytest.raises(InputError, match=match):
            compose(alpha=alpha)


@pytest.mark.parametrize("role", ["expert", "antiexpert"])
def test_a_missing_member_is_named(role: str) -> None:
    with pytest.raises(InputError, match=f"the {role}: expected a model, a hub id or a folder; got None"):
        compose(**{role: None})
    with pytest.raises(InputError, match=f"the {role}: expected .*; got None"):
        processor(**{role: None})


@pytest.mark.parametrize("role", ["base", "expert", "antiexpert"])
def test_what_holds_a_model_is_no_member(role: str) -> None:
    class Pipeline:
        model = None

    with pytest.raises(InputError, match=f"the {role}: expected a model, .*; got a Pipeline. .* pipeline.model"):
        compose(**{role: Pipeline()})


@pytest.mark.parametrize("role", ["base", "expert", "antiexpert"])
def test_a_missing_folder_is_named(role: str, tmp_path: Path) -> None:
    folder = str(tmp_path / "nowhere")
    with pytest.raises(MemberNotFoundError, match=f"the {role}: expected a hub id, or a folder .*; got '.*nowhere'"):
        compose(**{role: folder})


def test_an_empty_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(MemberNotFoundError, match="the expert: expected a hub id, or a folder with a config.json"):
        compose(expert=str(tmp_path))


@pytest.fixture
def layers_in_order() -> Iterator[None]:
    """What is taken out of a dictionary and put back comes last, and a page is made of the order."""
    before = dict(layer_kinds.ABLE)
    yield
    layer_kinds.ABLE.clear()
    layer_kinds.ABLE.update(before)


@pytest.mark.parametrize(
    ("kind", "name", "layers"),
    [
        ("mamba", "MambaForCausalLM", "linear_attention"),
        ("jamba", "JambaForCausalLM", "linear_attention"),
        ("lfm2", "Lfm2ForCausalLM", "conv"),
    ],
)
def test_layers_of_an_unknown_kind_are_refused_by_name(
    kind: str, name: str, layers: str, layers_in_order: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build(kind, 5)
    monkeypatch.delitem(layer_kinds.ABLE, layers)
    for role in ("base", "expert", "antiexpert"):
        with pytest.raises(
            UnsupportedModelError, match=f"the {role}: expected layers of a kind .*; got {name}.*{layers}"
        ):
            compose(**{role: model})
    with pytest.raises(UnsupportedModelError, match=f"the expert: .*; got {name}.* with {layers} layers"):
        processor(expert=model)


def test_a_trainer_s_batch_is_taken_whole() -> None:
    model, ids = compose(), torch.randint(3, 200, (1, 4))
    asked: dict[str, Any] = {"max_new_tokens": 2, "do_sample": False, "pad_token_id": PAD}
    assert torch.equal(model.generate(input_ids=ids, labels=ids, **asked), model.generate(ids, **asked))
    assert not model.accepts_loss_kwargs


@pytest.mark.parametrize(
    ("ability", "settings"),
    [
        ("reorder", {"num_beams": 2}),
        ("repeat", {"custom_generate": proxytune.ForkDecoding(threshold=1.0)}),
        ("crop", {"prompt_lookup_num_tokens": 2}),
        ("crop", {"custom_generate": proxytune.SpeculativeDecoding()}),
        ("static", {"cache_implementation": "static"}),
    ],
    ids=str,
)
def test_a_mode_is_refused_where_layers_lack_what_it_needs(
    ability: Any, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, ids = compose(base=build("lfm2", 5)), torch.randint(3, 200, (1, 4))
    monkeypatch.setitem(layer_kinds.ABLE, "conv", layer_kinds.ABLE["conv"] - {ability})
    with pytest.raises(UnsupportedModeError, match="for the base: expected .*; got a Lfm2ForCausalLM .* conv layers"):
        model.generate(ids, max_new_tokens=2, pad_token_id=PAD, **settings)


def test_an_encoder_decoder_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="the expert: expected a decoder-only model; got T5"):
        compose(expert=build("t5", 1))


def test_something_that_is_no_model_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="the expert: expected a causal LM .*; got Linear"):
        compose(expert=torch.nn.Linear(2, 2))


def test_what_holds_a_model_is_none() -> None:
    ask = pipeline("text-generation", build("llama", 1), tokenizer=tokenizer())
    for source, shown in ((ask, "TextGenerationPipeline"), (tokenizer(), "TokenizersBackend"), (7, "7")):
        match = f"the expert: expected a model, a hub id or a folder; got <?.*{shown}.*Pass the model itself"
        with pytest.raises(InputError, match=match):
            compose(expert=source)


def test_a_compiled_wrapper_is_no_member() -> None:
    for make, role in ((compose, "base"), (compose, "expert"), (processor, "antiexpert")):
        compiled = torch.nn.Module()  # as torch.compile() makes it
        compiled._orig_mod = shared("gpt2", 4)
        with pytest.raises(UnsupportedModelError, match=rf"the {role}: expected the model itself; got torch.compile\("):
            make(**{role: compiled})


@pytest.mark.parametrize("kind", [LlamaModel, LlamaForSequenceClassification])
def test_a_model_without_a_head_is_refused(kind: Any) -> None:
    bare = kind(shared("llama", 1).config)
    match = rf"the {{}}: expected a causal LM; got a {kind.__name__} \(llama\), which has no LM head. Load it with Auto"
    for role in ("base", "expert", "antiexpert"):
        with pytest.raises(UnsupportedModelError, match=match.format(role)):
            compose(**{role: bare})
    with pytest.raises(UnsupportedModelError, match=match.format("expert")):
        processor(expert=bare)


def test_members_in_the_order_of_the_original_code() -> None:
    base, expert, antiexpert = shared("llama", 1), shared("gpt2", 2), shared("gpt2", 3)
    model = proxytune.wrap(base, expert, antiexpert, check_vocabulary=False)
    assert (model.base, model.expert, model.antiexpert) == (base, expert, antiexpert)
    for third in (antiexpert, "org/small-base", Path("tiny-base")):
        with pytest.raises(InputError, match=r"^alpha: .* the base goes to attach\(\)"):
            ProxyTuningLogitsProcessor(base, expert, third, check_vocabulary=False)


def test_a_config_without_a_cache_says_how_to_have_one() -> None:
    base = build("llama", 1)
    base.generation_config.use_cache = False  # as MPT's config does
    loop = proxytune.SpeculativeDecoding(seed=0)
    with pytest.raises(CacheError, match=r"; got none \(use_cache=False\). Pass use_cache=True to generate"):
        compose(base=base).generate(prompt(), **GREEDY, custom_generate=loop)
    compose(base=base).generate(prompt(), **GREEDY, use_cache=True, custom_generate=loop)


def test_contradicting_arguments_are_refused() -> None:
    with pytest.raises(InputError, match="wrap: expected alpha or formula; got both"):
        compose(alpha=0.5, formula=proxytune.formulas.ProxyTuning(alpha=0.5))
    with pytest.raises(InputError, match="members: expected no further arguments .*; got dtype"):
        compose(dtype=torch.bfloat16)
    with pytest.raises(InputError, match="revisions: expected roles out of base, expert, antiexpert; got exprt"):
        compose(revisions={"exprt": "v1"})


@pytest.mark.parametrize("role", ["base", "expert", "antiexpert"])
def test_a_composed_model_is_no_member(role: str, tmp_path: Path) -> None:
    steered = compose(alpha=0.5)
    match = f"the {role}: expected a plain model; got a composed one, a ProxyTunedModel of alpha=0.5. .*model.base"
    with pytest.raises(MemberError, match=match) as caught:
        compose(**{role: steered})
    assert ("set its alpha" in str(caught.value)) is (role == "base")
    members = {"base": shared("llama", 1), "expert": shared("gpt2", 2), "antiexpert": shared("gpt2", 3)}
    with pytest.raises(MemberError, match=match):
        ProxyTunedModel(proxytune.ProxyTunedConfig(), members | {role: steered}, steered.formula)
    if role != "base":
        with pytest.raises(MemberError, match=match):
            processor(**{role: steered})
    # The folder of a recipe opens as a composed model too.
    family = {"expert": bundled("tiny-tuned"), "antiexpert": bundled("tiny-base")}
    proxytune.wrap(bundled("large-base"), **family, alpha=0.5).save_pretrained(tmp_path)
    with pytest.raises(MemberError, match=match):
        compose(**{role: tmp_path})


# --- keywords ----------------------------------------------------------------------------------------------------

FOREIGN = [
    ("alhpa", 0.5, "Did you mean alpha"),
    ("anti_experts", "x", "Did you mean antiexpert"),
    ("tokenizer", "x", "Did you mean tokenizers"),
    ("check_vocab", False, "Did you mean check_vocabulary"),
    ("device", "cpu", "Did you mean device_map"),
    ("local_file_only", True, "Did you mean local_files_only"),
    ("load_in_8bit", True, r"quantization_config=transformers.BitsAndBytesConfig\(load_in_8bit=True\)"),
    ("max_new_tokens", 20, r"a setting of generate\(\): call model.generate\(…, max_new_tokens=20\)"),
    ("frobnicate", 1, "passed on to from_pretrained, which does not know it"),
    ("role", 1, "passed on to from_pretrained, which does not know it"),
    ("caller", 1, "passed on to from_pretrained, which does not know it"),
]


@pytest.fixture
def no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """No member is opened: on the hub, that would download its weights first."""

    def opened(*arguments: Any, **options: Any) -> Any:
        raise AssertionError("a member was opened")

    monkeypatch.setattr("proxytune.models.loading.open_member", opened)


@pytest.mark.parametrize(("name", "value", "remedy"), FOREIGN)
def test_an_unknown_keyword_is_named_before_weights_are_read(
    no_weights: None, name: str, value: Any, remedy: str
) -> None:
    match = f"^{name}: expected an argument of {{}} .*alpha.* or from_pretrained; got {name}={value!r}. .*{remedy}"
    large, expert, antiexpert = (str(bundled(member)) for member in ("large-base", "tiny-tuned", "tiny-base"))
    with pytest.raises(InputError, match=match.format("wrap")):
        proxytune.wrap(large, expert=expert, antiexpert=antiexpert, **{name: value})
    with pytest.raises(InputError, match=match.format("ProxyTuningLogitsProcessor")):
        ProxyTuningLogitsProcessor(expert, antiexpert, **{name: value})


@pytest.mark.parametrize(("name", "value", "remedy"), FOREIGN)
def test_a_model_with_code_of_its_own_may_take_any_keyword(name: str, value: Any, remedy: str) -> None:
    # Only its constructor can tell; then transformers' TypeError becomes the same error.
    with pytest.raises(InputError, match=f"^{name}: expected .*; got {name}={value!r}. .*{remedy}"):
        compose(expert=bundled("tiny-tuned"), **{name: value, "trust_remote_code": True})


def test_a_misspelt_role_is_not_only_missing() -> None:
    base, expert, antiexpert = shared("llama", 1), shared("gpt2", 2), shared("gpt2", 3)
    for name in ("antiexprt", "anti_expert", "AntiExpert"):
        with pytest.raises(InputError, match=f"^{name}: .*; got {name}, a GPT2.*. Did you mean antiexpert?"):
            proxytune.wrap(base, expert=expert, **{name: antiexpert})
        with pytest.raises(InputError, match=f"^{name}: .*Did you mean antiexpert?"):
            ProxyTuningLogitsProcessor(expert, **{name: antiexpert})
    for name, role in {"expert_name_or_path": "expert", "anti_expert_name_or_path": "antiexpert"}.items():
        with pytest.raises(InputError, match=rf"^{name}: .*; got {name}='a/b'. Did you mean {role}\?"):
            proxytune.wrap(base, **{name: "a/b"})
    with pytest.raises(InputError, match="^exprt: .*Did you mean expert?"):
        proxytune.wrap(base, exprt=expert, antiexpert=antiexpert)
    with pytest.raises(InputError, match="^alpa: .*; got alpa=0.5. Did you mean alpha?"):
        processor(alpa=0.5)  # among model objects, which take no keyword at all
    with pytest.raises(InputError, match="^temperature: .*a setting of generate"):
        compose(temperature=0.5)
    with pytest.raises(InputError, match="the expert: expected a model, .*; got None"):
        proxytune.wrap(base, antiexpert=antiexpert)


def test_what_from_pretrained_and_configs_know_is_passed_on(tmp_path: Path) -> None:
    given = {"dtype": "float32", "use_cache": True, "rms_norm_eps": 1e-5, "low_cpu_mem_usage": True}
    members = {"base": "large-base", "expert": "tiny-tuned", "antiexpert": "tiny-base"}
    assert compose(**{role: bundled(name) for role, name in members.items()}, **given).expert.dtype == torch.float32
    with pytest.raises(InputError, match=r"^revision: .*; got revision='main'. Did you mean revisions?"):
        compose(expert=bundled("tiny-tuned"), revision="main")
    family = {"expert": bundled("tiny-tuned"), "antiexpert": bundled("tiny-base")}
    proxytune.wrap(bundled("large-base"), **family).save_pretrained(tmp_path)
    with pytest.raises(InputError, match="^alpha: expected an argument of from_pretrained; .*Set model.alpha after"):
        ProxyTunedModel.from_pretrained(tmp_path, alpha=0.5)
    with pytest.raises(InputError, match="^attn_implementations: .*Did you mean attn_implementation?"):
        ProxyTunedModel.from_pretrained(tmp_path, attn_implementations="sdpa")


def test_the_arguments_of_from_pretrained_are_those_of_transformers() -> None:
    own = set(inspect.signature(PreTrainedModel.from_pretrained).parameters)
    for method in (PreTrainedModel.from_pretrained, AutoModelForCausalLM.from_pretrained):
        own |= set(re.findall(r"kwargs\.pop\(\s*\"(\w+)", inspect.getsource(method)))
    own -= {"pretrained_model_name_or_path", "model_args", "kwargs", "revision"}
    assert len(own) > 30
    assert {name for name in own if name[0] != "_"} <= LOAD_ARGUMENTS


@pytest.mark.parametrize(
    ("word", "near"),
    [("fp32", "float32"), ("bf16", "bfloat16"), ("torch.float16", "float16"), ("flaot32", "float32"), ("nn", None)],
)
def test_a_dtype_that_is_none(no_weights: None, word: str, near: str | None) -> None:
    remedy = "Pass one of these" if near is None else f"Did you mean '{near}'"
    for name in ("dtype", "torch_dtype"):
        with pytest.raises(InputError, match=f"^{name}: expected 'auto', or .*; got '{re.escape(word)}'. {remedy}"):
            compose(expert=bundled("tiny-tuned"), **{name: word})
        with pytest.raises(InputError, match=f"^{name}: expected 'auto', or .*; got '{re.escape(word)}'. {remedy}"):
            processor(expert=bundled("tiny-tuned"), **{name: word})


def test_roles_are_a_mapping() -> None:
    for make in (compose, processor):
        with pytest.raises(InputError, match=r"tokenizers: expected a mapping from roles, .*; got a \w+, .*'base': …"):
            make(tokenizers=tokenizer())
    with pytest.raises(InputError, match=r"tokenizers: expected a tokenizer .*; got 'a/b' for the expert. Pass Auto"):
        compose(tokenizers={"expert": "a/b"})
    with pytest.raises(InputError, match="tokenizers: expected a tokenizer for each role; got 3 for the base"):
        processor(tokenizers={"base": 3})
    with pytest.raises(InputError, match="revisions: expected a mapping from roles, .*; got a str, 'v1'"):
        compose(revisions="v1")


# --- prompts -----------------------------------------------------------------------------------------------------


def test_an_empty_prompt() -> None:
    # Dropped in, the processor comes too late: the base's own forward has failed by then.
    nothing, base = torch.zeros(1, 0, dtype=torch.long), shared("llama", 1)
    with pytest.raises(InputError, match="input_ids: expected a prompt of at least one token; got shape"):
        compose().generate(nothing, **GREEDY)
    with processor().attach(base), pytest.raises(InputError, match="input_ids: expected the prompt's token ids"):
        base.generate(nothing, **GREEDY)


@pytest.mark.parametrize("members", ["base", "expert"])
def test_a_prompt_longer_than_a_context(members: str) -> None:
    short = build("llama", 7, context=16)
    model = compose(**{members: short})
    with pytest.raises(InputError, match=f"length for the {members}: expected at most 16 tokens .*; got 17"):
        model.generate(prompt(length=17), **GREEDY)
    # The length of a static cache is known to the device only: it is the settings that are looked at, before the start.
    for chunk in (None, 4):
        with pytest.raises(InputError, match=f"length for the {members}: expected at most 16 tokens .*; got 20"):
            model.generate(prompt(length=17), cache_implementation="static", prefill_chunk_size=chunk, **GREEDY)
    with pytest.raises(InputError, match=f"length for the {members}: expected at most 16 tokens .*; got 17"):
        model.generate(prompt(length=14), cache_implementation="static", eos_token_id=None, **GREEDY)
    # 14 and 4 more: the last one is sampled, not forwarded.
    with pytest.raises(InputError, match=f"length for the {members}: expected at most 16 tokens .*; got 17"):
        model.generate(prompt(length=14), eos_token_id=None, **GREEDY)
    assert model.generate(prompt(length=13), eos_token_id=None, **GREEDY).shape[1] == 17


def test_a_prompt_longer_than_a_companions_context() -> None:
    base = shared("llama", 1)
    with (
        processor(expert=build("gpt2", 7, context=16)).attach(base),
        pytest.raises(InputError, match="length for the expert: expected at most 16 tokens"),
    ):
        base.generate(prompt(length=17), **GREEDY)
    assert CONTEXT > 17, "the base itself had room"


@pytest.mark.parametrize("bad", [-1, 250, 255])
def test_ids_that_a_member_cannot_embed(bad: int) -> None:
    ids = prompt()
    ids[0, 2] = bad
    narrow = shared("gpt2", 2, 250)
    match = rf"input_ids: expected ids from 0 to 249, .*; got id {bad}, which the antiexpert \(250 embedding rows\)"
    with pytest.raises(InputError, match=match):
        compose(antiexpert=narrow).generate(ids, **GREEDY)
    for text in (ids, ids[:, 2:3]):  # one token is a prompt too
        with pytest.raises(InputError, match=match):
            compose(antiexpert=narrow)(text)
    if bad >= 0:  # the base itself stumbles over −1 first
        base = shared("llama", 1)
        with processor(antiexpert=narrow).attach(base), pytest.raises(InputError, match=match):
            base.generate(ids, **GREEDY)


def test_what_a_tokenizer_returns_is_unpacked() -> None:
    inputs = tokenizer()("abc", return_tensors="pt")
    model = compose()
    for call in (model, model.generate):
        with pytest.raises(InputError, match=r"input_ids: .*; got a BatchEncoding with .*Unpack it: generate\("):
            call(inputs)


def test_inputs_embeds_only(door: Any) -> None:
    embeds = shared("llama", 1).get_input_embeddings()(prompt())
    with pytest.raises(InputError, match="inputs_embeds"):
        door(inputs_embeds=embeds, **GREEDY)


def test_forward_refuses_what_it_cannot_serve() -> None:
    model = compose()
    with pytest.raises(InputError, match="output_hidden_states: expected no such argument"):
        model(prompt(), output_hidden_states=True)
    with pytest.raises(InputError, match="inputs_embeds: expected input_ids"):
        model(inputs_embeds=torch.zeros(1, 2, 32))
    with pytest.raises(InputError, match="input_ids: expected a tensor of token ids .*; got a NoneType"):
        model()
    for shape in ((1, 1, 6, 6), (2, 6), (1, 5)):
        with pytest.raises(InputError, match=r"attention_mask: expected \[B, T\] for 1 rows of 6 ids.*; got shape"):
            model(prompt(), attention_mask=torch.ones(*shape))
        with pytest.raises(InputError, match=r"attention_mask: expected \[B, T\] for 1 rows of 6 ids.*; got shape"):
            model.generate(prompt(), attention_mask=torch.ones(*shape), **GREEDY)
    with pytest.raises(InputError, match="attention_mask: expected 6 positions: 0 in the cache and 6 new; got 7"):
        model(prompt(), attention_mask=torch.ones(1, 7))
    for ids in (prompt()[0], [[3, 4, 5]], prompt().float()):
        with pytest.raises(InputError, match="input_ids: expected a tensor of token ids with two dimensions"):
            model.generate(ids, **GREEDY)
    with pytest.raises(InputError, match="output_attentions"):
        model.generate(prompt(), output_attentions=True, return_dict_in_generate=True, **GREEDY)
    with pytest.raises(ValueError, match="not_an_argument"):
        model.generate(prompt(), not_an_argument=1, **GREEDY)


# --- padding without a mask --------------------------------------------------------------------------------------


def padded(pad: int) -> torch.Tensor:
    ids = prompt(2, 8)
    ids[1, :3] = pad
    return ids


# The configured padding token is another one in the second case, as after `tokenizer.pad_token = tokenizer.eos_token`.
@pytest.mark.parametrize("settings", [{"pad_token_id": EOS}, {}])
@pytest.mark.parametrize("rows", [slice(None), slice(1, 2)])
def test_eos_tokens_at_the_start_but_no_mask(settings: dict[str, int], rows: slice) -> None:
    ids = padded(EOS)[rows]
    match = f"attention_mask: expected a mask, .*row {len(ids) - 1} starts with 3 × token 2, an EOS.*Pass"
    with pytest.raises(InputError, match=match):
        compose().generate(ids, **settings, **GREEDY)
    base = shared("llama", 1)
    with pytest.raises(InputError, match=match.replace("Pass", "Call processor.attach")):
        base.generate(ids, logits_processor=[processor()], **settings, **GREEDY)


def test_one_eos_at_the_start_of_every_prompt_is_text() -> None:
    # Models whose BOS is their EOS start so.
    ids = prompt(2, 8)
    ids[:, 0] = EOS
    want = compose().generate(ids, attention_mask=torch.ones_like(ids), **GREEDY)
    assert torch.equal(compose().generate(ids, **GREEDY), want)
    assert torch.equal(shared("llama", 1).generate(ids, logits_processor=[processor()], **GREEDY), want)


def test_a_batch_padded_with_eos_but_no_mask() -> None:
    with pytest.raises(InputError, match="attention_mask: expected a mask"):
        compose().generate(padded(EOS), pad_token_id=EOS, **GREEDY)
    companions = [build("gpt2", s) for s in (2, 3)]
    for companion in companions:
        companion.config.pad_token_id = EOS
    base = shared("llama", 1)
    with pytest.raises(InputError, match=r"attention_mask: expected a mask, since some prompts start like padding"):
        base.generate(
            padded(EOS),
            attention_mask=(padded(EOS) != EOS).long(),
            logits_processor=[processor(expert=companions[0], antiexpert=companions[1])],
            pad_token_id=EOS,
            **GREEDY,
        )


def test_a_dropped_in_processor_without_any_padding_token_refuses_batches() -> None:
    companions = [build("gpt2", s) for s in (2, 3)]
    for companion in companions:
        companion.config.pad_token_id = None
    steered = {"logits_processor": [processor(expert=companions[0], antiexpert=companions[1])]}
    base = shared("llama", 1)
    with pytest.raises(InputError, match="padding token is not set. Call processor.attach"):
        base.generate(prompt(2), attention_mask=torch.ones(2, 6), **steered, **GREEDY)
    assert base.generate(prompt(1), **steered, **GREEDY).shape[1] > 6


@pytest.mark.parametrize("shape", [(3, 6), (2, 40), (2,)])
def test_a_mask_of_another_prompt(shape: tuple[int, ...]) -> None:
    base = shared("llama", 1)
    with pytest.raises(InputError, match=r"attention_mask: expected .* 2 rows .* 6 ids; got shape"):
        base.generate(
            prompt(2),
            attention_mask=torch.ones(2, 6),
            logits_processor=[processor(attention_mask=torch.ones(*shape))],
            **GREEDY,
        )


# --- caches ------------------------------------------------------------------------------------------------------


def filled(model: Any, ids: torch.Tensor) -> DynamicCache:
    return model.generate(ids, return_dict_in_generate=True, **GREEDY).past_key_values


def test_a_foreign_filled_cache_is_refused() -> None:
    base, ids = shared("llama", 1), prompt()
    model = compose()
    foreign = {
        "the base's": filled(base, ids),
        "another composition's": filled(compose(), ids),
    }
    for cache in foreign.values():
        with pytest.raises(CacheError, match=f"{CACHE}: expected an empty cache, or one that this composed model"):
            model.generate(torch.cat([ids, ids], 1), **{CACHE: cache}, **GREEDY)
        with pytest.raises(CacheError, match="filled by another model"):
            model(ids, **{CACHE: cache})


def test_an_empty_cache_is_adopted_and_ones_own_is_taken_back() -> None:
    model, ids = compose(), prompt()
    want = model.generate(ids, **GREEDY)
    base = shared("llama", 1)
    for empty in (
        DynamicCache(),
        DynamicCache(config=base.config),
        DynamicCache(config=model.config),
        StaticCache(config=base.config, max_cache_len=20),
    ):
        assert torch.equal(model.generate(ids, **{CACHE: empty}, **GREEDY), want)
    own = filled(model, ids)
    longer = torch.cat([want, prompt()], 1)
    want = model.generate(longer, **GREEDY)
    for cache in (copy.deepcopy(own), own):
        assert torch.equal(model.generate(longer, **{CACHE: cache}, **GREEDY), want)


def test_new_ids_only_leave_a_processor_blind() -> None:
    base, ids = shared("llama", 1), prompt()
    new = prompt(length=3)
    with processor().attach(base):
        cache = filled(base, ids)
        mask = torch.ones(1, cache.get_seq_length() + 3, dtype=torch.long)
        with pytest.raises(InputError, match="input_ids: expected the whole prefix.*only the 3 new ids"):
            base.generate(new, **{CACHE: cache}, attention_mask=mask, **GREEDY)
        padded_mask = mask.clone()
        padded_mask[:, 0] = 0
        with pytest.raises(InputError, match="input_ids: expected the whole prefix.*only the 3 new ids"):
            base.generate(new, **{CACHE: cache}, attention_mask=padded_mask, **GREEDY)


# --- modes and attaching -----------------------------------------------------------------------------------------


def test_continuous_batching_is_refused() -> None:
    model, base = compose(), shared("llama", 1)
    match = "continuous batching: expected generate.*Use generate"
    with pytest.raises(UnsupportedModeError, match=match):
        model.generate_batch([[3, 4, 5]], max_new_tokens=2)
    with pytest.raises(UnsupportedModeError, match=match):
        model.generate(prompt(), cache_implementation="paged", **GREEDY)
    # `transformers serve --continuous-batching` asks this way, and goes on without it.
    assert not hasattr(model, "init_continuous_batching")
    assert hasattr(base, "init_continuous_batching")
    with processor().attach(base):
        with pytest.raises(UnsupportedModeError, match=match):
            base.generate_batch([[3, 4, 5]], max_new_tokens=2)
        with pytest.raises(UnsupportedModeError, match=match):
            base.generate(prompt(), cache_implementation="paged", **GREEDY)


def test_a_cache_position_is_taken_if_it_says_nothing_new() -> None:
    model, ids = compose(), prompt()
    cache = DynamicCache()
    model(ids[:, :4], **{CACHE: cache}, cache_position=torch.arange(4))
    got = model(ids[:, 4:], **{CACHE: cache}, cache_position=torch.arange(4, 6)).logits
    torch.testing.assert_close(got, model(ids).logits[:, 4:])
    with pytest.raises(InputError, match=r"cache_position: expected none, or 0 to 5: .*; got \[1, 2, 3, 4, 5, 6\]"):
        model(ids, cache_position=torch.arange(1, 7))


def test_a_vocabulary_cannot_be_resized_behind_the_members_back() -> None:
    with pytest.raises(UnsupportedModeError, match="resize_token_embeddings"):
        compose().resize_token_embeddings(300)


def test_attaching_twice_is_refused_and_detaching_leaves_no_trace() -> None:
    base, ids = build("llama", 1), prompt()
    alone = base.generate(ids, **GREEDY)
    before = dict(vars(base))
    one, two = processor(), processor()
    with one.attach(base):
        assert not torch.equal(base.generate(ids, **GREEDY), alone), "this α and these experts do change the text"
        with pytest.raises(InputError, match="attach: expected a detached processor"):
            one.attach(base)
        with pytest.raises(
            InputError, match="attach: expected a model that is not steered yet; got a model with another"
        ):
            two.attach(base)
        for dropped_in in (one, two):
            with pytest.raises(
                InputError,
                match="logits_processor: expected no processor .*; got a ProxyTuningLogitsProcessor: the shifts would",
            ):
                base.generate(ids, logits_processor=[dropped_in], **GREEDY)
    with pytest.raises(InputError, match="logits_processor: expected no ProxyTuningLogitsProcessor on a composed"):
        compose().generate(ids, logits_processor=[one], **GREEDY)
    assert vars(base).keys() == before.keys()
    assert torch.equal(base.generate(ids, **GREEDY), alone)
    one.detach()  # without effect
    with pytest.raises(InputError, match="attach: .*; got a composed model"):
        one.attach(compose())


@pytest.mark.parametrize(
    ("mode", "why"),
    [
        ({"prompt_lookup_num_tokens": 3}, "drafts are evaluated more than once"),
        ({"assistant_model": shared("gpt2", 3)}, "drafts are evaluated more than once"),
        ({"num_beams": 3}, "beams change places"),
        ({"num_beams": 3, "do_sample": True}, "beams change places"),
    ],
    ids=["lookup", "assistant", "beams", "sampled beams"],
)
def test_processors_that_count_their_calls_with_drafts_or_beams(mode: dict[str, Any], why: str) -> None:
    model, ids = compose(), torch.arange(20, 28)[None]
    watermark = SynthIDTextWatermarkingConfig(keys=[1, 2, 3], ngram_len=3)
    own = [UnbatchedClassifierFreeGuidanceLogitsProcessor(1.5, model)]
    for name, setting in (("guidance_scale", 1.5), ("watermarking_config", watermark), ("logits_processor", own)):
        said = "guidance_scale" if name == "logits_processor" else name
        with pytest.raises(UnsupportedModeError, match=f"{said}: expected .* while {why}. Leave {said} out, or"):
            model.generate(ids, **GREEDY | mode | {name: setting})


def test_guidance_and_self_speculation() -> None:
    base, ids = shared("llama", 1), prompt()
    with processor().attach(base):
        with pytest.raises(UnsupportedModeError, match="guidance_scale: expected none .*; got 1.5"):
            base.generate(ids, guidance_scale=1.5, **GREEDY)
        with pytest.raises(UnsupportedModeError, match="assistant_early_exit: expected a separate draft model"):
            base.generate(ids, assistant_early_exit=1, **GREEDY)
    with pytest.raises(UnsupportedModeError, match="assistant_early_exit: expected a separate draft model"):
        compose().generate(ids, assistant_early_exit=1, **GREEDY)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (LatentMixture(), r"got LatentMixture\(.*\. Pass it to a loop"),
        (FusedDecoding, "got the class FusedDecoding. Make one: custom_generate=FusedDecoding"),
    ],
)
def test_what_is_no_loop_is_not_ignored(given: Any, message: str) -> None:
    with pytest.raises(InputError, match="custom_generate: expected a loop, .*; " + message):
        compose().generate(prompt(), custom_generate=given, **GREEDY)


@pytest.mark.parametrize(
    ("loop", "name", "near"),
    [
        (proxytune.SpeculativeDecoding, "draft_token", "draft_tokens"),
        (proxytune.SiblingDecoding, "sibling", "siblings"),
        (proxytune.ForkDecoding, "branch", "branches"),
        (FusedDecoding, "sed", "seed"),
        (LatentMixture, "knd", "kind"),
        (proxytune.LatentDecoding, "sede", "seed"),
    ],
)
def test_a_misspelt_setting_of_a_loop(loop: Any, name: str, near: str) -> None:
    with pytest.raises(InputError, match=f"^{name}: expected a setting of {loop.__name__} .*; .*{near}\\?"):
        loop(**{name: 4})


def test_alpha_goes_to_the_model() -> None:
    model = compose()
    with pytest.raises(
        InputError, match=r"^alpha: expected no such argument .*; got alpha=1.0. Set model.alpha before"
    ):
        model.generate(prompt(), alpha=1.0, **GREEDY)
    with pytest.raises(InputError, match=r"^alhpa: .*; got alhpa=2. Did you mean model.alpha\?"):
        model.alhpa = 2


def test_members_cannot_be_exchanged_behind_the_models_back() -> None:
    model = compose()
    with pytest.raises(InputError, match="expert: expected the member that the model was composed with"):
        model.expert = shared("gpt2", 3)


def test_a_static_cache_that_is_too_short() -> None:
    model, ids = compose(), prompt()
    short = StaticCache(config=model.config, max_cache_len=8)
    with pytest.raises(
        CacheError, match=f"{CACHE}: expected a StaticCache for at least 9 tokens; got a StaticCache for 8"
    ):
        model.generate(ids, **{CACHE: short}, **GREEDY)


def test_every_message_says_expected_got_and_remedy() -> None:
    with pytest.raises(ProxytuneError) as caught:
        compose(expert=None)
    assert re.fullmatch(r".+: expected .+; got .+\. .+\.", str(caught.value))
    assert PAD != EOS
