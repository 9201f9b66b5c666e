"""Models that run over some of their layers several times for each token, and keep a cache layer for each of the times.

Inkling 2 Loop and Dory append these to the cache in their first pass, as copies of the looped layers' own. A view of
the composite cache would lose them, so they are made beforehand; such a model then appends none.
"""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

from transformers import PreTrainedConfig

__all__ = ["Loop", "loop_of", "with_passes"]


class Loop(NamedTuple):
    """Which layers are run over several times.

    Attributes:
        first: The first of them.
        end: One past the last.
        passes: How many times.
    """

    first: int
    end: int
    passes: int

    @property
    def copies(self) -> int:
        """Cache layers besides those of the model's layers."""
        return (self.end - self.first) * (self.passes - 1)


def loop_of(config: PreTrainedConfig) -> Loop | None:
    """The looped layers of a text config whose passes have cache layers of their own; None if there are none."""
    if hasattr(config, "loop_num_passes"):
        return Loop(config.loop_layer_index_start, config.loop_layer_index_end, config.loop_num_passes)
    # In the other mode one pass writes to the cache, and all others read what it wrote.
    if getattr(config, "recurrent_kv_cache_mode", "") == "per_loop":
        first = config.n_input_layers
        return Loop(first, first + config.n_recurrent_layers, config.n_recurrent_loops)
    return None


def with_passes(layers: list[Any], config: PreTrainedConfig) -> list[Any]:
    """A member's empty cache layers with those of the further passes, in the order in which the models append them."""
    loop = loop_of(config)
    if loop is None:
        return layers
    return layers + [copy.deepcopy(x) for x in layers[loop.first : loop.end] * (loop.passes - 1)]
