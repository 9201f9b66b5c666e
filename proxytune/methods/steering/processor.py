"""Proxy-tuning as a logits processor: the composed model's shift, for your own pipeline.

The processor holds the expert and the antiexpert as companions that follow any prefix of `generate()`.
"""

from __future__ import annotations

import itertools
import os
import warnings
from collections.abc import Mapping
from functools import partial
from typing import Any, Self, get_args

import torch
from transformers import LogitsProcessor, PreTrainedModel

from proxytune.errors import InputError, SteeringWarning, UnsupportedModelError
from proxytune.formulas.checks import check_formula
from proxytune.formulas.gates import Gate
from proxytune.formulas.proxy_tuning import ProxyTuning
from proxytune.formulas.schedules import Schedule
from proxytune.generation.call_log import log_now
from proxytune.generation.method_hooks import Attachable, MethodHook, batching_refused, hooks_on, target_of
from proxytune.generation.prompt_rows import expand_mask
from proxytune.methods.steering.attach import (
    CompanionPrefetch,
    ScoringNotice,
    SteeredProcessors,
    StoppingIds,
    drafts_refused,
    examined_base,
    refuse_no_ids,
)
from proxytune.models.end_tokens import EndWatch, ends_of, stopping_ids
from proxytune.models.ensemble import Ensemble
from proxytune.models.generation_mixin import ComposedGenerationMixin
from proxytune.models.loading import open_members, refuse_tokenizers
from proxytune.models.member_tokenizers import check_vocabularies, places_of_tokens
from proxytune.models.members.adapter_state import states_of
from proxytune.models.members.cuda_streams import CompanionStreams, may_overlap
from proxytune.models.members.embedding_table import embedding_rows
from proxytune.models.members.innermost import innermost
from proxytune.models.members.member import Member
from proxytune.models.members.prefix_cached import PrefixCached
from proxytune.models.padding import mask_of_padding, refuse_ambiguous_padding
from proxytune.models.references import reference_of
from proxytune.models.roles import refuse_no_shift, warn_of_roles, warn_of_size
from proxytune.models.weighing import Weighing, is_open
from proxytune.ops import normalise_
from proxytune.recipe import EndTokens
from proxytune.validation import choice, shown

__all__ = ["ProxyTuningLogitsProcessor"]


