"""Reject unsupported settings and calls of `SpeculativeDecoding` before the first forward pass."""

from __future__ import annotations

from typing import Any, get_args

from proxytune import ops
from proxytune.costs.speculation import DraftCosts
from proxytune.errors import InputError, UnsupportedModeError, UnsupportedModelError
from proxytune.generation.call import Call
from proxytune.methods.speculation.drafts import Draft
from proxytune.methods.speculation.ragged_cache import refuse_cache
from proxytune.methods.speculation.verifier import Accept
from proxytune.models.learned_prompts import learned_prompt_of
from proxytune.models.members.cache_name import CACHE
from proxytune.models.members.layer_kinds import refuse_lacking
from proxytune.models.members.long_rope import refuse_crossing
from proxytune.models.members.member import Member
from proxytune.models.members.own_cache import own_class_of
from proxytune.models.members.whole_text import reads_whole_text
from proxytune.models.own_prompts import PROMPT_WIDTH, PROMPTS
from proxytune.models.vision import holds_nothing, says_text
from proxytune.validation import refuse_seed, whole

__all__ = ["refuse_call", "refuse_settings"]

_LOOP = "SpeculativeDecoding"
_ALLOWED = {
    *("attention_mask", "position_ids", CACHE, "use_cache", "logits_to_keep", "inputs_embeds", "adapter_names"),
    *(PROMPTS, PROMPT_WIDTH),
}


def refuse_settings(*, draft: Any, draft_tokens: Any, accept: Any, costs: Any, seed: Any, impl: Any) -> None:
    """Raise InputError for a setting of the loop that is out of range."""
    refuse_seed(seed, _LOOP)
    if draft != "expert" and not isinstance(draft, Draft):
        raise InputError.of(
            "draft",
            expected="'expert', or a draft such as ModelDraft(model), PromptLookupDraft() or BigramDraft.of(base)",
            got=repr(draft) if isinstance(draft, str) else f"a {type(draft).__name__}",
            remedy="Pass e.g. draft=ModelDraft(model) or draft=PromptLookupDraft().",
        )
    if costs is not None and not isinstance(costs, DraftCosts):
        raise InputError.of(
            "costs",
            expected="DraftCosts, or None for the figures in proxytune.costs.devices",
            got=f"a {type(costs).__name__}",
            remedy="Pass DraftCosts(round=…, draft=…), in any unit of time.",
        )
    if draft_tokens != "auto":
        whole("draft_tokens", draft_tokens, remedy="Pass e.g. draft_tokens=4, or leave it out for 'auto'.")
    for name, value, allowed in (("accept", accept, Accept), ("impl", impl, ops.Impl)):
        if value not in get_args(allowed):
            raise InputError.of(
                name,
                expected=" or ".join(map(repr, get_args(allowed))),
                got=repr(value),
                remedy="Leave it out for the default.",
            )


def refuse_call(call: Call, draft: Any, assistant_model: Any) -> None:
    """Raise for whatever else `generate()` was asked to do that speculation cannot.

    Raises:
        UnsupportedModeError: For an unsupported output or model input, or a learned prompt; for a batch, if a member
            cannot be told where its rows are; if texts may cross the switch of a long-rope member.
        UnsupportedModelError: For a plain model that is no member, see `Member`.
        InputError: For an assistant, unless it is the composed model's own expert with `draft="expert"`.
        CacheError: With `use_cache=False`.
    """
    own_expert = assistant_model is getattr(call.model, "expert", None) and isinstance(draft, str)
    if assistant_model is not None and not own_expert:
        raise InputError.of(
            "assistant_model",
            expected="no assistant with SpeculativeDecoding, whose draft is a setting",
            got=f"a {type(assistant_model).__name__}",
            remedy="Pass SpeculativeDecoding(draft=ModelDraft(model)).",
        )
    if call.streamer is not None and len(call.input_ids) > 1:
        raise UnsupportedModeError.of(
            "streamer",
            expected="one row: several rows advance at different speeds",
            got=f"{len(call.input_ids)} rows",
            remedy="Stream one prompt at a time.",
        )
    flags = {
        "synced_gpus": call.synced,
        "output_attentions": call.config.output_attentions,
        "output_hidden_states": call.config.output_hidden_states,
    }
    requested = {name: value for name, value in flags.items() if value}
    requested |= {name: value for name, value in call.kwargs.items() if name not in _ALLOWED}
    for name, value in requested.items():
        if not holds_nothing(value) and not says_text(name, value):
            raise UnsupportedModeError.of(
                name,
                expected="none with SpeculativeDecoding: passes verify several tokens, and rows differ in length",
                got=repr(value) if isinstance(value, bool | int | float | str) else f"a {type(value).__name__}",
                remedy="Leave it out, or decode without speculation.",
            )
    if (config := learned_prompt_of(call.model)) is not None:
        raise UnsupportedModeError.of(
            "SpeculativeDecoding",
            expected="a cache of the text alone, from which rejected drafts can be removed",
            got=f"a PEFT model with {type(config).__name__}, whose learned tokens stand in the cache before the text",
            remedy="Decode without speculation, e.g. with FusedDecoding.",
        )
    instead = "decode without speculation"
    refuse_crossing(_LOOP, call.ensemble.switches, call.lengths, call.most_new, instead=instead, rows_leave=True)
    if not call.ensemble.composed and (why := reads_whole_text(call.model)) is not None:
        raise UnsupportedModelError.of(
            "the model",
            expected="a model whose state is in a cache that drafts can be taken out of",
            got=f"a {type(call.model).__name__}, which {why}",
            remedy="Decode without speculation.",
        )
    if not call.ensemble.composed and (kind := own_class_of(call.model)) is not None:
        raise UnsupportedModelError.of(
            "the model",
            expected="a cache that drafts can be taken out of",
            got=f"a {type(call.model).__name__}, whose {kind.__name__} keeps its states to itself",
            remedy="Compose it with proxytune.wrap, or decode without speculation.",
        )
    members = call.ensemble.members if call.ensemble.composed else [Member(call.model, "model")]
    expected = "layers that can drop the tokens of rejected drafts"
    refuse_lacking(members, "crop", _LOOP, expected=expected, remedy="Decode without speculation.")
    if len(call.input_ids) > 1:  # rows accept different numbers of tokens, and are moved
        for member in members:
            if not call.ensemble.composed:
                member.examine()
            member.refuse_moved_rows()
    if not call.kwargs.get("use_cache"):
        refuse_cache(None)
