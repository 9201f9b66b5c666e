"""Which models can take part: causal LMs of transformers and PEFT whose layers and cache are known."""

from __future__ import annotations

from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
)

from proxytune.errors import UnsupportedModelError
from proxytune.models.members.innermost import innermost
from proxytune.models.members.layer_kinds import ABLE, kinds_of
from proxytune.models.members.whole_text import reads_whole_text

__all__ = ["refuse_unsupported"]


def refuse_unsupported(model: PreTrainedModel, role: str, encoder_decoder: bool) -> None:
    """Raise UnsupportedModelError for a model that cannot play a role: an encoder, another kind of layer or adapter."""
    if hasattr(model, "_orig_mod"):
        raise UnsupportedModelError.of(
            f"the {role}",
            expected="the model itself",
            got=f"torch.compile({type(model._orig_mod).__name__})",
            remedy="Pass the model without torch.compile; compile it in place by model.compile(), or its decode steps "
            "by compile_members() of the composed model.",
        )
    config = getattr(model, "config", None)
    if config is None or not hasattr(model, "get_input_embeddings"):
        raise UnsupportedModelError.of(
            f"the {role}",
            expected="a causal LM of transformers (or PEFT)",
            got=type(model).__name__,
            remedy="Load it with AutoModelForCausalLM.from_pretrained.",
        )
    family = getattr(config, "model_type", type(model).__name__)
    inner = innermost(model)
    can_generate = getattr(inner, "can_generate", None)
    if can_generate is not None and not can_generate() and inner.get_output_embeddings() is None:
        # An encoder alone says in its config that it is no encoder-decoder.
        pairs = encoder_decoder or family not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
        pairs &= family in MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES
        raise UnsupportedModelError.of(
            f"the {role}",
            expected="an encoder-decoder with an LM head" if pairs else "a causal LM",
            got=f"a {type(inner).__name__} ({family}), which has no LM head",
            remedy=f"Load it with AutoModelFor{'Seq2SeqLM' if pairs else 'CausalLM'}.from_pretrained.",
        )
    if bool(getattr(config, "is_encoder_decoder", False)) != encoder_decoder:
        wanted, other = ("a decoder-only model", "an encoder-decoder")[:: -1 if encoder_decoder else 1]
        raise UnsupportedModelError.of(
            f"the {role}",
            expected=wanted,
            got=f"{type(model).__name__} ({family}), {other}",
            remedy="Encoder-decoders are composed by proxytune.wrap, all three members or none.",
        )
    adapters = dict(getattr(model, "peft_config", None) or {}).values()
    if hasattr(model, "get_base_model") and any(getattr(c, "alora_invocation_tokens", None) for c in adapters):
        raise UnsupportedModelError.of(
            f"the {role}",
            expected="an adapter that acts on every token of a text",
            got="a PEFT model with aLoRA, which looks for its invocation tokens in the new tokens of each pass alone",
            remedy="Use a LoRA without alora_invocation_tokens. A ProxyTuningLogitsProcessor takes one as its base.",
        )
    if any(getattr(c, "is_prompt_learning", False) for c in adapters):
        raise UnsupportedModelError.of(
            f"the {role}",
            expected="an adapter in the weights, such as LoRA",
            got="a PEFT model that learns a prompt or prefix, which adds its own tokens to the cache",
            remedy="Use another kind of adapter, or a merged model.",
        )
    text_config = config.get_text_config(decoder=True)
    counted = getattr(text_config, "num_hidden_layers", None)
    if counted is None and not encoder_decoder:
        raise UnsupportedModelError.of(
            f"the {role}",
            expected="a config with num_hidden_layers: a cache gets as many layers",
            got=f"{type(model).__name__} ({family}), whose {type(text_config).__name__} has none",
            remedy="Use another model in this role.",
        )
    if not encoder_decoder and (layers := getattr(text_config, "decoder_layers", counted)) != counted:
        raise UnsupportedModelError.of(
            f"the {role}",
            expected="a config whose num_hidden_layers are those of the decoder: a cache gets as many",
            got=f"{type(model).__name__} ({family}) with {layers}, and num_hidden_layers={counted}, its encoder's",
            remedy="Set model.config.num_hidden_layers = model.config.decoder_layers, and pass the model.",
        )
    if reads_whole_text(model) is None and (strange := sorted(kinds_of(text_config) - ABLE.keys())):
        raise UnsupportedModelError.of(
            f"the {role}",
            expected=f"layers of a kind whose cache is known: {', '.join(sorted(ABLE))}",
            got=f"{type(model).__name__} ({family}) with {', '.join(strange)} layers",
            remedy="Use another model in this role.",
        )
