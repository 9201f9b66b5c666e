"""The hook that feeds latent steps into the inputs a model prepares.

It is put on the instance, so other models of the class are not touched. An argument that travels with a generation to
every forward pass carries its latent steps: a generation without it, in another thread or inside one of its own
processors, decodes as usual.
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
"""The argument that carries a generation's latent steps to the hook, which removes it."""


def _feed(
    original: Callable[..., dict[str, Any]], input_ids: torch.Tensor, *args: Any, **kwargs: Any
) -> dict[str, Any]:
    """The inputs of a forward pass, with mixtures for the last drawn tokens."""
    steps: LatentSteps | None = kwargs.pop(ARGUMENT, None)
    inputs = original(input_ids, *args, **kwargs)
    if steps is not None and steps.gated:
        inputs["every_member"] = True  # a mixture cannot be read later
    return steps.feed(inputs, input_ids) if steps is not None and steps.waiting else inputs


def put_hook(model: Any) -> MethodHook:
    """Put the hook on a model.

    Raises:
        UnsupportedModeError: If it has one.
    """
    if any(hook.replacement is _feed for hook in hooks_on(model, _NAME)):
        raise UnsupportedModeError.of(
            "latent steps",
            expected="one generation with latent steps at a time on a model",
            got="a model with another one running, or with a LatentLogitsProcessor attached",
            remedy="Wait for it, detach() the processor, or load the model twice.",
        )
    return MethodHook(model, _NAME, _feed)


@contextmanager
def latent_inputs_installed(model: Any) -> Iterator[None]:
    """Put the hook on a model for the length of the context.

    Raises:
        UnsupportedModeError: If it has one.
    """
    hook = put_hook(model)
    try:
        yield
    finally:
        hook.take()
