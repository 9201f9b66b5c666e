"""A pass over a text with images: the base by its own inputs, the companions over the text alone."""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import Cache
from transformers.modeling_outputs import CausalLMOutputWithPast

from proxytune.models.adapter_names import refuse_leftover
from proxytune.models.combined_logits import CombinedLogitsMixin
from proxytune.models.generation_mixin import MemberOutput
from proxytune.models.members.cache_name import CACHE
from proxytune.models.members.composite_cache import note_members, view
from proxytune.models.members.cpu_threads import SideThread
from proxytune.models.members.forward import run_members
from proxytune.models.members.rewind import length_of
from proxytune.models.vision import StepInputs

__all__ = ["ImagesPassMixin"]


class ImagesPassMixin(CombinedLogitsMixin):
    """The pass of a base that sees."""

    base: Any
    config: Any
    split_threads: bool
    _adopt: Any
    _thread: SideThread

    def _forward_with_images(
        self,
        step: StepInputs,
        cache: Cache | None,
        logits_to_keep: int | torch.Tensor,
        prompt_width: int | None,
        *,
        return_member_logits: bool = False,
    ) -> CausalLMOutputWithPast:
        """One pass of `generate()` with images: the base by its own inputs, the companions over the text."""
        if cache is not None:
            self._adopt(cache, ahead=True, everyone=True, follows=False)
        if step.first:
            refuse_leftover(self.base)
        step.check(self.members)
        new = step.base["input_ids"].shape[1]
        past = 0 if cache is None else int(length_of(view(cache, *self.config.spans[0])))
        generated = self._generated(past, new, prompt_width, logits_to_keep)
        members = run_members(
            self.members,
            self.config.spans,
            step.base["input_ids"],
            cache=cache,
            attention_mask=None,
            position_ids=None,
            logits_to_keep=logits_to_keep,
            latent=[step.base, *([None] * (len(self.members) - 1))],
            precomputed={},
            texts={m.role: step.text for m in self.members[1:]},
            sides=self._sides if self.overlap else None,
            thread=self._thread if self.split_threads else None,
        )  # [B, K, V_i] each
        if cache is not None:
            note_members(cache, self._models, last=self._fingerprints, images=True)
        if return_member_logits:
            return MemberOutput(cache, members, generated)
        return CausalLMOutputWithPast(logits=self._combined(members, generated), **{CACHE: cache})
