"""The ways into speculation: `assistant_model=`, pipelines, saved recipes, adapters; what comes back; wrong use."""

import math
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from support.speculation import ALPHA, composed, members, near, prompts
from support.tiny import PAD, VOCABULARY, build, tokenizer
from transformers import AutoModelForCausalLM, DynamicCache, StoppingCriteriaList, TextGenerationPipeline, set_seed
from transformers.generation import EosTokenCriteria, GenerateDecoderOnlyOutput
from transformers.generation.streamers import BaseStreamer

import proxytune
from proxytune import FusedDecoding, SpeculativeDecoding
from proxytune.errors import InputError, UnsupportedModeError
from proxytune.methods.speculation import BigramDraft, ModelDraft, PromptLookupDraft
from proxytune.methods.speculation.output import SpeculativeOutput
from proxytune.models.members.cache_name import CACHE

NEW = 14


def run(model: Any, ids: Any = None, mask: Any = None, **kwargs: Any) -> Any:
    if ids is None:
        ids, mask = prompts()
    settings = {"max_new_tokens": NEW, "pad_token_id": PAD, "do_sample": False, "eos_token_id": None} | kwargs
    return model.generate(ids, attention_mask=mask, **settings)


# --- generate(assistant_model=model.expert) -------------------------------------------------------------------------


