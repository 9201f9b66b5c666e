"""The composed model: a `PreTrainedModel` whose logits are the combined logits of its members.

Its `forward` is in `proxytune.models.combined_forward`; what else transformers asks of a model is in
`proxytune.models.generation_mixin`.
"""

from __future__ import annotations

import uuid
from collections.abc import Collection, Mapping
from typing import Any, Self

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    CompileConfig,
    GenerationConfig,
    PreTrainedModel,
)

from proxytune.errors import InputError
from proxytune.formulas.base import Formula
from proxytune.formulas.checks import check_formula
from proxytune.formulas.view import View
from proxytune.models.cast import cast
from proxytune.models.combined_forward import CombinedForwardMixin
from proxytune.models.config import ProxyTunedConfig
from proxytune.models.encoder_decoder import EncoderDecoderMixin
from proxytune.models.generation_mixin import ComposedGenerationMixin
from proxytune.models.kept_cache import KeptCache
from proxytune.models.loading import refuse_composed
from proxytune.models.members.adapter_state import runs_as
from proxytune.models.members.cpu_threads import SideThread
from proxytune.models.members.cuda_streams import CompanionStreams
from proxytune.models.members.decode_step import Steps
from proxytune.models.members.encoder_decoder import EncoderDecoderMember
from proxytune.models.members.fingerprint import Fingerprint
from proxytune.models.members.gated_step import GatedStep
from proxytune.models.members.innermost import innermost
from proxytune.models.members.joint_step import JointStep
from proxytune.models.members.masks import positions_of
from proxytune.models.members.member import Member
from proxytune.models.members.text_checks import check_ids
from proxytune.models.own_prompts import roles_with_prompts
from proxytune.models.references import adapters_of
from proxytune.models.roles import refuse_folded, refuse_no_shift, refuse_taken_names, warn_of_roles
from proxytune.models.saved_as_recipe import SavedAsRecipe
from proxytune.models.weighing import Weighing
from proxytune.recipe import ROLES

__all__ = ["ProxyTunedConfig", "ProxyTunedModel"]


