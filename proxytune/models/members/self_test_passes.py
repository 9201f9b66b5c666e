"""The passes of the self-test over one model, and what is seen in them."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import (
    Cache,
    DynamicCache,
    DynamicLayer,
    EncoderDecoderCache,
    StaticCache,
    get_layer_types_and_kwargs,
)

from proxytune.models.members.cache_name import CACHE, argument_of
from proxytune.models.members.composite_cache import empty_cache, stored
from proxytune.models.members.embedding_table import device_of, embedding_rows
from proxytune.models.members.layer_kinds import STATES, kinds_of
from proxytune.models.members.own_cache import in_own_class, own_class_of
from proxytune.models.members.ragged_static import masks_of, ragged, rows_of, widen
from proxytune.models.members.rewind import make_rewindable, rewindable_layers
from proxytune.models.members.shadow import shadow_of
from proxytune.models.members.whole_text import logits_of_text, reads_whole_text

__all__ = ["ModelPasses", "PairPasses", "Verdict", "prepared_inputs"]

# Right families stay below 5e-7 in float32 and 1e-2 in bfloat16; wrong ones differ by .07, or .002 with weak weights.
_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 5e-2}
_QUANTIZED = 0.5  # activations rounded to 8 bits depend on their neighbours in the pass
_LONG = 130  # tokens: reformer hashes from 65 on


@dataclass(frozen=True)
class Verdict:
    """What a model does wrong by itself, in words; None for what is right or could not be tested.

    Attributes:
        cache: It depends on later tokens, or continues its cache differently.
        padding: Left padding changes its results.
        right: Padding at the right of a source changes its results (encoder-decoders).
        moved: Rows of its cache cannot be moved by some columns, as rejected drafts ask for.
        counts: Whether positions that it is given count from 0, as transformers counts them.
        several: Whether it continues its cache differently with several tokens at once, and rightly by single ones.
    """

    cache: str | None = None
    padding: str | None = None
    moved: str | None = None
    counts: bool = True
    several: bool = False
    right: str | None = None


def _columns(layer: Any) -> int:
    count = getattr(layer, "get_seq_length", None)
    return 0 if count is None or not getattr(layer, "is_initialized", True) else int(count())


class _Stop(Exception):
    """The hidden states after the layers that are looked at."""


def _end_early(model: Any, least: int = 1) -> None:
    """Let passes stop once a layer of each kind has run: a fault shows there, and the others cost as much again."""
    config = model.config.get_text_config(decoder=True)
    kinds = list(get_layer_types_and_kwargs(config)[0])
    needed = max([least, *(kinds.index(kind) + 1 for kind in set(kinds))])

    def stop(layer: nn.Module, args: Any, output: Any) -> None:
        states = output if isinstance(output, torch.Tensor) else output[0]
        if isinstance(states, torch.Tensor) and states.ndim == 3 and states.shape[-1] == config.hidden_size:
            raise _Stop(states)

    stacks: list[str] = []
    for name, module in model.named_modules():
        # Not the experts of a layer: they stand inside another list.
        inside = any(name.startswith(f"{stack}.") for stack in stacks)
        if isinstance(module, nn.ModuleList) and len(module) == config.num_hidden_layers >= needed and not inside:
            stacks.append(name)
            module[needed - 1].register_forward_hook(stop)


class ModelPasses:
    """The passes over one model, and what is seen in them."""

    seen = "hidden states"

    def __init__(self, model: Any, told: bool) -> None:
        self.model = shadow_of(model)
        self.config = model.config.get_text_config(decoder=True)
        self.told = told
        rows, self.device = embedding_rows(model), device_of(model)
        quantized = getattr(model, "hf_quantizer", None) is not None
        dtype = next((p.dtype for p in model.parameters() if p.is_floating_point() and p.ndim > 1), model.dtype)
        if dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest":
            dtype = torch.bfloat16  # or TF32
        self.tolerance = _QUANTIZED if quantized else _TOLERANCE.get(dtype, _QUANTIZED)
        special = {v for k, v in self.config.to_dict().items() if k.endswith("token_id") and isinstance(v, int)}
        usable = [i for i in range(3, min(rows, 4000)) if i not in special]
        self.ids = [usable[(7 + 131 * i) % len(usable)] for i in range(8)]
        pad = getattr(self.config, "pad_token_id", None)
        self.pad = pad if isinstance(pad, int) and 0 <= pad < rows else self.ids[7]

    def verdict(self) -> Verdict:
        """What the passes tell of the model."""
        a, b, c, d, e, f, x, y = self.ids
        _end_early(self.model)
        # Two texts that begin alike: a pass of one shape, which rounds alike, tells whether a token looks ahead.
        alone, other = self._pass([[a, b, c, d, e, f], [a, b, c, d, x, y]])
        # Not the first token, whose state can be so large that nothing shows in it.
        causal = max(self._differ(other[[i]], alone[[i]]) for i in (1, 2, 3))
        tight = self.tolerance if self.tolerance == _QUANTIZED else self.tolerance / 5
        ahead = self._said(causal, "the same four tokens before two endings", tight)
        if reads_whole_text(self.model):
            return Verdict(cache=ahead or self._drawn())
        found: tuple[str | None, str | None, str | None] | None = None
        with suppress(Exception):  # where it would be used, it would fail as well
            found = self._continued(alone)
        if found is None:
            return Verdict(cache=ahead or "a pass over its cache that fails")
        cached, padded, moved = found
        several = False
        if kinds_of(self.config) & STATES and not ahead and (cached or padded):
            singly = self._continued(alone, one_by_one=True)
            several = singly[:2] != (cached, padded)
            cached, padded, _ = singly
        return Verdict(cache=ahead or cached, padding=padded, moved=moved, several=several)

    def generated(self, rows: int) -> str | None:
        """What `generate()` carries on wrongly for some rows."""
        ids = torch.tensor([self.ids[:4], self.ids[4:]][:rows], device=self.device)
        settings = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None, "pad_token_id": self.pad}
        out = self.model.generate(
            ids, attention_mask=torch.ones_like(ids), return_dict_in_generate=True, output_logits=True, **settings
        )
        alone = torch.cat([self._pass(row[None, :-1].tolist())[:, -1] for row in out.sequences])
        last = out.logits[-1].to(alone.dtype)
        apart = (last - alone).norm(dim=-1) / alone.norm(dim=-1)
        return self._said(float(apart.max()), "the third token of generate(), and one pass over the text")

    def padded_alone(self) -> str | None:
        """What left padding changes without a cache."""
        a, b, c, d, *_ = self.ids
        _end_early(self.model)
        alone = self._pass([[a, b, c, d]], [[1] * 4])[0]
        padded = self._pass([[self.pad, self.pad, a, b, c, d]], [[0, 0, 1, 1, 1, 1]])[0]
        return self._said(self._differ(padded[3:], alone[1:]), "a text alone and the same text left-padded by two")

    def _drawn(self) -> str | None:
        """What tells that a pass draws random numbers, as reformer's hashing does, or sets their seed."""
        length = min(_LONG, getattr(self.config, "max_position_embeddings", None) or _LONG)
        before = torch.get_rng_state()
        ids = torch.tensor([(self.ids * _LONG)[:length]], device=self.device)
        logits_of_text(shadow_of(self.model), ids, None, None)  # a shadow's shadow does not end early
        return None if torch.equal(before, torch.get_rng_state()) else "a pass that draws or seeds random numbers"

    def _continued(self, alone: torch.Tensor, *, one_by_one: bool = False) -> tuple[str | None, str | None, str | None]:
        """What differs from a text `alone` `[6, H]` over a cache, left-padded, and moved in the cache."""
        a, b, c, d, e, f, x, y = self.ids
        cache = empty_cache(self.config)
        # All of it; padded by two; two tokens and two drafts.
        rows, mask = [[a, b, c, d], [self.pad, self.pad, a, b], [a, b, x, y]], [[1] * 4, [0, 0, 1, 1], [1] * 4]
        first = self._pass(rows, mask, cache)
        held = {n for layer in stored(cache) if (n := _columns(layer)) not in (0, 4)}
        if held:
            return f"a cache of {max(held)} columns after four tokens", None, None
        movable = self._move(cache)
        rows, mask = [[e, f], [c, d], [c, d]], [[1] * 6, [0, 0] + [1] * 4, [0, 0] + [1] * 4]
        ends = (1, 2) if one_by_one else (2,)
        second = torch.cat(
            [self._pass([r[n - 2 // len(ends) : n] for r in rows], [m[: 4 + n] for m in mask], cache) for n in ends], 1
        )
        cached = max(self._differ(first[0, 1:], alone[1:4]), self._differ(second[0], alone[4:]))
        padded = max(self._differ(first[1, 3:], alone[1:2]), self._differ(second[1], alone[2:4]))
        moved = self._differ(second[2], alone[2:4]) if movable else 0.0
        return (
            self._said(cached, "six tokens in one pass, and in two passes over a cache"),
            self._said(padded, "a text alone and the same text left-padded by two"),
            self._said(moved, "a text in one pass, and after its cached tokens were moved by two columns"),
        )

    def static(self, room: int) -> str | None:
        """What differs on a static cache for `room` tokens."""
        a, b, c, d, e, f, *_ = self.ids
        _end_early(self.model, least=2)  # two layers: kinds of attention that only the code knows alternate
        alone = self._pass([[a, b, c, d, e, f]])[0]
        cache = StaticCache(config=self.config, max_cache_len=room)
        make_rewindable(cache.layers)
        first = self._pass([[a, b, c, d, e]], [[1] * 5], cache)[0]
        second = self._pass([[f]], [[1] * 6], cache)[0]
        seen = max(self._differ(first[1:], alone[1:5]), self._differ(second, alone[5:]))
        return self._said(seen, f"six tokens in one pass, and in two over a static cache for {room} tokens")

    def ragged(self, room: int) -> str | None:
        """What differs on a static cache for `room` tokens whose rows differ in length (`ragged_static`)."""
        a, b, c, d, e, f, x, y = self.ids
        _end_early(self.model, least=2)
        alone = self._pass([[a, b, c, d, e, f]])[0]
        cache = StaticCache(config=self.config, max_cache_len=room)
        widen(cache, room)
        mask = [[1] * 4, [0, 0, 1, 1]]
        self._pass([[a, b, c, d], [self.pad, self.pad, a, b]], mask, cache)
        with ragged([cache], torch.tensor(mask, device=self.device), 2):
            where = rows_of(cache)
            assert where is not None
            columns = where.columns.clone()
            # The first row keeps one of two tokens, and reads over the other.
            first = self._pass([[e, x], [c, d]], [[1] * 6, [0, 0, 1, 1, 1, 1]], cache)
            where.columns.copy_(columns + torch.tensor([1, 2], device=self.device))
            second = self._pass([[f, y], [e, f]], [[1] * 7, [0, 1, 1, 1, 1, 1, 1]], cache)
        seen = max(self._differ(first[1], alone[2:4]), self._differ(second[1], alone[4:]))
        seen = max(seen, self._differ(first[0, :1], alone[4:5]), self._differ(second[0, :1], alone[5:]))
        return self._said(seen, "six tokens in one pass, and beside a row of another length on a static cache")

    def _pass(
        self, rows: Sequence[Sequence[int]], mask: Sequence[Sequence[int]] | None = None, cache: Cache | None = None
    ) -> torch.Tensor:
        """The hidden states `[B, N, H]` after the first layers, or the logits where no such layers were found."""
        ids = torch.tensor(rows, device=self.device)
        given: dict[str, Any] = {"input_ids": ids, "attention_mask": None, "use_cache": cache is not None}
        if mask is not None:
            given["attention_mask"] = torch.tensor(mask, device=self.device)
            if self.told:
                given["position_ids"] = (given["attention_mask"].cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        layers = rewindable_layers(cache)
        if cache is not None:
            own = own_class_of(self.model)
            cache = cache if own is None else in_own_class(cache, own)
            given[argument_of(self.model) or CACHE] = cache
            if (where := rows_of(cache)) is not None:
                given["attention_mask"] = masks_of(self.model, where, ids.shape[1])
            elif layers or isinstance(cache, StaticCache):
                given = prepared_inputs(self.model, given, cache)
        try:
            states: torch.Tensor = self.model(**given, return_dict=True).logits
        except _Stop as stop:
            states = stop.args[0]
            if sorted(states.shape[:2]) != sorted(
                ids.shape
            ):  # more than the tokens is in the layers, as in ProphetNet's
                self.model = shadow_of(self.model)  # without the hooks that end a pass early
                return self._pass(rows, mask, cache)
            if states.shape[:2] != ids.shape:  # as in xlnet, whose layers have the tokens before the rows
                states = states.transpose(0, 1)
        for layer in layers:
            layer.read += ids.shape[1]
        return states.to(torch.promote_types(states.dtype, torch.float32))

    def _move(self, cache: DynamicCache) -> bool:
        """Drop the last two columns of the third row and move it right; False where windows are too narrow for it."""
        layers = [layer for layer in cache.layers if getattr(layer, "is_initialized", True)]
        if not all(isinstance(layer, DynamicLayer) and layer.keys.shape[-2] == 4 for layer in layers):
            return False
        order = torch.tensor([0, 0, 0, 1])
        for layer in layers:
            for name in ("keys", "values", "indexer_keys"):
                if (states := getattr(layer, name, None)) is not None:
                    states = states.clone()
                    states[2] = states[2][..., order.to(states.device), :]
                    setattr(layer, name, states)
        return True

    @staticmethod
    def _differ(states: torch.Tensor, wanted: torch.Tensor) -> float:
        """The least relative difference of two texts `[N, H]` at any token: a fault shows at all of them."""
        apart = (states - wanted.to(states.device)).norm(dim=-1) / wanted.norm(dim=-1).to(states.device)
        if not bool(apart.isfinite().all()):
            raise FloatingPointError("states that are not finite say nothing of the model's code")
        return float(apart.min())

    def _said(self, seen: float, between: str, tolerance: float | None = None) -> str | None:
        allowed = self.tolerance if tolerance is None else tolerance
        if seen <= allowed:
            return None
        return f"{self.seen} that differ by {seen:.2%} between {between} (allowed: {allowed:.3%})"


class PairPasses(ModelPasses):
    """The same over an encoder-decoder: two sources, one of them padded at either side, and a target for each row."""

    seen = "logits"

    def verdict(self) -> Verdict:
        """What the passes tell of the model."""
        a, b, c, d, e, f, x, y = self.ids
        start = next((i for k in ("decoder_start_token_id", "pad_token_id") if isinstance(i := self._named(k), int)), y)
        pad, device = self.pad, self.device
        mask = torch.tensor([[1] * 5, [1] * 3 + [0] * 2, [0] * 2 + [1] * 3], device=device)
        sources = torch.tensor([[a, b, c, d, e], [f, x, y, pad, pad], [pad, pad, f, x, y]], device=device)
        targets = torch.tensor([[start, b, d, f], *[[start, x, a, c]] * 2], device=device)
        states, short = self._encode(sources, mask), self._encode(sources[1:2, :3], None)
        whole, alone = self._decode(targets, states, mask), self._decode(targets[1:2], short, None)
        cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
        steps = torch.cat([self._decode(part, states, mask, cache) for part in targets.split([2, 1, 1], 1)], 1)
        if steps.shape != whole.shape:
            return Verdict(cache=f"logits of {steps.shape[1]} positions for four tokens in three passes over a cache")
        # The encoder's states show another position of a token by more than the logits.
        left = max(self._most(whole[2:], alone), self._most(states[0][2:, 2:], short[0]))
        return Verdict(
            cache=self._said(self._most(steps, whole), "four tokens in one pass, and in three over a cache"),
            padding=self._said(left, "a source alone and the same source left-padded by two"),
            right=self._said(self._most(whole[1:2], alone), "a source alone and the same source padded by two"),
        )

    def _named(self, name: str) -> Any:
        places = (getattr(self.model, "generation_config", None), self.model.config)
        return next((i for place in places if (i := getattr(place, name, None)) is not None), None)

    def _encode(self, ids: torch.Tensor, mask: torch.Tensor | None) -> Any:
        return self.model.get_encoder()(input_ids=ids, attention_mask=mask, return_dict=True)

    def _decode(
        self, ids: torch.Tensor, states: Any, mask: torch.Tensor | None, cache: Cache | None = None
    ) -> torch.Tensor:
        given = {} if cache is None else {argument_of(self.model) or CACHE: cache}
        given |= {"decoder_input_ids": ids, "encoder_outputs": states, "attention_mask": mask}
        logits: torch.Tensor = self.model(**given, use_cache=cache is not None, return_dict=True).logits
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    def _most(self, states: torch.Tensor, wanted: torch.Tensor) -> float:
        """The largest relative difference of any token of `[B, N, V]`."""
        pairs = zip(states.flatten(0, 1).split(1), wanted.flatten(0, 1).split(1), strict=True)
        return max(self._differ(one, other) for one, other in pairs)


def prepared_inputs(model: Any, given: dict[str, Any], cache: Cache) -> dict[str, Any]:
    """The inputs of a pass as `generate()` prepares them for the model: with masks for static caches and for states."""
    layers = rewindable_layers(cache)
    first = bool(layers) and layers[0].read == 0
    prepared: dict[str, Any] = model.prepare_inputs_for_generation(**given, is_first_iteration=first)
    return {
        name: value for name, value in prepared.items() if name not in ("is_first_iteration", "next_sequence_length")
    }
