"""One causal LM of the composition: which models are supported, and one forward pass over a span of tokens.

The composed model passes a view of its composite cache, other callers a cache of the member's own. Nothing here knows
formulas.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import CompileConfig, PreTrainedModel
from transformers.cache_utils import Cache, StaticCache
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
)

from proxytune.costs.devices import Work, machine_of
from proxytune.costs.model_size import pass_work
from proxytune.errors import CacheError, InputError, NumericalError, UnsupportedModeError, UnsupportedModelError
from proxytune.models.members.adapter_state import AdapterState, check_adapter_state, running_as, switched
from proxytune.models.members.cache_name import CACHE, argument_of
from proxytune.models.members.compiled_step import CompiledStep
from proxytune.models.members.embedding_table import device_of, embedding_rows
from proxytune.models.members.innermost import innermost
from proxytune.models.members.layer_kinds import ABLE, STATES, kinds_of, lacking, refuse_lacking
from proxytune.models.members.long_rope import switch_of
from proxytune.models.members.own_cache import in_own_class, own_class_of
from proxytune.models.members.packed import packed_as
from proxytune.models.members.ragged_static import hindrance_of, ragged_pass, rows_of
from proxytune.models.members.rewind import length_of, rewindable_layers
from proxytune.models.members.self_test import UNTESTED, static_fault, verdict_of
from proxytune.models.members.self_test_passes import Verdict, prepared_inputs
from proxytune.models.members.stateful_pass import StatefulPass, kept_logits
from proxytune.models.members.whole_text import config_of_text, logits_of_text, reads_whole_text, warn_of_cost
from proxytune.validation import shown

__all__ = ["Member", "check_ids", "is_left_padded", "positions_of", "refuse_no_numbers"]


def _refuse_unsupported(model: PreTrainedModel, role: str, encoder_decoder: bool) -> None:
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


class Member:
    """A causal LM with a role in the composition.

    Attributes:
        role: `"base"`, or a companion's, such as `"expert"`.
        roles: All the roles that it plays: those that are the same model, prompt and adapter state.
        model: The causal LM.
        adapter: The state of its adapters: None as it is, False all off, or a name.
        own_prompt: Whether it reads a prompt of its own.
        rows: How many ids it can embed.
        context: The maximum number of positions; None if its config names none.
        switch: Beyond how many tokens a long-rope model has other frequencies; None for other models.
        token_forwards: Rows × tokens that it has run over so far.
        passes: Forward passes that it has made so far.
        step: Its compiled decode step; None if all passes run uncompiled.
        stateful: Whether some of its layers keep a state of all tokens (recurrent and hybrid models).
        config: What its caches are made by: the model's text config, or one for its ids (`whole_text`).
        whole_text: Why each pass reads the whole text (`proxytune.models.members.whole_text`); None if a cache serves.
        verdict: What the self-test found; nothing before `examine`.
        cache_name: What its forward calls the cache.
        takes_positions: Whether it can be told positions.
        takes_logits_to_keep: Whether it can leave out the logits of positions.
    """

    encoder_decoder = False

    def __init__(
        self,
        model: PreTrainedModel,
        role: str,
        *,
        adapter: AdapterState = None,
        own_prompt: bool = False,
    ) -> None:
        """Check that the model can take part.

        Args:
            model: A decoder-only causal LM of transformers, or a PEFT model around one.
            role: Its role, for messages.
            adapter: The state of its adapters: None as it is, False all off, or a name.
            own_prompt: Whether it reads a prompt of its own.

        Raises:
            InputError: If it has no such adapter.
            UnsupportedModelError: If it is an encoder-decoder, has layers of a kind that is not known, or cannot run
                without its adapters.

        Warns:
            SteeringWarning: If no cache serves it, so that each pass reads the whole text.
        """
        _refuse_unsupported(model, role, self.encoder_decoder)
        check_adapter_state(model, adapter, role)
        self.role = role
        self.roles: tuple[str, ...] = (role,)
        self.model = model
        self.adapter = adapter
        self.own_prompt = own_prompt
        self.rows = embedding_rows(model)
        text_config = model.config.get_text_config(decoder=True)
        self.context: int | None = getattr(text_config, "max_position_embeddings", None)
        self.switch = switch_of(model)
        self.whole_text = reads_whole_text(model)
        self.config = text_config if self.whole_text is None else config_of_text(text_config)
        if self.whole_text is not None:
            warn_of_cost(model, role, self.whole_text)
        self.stateful = bool(kinds_of(self.config) & STATES)
        self._cannot_pad = lacking(self.config, "pad")
        self.token_forwards = 0
        self.passes = 0
        self.step: CompiledStep | None = None
        inner = innermost(model)
        known = type(inner).__module__.startswith("transformers.") and getattr(inner, "hf_quantizer", None) is None
        serves = not (self.encoder_decoder or self.stateful or self.whole_text is not None)
        self._by_rows = known and serves and packed_as(model) is None
        self._work: Work | None = None
        self.verdict: Verdict = UNTESTED
        self._examined = False
        self.cache_name = argument_of(model) or CACHE
        self._own_cache = own_class_of(model)
        parameters = inspect.signature(innermost(model).forward).parameters
        self.takes_positions = "position_ids" in parameters and self.whole_text is None
        self.takes_logits_to_keep = "logits_to_keep" in parameters
        # Some count positions after a cache as in their last text with images, unless they are told.
        self._keeps_offsets = any(hasattr(module, "rope_deltas") for module in innermost(model).modules())

    @property
    def joins(self) -> bool:
        """Whether rows of other members of the same model may be in its passes, and change nothing but rounding."""
        return self._by_rows and self.step is None and self._own_cache is None

    @property
    def steps_plainly(self) -> bool:
        """Whether a pass over one token, after a text that was read, is one call of the model with nothing around it.

        So it is without states, without another prompt, and where padding needs no check.
        """
        whole = self.whole_text is not None or self.encoder_decoder or self.own_prompt
        padding = self.verdict.padding is not None or bool(self._cannot_pad)
        apart = self.step is not None or self._own_cache is not None or self._keeps_offsets or self.switch is not None
        return not (whole or self.stateful or padding or apart or switched(self.model, self.adapter))

    @property
    def stands_alone(self) -> str | None:
        """Why its decode step cannot be in one graph with those of others, in words; None if it can."""
        if self.step is None:
            return "which is not compiled"
        if self.stateful or self.whole_text is not None:
            return f"a {self._name()}, which keeps a state, or reads the whole text"
        if self._own_cache is not None or self.cache_name != CACHE:
            return f"a {self._name()}, which takes a cache of its own kind or name"
        if self.switch is not None:
            return f"a {self._name()}, whose frequencies depend on the length of the text"
        return "whose positions go on from those of its last images" if self._keeps_offsets else None

    @property
    def device(self) -> torch.device:
        """The device of its inputs (the first one, if the model is spread over several)."""
        return device_of(self.model)

    def compile_step(self, config: CompileConfig | None) -> None:
        """Compile the decode step, or undo it with None.

        Raises:
            UnsupportedModelError: If the model is offloaded, or quantized in a way that cannot be compiled.
        """
        places = {str(place) for place in (getattr(self.model, "hf_device_map", None) or {}).values()}
        away = places & {"cpu", "disk"} if len(places) > 1 else places & {"disk"}
        quantizer = getattr(self.model, "hf_quantizer", None)
        if config is not None and (away or not getattr(quantizer, "is_compileable", True)):
            raise UnsupportedModelError.of(
                f"the {self.role}",
                expected="a model that can be compiled",
                got=f"layers on the {', '.join(sorted(away))}" if away else type(quantizer).__name__,
                remedy="Leave it out: compile_members(roles=[…]).",
            )
        if config is not None and self.adapter is not None:
            raise UnsupportedModelError.of(
                f"the {self.role}",
                expected="a model that is compiled as it is",
                got=f"one whose adapters are switched for each pass (adapter={self.adapter!r})",
                remedy="Leave it out: compile_members(roles=[…]).",
            )
        self.step = None if config is None else CompiledStep(self.model, config)

    def examine(self) -> None:
        """Test whether the model is right by itself (`proxytune.models.members.self_test`), once per process.

        Raises:
            UnsupportedModelError: If it depends on later tokens, or continues its cache differently.
        """
        self.verdict, self._examined = verdict_of(self.model, self.takes_positions), True
        if self.whole_text is not None and self.verdict is UNTESTED and self.device.type != "meta":
            raise UnsupportedModelError.of(
                f"the {self.role}",
                expected="a model that takes a cache of transformers, or can be run on ids alone",
                got=f"a {self._name()} that {self.whole_text}, and cannot",
                remedy="Use another model in this role.",
            )
        self.takes_positions = self.takes_positions and self.verdict.counts
        if self.verdict.cache is not None:
            raise UnsupportedModelError.of(
                f"the {self.role}",
                expected="a causal LM, whose results do not depend on later tokens or on its cache",
                got=f"a {self._name()} with {self.verdict.cache}",
                remedy="If it is an encoder, load it as a decoder (is_decoder=True). self_test=False skips this check.",
            )

    def _name(self) -> str:
        return f"{type(self.model).__name__} ({getattr(self.model.config, 'model_type', '')})"

    def read_rightly(self, generation_config: Any, attention_mask: torch.Tensor | None) -> None:
        """Have a `generate()` of the model itself read a prompt at once, if it goes on wrongly in chunks.

        So do models that continue a cache wrongly with several tokens, and recurrent ones in padding `[B, T]`.
        """
        padded = self.stateful and attention_mask is not None and not bool((attention_mask != 0).all())
        lengthless = kinds_of(self.config) <= {"linear_attention", "conv"}  # generate() asks the cache for its length
        if self.verdict.several or padded or lengthless:
            generation_config.prefill_chunk_size = None

    def refuse_gaps(self, attention_mask: torch.Tensor | None) -> None:
        """Raise UnsupportedModeError for padding inside a text `[B, T]`, if the model has a state that it changes.

        Waits for the device, for such models only.
        """
        if not self.stateful or attention_mask is None:
            return
        there = attention_mask != 0
        inside = ~there & (there.long().cumsum(1) > 0) & (there.flip(1).long().cumsum(1).flip(1) > 0)
        if bool(inside.any()):
            raise UnsupportedModeError.of(
                f"padding inside a text for the {self.role}",
                expected="padding before a text: a recurrent layer forgets a little with each token, also of padding",
                got=f"a {self._name()}, and padding between tokens in row {int(inside.any(1).int().argmax())}",
                remedy="Pad the whole text at the left; if the padding token is text here, pass attention_mask.",
            )

    def refuse_padding(self, attention_mask: torch.Tensor | None) -> None:
        """Raise UnsupportedModeError for padding before tokens, if the self-test saw that the model is wrong there."""
        # Waits for the device, for such models only.
        strange = self._cannot_pad
        if attention_mask is None or (self.verdict.padding is None and not strange):
            return
        if is_left_padded(attention_mask):
            raise UnsupportedModeError.of(
                f"left padding for the {self.role}",
                expected="a member that tells padding from text by its mask",
                got=f"a {self._name()} with {_grouping(strange) if strange else self.verdict.padding}",
                remedy="Pass prompts of the same length, or one at a time.",
            )

    def refuse_positions(self, position_ids: torch.Tensor, mask: torch.Tensor) -> None:
        """Raise InputError for positions other than those of the mask `[B, past + N]`, if the model cannot be told any.

        Padding may have any position. Waits for the device, for such models only.
        """
        if self.takes_positions and (not self.stateful or position_ids.ndim != 2):
            return
        new = position_ids.shape[-1]
        there, given = mask[:, -new:] != 0, position_ids.to(mask.device)
        if self.takes_positions:  # from any place on, but not for another text, which would begin at the old state
            wrong = (given.diff(dim=-1) != 1) & there[:, 1:] & there[:, :-1]
        else:
            wrong = (given != positions_of(mask)[:, -new:]) & there
        if bool(wrong.any()):
            stands = "keeps one state of all tokens" if self.takes_positions else "counts positions by itself"
            raise InputError.of(
                f"position_ids for the {self.role}",
                expected=f"none, or 0, 1, 2, … without padding: a {self._name()} {stands}",
                got=shown(position_ids.tolist(), 80),
                remedy="Leave them out; give packed texts as rows; or use a member that takes positions.",
            )

    def refuse_moved_rows(self) -> None:
        """Raise UnsupportedModeError if rows of the model's cache cannot be moved, by its layers or the self-test."""
        refuse_lacking(
            [self],
            "move",
            "speculation in a batch",
            expected="members that keep something for each token, so that rows may accept different numbers of drafts",
            remedy="Pass one prompt at a time (num_return_sequences=1; --batch-size 1 on the command line), or decode "
            "without speculation.",
        )
        if self.verdict.moved is not None:
            raise UnsupportedModeError.of(
                f"speculation in a batch for the {self.role}",
                expected="a member that can be told the positions of rows that accept different numbers of tokens",
                got=f"a {self._name()} with {self.verdict.moved}",
                remedy="Pass one prompt at a time, or decode without speculation.",
            )

    def refuse_static_layers(self) -> None:
        """Raise UnsupportedModeError if the model can have no static cache."""
        expected, remedy = "layers that keep their size from the start", "Leave out cache_implementation."
        refuse_lacking([self], "static", "a static cache", expected=expected, remedy=remedy)
        if self.whole_text is not None:
            raise UnsupportedModeError.of(
                f"a static cache for the {self.role}",
                expected=expected,
                got=f"a {self._name()} that {self.whole_text}",
                remedy=remedy,
            )

    def refuse_static_cache(self, length: int) -> None:
        """Test an examined model on a static cache of `length`; UnsupportedModeError if it is wrong there."""
        if not self._examined or (fault := static_fault(self.model, self.takes_positions, length)) is None:
            return
        raise UnsupportedModeError.of(
            f"a static cache for the {self.role}",
            expected="a member that is right on a static cache",
            got=f"a {self._name()} with {fault}",
            remedy="Leave out cache_implementation, or pass no StaticCache.",
        )

    def refuse_ragged_cache(self, cache: Cache) -> None:
        """Raise CacheError if rows of its static cache, that is filled or empty, cannot differ in length."""
        why = hindrance_of(self.model, cache)
        if self.stateful or self.whole_text is not None or self._own_cache is not None or self.cache_name != CACHE:
            why = "what it keeps is not in a static cache"
        elif not self.takes_positions:
            why = "it counts positions by itself"
        why = why or static_fault(self.model, True, cache.get_max_length(), ragged=True)
        if why is not None:
            raise CacheError.of(
                CACHE,
                expected="a DynamicCache, or a static one in which rows may keep different numbers of drafts",
                got=f"a {type(cache).__name__}, and a {self._name()} as the {self.role}: {why}",
                remedy="Leave out cache_implementation.",
            )

    def refuse_length(self, length: int) -> None:
        """Raise InputError if `length` tokens exceed the model's context."""
        if self.context is not None and length > self.context:
            raise InputError.of(
                f"length for the {self.role}",
                expected=f"at most {self.context} tokens (max_position_embeddings of {type(self.model).__name__})",
                got=f"{length}",
                remedy="Shorten the prompt, lower max_new_tokens, or use a member with a longer context.",
            )

    def forward(
        self,
        input_ids: torch.Tensor,
        *,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        cache: Cache | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        latent: Mapping[str, Any] | None = None,
    ) -> torch.Tensor:
        """Run the model over the tokens that follow its cache.

        Args:
            input_ids: `[B, N]`, int64, only tokens that the cache does not hold yet.
            attention_mask: `[B, past + N]`, 1 for tokens and 0 for padding; None if there is no padding.
            position_ids: `[B, N]` or `[1, N]`; None for the model's default, 0, 1, 2, … after the cache.
            cache: The model's own cache (or view), extended in place; None to run without.
            logits_to_keep: The number of last positions to keep (0: all), or a tensor of positions.
            latent: Inputs in place of the ids, `[B, N, …]` each (see `proxytune.methods.latent.embedding`), or the
                model's own arguments, which come before those given here; None for the ids.

        Returns:
            Raw logits `[B, K, V]` in the model's dtype, on the model's device.

        Raises:
            InputError: If the sequence is longer than the model's context.
        """
        fresh = self.adapter is not None and (cache is None or int(length_of(cache)) == 0)
        with running_as(self.model, self.adapter, fresh=fresh):
            return self.run(
                input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                cache=cache,
                logits_to_keep=logits_to_keep,
                latent=latent,
            )

    def run(
        self,
        input_ids: torch.Tensor,
        *,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        cache: Cache | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        latent: Mapping[str, Any] | None = None,
    ) -> torch.Tensor:
        """`forward` with the adapters as they are set now."""
        n = input_ids.shape[1]
        past = length_of(cache) if cache is not None else 0
        # A static cache has its length on the device; reading it would make the host wait in every step.
        self.refuse_length(n + (past if isinstance(past, int) else 0))
        device = self.device
        if position_ids is None and self.stateful and cache is not None:
            # Bamba counts from 0 in each pass, since it asks a layer for its length that has none.
            position_ids = torch.arange(int(past), int(past) + n, device=device)[None]

        def here(t: torch.Tensor | None) -> torch.Tensor | None:
            # A non-blocking copy is safe only towards a GPU, see `proxytune.formulas.shift.shift`.
            return None if t is None else t.to(device, non_blocking=device.type != "cpu")

        if position_ids is None and self._keeps_offsets:
            position_ids = torch.arange(n, device=input_ids.device)[None] + past
        given = {"input_ids": here(input_ids), "attention_mask": here(attention_mask)}
        if position_ids is not None and self.takes_positions:
            given["position_ids"] = here(position_ids)
        fed = None if latent is None else {k: here(x) if isinstance(x, torch.Tensor) else x for k, x in latent.items()}
        if self.whole_text is not None:
            logits, read = logits_of_text(self.model, input_ids.to(device), given["attention_mask"], cache)
            self.token_forwards += read
            self.passes += 1
            return kept_logits(logits, logits_to_keep)
        if not (layers := rewindable_layers(cache)):
            return self._pass(given, cache, logits_to_keep, fed)
        assert cache is not None
        return self._with_states(cache, layers)(given, logits_to_keep, fed)

    def catch_up(self, cache: Cache, attention_mask: torch.Tensor | None) -> None:
        """Read what the states of a cache still lack after a crop; the mask `[B, length]` covers all its tokens."""
        if layers := rewindable_layers(cache):
            mask = None if attention_mask is None else attention_mask.to(self.device)
            with running_as(self.model, self.adapter):
                self._with_states(cache, layers).catch_up(mask)

    def _with_states(self, cache: Cache, layers: list[Any]) -> StatefulPass:
        one_by_one = self.stateful and (self.verdict.several or self.verdict is UNTESTED)
        return StatefulPass(self._pass, cache, layers, one_by_one=one_by_one, seconds=self._seconds)

    def _seconds(self, rows: int, positions: int) -> float:
        if self._work is None:
            self._work = pass_work(self.model)
        return machine_of(self.device.type).seconds(self._work, rows, positions)

    def _pass(
        self,
        given: dict[str, Any],
        cache: Cache | None,
        logits_to_keep: int | torch.Tensor,
        latent: Mapping[str, Any] | None,
    ) -> torch.Tensor:
        """One pass over `given`, ids, mask and perhaps positions on the model's device; arguments as in `forward`."""
        rows, n = given["input_ids"].shape
        if not torch.compiler.is_compiling():
            self.token_forwards += rows * n
            self.passes += 1
        if (where := rows_of(cache)) is not None:
            assert cache is not None
            told = {name: given[name] for name in ("input_ids", "position_ids")}
            if self.step is not None and not torch.is_grad_enabled():
                return self.step.ragged(told, cache, where)
            return ragged_pass(self.model, told, cache, where)
        if self.step is not None and not self._own_cache and CompiledStep.serves(n, cache, logits_to_keep, latent):
            assert cache is not None
            return self.step({"position_ids": None, **given} if self.takes_positions else given, cache)

        kwargs: dict[str, Any] = {**given, "use_cache": cache is not None}
        if cache is not None:
            cache = cache if self._own_cache is None else in_own_class(cache, self._own_cache)
            kwargs[self.cache_name] = cache
            if self.stateful or isinstance(cache, StaticCache):
                kwargs = prepared_inputs(self.model, kwargs, cache)
        if self.takes_logits_to_keep:
            kwargs["logits_to_keep"] = logits_to_keep
        if latent is not None:
            del kwargs["input_ids"]
            kwargs |= latent
        logits: torch.Tensor = self.model(**kwargs, return_dict=True).logits  # [B, K, V]
        return logits if self.takes_logits_to_keep else kept_logits(logits, logits_to_keep)