class ProxyTunedModel(SavedAsRecipe, CombinedForwardMixin, ComposedGenerationMixin, PreTrainedModel):
    """Base, expert and antiexpert as one causal LM, made by `proxytune.wrap` or `from_pretrained`.

    `forward` returns `z_base + α (z_expert − z_antiexpert)` in float32 (arXiv 2401.08565), so every mode of
    `generate()`, pipelines and log-likelihood scoring work as with any model. One cache holds all members' layers.
    Ids that some member cannot embed (at the tail of a padded head) get −inf, so they are never sampled.

    Attributes:
        base: The large frozen model.
        expert: The small tuned model.
        antiexpert: The small model that the expert was tuned from.
        formula: The formula with its α.
        views: Role → view, of the roles that are another's model once more.
        overlap: Whether companions on a GPU run on CUDA streams beside the base's [True]; no effect on a CPU.
        split_threads: Whether companions on a CPU run in a second thread beside the base, each on half of torch's
            threads [False]. It can be faster for large members; measure.
    """

    base: PreTrainedModel
    expert: PreTrainedModel
    antiexpert: PreTrainedModel
    formula: Formula
    views: dict[str, View]
    _index: dict[str, int]
    weighing: Weighing

    config_class = ProxyTunedConfig
    base_model_prefix = ""
    main_input_name = "input_ids"
    # Each member checked these when it was loaded; transformers must not refuse them here.
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = _supports_attention_backend = True
    # Keeps generate() from compiling this forward on static caches; `compile_members` compiles the members instead.
    _can_compile_fullgraph = False

    _member_class: type[Member] = Member

    accepts_loss_kwargs = False  # a trainer then passes no `num_items_in_batch`

    def __new__(cls, config: Any = None, members: Mapping[str, Any] | None = None, *args: Any, **kwargs: Any) -> Self:
        """A model of the class that composes such members: encoder-decoders have one of their own."""
        base = next(iter((members or {}).values()), None)
        if cls is ProxyTunedModel and getattr(getattr(base, "config", None), "is_encoder_decoder", False):
            return super().__new__(ProxyTunedEncoderDecoder)
        return super().__new__(cls)

    def __init__(
        self,
        config: ProxyTunedConfig,
        members: Mapping[str, PreTrainedModel],
        formula: Formula,
        *,
        views: Mapping[str, View] | None = None,
        self_test: bool = True,
    ) -> None:
        """Compose the members. Use `wrap` or `from_pretrained` instead of calling this.

        Args:
            config: A config; it is bound to the members here.
            members: Role → model, the base first. They are put in evaluation mode.
            formula: The formula.
            views: Role → view, of the roles that are another's model once more.
            self_test: Whether to test that each member is right by itself (see `wrap`).

        Raises:
            MemberError: If a member is composed already, cannot take part (see `Member`), or fails the self-test;
                or if expert and antiexpert are the same.

        Warns:
            SteeringWarning: If the roles look wrong (see `wrap`).
        """
        for role, model in members.items():
            refuse_composed(model, role)
        parts, index = cast(members, views or {}, ("base", *formula.roles))
        wrapped = [self._member_class(p.model, p.role, adapter=p.adapter, own_prompt=p.own_prompt) for p in parts]
        for i, member in enumerate(wrapped):
            member.roles = tuple(role for role, at in index.items() if at == i)
        roles = {role: parts[i].model for role, i in index.items()}
        if not views and roles.keys() >= {"expert", "antiexpert"}:
            refuse_no_shift(roles["expert"], roles["antiexpert"], formula)
        alike = [(id(innermost(p.model)), runs_as(p.model, p.adapter), p.own_prompt and p.role) for p in parts]
        refuse_folded(roles, {role: alike.index(alike[i]) for role, i in index.items()}, formula)
        config.bind([member.config for member in wrapped])
        config.is_encoder_decoder = self._member_class.encoder_decoder
        # Harnesses look there for a tokenizer; `from_pretrained` puts the recipe's place in.
        config.name_or_path = getattr(members["base"].config, "name_or_path", "") or ""
        config._attn_implementation = getattr(members["base"].config, "_attn_implementation", None)
        super().__init__(config)
        refuse_taken_names(self, roles)
        for role, model in roles.items():
            setattr(self, role, model.eval())
        if self_test:
            # The smallest first: the others share its verdict, if they are of its kind.
            for member in sorted(wrapped, key=lambda m: m.model.num_parameters()):
                member.examine()
        if not views:
            warn_of_roles(roles, formula)
        self._index = index
        self.views = {role: view for role, view in (views or {}).items() if role in index}
        self.formula = formula
        self.overlap = True
        self.split_threads = False
        self.members = wrapped
        self._joint: JointStep | None = None
        self._gated: GatedStep | None = None
        self._kept = KeptCache()
        self._sides = CompanionStreams()
        self._steps = Steps()
        self._thread = SideThread()
        self._fingerprints: dict[str, Fingerprint] = {}
        self._adapters = {m.role: adapters_of(m.model) for m in wrapped}
        # Marks the caches that this model fills; copies of a cache keep the mark.
        self.cache_owner = uuid.uuid4().hex
        self.generation_config = GenerationConfig.from_dict(self.base.generation_config.to_dict())
        self.eval()

    # --- what the composition is ---------------------------------------------------------------------------------

    @property
    def alpha(self) -> float:
        """Strength α of the shift; can be set to any finite number."""
        return self.formula.alpha

    @alpha.setter
    def alpha(self, value: float) -> None:
        self.formula = self.formula.with_alpha(value)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "formula":
            composed = "members" in self.__dict__  # before, the formula is that which they were composed for
            self.weighing = Weighing(self._checked(value) if composed else value, self._index)
        if name == "gate":
            raise InputError.of(
                name,
                expected="an attribute of the formula",
                got=f"model.gate = {value!r}",
                remedy="Set model.formula = dataclasses.replace(model.formula, gate=…).",
            )
        if name in {*ROLES, *self.__dict__.get("_index", ())} and "members" in self.__dict__:
            raise InputError.of(
                name,
                expected="the member that the model was composed with",
                got=f"a {type(value).__name__}",
                remedy="Caches and checks belong to the members: call proxytune.wrap again.",
            )
        if sorted(name) == sorted("alpha") and name != "alpha":  # letters interchanged
            raise InputError.of(
                name, expected="an attribute of the model", got=f"{name}={value!r}", remedy="Did you mean model.alpha?"
            )
        super().__setattr__(name, value)

    def _checked(self, formula: Any) -> Any:
        """A formula over the roles that the model has."""
        missing = [role for role in check_formula(formula).roles if role not in self._index]
        if missing:
            raise InputError.of(
                "model.formula",
                expected=f"a formula of {', '.join(self._index)}, with which the model was composed",
                got=f"{formula!r}, which has a role {missing[0]!r}",
                remedy="Call proxytune.wrap again.",
            )
        return formula

    @property
    def token_forwards(self) -> dict[str, int]:
        """Role → rows × tokens that the member has run over so far."""
        return {m.role: m.token_forwards for m in self.members}

    @property
    def passes(self) -> dict[str, int]:
        """Role → forward passes that the member has made so far; under a gate, companions make fewer than the base."""
        return {m.role: m.passes for m in self.members}

    def compile_members(self, config: CompileConfig | None = None, *, roles: Collection[str] | None = None) -> None:
        """Compile the decode step for `generate(cache_implementation="static")`: all members in one graph.

        The graph ends in the members' sum; with `FusedDecoding` in the draw, unless a logits processor has to run, or
        scores or logits are returned. Under a gate the companions have a graph of their own, which runs where a row
        asks. With `SpeculativeDecoding` drafts and their verification are graphs. Where a member cannot be in one graph
        with the others (a recurrent one, say), and with some of the `roles` alone, each has a graph of its own.

        This helps where launch overhead, not memory bandwidth, bounds the step: small companions on a fast GPU.
        Prompts and other caches run uncompiled. The first steps after a prompt are slow: they compile, and again for
        another batch size. Compiled members run one after the other, not on streams beside the base.

        Args:
            config: The settings [transformers' own: inductor, `mode="reduce-overhead"`, which is CUDA graphs on a GPU].
            roles: The members to compile [all]; the others run uncompiled, so `roles=()` undoes it.

        Raises:
            InputError: If there is no such member, or `config` is not a `CompileConfig`.
            UnsupportedModelError: If a member is offloaded, or quantized in a way that cannot be compiled.
        """
        chosen = [m.role for m in self.members] if roles is None else list(roles)
        unknown = [role for role in chosen if role not in {m.role for m in self.members}]
        if unknown or isinstance(roles, str) or not isinstance(config, CompileConfig | None):
            raise InputError.of(
                "compile_members",
                expected=f"a CompileConfig, and roles of {', '.join(m.role for m in self.members)}",
                got=repr(roles) if unknown or isinstance(roles, str) else repr(config),
                remedy='Call e.g. compile_members(CompileConfig(mode="reduce-overhead"), roles=["expert"]).',
            )
        settings = config or CompileConfig()
        for member in self.members:
            member.compile_step(settings if member.role in chosen else None)
        whole = all(member.step is not None for member in self.members)
        self._joint, self._gated = (JointStep(settings), GatedStep(settings)) if whole else (None, None)
        self._kept = KeptCache()

    @torch.no_grad()
    def member_logits(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None
    ) -> dict[str, torch.Tensor]:
        """Each member's own logits, without a cache: shows what the shift changed.

        Args:
            input_ids: `[B, T]`, int64.
            attention_mask: `[B, T]`; None if nothing is padded.

        Returns:
            Role → raw logits `[B, T, V_role]`, float32.

        Raises:
            InputError: As `forward`; or if a member reads a prompt of its own, which `input_ids` are not.
        """
        if roles := roles_with_prompts(self.members):
            raise InputError.of(
                "member_logits",
                expected="members that all read the same text",
                got=f"the {roles[0]}, which reads a prompt of its own",
                remedy=f"Ask that model itself: model.{roles[0]}(its_ids).logits.",
            )
        check_ids(input_ids, self.members)
        for member in self.members:
            member.refuse_padding(attention_mask)
        position_ids = None if attention_mask is None else positions_of(attention_mask)
        return {
            m.role: m.forward(input_ids, attention_mask=attention_mask, position_ids=position_ids).float()
            for m in self.members
        }


AutoConfig.register(ProxyTunedConfig.model_type, ProxyTunedConfig, exist_ok=True)


class ProxyTunedEncoderDecoder(EncoderDecoderMixin, ProxyTunedModel):
    """Base, expert and antiexpert as one encoder-decoder: `generate()` takes the source, as with a plain T5 or BART."""

    members: list[EncoderDecoderMember]  # type: ignore[assignment]
    _member_class = EncoderDecoderMember

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.refuse_other_starts()
        self.refuse_own_prompts()


for _auto in (AutoModelForCausalLM, AutoModelForSeq2SeqLM):
    _auto.register(ProxyTunedConfig, ProxyTunedModel, exist_ok=True)
