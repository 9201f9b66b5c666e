"""How latent steps come into a `generate()`: a hook on the inputs that a model prepares; and what is refused.

The hook is put on the instance, so other models of the class are not touched. Which generation takes latent steps is
told by an argument that travels with it to every forward pass: another one, in another thread or inside one of its own
processors, is decoded as ever.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, get_args

import torch
from transformers import LogitsProcessor
from transformers.generation.logits_process import UnbatchedClassifierFreeGuidanceLogitsProcessor

from proxytune.errors import InputError, UnsupportedModeError
from proxytune.generation.seeds import Rows, seed_of
from proxytune.methods.latent.gates import Gates
from proxytune.methods.latent.mixture import Mixture
from proxytune.methods.latent.steps import Feedback
from proxytune.ops import Impl

__all__ = [
    "ARGUMENT",
    "Hook",
    "checked",
    "feedback_of",
    "feeding",
    "put_hook",
    "refuse_processors",
    "take_hook",
]

_NAME = "prepare_inputs_for_generation"
ARGUMENT = "latent_feedback"
"""The argument by which a generation carries its feedback to the hook, which takes it out again."""


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
            UnsupportedModeError: As `Feedback.feed`.
        """
        feedback: Feedback | None = kwargs.pop(ARGUMENT, None)
        inputs = self.original(input_ids, *args, **kwargs)
        return feedback.feed(inputs, input_ids) if feedback is not None and feedback.waiting else inputs


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
    hook = vars(model).get(_NAME)
    if not isinstance(hook, Hook):  # somebody has put another one in its place, and it has nothing to do any more
        return
    original = hook.original
    if getattr(original, "__func__", None) is getattr(type(model), _NAME, None):
        delattr(model, _NAME)
    else:  # somebody had put another one on this instance
        setattr(model, _NAME, original)


@contextmanager
def feeding(model: Any) -> Iterator[None]:
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


def checked(mixture: Any, gates: Any, impl: Any) -> tuple[Mixture, Gates]:
    """The settings that both doors take.

    Args:
        mixture: The law, or its kind.
        gates: The gates.
        impl: The implementation.

    Returns:
        The law and the gates.

    Raises:
        InputError: If one of them is something else.
    """
    if isinstance(mixture, str):
        mixture = Mixture(kind=mixture)  # type: ignore[arg-type]
    for name, value, kind in (("mixture", mixture, Mixture), ("gates", gates, Gates)):
        if not isinstance(value, kind):
            raise InputError.of(
                name,
                expected=f"a {kind.__name__}",
                got=repr(value),
                remedy="Pass e.g. Mixture(kind='gumbel', tau=0.25) and Gates(max_run=64).",
            )
    if impl not in get_args(Impl):
        raise InputError.of(
            "impl", expected="'auto', 'triton' or 'torch'", got=repr(impl), remedy="Leave it out for 'auto'."
        )
    return mixture, gates


def feedback_of(
    model: Any,
    mixture: Mixture,
    gates: Gates,
    generation_config: Any,
    *,
    seed: int | None,
    lengths: torch.Tensor,
    rows: Rows,
    impl: Impl,
) -> Feedback:
    """The latent steps of one `generate()`: what ends, begins and pads its texts is discrete.

    Args:
        model: The composed model, or a plain causal LM.
        mixture: The law.
        gates: The gates.
        generation_config: The settings of the call.
        seed: The key of all noise; None for one from torch's default generator.
        lengths: `[B]` or `[1]`, int64: how many tokens each prompt has, without padding.
        rows: `[B]`: which stream of the seed each row draws from.
        impl: As in `ops.step`.

    Returns:
        The latent steps.

    Raises:
        InputError: If a gate names an id that the model cannot embed.
        UnsupportedModelError: If the model's embedding cannot be replaced by a mixture.
    """
    names = ("_eos_token_tensor", "_pad_token_tensor", "_bos_token_tensor")
    found = [getattr(generation_config, name, None) for name in names]
    special = {int(i) for x in found if x is not None for i in x.flatten().tolist() if i >= 0}
    feedback = Feedback(
        model,
        mixture,
        gates.with_discrete(sorted(special)) if special else gates,
        # Without noise there is nothing to draw, and plain decoding's own draws must not be shifted by one.
        seed=seed_of(seed) if mixture.is_random else 0,
        lengths=lengths,
        rows=rows,
        beams=int(generation_config.num_beams or 1),
        impl=impl,
    )
    if feedback.known is not None and gates.largest_id >= feedback.known:
        raise InputError.of(
            "gates",
            expected=f"token ids below {feedback.known}, which the model can embed",
            got=f"{gates.largest_id}",
            remedy="Take them from the tokenizer of this model.",
        )
    return feedback


def refuse_processors(processors: Sequence[LogitsProcessor]) -> None:
    """Refuse processors that would not know of what is fed back.

    Args:
        processors: The processors of the call.

    Raises:
        UnsupportedModeError: If one runs a model on the token ids.
    """
    if any(getattr(p, "shifts_logits", False) for p in processors):
        raise UnsupportedModeError.of(
            "latent steps",
            expected="a model whose members all get a mixture of their own embeddings",
            got="a ProxyTuningLogitsProcessor, whose companions read the token ids",
            remedy="Compose the models with proxytune.wrap.",
        )
    if any(isinstance(p, UnbatchedClassifierFreeGuidanceLogitsProcessor) for p in processors):
        raise UnsupportedModeError.of(
            "latent steps",
            expected="no guidance_scale: its unconditional branch reads the token ids",
            got="one",
            remedy="Leave guidance_scale out.",
        )