@pytest.mark.smoke
@pytest.mark.parametrize("rows", [1, 4])
def test_the_expert_as_the_assistant(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model, (ids, mask) = composed("mistral"), prompts(rows)
    want = run(model, ids, mask)
    assert torch.equal(run(model, ids, mask, assistant_model=model.expert), want)
    monkeypatch.setattr(model.expert.generation_config, "num_assistant_tokens", 3)
    out = run(model, ids, mask, assistant_model=model.expert, return_dict_in_generate=True, output_scores=True)
    assert isinstance(out, SpeculativeOutput)
    assert torch.equal(out.sequences, want)
    assert out.draft_lengths[:3] == [3, 3, 3]
    assert len(out.scores) == NEW
    assert out.accepted.sum() > 2


def test_sampling_with_the_assistant_follows_set_seed() -> None:
    model, texts = composed("llama"), []
    for seed in (1, 1, 2):
        set_seed(seed)
        texts.append(run(model, do_sample=True, assistant_model=model.expert))
    assert torch.equal(texts[0], texts[1])
    assert not torch.equal(texts[0], texts[2])


def test_other_assistants_go_transformers_way(monkeypatch: pytest.MonkeyPatch) -> None:
    model, (ids, mask) = composed("llama"), prompts(1)
    want = run(model, ids, mask)
    monkeypatch.setattr(SpeculativeDecoding, "__call__", lambda *args, **kwargs: 1 / 0)
    assert torch.equal(run(model, ids, mask, assistant_model=near("llama", 4, 0.1)), want)
    with pytest.raises(ZeroDivisionError):
        run(model, ids, mask, assistant_model=model.expert)


@pytest.mark.smoke
def test_wrong_use_of_the_assistant(monkeypatch: pytest.MonkeyPatch) -> None:
    model = composed("llama")
    with pytest.raises(InputError, match="assistant_ensemble_weight: expected None: .* got 0.5"):
        run(model, assistant_model=model.expert, assistant_ensemble_weight=0.5)
    loop = SpeculativeDecoding(draft_tokens=2)
    assert torch.equal(run(model, assistant_model=model.expert, custom_generate=loop), run(model))
    for assistant, other in (
        (near("llama", 4, 0.1), loop),
        (model.expert, SpeculativeDecoding(draft=PromptLookupDraft())),
    ):
        with pytest.raises(InputError, match="assistant_model: expected no assistant with SpeculativeDecoding"):
            run(model, assistant_model=assistant, custom_generate=other)
    with pytest.raises(UnsupportedModeError, match="FusedDecoding: expected greedy"):
        run(model, assistant_model=model.expert, custom_generate=FusedDecoding())


# --- what comes back ------------------------------------------------------------------------------------------------


class Collector(BaseStreamer):
    def __init__(self) -> None:
        self.got: list[list[int]] = []
        self.ended = 0

    def put(self, value: torch.Tensor) -> None:
        self.got.append(value.flatten().tolist())

    def end(self) -> None:
        self.ended += 1


def test_what_is_refused_is_refused_before_the_stream_and_the_first_pass() -> None:
    model, (ids, mask) = near("llama", 0, 0.0), prompts(1)
    stream, cache = Collector(), DynamicCache(config=model.config)
    with pytest.raises(InputError, match="draft='expert': expected a composed model"):
        run(model, ids, mask, custom_generate=SpeculativeDecoding(streamer=stream))
    loop = SpeculativeDecoding(draft=PromptLookupDraft(), streamer=stream)
    ended = StoppingCriteriaList([EosTokenCriteria(7)])
    with pytest.raises(InputError, match="pad_token_id: expected a padding token"):
        run(model, ids, mask, custom_generate=loop, stopping_criteria=ended, **{CACHE: cache}, pad_token_id=None)
    assert stream.got == []
    assert cache.get_seq_length() == 0
    with pytest.raises(UnsupportedModeError, match="output_router_logits: expected none with SpeculativeDecoding"):
        run(model, ids, mask, custom_generate=loop, output_router_logits=False)


@pytest.mark.smoke
def test_streaming_token_by_token() -> None:
    model, (ids, mask) = composed("llama"), prompts(1)
    theirs, ours, own, assisted = (Collector() for _ in range(4))
    run(model, ids, mask, streamer=theirs)
    run(model, ids, mask, streamer=ours, custom_generate=SpeculativeDecoding(draft_tokens=3))
    run(model, ids, mask, streamer=assisted, assistant_model=model.expert)
    assert ours.got == theirs.got == assisted.got
    assert ours.ended == assisted.ended == 1
    plain = Collector()
    run(model.base, ids, mask, streamer=plain)
    run(model.base, ids, mask, custom_generate=SpeculativeDecoding(draft=PromptLookupDraft(1, 1), streamer=own))
    assert own.got == plain.got
    with pytest.raises(UnsupportedModeError, match="streamer: expected one row: .* got 4 rows"):
        run(model, streamer=Collector(), custom_generate=SpeculativeDecoding())


def test_what_is_returned() -> None:
    model = composed("llama")
    loop = SpeculativeDecoding(draft_tokens=2)
    quiet = run(model, custom_generate=loop)
    assert isinstance(quiet, torch.Tensor)
    out = run(model, custom_generate=loop, return_dict_in_generate=True)
    assert isinstance(out, GenerateDecoderOnlyOutput)
    assert torch.equal(out.sequences, quiet)
    assert out.scores is None
    assert out.logits is None
    assert out.past_key_values is None
    assert out.drafted.dtype == out.accepted.dtype == out.rejected.dtype == torch.int64
    assert (out.accepted <= out.drafted).all()
    assert 0 < out.acceptance < 1
    plain = run(model, custom_generate=SpeculativeDecoding(draft_tokens=0), return_dict_in_generate=True)
    assert math.isnan(plain.acceptance)
    # Reports do not change what is drawn.
    sample = {"do_sample": True, "top_k": 9, "custom_generate": SpeculativeDecoding(draft_tokens=3, seed=1)}
    show = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
    assert torch.equal(run(model, **sample), run(model, **sample, **show).sequences)


@pytest.mark.smoke
def test_several_sequences_per_prompt() -> None:
    loop = SpeculativeDecoding(draft_tokens=3, accept="coupled", seed=4)
    settings = {"do_sample": True, "top_k": 9, "num_return_sequences": 3}
    got = run(composed("mistral"), custom_generate=loop, **settings)
    assert got.shape == (12, 12 + NEW)
    assert torch.equal(got, run(composed("mistral"), custom_generate=FusedDecoding(seed=4), **settings))
    assert len({tuple(row) for row in got.tolist()}) == 12


# --- where models come from -----------------------------------------------------------------------------------------


def test_a_saved_recipe_and_a_pipeline(tmp_path: Path) -> None:
    for role, seed in (("base", 1), ("expert", 2), ("antiexpert", 3)):
        build("llama", seed, VOCABULARY).save_pretrained(tmp_path / role)
        tokenizer().save_pretrained(tmp_path / role)
    made = proxytune.wrap(tmp_path / "base", expert=tmp_path / "expert", antiexpert=tmp_path / "antiexpert", alpha=0.3)
    made.save_pretrained(tmp_path / "adapter")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "adapter", trust_remote_code=True)
    want = run(made)
    assert torch.equal(run(model, custom_generate=SpeculativeDecoding(draft_tokens=3)), want)
    assert torch.equal(run(model, assistant_model=model.expert), want)
    pipe = TextGenerationPipeline(model=model, tokenizer=tokenizer())
    settings = {"do_sample": False, "max_new_tokens": 8, "eos_token_id": None, "pad_token_id": PAD}
    texts = ["Where does Bo live?", "Hi"]
    plain = pipe(texts, batch_size=2, **settings)
    loop = SpeculativeDecoding(draft=PromptLookupDraft(2, 1))
    assert pipe(texts, batch_size=2, custom_generate=loop, **settings) == plain
    assert pipe(texts, batch_size=2, assistant_model=model.expert, **settings) == plain


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
def test_an_adapter_as_the_expert_and_as_the_draft() -> None:
    torch.manual_seed(1)
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)
    tuned = peft.get_peft_model(build("llama", 1), config).eval()
    base, anti = members("llama")[0], near("llama", 3, 0.1)
    model = proxytune.wrap(base, expert=tuned, antiexpert=anti, alpha=ALPHA, check_vocabulary=False)
    want = run(model)
    for draft in ("expert", ModelDraft(tuned)):
        assert torch.equal(run(model, custom_generate=SpeculativeDecoding(draft=draft, draft_tokens=3)), want)
    assert torch.equal(run(model, assistant_model=model.expert), want)


