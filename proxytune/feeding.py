"""How latent steps come into a `generate()`: one processor at the end of the list, and a hook on the model's inputs.

The hook is put on the instance, so other models of the class are not touched, and only the generation that it belongs
to goes through it: another one, in another thread, is decoded as ever.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from transformers import LogitsProcessor, LogitsProcessorList

from proxytune.errors import InputError, UnsupportedModeError
from proxytune.feedback import Feedback
from proxytune.gating import Gates
from proxytune.member import embedding_rows
from proxytune.model import ProxyTunedModel

__all__ = ["Capture", "Hook", "feeding", "gates_of_call", "put_hook", "refuse_processors", "take_hook"]

_NAME = "prepare_inputs_for_generation"


class Capture(LogitsProcessor):
    """Shows the scores of each step to the latent steps of a generation."""

    supports_continuous_batching = False

    def __init__(self, feedback: Feedback, warpers: Sequence[LogitsProcessor] = ()) -> None:
        """Stand at the end of a list of processors, or before its warpers.

        Args:
            feedback: The generation's latent steps.
            warpers: The warpers that come later in the list.
        """
        self.feedback = feedback
        self.warpers = LogitsProcessorList(warpers)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Keep the distribution of a step.

        Args:
            input_ids: The whole texts, `[B, T]`, int64.
            scores: `[B, V]`, float32.

        Returns:
            `[B, V]`: the scores, but where a cold stop writes the end of the thinking span.
        """
        return self.feedback.capture(input_ids, scores, self.warpers)


class Hook:
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
        self._current: ContextVar[Feedback | None] = ContextVar("feedback", default=None)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return copy.deepcopy(self.original, memo)

    def begin(self, feedback: Feedback | None) -> None:
        """Let the generation of this thread go through latent steps from now on.

        Args:
            feedback: Its latent steps; None for none.
        """
        self._current.set(feedback)

    def __call__(self, input_ids: torch.Tensor, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Prepare the inputs of a forward pass.

        Args:
            input_ids: The whole texts, `[B, T]`, int64.
            *args: As in transformers.
            **kwargs: As in transformers.

        Returns:
            The inputs, with mixtures for what was drawn last.

        Raises:
            UnsupportedModeError: As `Feedback.feed`.
        """
        inputs = self.original(input_ids, *args, **kwargs)
        feedback = self._current.get()
        if feedback is None or not feedback.waiting:
            return inputs
        return feedback.feed(inputs, input_ids, kwargs.get("attention_mask"))


def put_hook(model: Any) -> Hook:
    """Put a hook on a model.

    Args:
        model: The model.

    Returns:
        The hook.

    Raises:
        UnsupportedModeError: If it has one.
    """
    if isinstance(getattr(model, _NAME), Hook):
        raise UnsupportedModeError.of(
            "latent steps",
            expected="one generation with latent steps at a time on a model",
            got="a model on which another one is running, or to which a StochasticLatentLogitsProcessor is attached",
            remedy="Wait for it, detach() the processor, or load the model twice.",
        )
    hook = Hook(getattr(model, _NAME))
    setattr(model, _NAME, hook)
    return hook


def take_hook(model: Any) -> None:
    """Take the hook off a model again.

    Args:
        model: The model.
    """
    original = vars(model)[_NAME].original
    if getattr(original, "__func__", None) is getattr(type(model), _NAME, None):
        delattr(model, _NAME)
    else:  # somebody had put another one on this instance
        setattr(model, _NAME, original)


@contextmanager
def feeding(model: Any, feedback: Feedback) -> Iterator[None]:
    """Let a generation go through latent steps, for as long as the context lasts, in this thread.

    Args:
        model: The model.
        feedback: The latent steps.

    Raises:
        UnsupportedModeError: If another one is running on this model.
    """
    hook = put_hook(model)
    hook.begin(feedback)
    try:
        yield
    finally:
        take_hook(model)


def gates_of_call(gates: Gates, generation_config: Any, model: Any) -> Gates:
    """The gates of one `generate()`: what ends, begins and pads its texts is discrete.

    Args:
        gates: The gates.
        generation_config: The settings of the call.
        model: The composed model, or a plain causal LM.

    Returns:
        The gates.

    Raises:
        InputError: If a gate names an id that the model cannot embed.
    """
    rows = model.usable_ids if isinstance(model, ProxyTunedModel) else embedding_rows(model)
    if gates.largest_id >= rows:
        raise InputError.of(
            "gates",
            expected=f"token ids below {rows}, which the model can embed",
            got=f"{gates.largest_id}",
            remedy="Take them from the tokenizer of this model.",
        )
    names = ("_eos_token_tensor", "_pad_token_tensor", "_bos_token_tensor")
    found = [getattr(generation_config, name, None) for name in names]
    special = {int(i) for x in found if x is not None for i in x.flatten().tolist() if i >= 0}
    return gates.with_discrete(sorted(special)) if special else gates


def refuse_processors(processors: Sequence[LogitsProcessor]) -> None:
    """Refuse processors that would not know of what is fed back.

    Args:
        processors: The processors of the call.

    Raises:
        UnsupportedModeError: If one runs companions on the token ids.
    """
    if any(getattr(p, "shifts_logits", False) for p in processors):
        raise UnsupportedModeError.of(
            "latent steps",
            expected="a model whose members all get a mixture of their own embeddings",
            got="a ProxyTuningLogitsProcessor, whose companions read the token ids",
            remedy="Compose the models with proxytune.wrap.",
        )
