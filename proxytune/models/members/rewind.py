"""Layers that keep a state of all tokens, and can still go back: by states that were kept, and tokens read again.

A recurrent layer cannot drop its last tokens. So while drafts are tried, it keeps its state from before each pass.
After a crop it is at the newest kept state that is not too new, and *behind* by the tokens since; the member reads them
again at the front of its next pass, so a rejected draft costs no pass of its own. Sliding layers beside recurrent ones
go back in the same way, since all layers of a model must be at one place.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionCacheLayerMixin,
    LinearAttentionLayer,
    StaticLayer,
)

from proxytune.models.members.tape import Tape

__all__ = [
    "REACH",
    "RewindableLayer",
    "compresses",
    "length_of",
    "made_rewindable",
    "make_rewindable",
    "rewindable_layers",
]

REACH = 64
"""How many states of a layer are kept at most, and how far before a crop the oldest may be, in tokens."""
_FAR = 512
"""The most tokens that a crop can drop: the longest draft."""
_MOST_BYTES = 1 << 28
"""What the kept states of a model's layers may take together, in bytes; two of each are always kept."""

_OF_STATE = (
    *("conv_states", "recurrent_states", "has_previous_state", "conv_kernel_size"),
    *("is_conv_states_initialized", "is_recurrent_states_initialized"),
)
_OF_WINDOW = ("keys", "values", "cumulative_length", "is_initialized")
# DeepSeek V4's layers keep, beside a window, entries that stand for several tokens each, and what is not yet in one.
_OF_ENTRIES = ("buffer_kv", "buffer_gate", "compressed_kv", "entry_count", "overlap_kv", "overlap_gate")


