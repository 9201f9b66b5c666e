"""One forward pass of a member over a span of tokens: what its model is given, and which way the pass takes.

The composed model passes a view of its composite cache, other callers a cache of the member's own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from transformers.cache_utils import Cache, StaticCache

from proxytune.costs.devices import Work, machine_of
from proxytune.costs.model_size import pass_work
from proxytune.models.members.adapter_state import AdapterState, running_as
from proxytune.models.members.compiled_step import CompiledStep
from proxytune.models.members.embedding_table import device_of
from proxytune.models.members.limits import MemberLimits
from proxytune.models.members.own_cache import in_own_class
from proxytune.models.members.ragged_static import ragged_pass, rows_of
from proxytune.models.members.rewind import length_of, rewindable_layers
from proxytune.models.members.self_test import UNTESTED
from proxytune.models.members.self_test_passes import prepared_inputs
from proxytune.models.members.stateful_pass import StatefulPass, kept_logits
from proxytune.models.members.whole_text import logits_of_text

__all__ = ["MemberForward"]


class MemberForward(MemberLimits):
    """The passes of a member; the attributes are those of `Member`."""

    adapter: AdapterState
    takes_logits_to_keep: bool
    step: CompiledStep | None
    token_forwards: int
    passes: int
    _keeps_offsets: bool
    _work: Work | None

    @property
    def device(self) -> torch.device:
        """The device of its inputs (the first one, if the model is spread over several)."""
        return device_of(self.model)

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
