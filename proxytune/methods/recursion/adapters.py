"""Where a model keeps its high-level state: `LatentRecursion`, its registry, and the adapters of HRM-Text and loops.

The noise (`Transition`) is the same for all models: `h' = u + σ · rms(u) · n` after a cycle, at each position, where u
is the high-level module's output in that cycle, rms goes over the hidden size, and n is standard normal. It is keyed by
(seed, row, trajectory, position, cycle, coordinate), not by the order of calls: with a cache, without one or in chunks,
a forward pass puts the same noise at the same place, and neither padding nor other rows change it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol, runtime_checkable

import torch

from proxytune.errors import InputError, UnsupportedModelError
from proxytune.methods.recursion.transition import Transition
from proxytune.models.ensemble import Ensemble
from proxytune.models.members.looped import Loop, loop_of
from proxytune.validation import shown

__all__ = ["HrmTextRecursion", "LatentRecursion", "LoopedRecursion", "ValueHead", "recursion_of", "register_recursion"]

ValueHead = Callable[[torch.Tensor], torch.Tensor]
"""High-level states `[R, D]`, after the last cycle, to a value for each, `[R]`; larger is better."""


@runtime_checkable
class LatentRecursion(Protocol):
    """How a class of models recurs. It keeps no model: one object serves all models of the class."""

    def cycles(self, model: Any) -> int:
        """Number of cycles in a forward pass: how often the high-level state is updated."""

    def state_size(self, model: Any) -> int:
        """D, the hidden size of the high-level state `[R, T, D]`."""

    def perturbed(self, model: Any, transition: Transition) -> AbstractContextManager[None]:
        """Apply a transition after every cycle of every forward pass within the context.

        In each cycle, with or without noise, call `transition(u, cycle=…, positions=…)` once, and continue with its
        result in place of u. u `[R, T, D]` is the high-level module's output, `cycle` counts from 0, and `positions`
        `[1, T]` or `[R, T]` are those of the tokens, padding not counted. Take cycle and positions from the module's
        inputs; do not count calls.

        Args:
            model: The model.
            transition: The transition.

        Returns:
            A context that leaves nothing on the model, also on errors.
        """

    def value_head(self, model: Any) -> ValueHead | None:
        """The model's learned value of a state (a TRM's Q head); None if it has none."""


class HrmTextRecursion:
    """The recursion of transformers' `HrmTextForCausalLM`: the high-level state is the output of `H_module`.

    A forward pass has `H_cycles` cycles, each of `L_cycles` passes of the low-level stack and one of the high-level
    stack. The module is given its slot in the cache, `cycle_offset`, which tells the cycle.
    """

    def cycles(self, model: Any) -> int:
        """`H_cycles` of the configuration."""
        return int(model.config.H_cycles)

    def state_size(self, model: Any) -> int:
        """`hidden_size` of the configuration."""
        return int(model.config.hidden_size)

    @contextmanager
    def perturbed(self, model: Any, transition: Transition) -> Iterator[None]:
        """A forward hook on `H_module`, for as long as the context lasts."""
        config = model.config
        slots = (config.L_cycles + 1) * config.num_layers_per_stack  # cache slots per cycle

        def hook(module: Any, args: Any, kwargs: dict[str, Any], output: torch.Tensor) -> torch.Tensor:
            return transition(output, cycle=kwargs["cycle_offset"] // slots, positions=kwargs["position_ids"])

        handle = model.model.H_module.register_forward_hook(hook, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()

    def value_head(self, model: Any) -> ValueHead | None:
        """None: the model has only its language-model head."""
        return None


class LoopedRecursion:
    """The recursion of transformers' `Inkling2LoopForCausalLM` and `DoryForCausalLM`, a cycle of which is a pass.

    They run over some of their layers several times, with one set of weights. Each pass begins with the same input and
    what the pass before ended with: Dory adds it, Inkling 2 Loop takes messages from it. The state is that end, the
    output of the last looped layer. Inkling 2's messages also come from states within a pass, which get no noise.
    """

    def cycles(self, model: Any) -> int:
        """The number of passes in the configuration."""
        return self._loop(model).passes

    def state_size(self, model: Any) -> int:
        """`hidden_size` of the configuration."""
        return int(model.config.hidden_size)

    @contextmanager
    def perturbed(self, model: Any, transition: Transition) -> Iterator[None]:
        """A forward hook on the last looped layer, and one before the model, which is told the positions."""
        loop, config = self._loop(model), model.config
        positions: list[torch.Tensor] = []

        def note(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
            positions[:] = [kwargs["position_ids"]]

        def hook(module: Any, args: Any, kwargs: dict[str, Any], output: torch.Tensor) -> torch.Tensor:
            # The cache layers of later passes stand behind those of the model's layers.
            behind = kwargs.get("cache_offset", 0) + loop.first - config.num_hidden_layers
            cycle = 0 if behind < 0 else behind // (loop.end - loop.first) + 1
            return transition(output, cycle=cycle, positions=positions[0])

        handles = (
            model.model.register_forward_pre_hook(note, with_kwargs=True),
            model.model.layers[loop.end - 1].register_forward_hook(hook, with_kwargs=True),
        )
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def value_head(self, model: Any) -> ValueHead | None:
        """None: the models have only their language-model heads."""
        return None

    @staticmethod
    def _loop(model: Any) -> Loop:
        if (loop := loop_of(model.config)) is not None:
            return loop
        raise UnsupportedModelError.of(
            "a model's recursion",
            expected='passes that can be told apart: recurrent_kv_cache_mode="per_loop"',
            got=f"a {type(model).__name__} with {getattr(model.config, 'recurrent_kv_cache_mode', None)!r}",
            remedy='Set recurrent_kv_cache_mode="per_loop" in its config; the weights are the same.',
        )


# By name, to avoid importing their modules.
_OF_TRANSFORMERS: dict[str, type[LatentRecursion]] = {
    "HrmTextForCausalLM": HrmTextRecursion,
    "Inkling2LoopForCausalLM": LoopedRecursion,
    "DoryForCausalLM": LoopedRecursion,
}
_METHODS = ("cycles", "state_size", "perturbed", "value_head")
_adapters: dict[type, LatentRecursion] = {}


def register_recursion(kind: type, recursion: LatentRecursion) -> None:
    """Register how a class of models and its subclasses recur; replaces an earlier registration.

    Args:
        kind: The class of the models that `generate()` is called on.
        recursion: Its recursion.

    Raises:
        InputError: If `kind` is not a class, or `recursion` lacks a method of `LatentRecursion`.
    """
    if not isinstance(kind, type) or isinstance(recursion, type) or not isinstance(recursion, LatentRecursion):
        raise InputError.of(
            "register_recursion",
            expected="a class of models, and an object with the methods of LatentRecursion",
            got=f"{_named(kind)} and {_named(recursion)}",
            remedy=f"Pass e.g. register_recursion(MyForCausalLM, MyRecursion()); it needs {', '.join(_METHODS)}.",
        )
    _adapters[kind] = recursion


def _named(value: Any) -> str:
    """A class by its name, an object by the first line of its `repr`: a model's has hundreds."""
    return f"the class {value.__name__}" if isinstance(value, type) else shown(value, 80).split("\n")[0]


def recursion_of(model: Any) -> LatentRecursion:
    """What was registered for the model's class, or for its nearest base class.

    Raises:
        UnsupportedModelError: If nothing was, or for a composed model, whose members each have a state of their own.
    """
    if Ensemble.of(model).composed:
        raise UnsupportedModelError.of(
            "a model's recursion",
            expected="a single model that recurs",
            got=f"a {type(model).__name__}, whose members each have a state of their own",
            remedy="Decode with the member that recurs, e.g. model.base.generate(...).",
        )
    for kind in type(model).__mro__:
        if kind in _adapters:
            return _adapters[kind]
        if kind.__name__ in _OF_TRANSFORMERS and kind.__module__.startswith("transformers."):
            return _OF_TRANSFORMERS[kind.__name__]()
    raise UnsupportedModelError.of(
        "a model's recursion",
        expected=f"{', '.join(_OF_TRANSFORMERS)}, or a class given to register_recursion",
        got=type(model).__name__,
        remedy="If it recurs in latent space, register its class: register_recursion(MyForCausalLM, MyRecursion()). A "
        "transformer that does not recur has no such state: use LatentDecoding, or sample.",
    )