class RewindableLayer:
    """Mixed into a cache layer of transformers: it counts its tokens, and can go back to states that it kept.

    Attributes:
        read: Tokens that its state has read.
        behind: Tokens of the text that it has to read again before new ones.
        recording: Whether it keeps states.
        tape: The last tokens, one for all layers of a model.
        lead: Whether it is the layer that moves the tape.
        share: The layer's part of the memory for kept states.
        kept: After how many tokens each kept state was, and the state.
        torn: Whether a pass has begun and not ended: nobody can tell what the state has read.
        settled: Whether every row has read a token that is no padding.
    """

    read: int
    behind: int
    recording: bool
    tape: Tape
    lead: bool
    share: float
    kept: list[tuple[int, dict[str, Any]]]
    torn: bool
    settled: bool

    @property
    def is_croppable(self) -> bool:
        """Whether `crop` can go back: not in a static cache."""
        return not isinstance(self, StaticLayer)

    @property
    def length(self) -> int:
        """Tokens of the text that the layer stands for."""
        return self.read + self.behind

    def get_seq_length(self) -> int:
        """Tokens of the text that the layer stands for; the layer's own count where it has one."""
        return self.length

    def keep(self) -> None:
        """Keep the state as it is, if recording; forget what is out of reach, or too much."""
        if not self.recording:
            return
        if not self.kept or self.kept[-1][0] != self.read:
            self.kept.append((self.read, {name: _copied(getattr(self, name)) for name in self._names()}))
        self._forget_before(self.read - _FAR)
        size = sum(x.numel() * x.element_size() for x in _tensors(self.kept[-1][1]))
        most = min(REACH, max(2, int(_MOST_BYTES * self.share / max(size, 1))))
        if len(self.kept) > most:
            del self.kept[1 : len(self.kept) - most + 1]  # a crop can always go back to the oldest
        if self.lead:
            self.tape.cut(self.kept[0][0])

    def start(self, read: int, tape: Tape, *, lead: bool, share: float) -> None:
        """Begin to count, after `read` tokens."""
        self.read, self.behind, self.recording, self.torn = read, 0, False, False
        self.settled = read > 0
        self.tape, self.lead, self.share = tape, lead, share
        self.kept = []

    def activate_past_recording(self) -> None:
        """Keep states from now on, so that `crop` can go back to them."""
        self.recording = True

    def stop_recording(self) -> None:
        """Keep no more states, and forget those kept; what has to be read again stays."""
        self.recording, self.kept = False, []
        if self.lead:
            self.tape.cut(self.read)

    def _forget_before(self, place: int) -> None:
        """Forget kept states that are older than the newest one of `place` or before."""
        while len(self.kept) > 1 and self.kept[1][0] <= place:
            del self.kept[0]

    def forget_rows(self, rows: torch.Tensor) -> None:
        """Take the states of some rows, a mask `[B]`, back to before any token."""
        for name in ("conv_states", "recurrent_states"):
            for state in getattr(self, name, {}).values():
                if state is not None and state.is_floating_point():  # Qwen 4 keeps ids of the last tokens beside
                    state.masked_fill_(rows.to(state.device).view(-1, *[1] * (state.ndim - 1)), 0)

    def fall_back(self) -> None:
        """Drop the keys and values of the tokens that the state has to read again, which come next."""
        if self.behind and self._grows():
            DynamicLayer.crop(self, -self.behind)
        self.behind = 0

    def crop(self, tokens_to_remove: int) -> None:
        """Drop the last `−tokens_to_remove` tokens; RuntimeError if no state from before them was kept."""
        target = self.length - abs(tokens_to_remove)
        if target < self.read:
            self.kept = [(read, state) for read, state in self.kept if read <= target]
            if self.kept:
                self.read = self.kept[-1][0]
                vars(self).update({name: _copied(value) for name, value in self.kept[-1][1].items()})
            elif target == 0:
                self._empty()
            else:
                raise RuntimeError(f"no state of the first {target} tokens was kept")
        self.behind = target - self.read
        self._forget_before(target - REACH)
        if self._grows():
            DynamicLayer.crop(self, -abs(tokens_to_remove))
        if self.lead:
            self.tape.crop(target)

    def reset(self) -> None:
        """Forget all tokens."""
        super().reset()  # type: ignore[misc]
        self._empty()
        if self.lead:
            self.tape.cut(0)
            self.tape.crop(0)

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Give each row the content of row `beam_idx` `[B']`; B' may differ from the number of rows."""
        super().reorder_cache(beam_idx)  # type: ignore[misc]
        if compresses(self) and not any("reorder_cache" in vars(kind) for kind in _compressing(type(self))):
            # as in transformers 5.17
            vars(self).update({name: _reordered(getattr(self, name), beam_idx) for name in _entries_of(self)})
        for _, state in self.kept:
            state.update({name: _reordered(value, beam_idx) for name, value in state.items()})
        if self.lead:
            self.tape.reorder(beam_idx)

    def __reduce__(self) -> Any:
        return _remade, (type(self).__bases__[1],), dict(vars(self))  # its class has no place in a module

    # transformers has neither for recurrent layers, and in hybrid ones moves only the keys and values.
    def batch_repeat_interleave(self, repeats: int) -> None:
        """Hold each row `repeats` times."""
        rows = next(x.shape[0] for x in _tensors({name: getattr(self, name) for name in self._names()}))
        self.reorder_cache(torch.arange(rows).repeat_interleave(repeats))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep the rows `indices`."""
        self.reorder_cache(indices)

    def _names(self) -> tuple[str, ...]:
        window = _OF_WINDOW if isinstance(self, DynamicSlidingWindowLayer) else ()
        return (_OF_STATE if isinstance(self, LinearAttentionCacheLayerMixin) else ()) + window + _entries_of(self)

    def _grows(self) -> bool:
        return isinstance(self, DynamicLayer) and not isinstance(self, DynamicSlidingWindowLayer)

    def _empty(self) -> None:
        self.read, self.behind, self.kept, self.torn, self.settled = 0, 0, [], False, False
        if isinstance(self, LinearAttentionCacheLayerMixin):
            for name in ("has_previous_state", "is_conv_states_initialized", "is_recurrent_states_initialized"):
                setattr(self, name, dict.fromkeys(getattr(self, name), False))
        for name in _entries_of(self):
            setattr(self, name, dict.fromkeys(getattr(self, name), 0 if name == "entry_count" else None))
        if isinstance(self, DynamicSlidingWindowLayer) and self.is_initialized:
            self.keys, self.values, self.cumulative_length = self.keys[:, :, :0], self.values[:, :, :0], 0


def make_rewindable(layers: list[Any], read: int = 0) -> None:
    """Replace a model's recurrent or compressing layers by ones that can go back, and sliding ones beside them.

    `read` is how many tokens they hold. The list is changed; that of a model without such layers stays as it is.
    """
    if not any(isinstance(layer, LinearAttentionCacheLayerMixin) or compresses(layer) for layer in layers):
        return
    chosen = [i for i, x in enumerate(layers) if isinstance(x, LinearAttentionLayer | DynamicSlidingWindowLayer)]
    if all(isinstance(layers[i], RewindableLayer) for i in chosen):
        return
    tape = Tape()
    for i in chosen:
        layer = object.__new__(_rewindable(type(layers[i])))
        vars(layer).update(vars(layers[i]))
        layer.start(read, tape, lead=i == chosen[0], share=1 / len(chosen))
        layers[i] = layer


@contextmanager
def made_rewindable(layers: list[Any], read: int = 0) -> Iterator[None]:
    """`make_rewindable` for a while: afterwards the layers are transformers' own again, as a plain model needs them.

    Whoever goes back by them catches up before.
    """
    before = {id(layer) for layer in layers if isinstance(layer, RewindableLayer)}
    make_rewindable(layers, read)
    try:
        yield
    finally:
        for i, layer in enumerate(layers):
            if isinstance(layer, RewindableLayer) and id(layer) not in before:
                plain: Any = object.__new__(type(layer).__bases__[1])
                vars(plain).update({k: v for k, v in vars(layer).items() if k not in RewindableLayer.__annotations__})
                layers[i] = plain


_kinds: dict[type, Any] = {}


def _rewindable(kind: type) -> Any:
    if kind not in _kinds:
        # With a `_layer_type`, transformers would make all caches with it.
        _kinds[kind] = type(f"Rewindable{kind.__name__}", (RewindableLayer, kind), {"_layer_type": None})
    return _kinds[kind]


def _remade(kind: type) -> Any:
    return object.__new__(_rewindable(kind))


def compresses(layer: Any) -> bool:
    """Whether a layer keeps entries that stand for several tokens each, as DeepSeek V4's do."""
    return hasattr(layer, "compressed_kv")


