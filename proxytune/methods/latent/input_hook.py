"""How latent steps come into a `generate()`: a hook on the inputs that a model prepares; and what is refused.

The hook is put on the instance, so other models of the class are not touched. Which generation takes latent steps is
told by an argument that travels with it to every forward pass: another one, in another thread or inside one of its own
processors, is decoded as ever.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from proxytune.errors import UnsupportedModeError
from proxytune.generation.method_hooks import MethodHook, hooks_on
from proxytune.methods.latent.steps import LatentSteps

__all__ = ["ARGUMENT", "latent_inputs_installed", "put_hook"]

_NAME = "prepare_inputs_for_generation"
ARGUMENT = "latent_feedback"
"""The argument by which a generation carries its feedback to the hook, which takes it out again."""


def _feed(
    original: Callable[..., dict[str, Any]], input_ids: torch.Tensor, *args: Any, **kwargs: Any
) -> dict[str, Any]:
    """The inputs of a forward pass, with mixtures for what was drawn last."""
    feedback: LatentSteps | None = kwargs.pop(ARGUMENT, None)
    inputs = original(input_ids, *args, **kwargs)
    return feedback.feed(inputs, input_ids) if feedback is not None and feedback.waiting else inputs


def put_hook(model: Any) -> MethodHook:
    """Put a hook on a model.

    Args:
        model: The model.

    Returns:
        The hook.

    Raises:
        UnsupportedModeError: If it has one.
    """
    if any(hook.replacement is _feed for hook in hooks_on(model, _NAME)):
        raise UnsupportedModeError.of(
            "latent steps",
            expected="one generation with latent steps at a time on a model",
            got="a model on which another one is running, or to which a LatentLogitsProcessor is attached",
            remedy="Wait for it, detach() the processor, or load the model twice.",
        )
    return MethodHook(model, _NAME, _feed)


@contextmanager
def latent_inputs_installed(model: Any) -> Iterator[None]:
    """Let the generations of a model that carry a feedback go through it, for as long as the context lasts.

    Args:
        model: The model.

    Raises:
        UnsupportedModeError: If another one is running on this model.
    """
    hook = put_hook(model)
    try:
        yield
    finally:
        hook.take()