class ProxyTuningLogitsProcessor(Attachable, LogitsProcessor):
    """`scores + α (z_expert − z_antiexpert)` (arXiv 2401.08565), for any `generate()` of the base.

    Two ways to use it:

    - `processor.attach(model)`, then `model.generate(...)` or a pipeline as usual: the shift comes before every other
      processor, as in the composed model, and the padding mask is `generate()`'s own. `detach()`, or the end of `with
      processor.attach(model):`, undoes it.
    - `generate(logits_processor=[processor])`: the shift comes after generate()'s own penalties and masks
      (`repetition_penalty`, `bad_words_ids`, `suppress_tokens`, `prefix_allowed_tokens_fn`, …) and before temperature,
      top-k and top-p. If one of those is used, the distribution differs from the attached one. It returns
      log-probabilities, because beam search adds scores up without renormalising them; so with beams, the probability
      that such a mask removed is spread over the other tokens. The padding mask is `attention_mask`, if given; else the
      run of padding tokens at the left, if the experts' padding token is no EOS; else an error where padding cannot be
      told from text.

    Attached to a vision-language model, the companions read the prompt without the placeholder tokens of its images.

    Unattached, it cannot tell those from text. Nor can it detect, and so not refuse, a second processor beside it, new
    ids only on a filled cache (its companions then read only those), `generate_batch` and paged caches (which drop
    processors silently). Attached, all of these are errors. Assisted decoding calls the processor for the draft as
    well, which only makes the draft better.

    One processor may serve several threads and several `generate()` calls; they take turns at its companions.

    Attributes:
        overlap: Whether attached companions start each step before the base [True], from the second token on; on a GPU
            on streams of their own. On a CPU only the order changes.
    """

    supports_continuous_batching = False
    _notice: ScoringNotice | None = None
    # The composed model refuses processors with this attribute.
    shifts_logits = True

    def __init__(
        self,
        expert: Any = None,
        antiexpert: Any = None,
        alpha: float = 1.0,
        *,
        gate: Gate | None = None,
        attention_mask: torch.Tensor | None = None,
        tokenizers: Mapping[str, Any] | None = None,
        check_vocabulary: bool = True,
        members: Mapping[str, Mapping[str, Any]] | None = None,
        end_tokens: EndTokens | None = None,
        self_test: bool = True,
        **from_pretrained: Any,
    ) -> None:
        """Open the companions.

        Args:
            expert: The small tuned model: a model object, a hub id or a folder, or `"lora:place"`, an adapter that goes
                onto the antiexpert. Needed.
            antiexpert: The small model that the expert was tuned from, likewise. Needed.
            alpha: The strength α of the shift.
            gate: Where the shift applies, e.g. `Gate(entropy=0.1)`, by the scores that the processor gets: the base's
                own if it is attached. Companions run only where it is open for some row, and read what they missed.
            attention_mask: `[B, T]` of the prompts, for one `generate()` call with padding. Not needed with `attach`.
            tokenizers: Role → tokenizer (`"base"`, `"expert"`, `"antiexpert"`), for members without one beside their
                weights. A `"base"` here lets an unattached processor compare with the base.
            check_vocabulary: Whether to compare the members' token ids.
            members: Role → arguments of `from_pretrained` for that companion alone, before the common ones.
            end_tokens: Whose end tokens stop a text of an attached base: "union" of base and expert, "base" or "expert"
                [union, with a warning where they differ]. `eos_token_id=` of a call comes first.
            self_test: Whether to test that each companion, and a base at `attach`, is right by itself (see `wrap`).
            **from_pretrained: Passed to `from_pretrained` of companions given by id or folder. `trust_remote_code=True`
                here trusts both.

        Raises:
            InputError: If α is not a finite number, a companion is missing, or an argument is unknown.
            MemberError: If a companion cannot be opened, is not supported, is composed already, fails the self-test, or
                its ids stand for other tokens; or if expert and antiexpert are the same.

        Warns:
            VocabularyWarning: If there was no tokenizer to compare by.
            SteeringWarning: If expert and antiexpert have equal weights or look swapped, or α is above 10.
        """
        _refuse_three_members(alpha)
        if gate is not None and not isinstance(gate, Gate):
            raise InputError.of("gate", expected="a Gate", got=shown(gate, 80), remedy="Pass e.g. Gate(entropy=0.1).")
        if gate is not None:
            gate.refuse_uncalibrated()
        if isinstance(alpha, Schedule):
            raise InputError.of(
                "alpha",
                expected="a number: a processor cannot tell the prompt from what was generated",
                got=str(alpha),
                remedy="Compose the models with proxytune.wrap, whose α may be a schedule.",
            )
        self.formula = check_formula(ProxyTuning(alpha=alpha, gate=gate))
        refuse_no_shift(expert, antiexpert, self.formula, members=members)
        refuse_tokenizers(tokenizers)
        self._tokenizers = dict(tokenizers or {})
        self._check_vocabulary = check_vocabulary
        models, references, found = open_members(
            {"expert": expert, "antiexpert": antiexpert},
            type(self),
            tokenizers={role: t for role, t in self._tokenizers.items() if role != "base"},
            check_vocabulary=check_vocabulary and "base" not in self._tokenizers,
            members=members,
            **from_pretrained,
        )
        self._references = places_of_tokens(references, models)
        if check_vocabulary and "base" in self._tokenizers:
            check_vocabularies({"base": None, **self._references}, self._tokenizers)
        refuse_no_shift(models["expert"], models["antiexpert"], self.formula)
        warn_of_roles(models, self.formula)
        self.end_tokens = None if end_tokens is None else choice("end_tokens", end_tokens, get_args(EndTokens))
        self._found_tokenizers = found
        # The base is not known yet; it most likely ends where the antiexpert does.
        tuned = [i for i in ends_of(models["expert"]) if i not in ends_of(models["antiexpert"])]
        self._watch = EndWatch(tuned) if tuned and end_tokens != "base" else None
        self._self_test = self_test
        states = states_of(models)
        roles = self.formula.roles
        companions = [Member(models[role].eval(), role, adapter=states[role]) for role in roles]
        if self_test:
            for member in companions:
                member.examine()
        # Those of one model read the text in one pass; the others have caches of their own.
        of_model: dict[int, list[Member]] = {}
        for member in companions:
            of_model.setdefault(id(innermost(member.model)), []).append(member)
        self._companions = [PrefixCached(group) for group in of_model.values()]
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
        self.formula = check_formula(self.formula.with_alpha(value))

    @property
    def token_forwards(self) -> dict[str, int]:
        """Role → tokens × rows that this companion has processed so far."""
        return {m.role: m.token_forwards for m in self._members}

    @property
    def _members(self) -> list[Member]:
        return [member for companions in self._companions for member in companions.members]

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
                embed, or its padding cannot be determined.
        """
        refuse_no_ids(input_ids.shape[1])
        self._watch_ends(input_ids)
        mask = self._inferred_mask(input_ids) if self._explicit_mask is None else self.explicit_mask(input_ids)
        return normalise_(self.shifted(input_ids, scores, mask, told=False))

    def begin_generation(self, *, handed_on: bool) -> None:
        """Announce a `generate()`; see `PrefixCached.begin_generation`."""
        for companions in self._companions:
            companions.begin_generation(handed_on=handed_on)

    def shifted(
        self, input_ids: torch.Tensor, scores: torch.Tensor, attention_mask: torch.Tensor | None, *, told: bool = True
    ) -> torch.Tensor:
        """The combined scores of one step, not normalised.

        Args:
            input_ids: The whole prefix, `[B, T]`, int64.
            scores: `[B, V]`, float32.
            attention_mask: `[B, ≤ T]`, 1 for tokens and 0 for padding; None if nothing is padded.
            told: Whether this `generate()` was announced.

        Returns:
            `[B, V]`, float32; −inf for ids that a companion cannot embed: sampling one would end in an index error.

        Raises:
            InputError: If the prefix is too long for a companion, or has ids that it cannot embed.
        """
        gate = self.formula.gate
        opened = None if gate is None else is_open(gate, scores)  # [B]
        members = self._members
        rows: list[torch.Tensor | None] = [scores[:, None], *([None] * len(members))]
        if opened is None or bool(opened.any()):
            found = (c.logits_for(input_ids, attention_mask, told=told) for c in self._companions)
            rows[1:] = itertools.chain.from_iterable(found)  # [B, 1, V_i] each
        weighing = Weighing(self.formula, {role: i for i, role in enumerate(("base", *self.formula.roles))})
        if (log := log_now()) is not None:
            shown = [None if x is None else x[:, 0].to(scores.device) for x in rows]
            roles = ["base", *(m.role for m in members)]
            usable = min(m.rows for m in members)
            log.watch(shown, partial(weighing, shown, None, opened), usable=usable, opened=opened, roles=roles)
        combined = weighing.combined(rows, opened=None if opened is None else opened[:, None])[:, 0]
        combined[:, min(m.rows for m in members) :] = -torch.inf
        return combined

    def begin(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> None:
        """Let attached companions run the next token ahead of time; see `PrefixCached.begin`."""
        # With an explicit mask, a tree's rows are known only when it needs logits; under a gate, whether any run.
        if not self._hooks or self._explicit_mask is not None or self.formula.gate is not None:
            return
        for companions in self._companions:
            first = companions.members[0]
            if may_overlap(first.device):
                with self._sides.beside(first.role, first.device, [input_ids, attention_mask]):
                    companions.begin(input_ids, attention_mask)
            else:
                companions.begin(input_ids, attention_mask)

    def read_prompts(self, chunk: int | None, *, finite: bool) -> None:
        """Let the companions prefill in chunks of tokens, as an attached base does (None: all at once).

        `finite` says whether NaN among their logits is an error.
        """
        for companions in self._companions:
            companions.prefill_chunk_size, companions.finite = chunk, finite

    def explicit_mask(self, input_ids: torch.Tensor) -> torch.Tensor | None:
        """The mask `[B, ≤ T]` given to the processor, expanded to these rows; None without one.

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
                expected="the prompts of the mask that was given to the processor",
                got=f"other prompts, of shape {list(prompts.shape)}",
                remedy="Create a processor per batch of prompts, or attach(model) one for all.",
            )
        return mask

    def _watch_ends(self, input_ids: torch.Tensor) -> None:
        """Say once that a text goes on after the expert's end of turn, which nobody but `generate()` could stop."""
        if self._watch is None or (token := self._watch.passed(input_ids)) is None:
            return
        self._watch = None
        warnings.warn(
            f"a text goes on after id {token}, with which the expert ends its turn: a processor cannot stop it. Pass "
            "eos_token_id=[…] with that id to generate(), or use attach(), which stops there. end_tokens='base' goes "
            "on in silence.",
            SteeringWarning,
            stacklevel=3,
        )

    def _inferred_mask(self, input_ids: torch.Tensor) -> torch.Tensor | None:
        config = self._members[0].model.config.get_text_config(decoder=True)
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
                got="attention_mask=None, and the experts' padding token is not set",
                remedy=remedy,
            )
        return None

    def detach(self) -> None:
        """Undo `attach`; without effect if the processor is not attached."""
        super().detach()
        if self._notice is not None:
            self._notice.remove()
        self._notice = None

    # --- attaching -----------------------------------------------------------------------------------------------

    def attach(self, model: PreTrainedModel) -> Self:
        """Steer every `generate()` of a model, before all other processors.

        Args:
            model: The base.

        Returns:
            Itself, so that `with processor.attach(model):` detaches at the end.

        Raises:
            InputError: If the processor is attached already, or the model is steered already.
            VocabularyMismatchError: If the model's ids stand for other tokens than the companions'.
            UnsupportedModelError: If the model fails the self-test, or is an encoder-decoder.

        Warns:
            VocabularyWarning: If there was no tokenizer to compare by.
            SteeringWarning: If the expert ends its texts with tokens that the model does not end at, or a companion is
                larger than the model. Later, once: if the model is asked for a whole text's logits outside
                `generate()`, which nothing steers.
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
                got="a composed model" if composed else "a model with another processor attached",
                remedy="Shifts would add up. Detach the other one, or attach to the base.",
            )
        if getattr(target.config, "is_encoder_decoder", False):
            raise UnsupportedModelError.of(
                "attach",
                expected="a decoder-only model, whose whole text is in the ids that companions read",
                got=f"a {type(target).__name__}, an encoder-decoder: the source is not among them",
                remedy="Compose three encoder-decoders with proxytune.wrap.",
            )
        found = self._found_tokenizers
        if self._check_vocabulary:
            found = check_vocabularies({"base": reference_of(model, below=True), **self._references}, self._tokenizers)
        base = examined_base(target) if self._self_test else None
        companions = {m.role: m.model for m in self._members}
        warn_of_size(model, companions, self.formula)
        usable = min(embedding_rows(target), *(m.rows for m in self._members))
        ends = stopping_ids(target.generation_config.eos_token_id, companions["expert"], self.end_tokens, found, usable)
        stops = () if ends is None else (MethodHook(target, "_prepare_generation_config", StoppingIds(target, ends)),)
        drafts = partial(drafts_refused, Ensemble.of(target).switches)
        notice = ScoringNotice(model, target)
        self._hooks = (
            *stops,
            MethodHook(target, "_get_logits_processor", SteeredProcessors(self, target, base)),
            MethodHook(target, "_get_candidate_generator", drafts),
            *batching_refused(target),
            MethodHook(target, "prepare_inputs_for_generation", CompanionPrefetch(self, notice)),
        )
        self._notice = notice
        return self


def _refuse_three_members(alpha: Any) -> None:
    """Refuse a member in the place of α: the base, expert and antiexpert were passed, in that order."""
    named = isinstance(alpha, str) and not alpha.strip("+-.").replace(".", "").isdigit()
    if named or isinstance(alpha, os.PathLike | torch.nn.Module):
        raise InputError.of(
            "alpha",
            expected="a finite number after the expert and the antiexpert",
            got=f"a {type(alpha).__name__}" if isinstance(alpha, torch.nn.Module) else repr(str(alpha)),
            remedy="Call ProxyTuningLogitsProcessor(expert, antiexpert, alpha); the base goes to attach().",
        )
