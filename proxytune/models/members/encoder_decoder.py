"""An encoder-decoder (T5, BART, Marian, …) as a member: its encoder runs once, its decoder over what follows a cache.

The pair of caches that transformers keeps for such a model, self-attention and cross-attention, is composite like that
of decoder-only members: one pair holds all members' layers, and each member sees a view of both.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import CompileConfig, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, EncoderDecoderCache
from transformers.modeling_outputs import BaseModelOutput

from proxytune.errors import CacheError, InputError, UnsupportedModeError, UnsupportedModelError
from proxytune.models.members.adapter_state import running_as
from proxytune.models.members.cache_name import CACHE
from proxytune.models.members.composite_cache import adopt, cached_layers, decoder_config, is_owned
from proxytune.models.members.embedding_table import rows_of
from proxytune.models.members.innermost import innermost
from proxytune.models.members.masks import is_left_padded
from proxytune.models.members.member import Member
from proxytune.models.members.self_test import verdict_of

__all__ = ["EncoderDecoderMember", "adopt_pair", "start_of"]


@dataclass
class _States(BaseModelOutput):
    """An encoder's states, for any decoder: those of mixtures of experts look for the routers' logits beside them."""

    router_logits: tuple[torch.Tensor, ...] | None = None


def start_of(model: Any) -> int | None:
    """The token that a model's decoder starts with; None if neither its generation config nor its config tells."""
    places = (getattr(model, "generation_config", None), model.config)
    found = (getattr(place, name, None) for name in ("decoder_start_token_id", "bos_token_id") for place in places)
    return next((int(token) for token in found if isinstance(token, int)), None)