def _grouping(kinds: list[str]) -> str:
    return f"{', '.join(kinds)} layers, which group tokens by their column in the cache"


def is_left_padded(attention_mask: torch.Tensor) -> bool:
    """Whether some row of a mask `[B, T]` has padding before a token. Waits for the device."""
    there = attention_mask != 0
    return bool((there[:, 1:] > there[:, :-1]).any())


def positions_of(attention_mask: torch.Tensor) -> torch.Tensor:
    """Each token's position in its row, padding not counted: `[B, T]`, int64, from a mask `[B, T]`; 0 on padding."""
    return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)


def check_ids(
    input_ids: torch.Tensor, members: Sequence[Member], rows: Sequence[int] | None = None, name: str = "input_ids"
) -> None:
    """Raise InputError if a prompt `[B, T]` is empty or has ids that some member cannot embed.

    `rows` is how many ids each can embed [its `rows`], `name` what the ids are called. Waits for the device: call it
    for prompts, not in every step.
    """
    if input_ids.numel() == 0:
        raise InputError.of(
            name,
            expected="a prompt of at least one token",
            got=f"shape {list(input_ids.shape)}",
            remedy="Start from the BOS token, or any text.",
        )
    most, least = min(zip(rows or [m.rows for m in members], members, strict=True), key=lambda pair: pair[0])
    low, high = (int(x) for x in torch.aminmax(input_ids))
    if low < 0 or high >= most:
        bad = low if low < 0 else high
        raise InputError.of(
            name,
            expected=f"ids from 0 to {most - 1}, which every member can embed",
            got=f"id {bad}, which the {least.role} ({most} embedding rows) has no embedding for",
            remedy="Use the tokenizer that all members share, without tokens added for one of them.",
        )


def refuse_no_numbers(logits: torch.Tensor, whose: str) -> None:
    """Raise NumericalError if a row of logits `[B, V]` holds NaN or +inf, or −inf only. Waits for the device."""
    wrong = [not math.isfinite(top) for top in logits.amax(-1).tolist()]  # NaN if any is
    if any(wrong):
        row = wrong.index(True)
        raise NumericalError.of(
            f"row {row} of {len(logits)}",
            expected="logits of which a token can be drawn",
            got=f"NaN or +inf among {whose}, or −inf for every token",
            remedy="Run the members in bfloat16 or float32 rather than float16, and look at each one's own logits for "
            "this text (model.member_logits). remove_invalid_values=True goes on with finite values, unless a "
            "processor was handed over.",
        )