def _entries_of(layer: Any) -> tuple[str, ...]:
    return tuple(name for name in _OF_ENTRIES if hasattr(layer, name))


def _compressing(kind: type) -> list[type]:
    """A layer's classes that know of its entries."""
    mine = (RewindableLayer, *RewindableLayer.__mro__, *DynamicSlidingWindowLayer.__mro__)
    return [base for base in kind.__mro__ if base not in mine]


def rewindable_layers(cache: Cache | None) -> list[Any]:
    """The layers of a cache that can go back by kept states."""
    return [] if cache is None else [layer for layer in cache.layers if isinstance(layer, RewindableLayer)]


def length_of(cache: Cache) -> Any:
    """How many tokens a cache holds: an int, or a tensor where only the device knows; by the first layer that counts.

    Recurrent layers count once they are rewindable. A cache of others alone holds 0 if they are empty.
    """
    for layer in cache.layers:
        if isinstance(layer, RewindableLayer):
            return layer.length
        if isinstance(layer, CacheLayerMixin):
            return layer.get_seq_length()
    return 0


def _copied(value: Any) -> Any:
    """A state that later passes do not write to: they write to recurrent states in place, never to a window's."""
    return (
        {i: x.clone() if isinstance(x, torch.Tensor) else x for i, x in value.items()}
        if isinstance(value, dict)
        else value
    )


def _reordered(value: Any, rows: torch.Tensor) -> Any:
    if isinstance(value, dict):
        return {i: _reordered(x, rows) for i, x in value.items()}
    return value.index_select(0, rows.to(value.device)) if isinstance(value, torch.Tensor) else value


def _tensors(state: dict[str, Any]) -> Iterator[torch.Tensor]:
    for value in state.values():
        for x in value.values() if isinstance(value, dict) else (value,):
            if isinstance(x, torch.Tensor):
                yield x