class EncoderDecoderMember(Member):
    """An encoder-decoder with a role in the composition.

    Attributes:
        encoder_rows: How many ids its encoder can embed; `rows` are its decoder's.
        encoder_context: The maximum number of tokens of a source; None if its config names none.
    """

    encoder_decoder = True

    def __init__(self, model: PreTrainedModel, role: str, **state: Any) -> None:
        """Check that the model can take part; arguments as for `Member`.

        Raises:
            UnsupportedModelError: If it is decoder-only, takes no cache, or reads other than text.
        """
        super().__init__(model, role, **state)
        inner = innermost(model)
        if self.whole_text is not None:
            raise UnsupportedModelError.of(
                f"the {role}",
                expected="an encoder-decoder that a cache serves",
                got=f"a {self._name()} that {self.whole_text}",
                remedy="Use a model of another family.",
            )
        reads = getattr(inner.get_encoder(), "main_input_name", "input_ids")
        if reads != "input_ids":
            raise UnsupportedModelError.of(
                f"the {role}",
                expected="an encoder-decoder that reads the token ids of a source",
                got=f"a {self._name()} that reads {reads}",
                remedy="Use a text-to-text model.",
            )
        self.takes_positions = False
        self.config = decoder_config(model.config)
        self.encoder_rows, self.rows = (_rows(part, self.rows) for part in (inner.get_encoder(), inner.get_decoder()))
        config = inner.config
        # LongT5 sums up blocks of its columns; a self-test would need a source of several blocks.
        blocks = getattr(config, "encoder_attention_type", None) == "transient-global"
        self._grouping = "transient-global attention, which groups tokens by their column" if blocks else None
        sides = (getattr(config, side, config) for side in ("encoder", "decoder"))
        self.encoder_context, self.context = map(_context, sides, ("encoder", "decoder"))

    def compile_step(self, config: CompileConfig | None) -> None:
        """Raise UnsupportedModelError, unless it is to be undone: there are no static caches of encoder-decoders."""
        if config is not None:
            raise UnsupportedModelError.of(
                f"the {self.role}",
                expected="a decoder-only model: compiled steps run over a static cache",
                got=f"a {self._name()}, an encoder-decoder",
                remedy="Leave out compile_members().",
            )

    def examine(self) -> None:
        """Test whether the model is right by itself, once per process; UnsupportedModelError if it is not, cached."""
        self.verdict = verdict_of(self.model, False)
        if self.verdict.cache is not None:
            raise UnsupportedModelError.of(
                f"the {self.role}",
                expected="an encoder-decoder whose results do not depend on its cache",
                got=f"a {self._name()} with {self.verdict.cache}",
                remedy="Use a model of another family. self_test=False skips this check.",
            )

    def refuse_padding(self, attention_mask: torch.Tensor | None) -> None:
        """Raise UnsupportedModeError for a padded source `[B, S]`, if the self-test saw that the model is wrong there.

        Waits for the device, for such models only.
        """
        always, left = self.verdict.right, self._grouping or self.verdict.padding
        if attention_mask is None or not (always or left):
            return
        there = attention_mask != 0
        if always and not bool(there.all()):
            left = None
        elif left and is_left_padded(attention_mask):
            always = None
        else:
            return
        raise UnsupportedModeError.of(
            f"{'left ' if left else ''}padding for the {self.role}",
            expected="a member that tells padding from text by its mask",
            got=f"a {self._name()} with {left or always}",
            remedy='Pad sources at the right (tokenizer.padding_side = "right"), or pass one at a time.'
            if left
            else "Pass sources of the same length, or one at a time.",
        )

    def encode(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
        """Run the encoder over sources `[B, S]`: its states `[B, S, H]`, on its device.

        Raises:
            InputError: If the sources are longer than its context.
        """
        length = input_ids.shape[1]
        if self.encoder_context is not None and length > self.encoder_context:
            raise InputError.of(
                f"length for the encoder of the {self.role}",
                expected=f"at most {self.encoder_context} tokens, the context of its {type(self.model).__name__}",
                got=f"{length}",
                remedy="Shorten the source, or use a member with a longer context.",
            )
        self.token_forwards += input_ids.numel()
        self.passes += 1
        mask = None if attention_mask is None else attention_mask.to(self.device)
        encoder: Any = self.model.get_encoder()
        with running_as(self.model, self.adapter):
            states: torch.Tensor = encoder(input_ids=input_ids.to(self.device), attention_mask=mask, return_dict=True)[
                0
            ]
        return states

    def forward(
        self,
        input_ids: torch.Tensor,
        *,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        cache: Cache | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        latent: Mapping[str, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """Run the decoder over the tokens that follow its cache.

        Args:
            input_ids: `[B, N]`, int64: the decoder's tokens that the cache does not hold yet.
            attention_mask: `[B, past + N]` of the decoder's tokens; None if there is no padding.
            position_ids: None.
            cache: The member's own pair of caches, extended in place; None to run without.
            logits_to_keep: The number of last positions to keep (0: all), or a tensor of positions.
            latent: "states", the encoder's states `[B, S, H]`, and "mask", that of the source `[B, S]`, if it has one.

        Returns:
            Raw logits `[B, K, V]` in the model's dtype, on the model's device.

        Raises:
            InputError: If the text is longer than the decoder's context.
        """
        assert latent is not None
        assert position_ids is None
        self.refuse_length(input_ids.shape[1] + (0 if cache is None else int(cache.get_seq_length())))
        device = self.device
        self.token_forwards += input_ids.numel()
        # A non-blocking copy is safe only towards a GPU, see `proxytune.formulas.shift.shift`.
        quick = device.type != "cpu"
        given = {"decoder_input_ids": input_ids, "decoder_attention_mask": attention_mask}
        given |= {"attention_mask": latent.get("mask")}
        kwargs: dict[str, Any] = {k: x if x is None else x.to(device, non_blocking=quick) for k, x in given.items()}
        kwargs["encoder_outputs"] = _States(last_hidden_state=latent["states"].to(device, non_blocking=quick))
        if cache is not None:
            kwargs[self.cache_name] = cache
        with running_as(self.model, self.adapter, fresh=False):  # the encoder has looked
            out = self.model(**kwargs, use_cache=cache is not None, return_dict=True)
        logits: torch.Tensor = out.logits  # [B, N, V]
        if isinstance(logits_to_keep, torch.Tensor):
            return logits[:, logits_to_keep]
        return logits[:, -logits_to_keep:] if logits_to_keep else logits


def _rows(part: Any, otherwise: int) -> int:
    """How many ids an encoder or decoder can embed."""
    found = (
        part.get_input_embeddings() if hasattr(part, "get_input_embeddings") else getattr(part, "embed_tokens", None)
    )
    rows = None if found is None else rows_of(found)
    return otherwise if rows is None else rows


def _context(config: Any, side: str) -> int | None:
    """The maximum number of positions of an encoder or decoder; None if its config names none."""
    names = (f"max_{side}_position_embeddings", "max_position_embeddings")
    return next((int(n) for name in names if (n := getattr(config, name, None)) is not None), None)


def adopt_pair(cache: Any, configs: Sequence[PreTrainedConfig], owner: str) -> None:
    """Make an encoder-decoder's pair of caches this model's, or refuse it, as `adopt` does for one cache.

    Args:
        cache: A pair that `generate()` or the caller made. While it is empty it gets the members' layers, in place.
        configs: The members' decoder configs, in the order of their layers.
        owner: An id of the composed model.

    Raises:
        CacheError: If it is no pair of dynamic caches, or holds tokens from another model.
    """
    parts: list[Any] = [getattr(cache, name, None) for name in ("self_attention_cache", "cross_attention_cache")]
    if not isinstance(cache, EncoderDecoderCache) or any(type(part) is not DynamicCache for part in parts):
        kinds = " and a ".join(type(part).__name__ for part in parts if part is not None)
        raise CacheError.of(
            CACHE,
            expected="EncoderDecoderCache(DynamicCache(), DynamicCache())",
            got=f"a {type(cache).__name__}" + (f" of a {kinds}" if kinds else ""),
            remedy=f"Pass the {CACHE} that this model returned, or none.",
        )
    own, cross = parts
    new = not is_owned(own, owner)
    adopt(own, configs, owner)
    if new:
        # Not from the configs: no window slides over a source.
        cross.layers = [DynamicLayer() for config in configs for _ in range(cached_layers(config))]
        cross.layer_class_to_replicate = None
