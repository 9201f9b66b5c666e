"""What the modes of decoding need of a cache, and which layers can do it: one table for all members.

A layer's kind is its `layer_types` entry in transformers' config. Where a layer lacks what a mode needs, the mode is
refused by the layer's kind and the member's role; a model with layers of a kind that is not in the table is refused as
a member.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal, get_args

from transformers import PreTrainedConfig
from transformers.cache_utils import get_layer_types_and_kwargs

from proxytune.errors import UnsupportedModeError

__all__ = ["ABLE", "NEEDS", "REWOUND", "STATES", "Ability", "kinds_of", "lacking", "refuse_lacking"]

Ability = Literal["append", "pad", "reorder", "repeat", "crop", "move", "static"]
"""What a cache layer may be asked for.

- append: go on after its tokens;
- pad: tell padding at the left from text;
- reorder: give each row another row's content;
- repeat: hold another number of rows than before;
- crop: drop the last tokens of all rows;
- move: shift rows against each other, where rows keep different numbers of tokens;
- static: keep its size from the start.
"""

NEEDS: dict[str, tuple[Ability, ...]] = {
    "greedy decoding, sampling, `FusedDecoding`, latent steps": ("append",),
    "prompts of different lengths in a batch": ("append", "pad"),
    "beams, `num_return_sequences`": ("append", "reorder"),
    "`ForkDecoding`, `SiblingDecoding`": ("append", "reorder", "repeat"),
    "assisted decoding, `SpeculativeDecoding` of one prompt": ("append", "crop"),
    "a processor's companions under assisted decoding": ("append", "reorder", "crop"),
    "`SpeculativeDecoding` of several prompts": ("append", "crop", "move"),
    'cache_implementation="static"': ("append", "static"),
}
"""Mode → what it asks of every member's layers."""

_ALL: frozenset[Ability] = frozenset(get_args(Ability))
_NO_ROWS_APART: frozenset[Ability] = _ALL - {"move"}  # a state says nothing of single tokens
_IN_PLACE: frozenset[Ability] = _ALL - {"pad", "move"}  # tokens are grouped by their column in the cache

ABLE: dict[str, frozenset[Ability]] = {
    "full_attention": _ALL,
    "sliding_attention": _ALL,
    "chunked_attention": _ALL,
    "linear_attention": _NO_ROWS_APART,
    "conv": _NO_ROWS_APART,
    "hybrid": _NO_ROWS_APART,
    "hybrid_sliding": _NO_ROWS_APART,
    "indexed_attention": _ALL,  # an index chooses the keys; it is kept beside them
    "deepseek_sparse_attention": _ALL,  # the same in transformers 5.17
    "minimax_m3_sparse": _IN_PLACE,
    "compressed_sparse_attention": _IN_PLACE - {"static"},
    "heavily_compressed_attention": _IN_PLACE - {"static"},
    "dummy": _ALL,  # transformers' name for a layer without a cache of its own
    "moe": _ALL,  # the same before 5.20
    "mlp": _ALL,
}
"""Kind of layer → what it can do here."""

STATES = frozenset({"linear_attention", "conv", "hybrid", "hybrid_sliding"})
"""The kinds that keep a state of all tokens instead of something for each."""

REWOUND = STATES | {"compressed_sparse_attention", "heavily_compressed_attention"}
"""The kinds that crop by going back to what was kept (`rewind`)."""


def kinds_of(config: PreTrainedConfig) -> set[str]:
    """The kinds of layers in a text config."""
    return set(get_layer_types_and_kwargs(config)[0])


def lacking(config: PreTrainedConfig, ability: Ability) -> list[str]:
    """The kinds of layers of a text config that cannot do something, sorted."""
    return sorted(kind for kind in kinds_of(config) if ability not in ABLE.get(kind, ()))


def refuse_lacking(members: Iterable[Any], ability: Ability, mode: str, *, expected: str, remedy: str) -> None:
    """Raise UnsupportedModeError for a mode that asks for what some member's (`Member`) layers cannot do."""
    for member in members:
        if strange := lacking(member.config, ability):
            name = f"{type(member.model).__name__} ({member.model.config.model_type})"
            raise UnsupportedModeError.of(
                f"{mode} for the {member.role}",
                expected=expected,
                got=f"a {name} with {', '.join(strange)} layers",
                remedy=remedy,
            )
