"""What speculation refuses before its first pass."""

from __future__ import annotations

from typing import Any, get_args

import torch

from proxytune import ops
from proxytune.costs.speculation import DraftCosts
from proxytune.errors import InputError, UnsupportedModeError
from proxytune.generation.batch import is_synced
from proxytune.generation.modes import refuse_modes
from proxytune.methods.speculation.drafts import Draft
from proxytune.methods.speculation.ragged_cache import refuse_cache
from proxytune.methods.speculation.verifier import Accept
from proxytune.validation import refuse_seed, whole

__all__ = ["refuse_call", "refuse_settings"]

_LOOP = "SpeculativeDecoding"
_SERVED = {"attention_mask", "position_ids", "past_key_values", "use_cache", "logits_to_keep", "inputs_embeds"}


def refuse_settings(*, draft: Any, draft_tokens: Any, accept: Any, costs: Any, seed: Any, impl: Any) -> None:
    """Refuse settings of the loop that are out of range.

    Raises:
        InputError: If one is.
    """
    refuse_seed(seed, _LOOP)
    if draft != "expert" and not isinstance(draft, Draft):
        raise InputError.of(
            "draft",
            expected="'expert', or a draft such as ModelDraft(model), PromptLookupDraft() or BigramDraft.of(base)",
            got=repr(draft) if isinstance(draft, str) else f"a {type(draft).__name__}",
            remedy="Wrap a model: draft=ModelDraft(model).",
        )
    if costs is not None and not isinstance(costs, DraftCosts):
        raise InputError.of(
            "costs",
            expected="DraftCosts, or None for the figures of proxytune.costs.devices",
            got=f"a {type(costs).__name__}",
            remedy="Pass DraftCosts(round=…, draft=…), in any unit of time.",
        )
    if draft_tokens != "auto":
        whole("draft_tokens", draft_tokens, "of tokens, or 'auto'")
    for name, value, allowed in (("accept", accept, Accept), ("impl", impl, ops.Impl)):
        if value not in get_args(allowed):
            raise InputError.of(
                name,
                expected=" or ".join(map(repr, get_args(allowed))),
                got=repr(value),
                remedy="Leave it out for the default.",
            )


def refuse_call(
    model: Any,
    input_ids: torch.Tensor,
    generation_config: Any,
    synced_gpus: bool | None,
    model_kwargs: dict[str, Any],
    *,
    draft: Any,
    streams: bool,
    assistant_model: Any,
) -> None:
    """Refuse what `generate()` may be asked for but passes over drafts cannot give.

    Args:
        model: The model.
        input_ids: `[B, T]`.
        generation_config: The settings of the call.
        synced_gpus: Whether processes have to go on together; None to find out.
        model_kwargs: What the model is called with; the cache among them.
        draft: The loop's draft.
        streams: Whether there is a streamer.
        assistant_model: What was given as the assistant.

    Raises:
        UnsupportedModeError: For what it cannot do.
        InputError: For an assistant beside a draft.
        CacheError: Without a cache.
    """
    own = assistant_model is getattr(model, "expert", None) and isinstance(draft, str)
    if assistant_model is not None and not own:
        raise InputError.of(
            "assistant_model",
            expected="none beside SpeculativeDecoding, which has a draft of its own",
            got=f"a {type(assistant_model).__name__}",
            remedy="Pass SpeculativeDecoding(draft=ModelDraft(model)).",
        )
    refuse_modes(_LOOP, model, generation_config, None)
    if streams and len(input_ids) > 1:
        raise UnsupportedModeError.of(
            "streamer",
            expected="one row: several go on by themselves, and have no step in common",
            got=f"{len(input_ids)} rows",
            remedy="Stream one prompt at a time.",
        )
    asked = {
        "synced_gpus": is_synced(model) if synced_gpus is None else synced_gpus,
        "output_attentions": generation_config.output_attentions,
        "output_hidden_states": generation_config.output_hidden_states,
        **{name: value for name, value in model_kwargs.items() if name not in _SERVED and value is not None},
    }
    for name, value in asked.items():
        if value is not None and value is not False:
            raise UnsupportedModeError.of(
                name,
                expected="none with SpeculativeDecoding: passes are over drafts, and rows differ in length",
                got=repr(value) if isinstance(value, bool | int | float | str) else f"a {type(value).__name__}",
                remedy="Leave it out, or decode without speculation.",
            )
    if not model_kwargs.get("use_cache"):
        refuse_cache(None)
