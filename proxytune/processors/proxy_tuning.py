"""Proxy-tuning as a logits processor: the same shift as the composed model's, for a pipeline of one's own.

The processor holds the expert and the antiexpert as companions that follow whatever prefix `generate()` asks about.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self

import torch
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedModel

from proxytune.companion import Companion
from proxytune.errors import InputError
from proxytune.formula import ProxyTuning, shift
from proxytune.generating import ComposedGenerationMixin, refuse_continuous_batching
from proxytune.member import embedding_rows
from proxytune.opening import check_vocabularies, open_members, reference_of

__all__ = ["ProxyTuningLogitsProcessor"]

_HOOKS = ("_get_logits_processor", "init_continuous_batching")


class ProxyTuningLogitsProcessor(LogitsProcessor):
    """`scores + α (z_expert − z_antiexpert)` (arXiv 2401.08565), for any `generate()` of the base.

    Two ways to use it:

    - `processor.attach(model)`, then `model.generate(...)` or a pipeline as ever: the shift comes before every other
      processor, as in the composed model, and the padding mask is `generate()`'s own. `detach()` ends it; also a
      context manager.
    - `generate(logits_processor=[processor])`: the shift comes after the repetition-type penalties and before
      temperature, top-k and top-p. There it returns log-probabilities, because beam search adds scores up without
      renormalising them. The mask is, in this order: `attention_mask`; else the run of padding tokens at the left, if
      the experts' padding token is no EOS; else an error for a batch.

    Assisted decoding hands the processor to the draft as well; that is right, and only makes the draft better.
    `generate_batch` and paged caches drop processors without a word; only an attached one can refuse.
    """

    supports_continuous_batching = False

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
        self._companions = [Companion(models[role], role) for role in self.formula.roles]
        self._explicit_mask = attention_mask
        self._attached: PreTrainedModel | None = None
        # Of the generate() call that is running on the attached model:
        self._mask: torch.Tensor | None = None
        self._logsoftmaxed = True

    @property
    def alpha(self) -> float:
        """The strength α of the shift."""
        return self.formula.alpha

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
            `[B, V]`, float32: log-probabilities; attached and outside of beam search, raw combined logits.

        Raises:
            InputError: If the prefix is empty (`inputs_embeds` only), too long for a companion, has ids that it cannot
                embed, or may be padded in a way that cannot be told.
        """
        _refuse_no_ids(input_ids.shape[1])
        mask = self._mask_for(input_ids)
        companions = [c.logits_for(input_ids, mask)[:, -1] for c in self._companions]  # [B, V_i] each
        combined = shift(scores, companions, self.formula.weights())  # [B, V]
        # Once sampled, an id that a companion cannot embed would end the generation in an index error.
        combined[:, min(c.member.rows for c in self._companions) :] = -torch.inf
        return combined.log_softmax(-1) if self._logsoftmaxed else combined

    def _mask_for(self, input_ids: torch.Tensor) -> torch.Tensor | None:
        if self._explicit_mask is not None:
            return _spread(self._explicit_mask, input_ids)
        if self._attached is not None:
            return None if self._mask is None else _spread(self._mask, input_ids)
        return self._inferred_mask(input_ids)

    def _inferred_mask(self, input_ids: torch.Tensor) -> torch.Tensor | None:
        config = self._companions[0].member.model.config
        pad, eos = config.pad_token_id, config.eos_token_id
        ends = [] if eos is None else [eos] if isinstance(eos, int) else list(eos)
        if pad is None or pad in ends:
            if input_ids.shape[0] == 1 or (pad is not None and not bool((input_ids[:, 0] == pad).any())):
                return None
            raise InputError.of(
                "attention_mask",
                expected="a mask for a batch whose padding cannot be told from text",
                got="none; the experts' padding token is " + ("not set" if pad is None else f"{pad}, also an EOS"),
                remedy="Call processor.attach(model) before generate(), or pass attention_mask= to the processor.",
            )
        # The run of padding at the left only: a padding token inside the text is text to the companions.
        return (input_ids != pad).long().cummax(-1).values

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
        if self._attached is not None:
            raise InputError.of(
                "attach", expected="a detached processor", got="one that is attached", remedy="Call detach() first."
            )
        composed = isinstance(model, ComposedGenerationMixin)
        if composed or any(hook in vars(model) for hook in _HOOKS):
            raise InputError.of(
                "attach",
                expected="a model that is not steered yet",
                got="a composed model" if composed else "one with another processor attached",
                remedy="Shifts would add up. Detach the other one, or attach to the base.",
            )
        if self._check_vocabulary:
            check_vocabularies({"base": reference_of(model), **self._references}, self._tokenizers)
        original = model._get_logits_processor
        rows = embedding_rows(model)

        def with_shift(*args: Any, **kwargs: Any) -> LogitsProcessorList:
            processors = original(*args, **kwargs)
            self._begin(*args, processors=processors, rows=rows, **kwargs)
            processors.insert(0, self)
            return processors

        # On the instance: other models of the class are not touched, and detaching is deleting.
        model._get_logits_processor = with_shift
        model.init_continuous_batching = refuse_continuous_batching
        self._attached = model
        return self

    def detach(self) -> None:
        """Undo `attach`; without effect if the processor is not attached."""
        if self._attached is not None:
            for hook in _HOOKS:
                delattr(self._attached, hook)
        self._attached, self._mask, self._logsoftmaxed = None, None, True

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.detach()

    def _begin(
        self,
        generation_config: Any,
        input_ids_seq_length: int | None = None,
        *,
        processors: LogitsProcessorList,
        rows: int,
        model_kwargs: dict[str, Any] | None = None,
        **_: Any,
    ) -> None:
        """Take from a `generate()` that starts what its steps will not tell."""
        if any(p is self for p in processors):
            raise InputError.of(
                "logits_processor",
                expected="no other processor of this kind on a model that it is attached to",
                got="the attached processor itself",
                remedy="Leave it out of logits_processor, or detach() it.",
            )
        _refuse_no_ids(input_ids_seq_length)
        model_kwargs = model_kwargs or {}
        self._mask = model_kwargs.get("attention_mask")
        self._logsoftmaxed = generation_config.num_beams > 1
        seen = input_ids_seq_length or 0
        # generate() drops a mask of ones, but remembers how long it was.
        covered = getattr(generation_config, "_mask_length", seen) if self._mask is None else self._mask.shape[1]
        past = model_kwargs.get("past_key_values")
        if covered != seen or (past is not None and seen <= int(past.get_seq_length())):
            raise InputError.of(
                "input_ids",
                expected="the whole prefix, with a cache too: the companions read it from the ids",
                got=f"only the {seen} new ids",
                remedy="Pass all ids; generate() forwards through the base only those that the cache has not seen.",
            )


def _refuse_no_ids(length: int | None) -> None:
    if length == 0:
        raise InputError.of(
            "input_ids",
            expected="the prompt's token ids, which the companions read",
            got="none: generate() was given inputs_embeds only, or an empty prompt",
            remedy="Pass input_ids.",
        )


def _spread(mask: torch.Tensor, input_ids: torch.Tensor) -> torch.Tensor:
    """Repeat the prompts' mask for beams and several sequences per prompt."""
    rows, prompts = input_ids.shape[0], mask.shape[0]
    if mask.ndim != 2 or rows % prompts or mask.shape[1] > input_ids.shape[1]:
        raise InputError.of(
            "attention_mask",
            expected=f"[B, T] for {rows} rows (beams included) of {input_ids.shape[1]} ids",
            got=f"shape {list(mask.shape)}",
            remedy="Pass the mask of this very batch of prompts; for other prompts, make another processor.",
        )
    return mask.repeat_interleave(rows // prompts, 0)
