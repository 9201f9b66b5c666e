"""Proxy-tuning as a logits processor: the same shift as the composed model's, for a pipeline of one's own.

The processor holds the expert and the antiexpert as companions that follow whatever prefix `generate()` asks about.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

import torch
from transformers import LogitsProcessor, PreTrainedModel

from proxytune.errors import InputError
from proxytune.formulas.proxy_tuning import ProxyTuning
from proxytune.generation.method_hooks import Attachable, MethodHook, hooks_on, target_of
from proxytune.generation.prompt_rows import expand_mask
from proxytune.methods.steering.attach import CompanionPrefetch, SteeredProcessors, refuse_no_ids
from proxytune.methods.steering.companion import PrefixCachedMember
from proxytune.models.generation_mixin import ComposedGenerationMixin, refuse_continuous_batching
from proxytune.models.loading import check_vocabularies, open_members, reference_of
from proxytune.models.members.cuda_streams import CompanionStreams, may_overlap
from proxytune.models.padding import mask_of_padding, refuse_ambiguous_padding
from proxytune.ops import combine, normalise_

__all__ = ["ProxyTuningLogitsProcessor"]


class ProxyTuningLogitsProcessor(Attachable, LogitsProcessor):
    """`scores + α (z_expert − z_antiexpert)` (arXiv 2401.08565), for any `generate()` of the base.

    Two ways to use it:

    - `processor.attach(model)`, then `model.generate(...)` or a pipeline as ever: the shift comes before every other
      processor, as in the composed model, and the padding mask is `generate()`'s own. `detach()` ends it; also a
      context manager.
    - `generate(logits_processor=[processor])`: the shift comes after generate()'s own penalties and masks
      (`repetition_penalty`, `bad_words_ids`, `suppress_tokens`, `prefix_allowed_tokens_fn`, …) and before temperature,
      top-k and top-p. That is another law than attached wherever one of them is in play. It returns log-probabilities
      there, because beam search adds scores up without renormalising them; so with beams, what such a mask took away
      is spread over the rest. The padding mask is, in this order: `attention_mask`; else the run of padding tokens at
      the left, if the experts' padding token is no EOS; else an error where padding cannot be told from text.

    What a dropped-in processor cannot see, it cannot refuse: a second one beside it, new ids only on a filled cache
    (its companions then read only those), `generate_batch` and paged caches (which drop processors without a word).
    Attached, all of these are errors. Assisted decoding hands the processor to the draft as well; that is right, and
    only makes the draft better.

    One processor may serve several threads and several `generate()` calls; they take turns at its companions.

    Attributes:
        overlap: Whether the companions of an attached processor begin with each step before the base does [True], on a
            GPU on streams beside its own; from the second token on. On a CPU only the order is another.
    """

    supports_continuous_batching = False
    # By this the composed model knows what must not be added to it.
    shifts_logits = True

    def __init__(
        self,
        expert: Any,
        antiexpert: Any,
        alpha: float = 1.0,
        *,
        attention_mask: torch.Tensor | None = None,
        tokenizers: Mapping[str, Any] | None = None,
        check_vocabulary: bool = True,
        **from_pretrained: Any,
    ) -> None:
        """Open the companions.

        Args:
            expert: The small tuned model: a model object, a hub id or a folder.
            antiexpert: The small model that the expert was tuned from, likewise.
            alpha: The strength α of the shift.
            attention_mask: `[B, T]` of the prompts, for one `generate()` call with padding. Not needed with `attach`.
            tokenizers: Role → tokenizer (`"base"`, `"expert"`, `"antiexpert"`), for members that have none beside their
                weights. A `"base"` here lets an unattached processor compare with the base.
            check_vocabulary: Whether to compare the members' token ids.
            **from_pretrained: Handed to `from_pretrained` of companions given by id or folder.

        Raises:
            InputError: If α is no finite number, or a companion is missing.
            MemberError: If a companion cannot be opened, is not supported, or means other tokens by its ids.

        Warns:
            VocabularyWarning: If there was no tokenizer to compare by.
        """
        self.formula = ProxyTuning(alpha=alpha)
        self._tokenizers = dict(tokenizers or {})
        self._check_vocabulary = check_vocabulary
        models, self._references = open_members(
            {"expert": expert, "antiexpert": antiexpert},
            tokenizers={role: t for role, t in self._tokenizers.items() if role != "base"},
            check_vocabulary=check_vocabulary and "base" not in self._tokenizers,
            **from_pretrained,
        )
        if check_vocabulary and "base" in self._tokenizers:
            check_vocabularies({"base": None, **self._references}, self._tokenizers)
        self._companions = [PrefixCachedMember(models[role], role) for role in self.formula.roles]
        self._explicit_mask = attention_mask
        self._explicit_prompts: torch.Tensor | None = None  # [B, T]: what the explicit mask was first used for
        self.overlap = True
        self._sides = CompanionStreams()

    @property
    def alpha(self) -> float:
        """The strength α of the shift; may be set to any finite number."""
        return self.formula.alpha

    @alpha.setter
    def alpha(self, value: float) -> None:
        self.formula = self.formula.with_alpha(value)

    @property
    def token_forwards(self) -> dict[str, int]:
        """Role → tokens × rows that went through that companion so far."""
        return {c.member.role: c.member.token_forwards for c in self._companions}

    # --- the step ------------------------------------------------------------------------------------------------

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Shift the scores of one step.

        Args:
            input_ids: The whole prefix, `[B, T]`, int64.
            scores: `[B, V]`, float32: raw logits, or log-probabilities in beam search.

        Returns:
            `[B, V]`, float32: normalised log-probabilities.

        Raises:
            InputError: If the prefix is empty (`inputs_embeds` only), too long for a companion, has ids that it cannot
                embed, or may be padded in a way that cannot be told.
        """
        refuse_no_ids(input_ids.shape[1])
        mask = self._inferred_mask(input_ids) if self._explicit_mask is None else self.explicit_mask(input_ids)
        return normalise_(self.shifted(input_ids, scores, mask))

    def shifted(
        self, input_ids: torch.Tensor, scores: torch.Tensor, attention_mask: torch.Tensor | None
    ) -> torch.Tensor:
        """The combined scores of one step, not normalised.

        Args:
            input_ids: The whole prefix, `[B, T]`, int64.
            scores: `[B, V]`, float32.
            attention_mask: `[B, ≤ T]`, 1 for tokens and 0 for padding; None if nothing is padded.

        Returns:
            `[B, V]`, float32; −inf for ids that a companion cannot embed: once sampled, they would end the generation
            in an index error.

        Raises:
            InputError: If the prefix is too long for a companion, or has ids that it cannot embed.
        """
        companions = [c.logits_for(input_ids, attention_mask)[:, -1] for c in self._companions]  # [B, V_i] each
        combined = combine([scores, *companions], self.formula.weights())  # [B, V]
        combined[:, min(c.member.rows for c in self._companions) :] = -torch.inf
        return combined

    def begin(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> None:
        """Let attached companions run over a token before they are asked for it; see `PrefixCachedMember.begin`.

        Args:
            input_ids: The whole prefix, `[B, T]`, int64.
            attention_mask: `[B, T]`, 1 for tokens and 0 for padding; None if nothing is padded.

        Raises:
            InputError: As `shifted`.
        """
        # Which row a mask of one's own belongs to, a tree tells when it asks for logits, and not before.
        if not self._hooks or self._explicit_mask is not None:
            return
        for companion in self._companions:
            device = companion.member.device
            if may_overlap(device):
                with self._sides.beside(companion.member.role, device, [input_ids, attention_mask]):
                    companion.begin(input_ids, attention_mask)
            else:
                companion.begin(input_ids, attention_mask)

    def read_in_chunks(self, size: int | None) -> None:
        """Let the companions read long texts in parts, as `generate(prefill_chunk_size=…)` of an attached base does.

        Args:
            size: Tokens per part; None for at once.
        """
        for companion in self._companions:
            companion.prefill_chunk_size = size

    def explicit_mask(self, input_ids: torch.Tensor) -> torch.Tensor | None:
        """The mask that was given to the processor, for these rows.

        Args:
            input_ids: The whole prefix, `[B, T]`, int64.

        Returns:
            `[B, ≤ T]`; None if none was given.

        Raises:
            InputError: If it was given for other prompts.
        """
        if self._explicit_mask is None:
            return None
        mask = expand_mask(self._explicit_mask, input_ids)
        prompts = input_ids[:, : mask.shape[1]]
        if self._explicit_prompts is None:
            number = torch.arange(len(self._explicit_mask))[:, None]  # [B, 1]
            first = (expand_mask(number, input_ids)[:, 0] == number).int().argmax(1)  # of each prompt's rows
            self._explicit_prompts = prompts.index_select(0, first.to(prompts.device))
        if not torch.equal(expand_mask(self._explicit_prompts, input_ids), prompts):
            raise InputError.of(
                "attention_mask",
                expected="the prompts that the processor's mask was given for",
                got="other ones",
                remedy="Make another processor for other prompts, or attach(model) one for all.",
            )
        return mask

    def _inferred_mask(self, input_ids: torch.Tensor) -> torch.Tensor | None:
        config = self._companions[0].member.model.config.get_text_config(decoder=True)
        pad, eos = config.pad_token_id, config.eos_token_id
        ends = [] if eos is None else [eos] if isinstance(eos, int) else list(eos)
        remedy = "Call processor.attach(model) before generate(), or pass attention_mask= to the processor."
        refuse_ambiguous_padding(input_ids, ends, remedy=remedy)
        if pad is not None and pad not in ends:
            return mask_of_padding(input_ids, pad)
        if pad is None and input_ids.shape[0] > 1:
            raise InputError.of(
                "attention_mask",
                expected="a mask for a batch whose padding cannot be told from text",
                got="none; the experts' padding token is not set",
                remedy=remedy,
            )
        return None

    # --- attaching -----------------------------------------------------------------------------------------------

    def attach(self, model: PreTrainedModel) -> Self:
        """Let every `generate()` of a model be steered, before all other processors.

        Args:
            model: The base.

        Returns:
            Itself, so that `with processor.attach(model):` detaches at the end.

        Raises:
            InputError: If the processor is attached already, or the model is steered already.
            VocabularyMismatchError: If the model means other tokens by its ids than the companions.

        Warns:
            VocabularyWarning: If there was no tokenizer to compare by.
        """
        self._refuse_attached()
        target = target_of(model)
        composed = isinstance(target, ComposedGenerationMixin)
        attached = any(
            getattr(hook.replacement, "changes_logits", False) for hook in hooks_on(target, "_get_logits_processor")
        )
        if composed or attached:
            raise InputError.of(
                "attach",
                expected="a model that is not steered yet",
                got="a composed model" if composed else "one with another processor attached",
                remedy="Shifts would add up. Detach the other one, or attach to the base.",
            )
        if self._check_vocabulary:
            check_vocabularies({"base": reference_of(model), **self._references}, self._tokenizers)
        self._hooks = (
            MethodHook(target, "_get_logits_processor", SteeredProcessors(self)),
            MethodHook(target, "init_continuous_batching", refuse_continuous_batching),
            MethodHook(target, "prepare_inputs_for_generation", CompanionPrefetch(self)),
        )
        return self
