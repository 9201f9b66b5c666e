"""One causal LM of the composition: what it is, what it can take, and whether it is right by itself.

Its passes are in `proxytune.models.members.member_pass`, what it refuses in `proxytune.models.members.limits`. Nothing
here knows formulas.
"""

from __future__ import annotations

import inspect

from transformers import CompileConfig, PreTrainedModel

from proxytune.costs.devices import Work
from proxytune.errors import UnsupportedModelError
from proxytune.models.members.adapter_state import AdapterState, check_adapter_state, switched
from proxytune.models.members.cache_name import CACHE, argument_of
from proxytune.models.members.compiled_step import CompiledStep, uncompilable
from proxytune.models.members.embedding_table import embedding_rows
from proxytune.models.members.innermost import innermost
from proxytune.models.members.layer_kinds import STATES, kinds_of, lacking
from proxytune.models.members.long_rope import switch_of
from proxytune.models.members.member_pass import MemberForward
from proxytune.models.members.own_cache import own_class_of
from proxytune.models.members.packed import packed_as
from proxytune.models.members.self_test import UNTESTED, verdict_of
from proxytune.models.members.self_test_passes import Verdict
from proxytune.models.members.supported import refuse_unsupported
from proxytune.models.members.whole_text import config_of_text, reads_whole_text, warn_of_cost

__all__ = ["Member"]


class Member(MemberForward):
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
        refuse_unsupported(model, role, self.encoder_decoder)
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

    def compile_step(self, config: CompileConfig | None) -> None:
        """Compile the decode step, or undo it with None.

        Raises:
            UnsupportedModelError: If the model is offloaded, or quantized in a way that cannot be compiled.
        """
        if config is not None and (why := uncompilable(self.model)) is not None:
            raise UnsupportedModelError.of(
                f"the {self.role}",
                expected="a model that can be compiled",
                got=why,
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
