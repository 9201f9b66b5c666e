"""Members that are wrong by themselves are refused where it matters, and right ones never."""

import copy
import functools
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from support.tiny import build
from transformers import (
    BartConfig,
    BartForCausalLM,
    BertConfig,
    BertLMHeadModel,
    BloomConfig,
    BloomForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GitConfig,
    GitForCausalLM,
    GPTNeoConfig,
    GPTNeoForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
    RobertaConfig,
    RobertaForCausalLM,
    RoFormerConfig,
    RoFormerForCausalLM,
)
from transformers.cache_utils import StaticCache

import proxytune
from proxytune import ProxyTuningLogitsProcessor, SpeculativeDecoding
from proxytune.errors import UnsupportedModeError, UnsupportedModelError
from proxytune.methods.speculation import PromptLookupDraft
from proxytune.models.members import self_test, self_test_passes
from proxytune.models.members.cache_name import CACHE
from proxytune.models.members.member import Member
from proxytune.models.members.self_test import UNTESTED, Verdict, verdict_of

WIDTHS = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
COMMON = {**WIDTHS, "vocab_size": 128, "max_position_embeddings": 128, "initializer_range": 0.3}
DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


# Before, git cannot use its cache without an image, and roformer misplaces what it has cached.
OLD = pytest.mark.skipif(Version(transformers.__version__) < Version("5.23"), reason="they were wrong alone")


@functools.cache
def made(kind: str, seed: int = 0) -> PreTrainedModel:
    """A random model of a family; tests must not change it."""
    torch.manual_seed(seed)
    model: Any
    match kind:
        case "bart":
            config = BartConfig(
                vocab_size=128,
                d_model=32,
                encoder_layers=2,
                decoder_layers=2,
                decoder_attention_heads=4,
                decoder_ffn_dim=64,
                max_position_embeddings=128,
                init_std=0.3,
                is_decoder=True,
                is_encoder_decoder=False,
                forced_eos_token_id=None,
            )
            model = BartForCausalLM(config)
        case "bert":
            model = BertLMHeadModel(BertConfig(**COMMON, **DROPOUT, is_decoder=True))
        case "bert encoder":
            model = BertLMHeadModel(BertConfig(**COMMON, **DROPOUT))
        case "bloom":
            model = BloomForCausalLM(BloomConfig(vocab_size=128, hidden_size=32, n_layer=2, n_head=4))
        case "git":
            vision = {**WIDTHS, "image_size": 32, "patch_size": 16}
            model = GitForCausalLM(GitConfig(**COMMON, **DROPOUT, vision_config=vision))
        case "gpt_neo":
            config = GPTNeoConfig(
                eos_token_id=2,
                vocab_size=128,
                hidden_size=32,
                num_layers=2,
                num_heads=4,
                attention_types=[[["global", "local"], 1]],
                window_size=16,
                max_position_embeddings=128,
                initializer_range=0.3,
            )
            model = GPTNeoForCausalLM(config)
        case "opt":
            config = OPTConfig(
                vocab_size=128,
                hidden_size=32,
                word_embed_proj_dim=32,
                ffn_dim=64,
                num_hidden_layers=2,
                num_attention_heads=4,
                max_position_embeddings=128,
                init_std=0.3,
            )
            model = OPTForCausalLM(config)
        case "roberta":
            model = RobertaForCausalLM(RobertaConfig(**COMMON, **DROPOUT, is_decoder=True))
        case "roformer":
            model = RoFormerForCausalLM(RoFormerConfig(**COMMON, **DROPOUT, embedding_size=32, is_decoder=True))
        case "two-way gemma3":
            config = Gemma3TextConfig(
                **COMMON,
                num_key_value_heads=2,
                head_dim=8,
                layer_types=["full_attention"] * 2,
                use_bidirectional_attention=True,
            )
            model = Gemma3ForCausalLM(config)
        case _:
            return build(kind, seed, 128)
    model.generation_config.pad_token_id = 0
    return model.eval()


