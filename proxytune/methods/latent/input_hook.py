"""How latent steps come into a `generate()`: a hook on the inputs that a model prepares; and what is refused.

The hook is put on the instance, so other models of the class are not touched. Which generation takes latent steps is
told by an argument that travels with it to every forward pass: another one, in another thread or inside one of its own
processors, is decoded as ever.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from proxytune.errors import UnsupportedModeError
from proxytune.methods.latent.steps import LatentSteps

__all__ = ["ARGUMENT", "InputHook", "latent_inputs_installed", "put_hook", "take_hook"]

_NAME = "prepare_inputs_for_generation"
ARGUMENT = "latent_feedback"
"""The argument by which a generation carries its feedback to the hook, which takes it out again."""


class InputHook:
    """What stands in for a model's `prepare_inputs_for_generation`; a copy of the model goes without.

    Attributes:
        original: What it stands in for.
    """

    def __init__(self, original: Callable[..., dict[str, Any]]) -> None:
        """Stand in for a method.

        Args:
            original: The bound method.
        """
        functools.update_wrapper(self, original)  # generate() reads the signature
        self.original = original

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return copy.deepcopy(self.original, memo)

    def __call__(self, input_ids: torch.Tensor, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Prepare the inputs of a forward pass.

        Args:
            input_ids: The whole texts, `[B, T]`, int64.
            *args: As in transformers.
            **kwargs: As in transformers.

        Returns:
            The inputs, with mixtures for what was drawn last.

        Raises:
            UnsupportedModeError: As `LatentSteps.feed`.
        """
        feedback: LatentSteps | None = kwargs.pop(ARGUMENT, None)
        inputs = self.original(input_ids, *args, **kwargs)
        return feedback.feed(inputs, input_ids) if feedback is not None and feedback.waiting else inputs


def put_hook(model: Any) -> InputHook:
    """Put a hook on a model.

    Args:
        model: The model.

    Returns:
        The hook.

    Raises:
        UnsupportedModeError: If it has one.
    """
    if isinstance(getattr(model, _NAME), InputHook):
        raise UnsupportedModeError.of(
            "latent steps",
            expected="one generation with latent steps at a time on a model",
            got="a model on which another one is running, or to which a LatentLogitsProcessor is attached",
            remedy="Wait for it, detach() the processor, or load the model twice.",
        )
    hook = InputHook(getattr(model, _NAME))
    setattr(model, _NAME, hook)
    return hook


def take_hook(model: Any) -> None:
    """Take the hook off a model again.

    Args:
        model: The model.
    """
    hook = vars(model).get(_NAME)
    if not isinstance(hook, InputHook):  # somebody has put another one in its place, and it has nothing to do any more
        return
    original = hook.original
    if getattr(original, "__func__", None) is getattr(type(model), _NAME, None):
        delattr(model, _NAME)
    else:  # somebody had put another one on this instance
        setattr(model, _NAME, original)


@contextmanager
def latent_inputs_installed(model: Any) -> Iterator[None]:
    """Let the generations of a model that carry a feedback go through it, for as long as the context lasts.

    Args:
        model: The model.

    Raises:
        UnsupportedModeError: If another one is running on this model.
    """
    put_hook(model)
    try:
        yield
    finally:
        take_hook(model)
