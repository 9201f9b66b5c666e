"""Members that no cache of transformers serves: right in every mode, since each pass reads the whole text."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from support.reference import Reference
from support.tiny import BOS, EOS, PAD, shared
from transformers import (
    OpenAIGPTConfig,
    OpenAIGPTLMHeadModel,
    RecurrentGemmaConfig,
    RecurrentGemmaForCausalLM,
    ReformerConfig,
    ReformerModelWithLMHead,
    RwkvConfig,
    RwkvForCausalLM,
    XLNetConfig,
    XLNetLMHeadModel,
    xLSTMConfig,
    xLSTMForCausalLM,
)

import proxytune
from proxytune import LatentDecoding, ProxyTuningLogitsProcessor, SpeculativeDecoding
from proxytune.errors import SteeringWarning, UnsupportedModeError, UnsupportedModelError
from proxytune.models.members.member import Member
from proxytune.models.members.whole_text import reads_whole_text

VOCAB, SIZE, NEW, ALPHA = 64, 16, 4, 0.7
WHY = {
    "rwkv": "takes `state`, which is no cache of transformers",
    "xlstm": "takes its cache as xLSTMCache, which is no cache of transformers",
    "recurrent_gemma": "keeps its state in its own modules (RecurrentGemmaRecurrentBlock.conv1d_state)",
    "gpt": "takes no cache",
}


@functools.cache
def made(kind: str, seed: int = 0) -> Any:
    """A random model; tests must not change it."""
    torch.manual_seed(seed)
    sizes = {"vocab_size": VOCAB, "hidden_size": SIZE, "num_hidden_layers": 2}
    ids = {"pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS}
    model: Any
    match kind:
        case "rwkv":
            model = RwkvForCausalLM(RwkvConfig(**sizes, **ids, attention_hidden_size=SIZE, context_length=64))
        case "xlstm":
            kernels = {"chunkwise_kernel": "chunkwise--native_autograd", "chunk_size": 16}
            kernels |= {"sequence_kernel": "native_sequence__native", "step_kernel": "native"}
            model = xLSTMForCausalLM(xLSTMConfig(**sizes, **ids, num_blocks=2, num_heads=2, **kernels))
        case "recurrent_gemma":
            wide = {"intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1, "lru_width": SIZE}
            sizes["num_hidden_layers"] = 3
            model = RecurrentGemmaForCausalLM(RecurrentGemmaConfig(**sizes, **ids, **wide, attention_window_size=8))
        case "gpt":
            config = OpenAIGPTConfig(vocab_size=VOCAB, n_positions=64, n_embd=SIZE, n_layer=2, n_head=2, **ids)
            model = OpenAIGPTLMHeadModel(config)
        case "reformer":
            config = ReformerConfig(
                vocab_size=VOCAB,
                hidden_size=SIZE,
                num_attention_heads=2,
                attention_head_size=8,
                feed_forward_size=32,
                axial_pos_embds=False,
                attn_layers=["local", "lsh"],
                is_decoder=True,
                num_buckets=2,
                max_position_embeddings=192,
            )
            model = ReformerModelWithLMHead(config)
        case "xlnet":
            model = XLNetLMHeadModel(XLNetConfig(vocab_size=VOCAB, d_model=SIZE, n_layer=2, n_head=2, d_inner=32))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.3)  # rows far from uniform, and nothing at zero
    model.generation_config.pad_token_id = PAD
    return model.eval()


def prompts() -> tuple[torch.Tensor, torch.Tensor]:
    """Two prompts of 7 and 4 tokens, padded at the left."""
    ids = torch.randint(3, VOCAB, (2, 7), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    ids[1, :3], mask[1, :3] = PAD, 0
    return ids, mask


MODES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampling": {"do_sample": True, "num_return_sequences": 2, "top_k": 0, "max_new_tokens": 2},
    "beams": {"num_beams": 2, "max_new_tokens": 2},
}


@pytest.mark.filterwarnings("ignore::proxytune.errors.SteeringWarning")
@pytest.mark.parametrize("kind", WHY)
def test_they_are_right_in_every_mode(kind: str) -> None:
    base, members = shared("llama", 1, VOCAB), {"expert": made(kind, 1), "antiexpert": made(kind, 2)}
    model = proxytune.wrap(base, **members, alpha=ALPHA, check_vocabulary=False)
    reference = Reference([base, *members.values()], ALPHA)
    ids, mask = prompts()
    given = {"attention_mask": mask, "max_new_tokens": NEW, "eos_token_id": None, "do_sample": False}
    processor = ProxyTuningLogitsProcessor(**members, alpha=ALPHA, check_vocabulary=False, attention_mask=mask)
    for mode in MODES if kind == "rwkv" else ("greedy", "beams"):
        results = []
        for door, options in ((reference, {}), (model, {}), (base, {"logits_processor": [processor]})):
            torch.manual_seed(0)
            results.append(door.generate(ids, **given | MODES[mode] | options))
        assert torch.equal(results[0], results[1])
        assert torch.equal(results[0], results[2])
    loop = SpeculativeDecoding(draft="expert", draft_tokens=3)
    assert torch.equal(model.generate(ids, custom_generate=loop, **given), reference.generate(ids, **given))
    with pytest.raises(UnsupportedModeError, match="a static cache for the expert"):
        model.generate(ids, cache_implementation="static", **given)
    if kind != "xlstm":  # which would try
        with pytest.raises(UnsupportedModelError, match="holds what latent steps put in"):
            model.generate(ids, custom_generate=LatentDecoding(), **given)


@pytest.mark.filterwarnings("ignore::proxytune.errors.SteeringWarning")
def test_a_base_is_right() -> None:
    members = {"base": made("rwkv", 0), "expert": made("gpt", 1), "antiexpert": made("gpt", 2)}
    model = proxytune.wrap(**members, alpha=ALPHA, check_vocabulary=False)
    ids, mask = prompts()
    given = {"attention_mask": mask, "max_new_tokens": NEW, "eos_token_id": None, "num_beams": 2}
    want = Reference(list(members.values()), ALPHA).generate(ids, **given)
    assert torch.equal(model.generate(ids, **given), want)


@pytest.mark.parametrize("kind", WHY)
def test_their_reason_is_said(kind: str) -> None:
    assert reads_whole_text(made(kind)) == WHY[kind]
    with pytest.warns(SteeringWarning, match="the expert: .* reads the whole text anew for every token"):
        member = Member(made(kind), "expert")
    ids = prompts()[0][:1]
    torch.testing.assert_close(member.forward(ids), made(kind).eval()(input_ids=ids, use_cache=False).logits)
    assert member.token_forwards == 7
    assert reads_whole_text(shared("llama", 1)) is reads_whole_text(shared("jamba", 1)) is None


@pytest.mark.filterwarnings("ignore::proxytune.errors.SteeringWarning")
def test_what_no_whole_text_makes_right() -> None:
    for kind, why in (("reformer", "random numbers"), ("xlnet", "before two endings")):
        with pytest.raises(UnsupportedModelError, match=why):
            proxytune.wrap(made(kind, 0), expert=made(kind, 1), antiexpert=made(kind, 2), check_vocabulary=False)
