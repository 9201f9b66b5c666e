"""Logits processors that users bring: which state they keep is found out by calling them again.

transformers calls a processor once per token, with rows that stay in place. Some engines rely on that: they keep a
matcher for each row, and feed it the last token of each call. With beams, drafts and trees, rows move and texts are
evaluated again; there a processor has to be a function of the ids. So it is asked an earlier question once more, and
has to give the same answer. A class says nothing about that.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from contextvars import Context, copy_context
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from transformers import LogitsProcessor, LogitsProcessorList, PrefixConstrainedLogitsProcessor

from proxytune.errors import UnsupportedModeError
from proxytune.models.processor_list import ProcessorList

__all__ = ["DRAFTS", "CheckedProcessor", "checked", "given", "processors_of_call"]

DRAFTS = "drafts are evaluated more than once"
_FIRST, _EVERY = 8, 8


@dataclass(frozen=True, eq=False)
class _Sample:
    """One call and its result, and the dtype of the autocast that it ran under."""

    input_ids: torch.Tensor
    scores: torch.Tensor
    result: torch.Tensor
    context: Context
    cast: torch.dtype | None

    def repeats(self, processor: Any, *, flip: bool = False) -> bool:
        """Whether the processor gives the same result now; with `flip` also with its rows in reverse."""
        try:
            cast = torch.autocast(self.scores.device.type, self.cast, enabled=self.cast is not None)
            with torch.no_grad(), cast:
                ids, scores = (x.flip(0) if flip else x for x in (self.input_ids, self.scores))
                again = self.context.copy().run(processor, ids, scores.clone())
                again = again.flip(0) if flip else again
        except Exception:  # noqa: BLE001  a matcher that is fed the wrong token may raise anything
            return False
        # A processor that runs a model may round otherwise; what it masks has to be the same.
        return again.shape == self.result.shape and torch.allclose(
            again, self.result, rtol=1e-3, atol=1e-3, equal_nan=True
        )


_first_use: WeakKeyDictionary[Any, _Sample] = WeakKeyDictionary()
"""Processor that changed in its first call → that call."""


class CheckedProcessor(LogitsProcessor):
    """A user's processor during one `generate()`.

    While every call is one more token of every row, calls are only passed on. From the first other call on, or from the
    start with `why`, it has to be a function of the ids: an earlier call is repeated at each of the first calls, at
    every eighth later, and when the number of rows has changed.

    Attributes:
        inner: The user's processor.
        why: Why it has to be a function of the ids from the start, as a phrase; None if it may be fed token by token.
        flip: Whether a row's place must not matter either.
    """

    supports_continuous_batching = False

    def __init__(self, inner: Any) -> None:
        """Begin a `generate()`; a processor with `reset()` is reset."""
        self.inner = inner
        self.why: str | None = None
        self.flip = False
        self._repeated = False
        self._calls = 0
        self._shape: torch.Size | None = None
        self._last: _Sample | None = None
        if callable(getattr(inner, "reset", None)):
            inner.reset()

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Call the processor on scores `[B, V]` after the prefixes `[B, T]`.

        Raises:
            UnsupportedModeError: If it keeps state from call to call where it has to be a function of the ids.
        """
        before, self._shape = self._shape, input_ids.shape
        self._calls += 1
        if before is None:
            return self._first(input_ids, scores)
        self._repeated |= input_ids.shape != (before[0], before[1] + 1)
        if not self._repeated and not self.why:
            return self.inner(input_ids, scores)
        due = before[0] != len(input_ids) or self._calls <= _FIRST or self._calls % _EVERY == 0
        if due and not self._repeats():
            raise self._refusal()
        try:
            if not due:
                return self.inner(input_ids, scores)
            self._last = self._sample(input_ids, scores)
        except Exception as error:
            if self._repeats():
                raise  # an error of its own
            raise self._refusal() from error
        return self._last.result.clone()

    def _first(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """The first call; one that changes the processor is kept, and repeated when another `generate()` begins."""
        earlier = None
        with contextlib.suppress(TypeError):  # no weak references to it
            earlier = _first_use.get(self.inner)
        if earlier is not None and not earlier.repeats(self.inner):
            raise self._refusal(reused=True)
        attributes = dict(getattr(self.inner, "__dict__", {}))
        self._last = self._sample(input_ids, scores)
        now = getattr(self.inner, "__dict__", {})
        if not hasattr(self.inner, "reset") and any(attributes.get(name, self) is not x for name, x in now.items()):
            with contextlib.suppress(TypeError):
                _first_use[self.inner] = self._last
        if self.why and not self._repeats():
            raise self._refusal()
        return self._last.result.clone()

    def _sample(self, input_ids: torch.Tensor, scores: torch.Tensor) -> _Sample:
        kept, kind = scores.clone(), scores.device.type
        cast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        return _Sample(input_ids, kept, self.inner(input_ids, scores).clone(), copy_context(), cast)

    def _repeats(self) -> bool:
        return self._last is not None and self._last.repeats(self.inner, flip=self.flip)

    def _refusal(self, *, reused: bool = False) -> UnsupportedModeError:
        name = type(self.inner).__name__
        name = getattr(self.inner, "__name__", name) if name == "function" else name
        why = "it served an earlier generate()" if reused else self.why or DRAFTS
        error = UnsupportedModeError.of(
            name,
            expected=f"a function of the ids: {why}",
            got="another result for the same ids when called again, as of an engine that keeps a matcher per row",
            remedy="Wrap it in proxytune.generation.ConstraintLogitsProcessor, which keeps one per prefix"
            + (", or make a new one for each call." if reused else "; or leave it out, or the loop."),
        )
        assert isinstance(error, UnsupportedModeError)
        return error


def given(processor: Any) -> Any:
    """The processor that a user gave."""
    return processor.inner if isinstance(processor, CheckedProcessor) else processor


def processors_of_call(
    processors: Iterable[Any], generation_config: Any, prompt_length: int | None, why: str | None = None
) -> LogitsProcessorList:
    """The processors as one `generate()` runs them, after prompts of `prompt_length` ids, padding included.

    Those with `for_prompts` make one for this call, and the users' own are checked; for `why` see `checked`. Doing this
    once more changes nothing.
    """
    beams = (generation_config.num_beams or 1) > 1
    ends = getattr(generation_config, "_eos_token_tensor", None)
    out = LogitsProcessorList(processors)
    for i, processor in enumerate(out):
        if hasattr(processor, "for_prompts"):
            out[i] = processor.for_prompts(prompt_length, ends=() if ends is None else ends.tolist(), beams=beams)
    return checked(out, "beam search moves rows" if beams else why)


def checked(processors: Iterable[Any], why: str | None = None, *, flip: bool = False) -> LogitsProcessorList:
    """The processors of one `generate()`: the users' own are checked, the others stay as they are.

    `why` says, as a phrase, why they have to be functions of the ids from the start; then a function given as
    `prefix_allowed_tokens_fn` is checked too. `flip` says that a row's place must not matter either.
    """
    out = ProcessorList()
    for processor in processors:
        constrained = isinstance(processor, PrefixConstrainedLogitsProcessor)  # is told a row's place
        if not isinstance(processor, CheckedProcessor) and (_is_foreign(processor) or (constrained and why)):
            processor = CheckedProcessor(processor)
        if isinstance(processor, CheckedProcessor) and why:
            processor.why, processor.flip = why, flip and not constrained
        out.append(processor)
    return out


def _is_foreign(processor: Any) -> bool:
    """Whether its class is neither transformers' nor made of one of ours, and it does not vouch for itself."""
    if getattr(processor, "function_of_ids", False):  # e.g. one that records its calls
        return False
    ours = any(_package(kind) == "proxytune" for kind in type(processor).__mro__)
    return not ours and _package(type(processor)) != "transformers"


def _package(kind: type) -> str:
    return kind.__module__.partition(".")[0]