def verdict(kind: str, dtype: torch.dtype = torch.float32) -> Verdict:
    """A verdict that no other test has left."""
    self_test._of_kind.clear()
    model = made(kind) if dtype == torch.float32 else copy.deepcopy(made(kind)).to(dtype)
    return verdict_of(model, Member(model, "base").takes_positions)


def composed(kind: str, **keys: Any) -> proxytune.ProxyTunedModel:
    members = [made(kind, seed) for seed in (0, 1, 2)]
    return proxytune.wrap(members[0], expert=members[1], antiexpert=members[2], check_vocabulary=False, **keys)


IDS = torch.randint(3, 100, (2, 7), generator=torch.Generator().manual_seed(0))
MASK = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1] * 7])
GREEDY: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


def slow(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """Greedy decoding of a composed model, row by row, without cache, mask or positions."""
    rows = []
    for row in ids:
        text = row[None]
        for _ in range(6):
            z = [m.model(text).logits[:, -1] for m in model.members]
            text = torch.cat([text, (z[0] + model.alpha * (z[1] - z[2])).argmax(-1)[:, None]], 1)
        rows.append(text)
    return torch.cat(rows)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", ["llama", "qwen3", "gpt2", "mistral", "gemma3", "bert", "bloom", "gpt_neo", "opt"])
def test_right_families_pass(kind: str, dtype: torch.dtype) -> None:
    assert verdict(kind, dtype) == Verdict()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("kind", "wrong", "counts"),
    [
        ("bert encoder", {"cache", "padding", "moved"}, True),
        ("two-way gemma3", {"cache", "padding", "moved"}, True),
        ("bart", {"padding", "moved"}, True),
        pytest.param("git", {"padding", "moved"}, True, marks=OLD),
        ("roberta", {"padding", "moved"}, False),
        pytest.param("roformer", {"moved"}, True, marks=OLD),
    ],
)
def test_wrong_families_are_found(kind: str, wrong: set[str], counts: bool, dtype: torch.dtype) -> None:
    found = verdict(kind, dtype)
    assert {name for name in ("cache", "padding", "moved") if getattr(found, name) is not None} == wrong
    assert found.counts == counts


@pytest.mark.parametrize("kind", ["bert encoder", "two-way gemma3"])
def test_members_that_read_later_tokens_are_refused(kind: str) -> None:
    for make in (composed, lambda kind: ProxyTuningLogitsProcessor(made(kind), made(kind, 1), check_vocabulary=False)):
        with pytest.raises(UnsupportedModelError, match=r"the (base|expert): .*differ by \d+.*the same four tokens"):
            make(kind)
    assert composed(kind, self_test=False).members[0].verdict is UNTESTED


@pytest.mark.parametrize(
    "kind", ["bart", "roberta", pytest.param("git", marks=OLD), pytest.param("roformer", marks=OLD)]
)
def test_without_padding_they_are_right(kind: str) -> None:
    model = composed(kind)
    want = slow(model, IDS)
    assert torch.equal(model.generate(IDS, **GREEDY), want)
    assert torch.equal(model.generate(IDS[:1], **GREEDY, custom_generate=SpeculativeDecoding(seed=0)), want[:1])
    shift = ProxyTuningLogitsProcessor(model.expert, model.antiexpert, check_vocabulary=False)
    assert torch.equal(model.base.generate(IDS, **GREEDY, logits_processor=[shift]), want) or kind == "roberta"
    # A mask of ones says nothing new, and positions from 0 are not told to those that count otherwise.
    ones = model(IDS, attention_mask=torch.ones_like(IDS)).logits
    torch.testing.assert_close(ones, model(IDS).logits)


@pytest.mark.parametrize("kind", ["bart", "roberta", pytest.param("git", marks=OLD)])
def test_left_padding_is_refused_before_any_member_runs(kind: str) -> None:
    model = composed(kind)
    before = model.token_forwards
    for call in (lambda: model.generate(IDS, attention_mask=MASK, **GREEDY), lambda: model.member_logits(IDS, MASK)):
        with pytest.raises(UnsupportedModeError, match=r"left padding for the base.*left-padded by two"):
            call()
    shift = ProxyTuningLogitsProcessor(model.expert, model.antiexpert, check_vocabulary=False, attention_mask=MASK)
    with pytest.raises(UnsupportedModeError, match="left padding for the expert"):
        shift(IDS, torch.zeros(2, 128))
    assert model.token_forwards == before
    model(IDS, attention_mask=MASK.flip(1))  # padding at the right changes nothing


