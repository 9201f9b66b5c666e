"""One decode step of a member as a compiled graph, over a static cache.

After the prompt every pass over one token has the same shapes, so one graph serves them all, and
`torch.compile(mode="reduce-overhead")` replays it on a GPU with a single launch. Masks change form from step to step,
so they are made outside the graph by the member's `prepare_inputs_for_generation`, as `generate()` does for a plain
model.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Mapping
from itertools import count
from typing import Any

import torch
from transformers import CompileConfig
from transformers.cache_utils import Cache

from proxytune.models.members.cache_name import CACHE
from proxytune.models.members.innermost import innermost
from proxytune.models.members.ragged_static import Rows, ragged_pass
from proxytune.models.members.rewind import length_of

__all__ = ["CompiledStep", "uncompilable", "with_own_code"]

_numbers = count()


def uncompilable(model: Any) -> str | None:
    """Why a model's pass cannot be one graph, in words: it is offloaded, or quantized in such a way."""
    places = {str(place) for place in (getattr(model, "hf_device_map", None) or {}).values()}
    if away := places & {"cpu", "disk"} if len(places) > 1 else places & {"disk"}:
        return f"layers on the {', '.join(sorted(away))}"
    if any(getattr(getattr(part, "_hf_hook", None), "offload", False) for part in model.modules()):
        return "weights that a hook loads for each pass"
    quantizer = getattr(innermost(model), "hf_quantizer", None)
    return None if getattr(quantizer, "is_compileable", True) else type(quantizer).__name__


def with_own_code(function: Any) -> Any:
    """A function with code of its own: torch keeps graphs, and limits their number, for each code."""
    code = function.__code__.replace(co_name=f"{function.__name__}_{next(_numbers)}")
    return types.FunctionType(code, function.__globals__)


class CompiledStep:
    """A member's pass over one token per row, compiled at its first use; a copy compiles anew.

    Attributes:
        config: The settings, as for transformers' `generate(compile_config=…)`.
    """

    def __init__(self, model: Any, config: CompileConfig) -> None:
        self.config = config
        self._model = model
        self._call = torch.compile(model.__call__, **config.to_dict())
        self._ragged: Callable[..., torch.Tensor] = torch.compile(with_own_code(ragged_pass), **config.to_dict())

    def __getstate__(self) -> dict[str, Any]:
        return {"model": self._model, "config": self.config}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    @staticmethod
    def serves(new: int, cache: Cache | None, logits_to_keep: int | torch.Tensor, latent: Any) -> bool:
        """Whether a pass can be compiled: one token after a prompt in a static cache, without gradients."""
        return (
            new == 1
            and latent is None
            and isinstance(logits_to_keep, int)
            and cache is not None
            and cache.is_compileable
            and cache.is_initialized
            and not torch.is_grad_enabled()
            and not torch.compiler.is_compiling()
        )

    def __call__(self, inputs: Mapping[str, torch.Tensor | None], cache: Cache) -> torch.Tensor:
        """Run the model over one token per row.

        Args:
            inputs: `input_ids` `[B, 1]`, `attention_mask` `[B, past + 1]` and, if the model takes them, `position_ids`
                `[B, 1]` or `[1, 1]`. None stands for a mask of ones, and for positions counted from the cache.
            cache: Its static cache, extended in place.

        Returns:
            Raw logits `[B, 1, V]`, a copy that the next replay does not overwrite.
        """
        given = {name: x for name, x in inputs.items() if x is not None or name != "position_ids"}
        if "position_ids" in inputs and inputs["position_ids"] is None:
            past = length_of(cache)
            ids = inputs["input_ids"]
            assert ids is not None
            # A length on the device is not read by the host.
            given["position_ids"] = (
                past.view(1, 1) if isinstance(past, torch.Tensor) else torch.full((1, 1), past, device=ids.device)
            )
        prepared = self._model.prepare_inputs_for_generation(**given, **{CACHE: cache}, use_cache=True)
        # Same strides in every step: slices of a growing text differ in theirs.
        prepared = {
            name: x.clone(memory_format=torch.contiguous_format) if isinstance(x, torch.Tensor) else x
            for name, x in prepared.items()
        }
        torch.compiler.cudagraph_mark_step_begin()
        logits: torch.Tensor = self._call(**prepared, return_dict=True).logits
        return logits.clone()

    def ragged(self, given: Mapping[str, torch.Tensor], cache: Cache, rows: Rows) -> torch.Tensor:
        """Run the model over N tokens per row, which go to columns of their own; one graph for each N.

        Args:
            given: `input_ids` and `position_ids`, `[B, N]`.
            cache: Its static cache, extended in place.
            rows: Where the rows are.

        Returns:
            Raw logits `[B, N, V]`, a copy that the next replay does not overwrite.
        """
        same = {name: x.clone(memory_format=torch.contiguous_format) for name, x in given.items()}
        torch.compiler.cudagraph_mark_step_begin()
        return self._ragged(self._model, same, cache, rows).clone()
