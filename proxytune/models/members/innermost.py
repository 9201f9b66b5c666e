"""The model itself, below what `torch.compile()` and PEFT put around it."""

from __future__ import annotations

from typing import Any

__all__ = ["innermost"]


def innermost(model: Any) -> Any:
    """The model without torch.compile's wrapper, and without PEFT's; anything else as it is."""
    model = getattr(model, "_orig_mod", model)
    return model.get_base_model() if hasattr(model, "get_base_model") else model