@pytest.mark.parametrize("kind", ["bart", pytest.param("roformer", marks=OLD), pytest.param("git", marks=OLD)])
def test_speculation_in_a_batch_is_refused_where_rows_cannot_be_moved(kind: str) -> None:
    loop = SpeculativeDecoding(draft=PromptLookupDraft(), seed=0)
    for model, role in ((composed(kind), "base"), (made(kind), "model")):
        with pytest.raises(
            UnsupportedModeError, match=rf"speculation in a batch for the {role}: .*moved by two columns"
        ):
            model.generate(IDS, **GREEDY, custom_generate=loop)


def test_a_base_is_tested_when_it_is_attached_to() -> None:
    def shift() -> ProxyTuningLogitsProcessor:
        return ProxyTuningLogitsProcessor(made("llama"), made("llama", 1), check_vocabulary=False)

    with pytest.raises(UnsupportedModelError, match="the base: expected a model that counts positions from 0"):
        shift().attach(made("roberta"))
    with shift().attach(made("bart")), pytest.raises(UnsupportedModeError, match="left padding for the base"):
        made("bart").generate(IDS, attention_mask=MASK, **GREEDY)
    with shift().attach(made("mamba")):  # a base may be recurrent
        pass


def test_static_caches_get_the_masks_that_a_member_makes() -> None:
    model = composed("bloom")  # its own masks are as long as the cache
    for mask in (None, MASK):
        want = model.generate(IDS, attention_mask=mask, **GREEDY)
        static = model.generate(IDS, attention_mask=mask, **GREEDY, cache_implementation="static")
        assert torch.equal(static, want)


def test_a_static_cache_is_refused_where_a_member_is_wrong_on_it() -> None:
    model = composed("gpt_neo")
    with pytest.raises(UnsupportedModeError, match=r"a static cache for the base.*static cache for 40 tokens"):
        model(IDS, **{CACHE: StaticCache(config=model.config, max_cache_len=40)})
    with pytest.raises(UnsupportedModeError, match="a static cache for the base"):
        model.generate(IDS, **GREEDY | {"max_new_tokens": 30}, cache_implementation="static")
    # A cache no longer than its window is right. (transformers keeps a model's static cache, so another model.)
    model = composed("gpt_neo")
    want = model.generate(IDS, **GREEDY)
    assert torch.equal(model.generate(IDS, **GREEDY, cache_implementation="static"), want)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_verdict_does_not_depend_on_the_callers_autocast(dtype: torch.dtype) -> None:
    model = copy.deepcopy(composed("llama"))
    want = model.generate(IDS, **GREEDY)
    with torch.autocast("cpu", dtype):
        assert verdict("llama") == Verdict()
        assert self_test.padding_fault(model.base) is None
        assert self_test.static_fault(model.base, True, 36, ragged=True) is None
        assert self_test.generation_fault(made("gpt2"), 1) is None
        assert [self_test.static_fault(m.model, True, 36) for m in model.members] == [None] * 3
    assert torch.equal(model.generate(IDS, **GREEDY, cache_implementation="static"), want)


def test_the_test_runs_once_for_models_that_differ_in_sizes_only(monkeypatch: pytest.MonkeyPatch) -> None:
    passes: list[Any] = []
    original = self_test_passes.ModelPasses._pass
    monkeypatch.setattr(self_test_passes.ModelPasses, "_pass", lambda *args: passes.append(args) or original(*args))
    self_test._of_kind.clear()
    large, small, other = build("llama", 0, 128), build("llama", 1, 128, hidden=16), build("llama", 2, 128, hidden=16)
    for _ in range(2):
        proxytune.wrap(large, expert=small, antiexpert=other, check_vocabulary=False)
        assert len(passes) == 3
    assert {args[0].config.hidden_size for args in passes} == {16}