# --- wrong use ------------------------------------------------------------------------------------------------------


@pytest.mark.smoke
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"draft": "model"}, "draft: expected 'expert', or a draft such as .* got 'model'"),
        ({"draft": PromptLookupDraft}, "draft: expected 'expert', or a draft such as .* got a ABCMeta"),
        ({"draft": None}, "draft: expected 'expert', or a draft such as .* got a NoneType"),
        (
            {"draft_tokens": -1},
            "draft_tokens: expected a whole number of tokens, at least 0; got -1. Pass e.g. draft_tokens=4",
        ),
        ({"draft_tokens": 1.5}, "draft_tokens: .* got 1.5"),
        ({"draft_tokens": True}, "draft_tokens: .* got True"),
        ({"draft_tokens": "many"}, "draft_tokens: .* got 'many'"),
        ({"draft_tokens": None}, "draft_tokens: .* got None"),
        ({"accept": "typical"}, "accept: expected 'rejection' or 'coupled'; got 'typical'"),
        ({"impl": "cuda"}, "impl: expected .* got 'cuda'"),
        ({"seed": 0.5}, "seed: expected a whole number of 64 bits"),
        ({"costs": 3.0}, "costs: expected DraftCosts, or None .* got a float"),
    ],
)
def test_wrong_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        SpeculativeDecoding(**settings)


def test_wrong_drafts() -> None:
    with pytest.raises(InputError, match="shortest: expected a whole number of tokens, at least 1; got 0"):
        PromptLookupDraft(3, 0)
    with pytest.raises(InputError, match="longest: expected a whole number of tokens, at least 4; got 3"):
        PromptLookupDraft(3, 4)
    for table in (torch.zeros(3), torch.zeros(2, 2).long(), torch.tensor([0, 5]), torch.zeros(0).long()):
        with pytest.raises(InputError, match="following: expected"):
            BigramDraft(table)
    with pytest.raises(proxytune.errors.UnsupportedModelError, match="the draft: expected a decoder-only model"):
        ModelDraft(build("t5", 1))
    with pytest.raises(InputError, match="draft='expert': expected a composed model, .* got a LlamaForCausalLM"):
        run(members("llama")[0], custom_generate=SpeculativeDecoding())


def test_wrong_rows_and_branches() -> None:
    for rows in ([0, 1], [0.5] * 4, [-1, 0, 1, 2]):
        with pytest.raises(InputError, match="stream_ids: expected whole numbers .* one for each of 4 rows"):
            run(composed("llama"), do_sample=True, custom_generate=SpeculativeDecoding(stream_ids=rows))
    with pytest.raises(InputError, match="noise: branch: expected"):
        run(composed("llama"), do_sample=True, custom_generate=SpeculativeDecoding(branch_ids=[0, 1]))


@pytest.mark.smoke
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_beams": 2}, "SpeculativeDecoding: expected greedy decoding or sampling; got .*beam search"),
        ({"prompt_lookup_num_tokens": 3}, "SpeculativeDecoding: .*assisted generation"),
        ({"synced_gpus": True}, "synced_gpus: expected none with SpeculativeDecoding"),
        ({"output_attentions": True, "return_dict_in_generate": True}, "output_attentions: expected none"),
        ({"output_hidden_states": True, "return_dict_in_generate": True}, "output_hidden_states: expected none"),
    ],
)
def test_other_modes_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedModeError, match=message):
        run(composed("llama"), custom_generate=SpeculativeDecoding(), **settings)


def test_encoder_decoders_are_refused() -> None:
    with pytest.raises(UnsupportedModeError, match="expected a decoder-only model; got T5For"):
        run(build("t5", 1), custom_generate=SpeculativeDecoding(draft=PromptLookupDraft()))
