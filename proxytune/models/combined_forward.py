"""`forward` of a composed model: members → logits → shift."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from transformers.cache_utils import Cache
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import can_return_tuple

from proxytune.models.adapter_names import checked_names
from proxytune.models.forward_checks import (
    refuse_arguments,
    refuse_positions,
    refuse_shapes,
)
from proxytune.models.images_pass import ImagesPassMixin
from proxytune.models.members.cache_name import one_cache
from proxytune.models.members_pass import MembersPassMixin
from proxytune.models.own_prompts import (
    PROMPT_WIDTH,
    PROMPTS,
)
from proxytune.models.vision import BASE_INPUTS, says_text, sees

__all__ = ["CombinedForwardMixin"]

_OF_OUR_LOOPS = (
    *("return_member_logits", "precomputed_logits", "latent_inputs"),
    *("every_member", PROMPT_WIDTH, PROMPTS, "decision"),
)


class CombinedForwardMixin(ImagesPassMixin, MembersPassMixin):
    """`forward` of a composed model; must come before `PreTrainedModel` among the bases."""

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        labels: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        is_first_iteration: bool | None = None,
        cache: Cache | None = None,
        adapter_names: Sequence[str] | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Run all members over the tokens and combine their logits.

        Args:
            input_ids: `[B, N]`, int64: the tokens that the cache does not hold yet.
            attention_mask: `[B, past + N]`, 1 for tokens and 0 for padding.
            position_ids: `[B, N]` or `[1, N]`; None to count by the mask.
            past_key_values: An empty cache, or one that this model filled.
            use_cache: Whether to return a cache [True].
            logits_to_keep: The number of last positions to keep [0: all], or a tensor of positions.
            labels: `[B, N]`, −100 at positions without a target: adds the mean next-token loss, in nats.
            inputs_embeds: Refused; members do not share an embedding space.
            is_first_iteration: Set by `generate()` for a prompt.
            cache: The same as `past_key_values`, by its name since transformers 5.24.
            adapter_names: For each row an adapter of the base, a PEFT model, or "__base__" [its active one for all].
            **kwargs: `cache_position`, which must go on where the cache ends; options of the package's own loops, see
                `_forward_members`; any other that is not None or False is refused.

        Returns:
            Logits `[B, K, V]`, float32, V the base's width; the loss; the cache.

        Raises:
            InputError: If the prompt is empty, too long for a member, or has ids that a member cannot embed; if the
                labels have another shape, or `adapter_names` do not fit; or an argument is not supported.
            UnsupportedModeError: If the base's adapters cannot be mixed in a batch.
            CacheError: If the cache was filled by another model.
        """
        if is_first_iteration is False and labels is None and inputs_embeds is None and adapter_names is None:
            held = past_key_values if cache is None else cache
            if (out := self._step(input_ids, attention_mask, position_ids, held, logits_to_keep, kwargs)) is not None:
                return out
        # Not in the signature, so generate() refuses them from users: transformers' loops need combined logits.
        loop_options = {name: kwargs.pop(name) for name in _OF_OUR_LOOPS if name in kwargs}
        past_key_values = one_cache(past_key_values, cache)
        step = kwargs.pop(BASE_INPUTS, None)
        refuse_positions(kwargs.pop("cache_position", None), input_ids, past_key_values)
        # A processor tells the types of tokens of a text alone, too.
        kwargs = {k: v for k, v in kwargs.items() if not (says_text(k, v) and sees(self.base))}
        refuse_arguments(inputs_embeds=inputs_embeds, **kwargs)
        if step is not None:
            wanted, width = bool(loop_options.get("return_member_logits")), loop_options.get(PROMPT_WIDTH)
            return self._forward_with_images(step, past_key_values, logits_to_keep, width, return_member_logits=wanted)
        refuse_shapes(input_ids, attention_mask, labels)
        assert input_ids is not None
        return self._forward_members(
            input_ids,
            attention_mask,
            position_ids,
            past_key_values,
            use_cache in (None, True),
            logits_to_keep,
            labels,
            is_first_iteration,
            adapter_names=None if adapter_names is None else checked_names(adapter_names, self.members, len(input_ids)),
            **loop_options,
        )


# transformers reads it several times in each generate().
vars(CombinedForwardMixin.forward)["__signature__"] = inspect.signature(CombinedForwardMixin.forward)
