"""Assisted decoding on a composed model, also with drafts whose head is narrower or wider than the base's.

A draft only proposes; the combined logits decide. So a draft of another width only needs rows of the base's width, ids
that it can embed, and no proposals that some member cannot embed. The model's own expert as the draft runs on the
composite cache instead, in the loop of `proxytune.methods.speculation.decoding`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from transformers import DynamicCache, GenerationConfig, LogitsProcessor, StaticCache
from transformers.generation.candidate_generator import (
    AssistedCandidateGenerator,
    CandidateGenerator,
    PromptLookupCandidateGenerator,
)
from transformers.generation.configuration_utils import GenerationMode
from transformers.generation.logits_process import (
    LogitsProcessorList,
    SynthIDTextWatermarkLogitsProcessor,
    UnbatchedClassifierFreeGuidanceLogitsProcessor,
)

import proxytune
from proxytune.errors import InputError, NumericalError, UnsupportedModeError
from proxytune.models.members.cache_name import CACHE, cache_of
from proxytune.models.members.composite_cache import refuse_outdated
from proxytune.models.members.embedding_table import embedding_rows
from proxytune.models.members.layer_kinds import Ability, refuse_lacking
from proxytune.models.members.long_rope import longest_prompt, refuse_crossing, switches_of
from proxytune.models.members.rewind import length_of, rewindable_layers
from proxytune.models.members.text_checks import refuse_no_numbers
from proxytune.models.own_prompts import PROMPT_WIDTH, PROMPTS
from proxytune.models.processor_list import ProcessorList

__all__ = ["AssistedMixin", "FittedDraft", "TailMask", "refuse_rewinding", "refuse_self_speculation"]

# Settings of generate() that draft with layers, heads or embeddings of the model itself.
_SELF_SPECULATION = {"assistant_early_exit": (None,), "use_mtp": (None, False), "speculation_type": (None,)}


class TailMask(LogitsProcessor):
    """Sets ids from `width` on to −inf.

    The composed logits are −inf there anyway. This is for drafts of assisted decoding, which `generate()` gives the
    same processors, and for the NaN of `(−inf) − (−inf)` in classifier-free guidance. With `finite`, it also refuses
    rows without a distribution, whose argmax would be some token: transformers' loops wait for the device in each step.
    """

    supports_continuous_batching = False

    def __init__(self, width: int, *, finite: bool = False) -> None:
        self.width = width
        self.finite = finite

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Mask the tail of scores `[B, V]`; a new tensor if there is a tail.

        Raises:
            NumericalError: With `finite`, if a row holds NaN or +inf, or nothing but −inf.
        """
        if self.finite:
            refuse_no_numbers(scores, "the members' combined logits")
        if scores.shape[-1] <= self.width:
            return scores
        masked = scores.clone()
        masked[:, self.width :] = -torch.inf
        return masked


