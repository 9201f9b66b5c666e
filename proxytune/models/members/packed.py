"""Whether a model's weights are plain numbers, or packed by a quantiser."""

from __future__ import annotations

import torch
from torch import nn

__all__ = ["packed_as"]


def packed_as(model: nn.Module) -> type | torch.dtype | None:
    """What holds weights that are no plain tensors of floats, nor shards of such; None if all are."""
    for weight in model.parameters():
        if not weight.is_floating_point():
            return weight.dtype
        if type(weight.data) is not torch.Tensor and type(weight.data).__name__ != "DTensor":
            return type(weight.data)
    return None
