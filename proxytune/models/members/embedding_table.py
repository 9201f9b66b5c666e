"""What is asked of a model's input embedding: its rows, its device, and the matrix itself where there is one.

A quantiser may keep the weight packed (bitsandbytes), as a tensor of its own kind (torchao, quanto), or in buffers.
Nothing else takes `get_input_embeddings().weight` for a matrix.
"""

from __future__ import annotations

from itertools import chain
from typing import Any

import torch
from torch import nn

from proxytune.errors import UnsupportedModelError

__all__ = ["device_of", "embedding_rows", "matrix_of", "rows_of"]


def matrix_of(module: nn.Module) -> torch.Tensor | None:
    """The weight `[V, D]` of an embedding, if it is a plain matrix of floats of two bytes or more; else None."""
    weight: Any = getattr(module, "weight", None)
    plain = isinstance(weight, torch.Tensor) and type(weight.data) is torch.Tensor and weight.ndim == 2
    return weight if plain and weight.is_floating_point() and weight.element_size() > 1 else None


def rows_of(module: nn.Module) -> int | None:
    """How many ids an embedding has, padded rows included; None if it does not tell."""
    weight: Any = matrix_of(module)
    count = getattr(module, "num_embeddings", None) if weight is None else weight.shape[0]
    if count is None and isinstance(weight := getattr(module, "weight", None), torch.Tensor) and weight.ndim == 2:
        count = weight.shape[0]
    return None if count is None else int(count)


def embedding_rows(model: Any) -> int:
    """How many ids a model can embed; padded rows count. UnsupportedModelError if its embedding does not tell."""
    module = model.get_input_embeddings()
    rows = rows_of(module)
    if rows is None:
        raise UnsupportedModelError.of(
            "the input embedding",
            expected="a weight [V, D], or num_embeddings, which says how many ids there are",
            got=f"a {type(module).__name__} without them, in a {type(model).__name__}",
            remedy="Load the model without quantising its embedding.",
        )
    return rows


def device_of(model: Any) -> torch.device:
    """The device for a model's ids: its embedding's, or the one it is loaded to, if accelerate keeps it elsewhere."""
    module: nn.Module = model.get_input_embeddings()
    weight: Any = getattr(module, "weight", None)
    if not isinstance(weight, torch.Tensor):
        weight = next(chain(module.parameters(), module.buffers()), None)
    device: torch.device = model.device if weight is None else weight.device
    if device.type != "meta":
        return device
    # Below an adapter, the hook is on the layer that it wraps.
    found = [hook for part in module.modules() if (hook := getattr(part, "_hf_hook", None)) is not None]
    hooks = [one for hook in found for one in getattr(hook, "hooks", [hook])]
    place = next((x for one in hooks if (x := getattr(one, "execution_device", None)) is not None), None)
    return device if place is None else torch.device(place)