class _SomeToken(LogitsProcessor):
    """Refuses a row of which the processors have left no token."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        none = scores.amax(-1) == -torch.inf
        if bool(none.any()):
            raise NumericalError.of(
                f"row {int(none.int().argmax())} of {len(scores)}",
                expected="a token that the formula's plausibility mask and the processors both allow",
                got="none: the processors forbid all that the mask leaves (e.g. min_new_tokens the end token)",
                remedy="Relax the processors, or the mask (share, top_p or plausible of the formula).",
            )
        return scores


class _WrappedDraft(CandidateGenerator):
    def __init__(self, inner: CandidateGenerator) -> None:
        self.inner = inner

    def __getattr__(self, name: str) -> Any:
        # The assisted loop reads and sets attributes of its generator.
        return getattr(self.inner, name)

    def update_candidate_strategy(self, input_ids: torch.Tensor, scores: torch.Tensor, num_matches: int) -> None:
        """Tell the draft how many candidates were accepted."""
        self.inner.update_candidate_strategy(input_ids, scores, num_matches)


class FittedDraft(_WrappedDraft):
    """A candidate generator whose logits are fitted to the base's width: columns that the draft lacks get −inf."""

    def __init__(self, inner: CandidateGenerator, width: int) -> None:
        """Wrap a generator of transformers; `TailMask` keeps its proposals among ids that all members can embed."""
        super().__init__(inner)
        self.width = width

    def get_candidates(self, input_ids: torch.Tensor, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Draft a continuation of `[1, T]`: ids with the candidates, `[1, T + K]`, and their logits, `[1, K, V]`."""
        # An id that the draft cannot embed is replaced for it: only its proposals get worse.
        known = input_ids.clamp(max=embedding_rows(self.inner.assistant_model) - 1)
        candidates, logits = self.inner.get_candidates(known, **kwargs)
        candidates = torch.cat([input_ids, candidates[:, input_ids.shape[1] :].to(input_ids.device)], 1)
        if logits is not None:
            missing = self.width - logits.shape[-1]
            logits = torch.nn.functional.pad(logits, (0, missing), value=-torch.inf)  # negative padding crops
        return candidates, logits


class _ShortLookup(_WrappedDraft):
    """Prompt lookup that leaves the last token to the target.

    transformers' own goes on past the maximum length: past the end of a static cache, or of a member's context.
    """

    def get_candidates(self, input_ids: torch.Tensor, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
        candidates, logits = self.inner.get_candidates(input_ids, **kwargs)
        return candidates[:, : max(input_ids.shape[1], self.max_length - 1)], logits


def refuse_self_speculation(generation_config: GenerationConfig) -> None:
    """Raise UnsupportedModeError for drafts by a part of the model: a composed model has no such part."""
    for name, off in _SELF_SPECULATION.items():
        if (value := getattr(generation_config, name, None)) not in off:
            raise UnsupportedModeError.of(
                name,
                expected="a separate draft model, or none",
                got=f"{name}={value!r}, which drafts with a part of one model",
                remedy="Pass assistant_model= or prompt_lookup_num_tokens=.",
            )


def refuse_rewinding(
    switches: Mapping[str, int],
    generation_config: GenerationConfig,
    input_ids: torch.Tensor,
    *args: Any,
    model_kwargs: Mapping[str, Any],
    **kwargs: Any,
) -> None:
    """Raise UnsupportedModeError if assisted decoding of prompts `[1, T]` may cross the switch of a long-rope model.

    Takes the arguments of `_get_candidate_generator`, which assisted decoding calls first.
    """
    if switches:
        assert generation_config.max_length is not None
        refuse_crossing(
            "assisted decoding",
            switches,
            torch.tensor([longest_prompt(generation_config, model_kwargs, input_ids.shape[1])]),
            generation_config.max_length - input_ids.shape[1],
            instead="leave out assistant_model and prompt_lookup_num_tokens",
        )


# Processors of transformers that count their calls, one a token of each row, and the setting that turns them on.
_COUNTING = {
    UnbatchedClassifierFreeGuidanceLogitsProcessor: "guidance_scale",
    SynthIDTextWatermarkLogitsProcessor: "watermarking_config",
}


def _refuse_counting(processors: Iterable[Any], but: str, without: str) -> None:
    """Raise UnsupportedModeError for a processor that counts its calls, if a call is not one more token per row."""
    for processor in processors:
        for kind, setting in _COUNTING.items():
            if isinstance(processor, kind):
                raise UnsupportedModeError.of(
                    setting,
                    expected="greedy decoding or sampling, one token of each row at a time",
                    got=f"a {kind.__name__}, which counts its calls, while {but}",
                    remedy=f"Leave {setting} out, or {without}.",
                )


_NEEDED: dict[GenerationMode, Ability] = {
    GenerationMode.BEAM_SEARCH: "reorder",
    GenerationMode.BEAM_SAMPLE: "reorder",
    GenerationMode.ASSISTED_GENERATION: "crop",
}


_OF_THE_TARGET = ("adapter_names", PROMPTS, PROMPT_WIDTH)


class AssistedMixin:
    """`generate(assistant_model=…)` on a composed model; must come before `GenerationMixin` among the bases.

    Drafts and beams also refuse what transformers lets go wrong in them.
    """

    def _beam_search(self, input_ids: torch.Tensor, logits_processor: Any, *args: Any, **kwargs: Any) -> Any:
        _refuse_counting(logits_processor, "beams change places", "num_beams")
        config = kwargs["generation_config"]
        if self.weighing.masked and (config.do_sample or (config.num_return_sequences or 1) > 1):  # type: ignore[attr-defined]
            raise UnsupportedModeError.of(
                "beams under a plausibility mask",
                expected="beam search that returns one sequence: a mask may leave fewer tokens than beams",
                got=f"do_sample={config.do_sample}, num_return_sequences={config.num_return_sequences}",
                remedy="Leave num_beams out, or the formula's mask (share=None, top_p=None, plausible=None).",
            )
        parent: Any = super()
        return parent._beam_search(input_ids, logits_processor, *args, **kwargs)

    def _sample(self, input_ids: torch.Tensor, logits_processor: Any, *args: Any, **kwargs: Any) -> Any:
        # Processors after a mask may forbid the only tokens that it left: the argmax would be any token.
        if self.weighing.masked and not kwargs["generation_config"].remove_invalid_values:  # type: ignore[attr-defined]
            logits_processor = ProcessorList([*logits_processor, _SomeToken()])
        parent: Any = super()
        return parent._sample(input_ids, logits_processor, *args, **kwargs)

    def _validate_generation_mode(
        self, generation_mode: Any, generation_config: GenerationConfig, generation_mode_kwargs: dict[str, Any]
    ) -> None:
        refuse_self_speculation(generation_config)
        if (need := _NEEDED.get(generation_mode)) and generation_config.use_cache is not False:
            mode = generation_mode.value.replace("_", " ")
            expected, remedy = (
                f"layers of a cache that can {need} what they hold",
                "Pass use_cache=False, or leave it out.",
            )
            refuse_lacking(self.members, need, mode, expected=expected, remedy=remedy)  # type: ignore[attr-defined]
        if not generation_mode_kwargs.get("assistant_tokenizer"):
            # transformers takes a different head width for a different tokenizer; here rows are fitted instead.
            generation_mode_kwargs = {k: v for k, v in generation_mode_kwargs.items() if k != "assistant_model"}
        parent: Any = super()
        parent._validate_generation_mode(generation_mode, generation_config, generation_mode_kwargs)

    def _get_candidate_generator(self, *args: Any, **kwargs: Any) -> CandidateGenerator:
        parent: Any = super()
        refuse_rewinding(switches_of(self.members), *args, **kwargs)  # type: ignore[attr-defined]
        if "logits_processor" in kwargs:  # a draft gets them, and may propose anything
            masks = [TailMask(p.width) if type(p) is TailMask else p for p in kwargs["logits_processor"]]
            kwargs["logits_processor"] = LogitsProcessorList(masks)
        if "model_kwargs" in kwargs:  # a draft gets them all
            kwargs["model_kwargs"] = {k: v for k, v in kwargs["model_kwargs"].items() if k not in _OF_THE_TARGET}
        inner: CandidateGenerator = parent._get_candidate_generator(*args, **kwargs)
        width: int = self.config.vocab_size  # type: ignore[attr-defined]
        if type(inner) is PromptLookupCandidateGenerator:
            return _ShortLookup(inner)
        return FittedDraft(inner, width) if type(inner) is AssistedCandidateGenerator else inner

    def _assisted_decoding(
        self, input_ids: torch.Tensor, logits_processor: Any, *args: Any, assistant_model: Any = None, **kwargs: Any
    ) -> Any:
        _refuse_counting(
            logits_processor, "drafts are evaluated more than once", "assistant_model and prompt_lookup_num_tokens"
        )
        cache, mask = cache_of(kwargs), kwargs.get("attention_mask")
        width = input_ids.shape[1]
        covered = (
            (getattr(kwargs["generation_config"], "_mask_length", None) or width) if mask is None else mask.shape[1]
        )
        if cache is not None and not isinstance(cache, StaticCache) and covered == width and length_of(cache):
            # transformers would read the whole text after what a cache holds of it; it is read anew.
            refuse_outdated(cache, self._models, kwargs.get("adapter_names"), values=True)  # type: ignore[attr-defined]
            kwargs[CACHE] = DynamicCache(config=self.config)  # type: ignore[attr-defined]
            self._adopt(kwargs[CACHE])  # type: ignore[attr-defined]
        if isinstance(cache, StaticCache) and not all(layer.is_croppable for layer in rewindable_layers(cache)):
            raise UnsupportedModeError.of(
                "a static cache",
                expected="a dynamic one with drafts, for members with recurrent layers",
                got=f"a {type(cache).__name__}",
                remedy="Leave out cache_implementation.",
            )
        parent: Any = super()
        expert: Any = getattr(self, "expert", None)
        if expert is None or assistant_model is not expert:
            return parent._assisted_decoding(
                input_ids, logits_processor, *args, assistant_model=assistant_model, **kwargs
            )
        config = kwargs["generation_config"]
        if config.assistant_ensemble_weight is not None:
            raise InputError.of(
                "assistant_ensemble_weight",
                expected="None: the expert as the draft is lossless",
                got=f"{config.assistant_ensemble_weight}, which mixes the draft into the model",
                remedy="Leave it out, or change alpha, which is the weight of the expert.",
            )
        for name in ("inputs_tensor", "assistant_tokenizer"):
            kwargs.pop(name, None)
        tokens = expert.generation_config.num_assistant_tokens
        # `assistant_model=model.expert` is short for `custom_generate=SpeculativeDecoding()`, and is written so: by the
        # public name, since the loops stand above the model.
        loop = proxytune.SpeculativeDecoding(draft_tokens="auto" if tokens is None else tokens)
        return loop(self, input_ids, logits_processor, *args, **kwargs)