def test_a_model_is_left_as_it_was() -> None:
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    config = LlamaConfig(**COMMON | {"max_position_embeddings": 16}, rope_parameters=rope, attention_dropout=0.5)
    model = LlamaForCausalLM(config).train()
    model.model.layers[0].eval()
    with torch.no_grad():
        model(torch.arange(20)[None])  # its rotary embedding has grown
    rotary = model.model.rotary_emb
    fired: list[Any] = []
    handle = model.model.layers[0].register_forward_hook(lambda *args: fired.append(args))
    before = (copy.deepcopy(model.state_dict()), rotary.inv_freq.clone(), rotary.max_seq_len_cached)
    modes, state = [m.training for m in model.modules()], torch.get_rng_state()
    self_test._of_kind.clear()
    assert verdict_of(model, True) == Verdict()
    assert [m.training for m in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(x, model.state_dict()[name]) for name, x in before[0].items())
    assert torch.equal(rotary.inv_freq, before[1])
    assert rotary.max_seq_len_cached == before[2]
    assert not fired
    assert [len(m._forward_hooks) for m in model.modules()].count(1) == 1
    handle.remove()
    assert not model.model.layers[0]._forward_hooks


def test_a_model_that_cannot_run_is_not_tested() -> None:
    self_test._of_kind.clear()
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**COMMON))
    assert verdict_of(model, True) is UNTESTED


@pytest.mark.parametrize("decoder_layers", [1, 3])
def test_a_decoder_counted_by_its_encoder_is_refused_with_the_cure(decoder_layers: int) -> None:
    torch.manual_seed(0)
    sizes = {"d_model": 32, "decoder_attention_heads": 4, "decoder_ffn_dim": 64, "vocab_size": 128}
    config = BartConfig(**sizes, encoder_layers=2, is_decoder=True, is_encoder_decoder=False, forced_eos_token_id=None)
    config.decoder_layers = decoder_layers
    model = BartForCausalLM(config)
    with pytest.raises(UnsupportedModelError, match="num_hidden_layers=2"):
        Member(model, "expert")
    model.config.num_hidden_layers = model.config.decoder_layers
    Member(model, "expert").examine()


def test_states_that_are_not_finite_leave_no_verdict_for_others() -> None:
    self_test._of_kind.clear()
    broken = copy.deepcopy(made("llama"))
    with torch.no_grad():
        broken.get_input_embeddings().weight.fill_(torch.nan)
    assert verdict_of(broken, True) is UNTESTED
    assert not self_test._of_kind
    assert verdict_of(made("llama"), True) == Verdict()


def test_a_model_changed_in_place_is_tested_again() -> None:
    model = copy.deepcopy(made("bert encoder"))
    assert verdict_of(model, True).cache is not None
    for config in (model.config, *(layer.attention.self.config for layer in model.bert.encoder.layer)):
        config.is_decoder = True
    for layer in model.bert.encoder.layer:
        layer.is_decoder = layer.attention.is_decoder = layer.attention.self.is_decoder = True
        layer.attention.self.is_causal = True
    assert verdict_of(model, True) == Verdict()


def test_the_model_can_be_used_while_it_is_tested(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hooks act, modes hold and nothing stops early in a pass of the model itself, as from another thread."""
    model, seen = copy.deepcopy(made("llama")), []
    want = model(IDS).logits
    model.model.layers[0].register_forward_hook(lambda *args: seen.append(args))
    model.train()
    compiled: list[Any] = []
    model.forward = torch.compile(model.forward, backend=lambda graph, _: compiled.append(graph) or graph)
    original = self_test_passes.ModelPasses._pass

    def between(*args: Any) -> Any:
        assert model.training
        torch.testing.assert_close(LlamaForCausalLM.forward(model, IDS).logits, want)
        return original(*args)

    monkeypatch.setattr(self_test_passes.ModelPasses, "_pass", between)
    self_test._of_kind.clear()
    assert verdict_of(model, True) == Verdict()
    assert len(seen) == 3  # by the passes of the model itself alone
    assert not compiled
