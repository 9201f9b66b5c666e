"""Noise at the high-level state of a model that recurs: `h' = u + σ · rms(u) · n`, after a cycle, for each position.

u is what the high-level module made of the state in a cycle, rms goes over the hidden size, and n is standard normal,
one variate for each coordinate. A `LatentRecursion` says of a kind of model where that state is and how many cycles
there are; the `Transition` is the same for all of them. It is keyed by (seed, row, trajectory, position, cycle,
coordinate), never drawn in the order of calls: a forward pass with a cache, without one, or in chunks puts the same
noise at the same place, and neither padding nor the rows around it change a row.

`RecursionDecoding` in `proxytune.methods.recursion.decoding` decodes with it; that module says how it relates to
GRAM and PTRM.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol, runtime_checkable

import torch

from proxytune.errors import InputError, UnsupportedModelError
from proxytune.methods.recursion.transition import Transition
from proxytune.models.ensemble import Ensemble

__all__ = ["HrmTextRecursion", "LatentRecursion", "ValueHead", "recursion_of", "register_recursion"]

ValueHead = Callable[[torch.Tensor], torch.Tensor]
"""High-level states `[R, D]`, after the last cycle, to a value for each, `[R]`; larger is better."""


@runtime_checkable
class LatentRecursion(Protocol):
    """What a kind of model has to say of its recursion. It keeps no model: one object serves all models of a class."""

    def cycles(self, model: Any) -> int:
        """How many cycles a forward pass has.

        Args:
            model: The model.

        Returns:
            The number of times that the high-level state is made anew.
        """

    def state_size(self, model: Any) -> int:
        """The hidden size of the high-level state.

        Args:
            model: The model.

        Returns:
            D, the size of the last dimension of the state `[R, T, D]`.
        """

    def perturbed(self, model: Any, transition: Transition) -> AbstractContextManager[None]:
        """Let a transition have its say after every cycle, in every forward pass within the context.

        In each cycle, `transition(u, cycle=…, positions=…)` is called once with the high-level module's output u
        `[R, T, D]`, the number of the cycle from 0, and the positions `[1, T]` or `[R, T]` of its tokens, padding not
        counted; what it returns takes the place of u. It is called in every cycle, whether there is noise in it or not.
        Cycle and positions come from what the module is told, not from counting calls.

        Args:
            model: The model.
            transition: The transition.

        Returns:
            A context that leaves nothing on the model, also on errors.
        """

    def value_head(self, model: Any) -> ValueHead | None:
        """What the model has learnt to tell good states from bad ones by (a TRM's Q head).

        Args:
            model: The model.

        Returns:
            The head; None if it has none.
        """


class HrmTextRecursion:
    """The recursion of transformers' `HrmTextForCausalLM`: the high-level state is what `H_module` returns.

    A cycle is `L_cycles` passes of the low-level stack and one of the high-level stack, `H_cycles` times. The module is
    told its slot in the cache, `cycle_offset`, which tells the cycle. There is no value head.
    """

    def cycles(self, model: Any) -> int:
        """`H_cycles` of the configuration.

        Args:
            model: The model.

        Returns:
            The number.
        """
        return int(model.config.H_cycles)

    def state_size(self, model: Any) -> int:
        """`hidden_size` of the configuration.

        Args:
            model: The model.

        Returns:
            The size.
        """
        return int(model.config.hidden_size)

    @contextmanager
    def perturbed(self, model: Any, transition: Transition) -> Iterator[None]:
        """A forward hook on `H_module`, for as long as the context lasts.

        Args:
            model: The model.
            transition: The transition.
        """
        config = model.config
        slots = (config.L_cycles + 1) * config.num_layers_per_stack  # of the cache, in one cycle

        def hook(module: Any, args: Any, kwargs: dict[str, Any], output: torch.Tensor) -> torch.Tensor:
            return transition(output, cycle=kwargs["cycle_offset"] // slots, positions=kwargs["position_ids"])

        handle = model.model.H_module.register_forward_hook(hook, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()

    def value_head(self, model: Any) -> ValueHead | None:
        """None: the model has only its head of tokens.

        Args:
            model: The model.

        Returns:
            None.
        """
        return None


_adapters: dict[type, LatentRecursion] = {}


def register_recursion(kind: type, recursion: LatentRecursion) -> None:
    """Say how a class of models recurs; its subclasses do so too. What was said of the class before is replaced.

    Args:
        kind: The class of the models that `generate()` is called on.
        recursion: Its recursion.

    Raises:
        InputError: If it is no class, or the recursion lacks a method of `LatentRecursion`.
    """
    if not isinstance(kind, type) or isinstance(recursion, type) or not isinstance(recursion, LatentRecursion):
        raise InputError.of(
            "register_recursion",
            expected="a class of models, and an object with the methods of LatentRecursion",
            got=f"{kind!r} and {recursion!r}",
            remedy="Pass e.g. register_recursion(MyForCausalLM, MyRecursion()).",
        )
    _adapters[kind] = recursion


def recursion_of(model: Any) -> LatentRecursion:
    """How a model recurs.

    Args:
        model: The model.

    Returns:
        What was registered for its class, or for the nearest class above it.

    Raises:
        UnsupportedModelError: If nothing was, or it is a composed model, whose members each have a state of their own.
    """
    if Ensemble.of(model).composed:
        raise UnsupportedModelError.of(
            "a model's recursion",
            expected="a model that recurs by itself",
            got=f"a {type(model).__name__}, with a state in each member that does",
            remedy="Decode with the member: model.base.generate(...), say.",
        )
    for kind in type(model).__mro__:
        if kind in _adapters:
            return _adapters[kind]
        if kind.__name__ == "HrmTextForCausalLM" and kind.__module__.startswith("transformers."):
            return HrmTextRecursion()  # by its name: its module is imported by whoever has such a model
    raise UnsupportedModelError.of(
        "a model's recursion",
        expected="HrmTextForCausalLM, or a class given to register_recursion",
        got=type(model).__name__,
        remedy="If it recurs in latent space, register how: register_recursion(its class, a LatentRecursion). A "
        "transformer that does not recur has no such state: use latent steps on what is fed back to it, or sample.",
    )
