"""A backend of torch.compile that runs graphs as they are, and counts them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import CompileConfig

__all__ = ["Graphs"]


class Graphs:
    """A backend that runs the graphs as they are, and counts them.

    Attributes:
        places: For each graph where what it takes by its address was: a graph of CUDA is recorded for each.
    """

    def __init__(self) -> None:
        self.compiled = self.runs = 0
        self.places: dict[int, set[tuple[int, ...]]] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> Graphs:
        return self  # a CompileConfig hands out copies

    def __call__(self, module: torch.fx.GraphModule, example_inputs: Any) -> Callable[..., Any]:
        self.compiled += 1
        held = self.places[self.compiled] = set()

        def run(*args: Any) -> Any:
            self.runs += 1
            held.add(tuple(x.data_ptr() for x in args if hasattr(x, "_dynamo_static_input_type")))
            return module.forward(*args)

        return run

    @property
    def config(self) -> CompileConfig:
        # fullgraph: a graph that breaks is an error.
        return CompileConfig(backend=self, mode=None, fullgraph=True)
