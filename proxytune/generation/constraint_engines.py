"""What constraint engines have in common: which tokens may come next, and one token more.

An engine is known by its methods, so that none has to be installed.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any, Protocol, Self

import numpy as np
import torch

from proxytune.errors import InputError
from proxytune.validation import shown

__all__ = ["Matcher", "MatcherOfEngine", "matcher_of"]


class Matcher(Protocol):
    """What follows one text, as `ConstraintLogitsProcessor` needs it; an engine of your own may be written like this.

    With a further method `copy()`, which returns an independent matcher in the same state, texts that part are faster:
    without it, the matcher of such a text is made anew.
    """

    def allowed(self) -> Sequence[int] | torch.Tensor:
        """The ids that may come next: numbers, or a mask `[V]`, bool. At the end, those that end the text."""

    def advance(self, token: int) -> Any:
        """Go on by one of these ids."""


class MatcherOfEngine:
    """One text's matcher, whatever the engine.

    Attributes:
        ended: Whether nothing can follow: the text has ended, or left what the constraint allows.
    """

    def __init__(self, matcher: Any, width: int) -> None:
        """Follow a text of ids below `width` with a new matcher of an engine."""
        self.matcher = matcher
        self.width = width
        self.ended = False
        self._mask: torch.Tensor | None = None

    def allowed(self) -> torch.Tensor:
        """Which ids may come next, `[V]`, bool, on the CPU."""
        if self._mask is None:
            self._mask = _mask_of(self._next(), self.width)
        return self._mask

    def advance(self, token: int) -> None:
        """Go on by a token, or end where it is not allowed."""
        if not self.ended:
            self.ended = not self._accept(token)
            self._mask = None

    def copy(self) -> Self | None:
        """An independent one in the same state; None if the engine cannot make one."""
        inner = self._copy()
        if inner is None:
            return None
        made = copy.copy(self)
        made.matcher = inner
        return made

    def _next(self) -> Any:
        return self.matcher.allowed()

    def _accept(self, token: int) -> bool:
        if token >= self.width or not bool(self.allowed()[token]):
            return False
        self.matcher.advance(token)
        return True

    def _copy(self) -> Any:
        return self.matcher.copy() if hasattr(self.matcher, "copy") else None


class _XGrammar(MatcherOfEngine):
    """`xgrammar.GrammarMatcher`."""

    def _next(self) -> Any:
        if self.matcher.is_terminated():  # without a stop token, as it was told to
            return self.matcher.stop_token_ids
        bits = torch.full((1, (self.width + 31) // 32), -1, dtype=torch.int32)
        try:
            self.matcher.fill_next_token_bitmask(bits, 0)
        except RuntimeError as error:
            raise InputError.of(
                "xgrammar",
                expected=f"a grammar compiled for the model's {self.width} ids",
                got=shown(str(error), 200),
                remedy=f"Pass TokenizerInfo.from_huggingface(tokenizer, vocab_size={self.width}) to the compiler.",
            ) from error
        return bits.numpy().tobytes()

    def _accept(self, token: int) -> bool:
        stopped = self.matcher.is_terminated()  # it complains of more tokens then
        accepted = not stopped and bool(self.matcher.accept_token(token))
        return accepted and not (self.matcher.is_terminated() and token in self.matcher.stop_token_ids)

    def _copy(self) -> Any:
        return self.matcher.fork()


class _LLGuidance(MatcherOfEngine):
    """`llguidance.LLMatcher`."""

    def _next(self) -> Any:
        return self.matcher.compute_bitmask()

    def _accept(self, token: int) -> bool:
        # It prints a warning when it is given a token that it does not accept.
        fits = not self.matcher.is_stopped() and self.matcher.validate_tokens([token]) == 1
        return fits and bool(self.matcher.consume_token(token))

    def _copy(self) -> Any:
        return self.matcher.deep_copy()


class _OutlinesCore(MatcherOfEngine):
    """`outlines_core.Guide`; a copy of it would hold the whole index once more."""

    def _next(self) -> Any:
        return self.matcher.get_tokens()

    def _accept(self, token: int) -> bool:
        accepted: bool = self.matcher.accepts_tokens([token])
        if accepted:
            self.matcher.advance(token, return_tokens=False)
        return accepted

    def _copy(self) -> Any:
        return None


class _OneTextProcessor(MatcherOfEngine):
    """A logits processor that masks, called once for each token of one text."""

    def __init__(self, processor: Callable[..., torch.Tensor], width: int, prompt: Sequence[int]) -> None:
        super().__init__(processor, width)
        self._ids = list(prompt)

    def _next(self) -> Any:
        out = self.matcher(torch.tensor([self._ids]), torch.zeros(1, self.width))[0]
        masked = out == -torch.inf
        if bool(((out != 0) & ~masked).any()):
            raise InputError.of(
                type(self.matcher).__name__,
                expected="a processor that masks ids and leaves the other scores as they are",
                got=f"changed scores, e.g. 0 → {float(out[(out != 0) & ~masked][0]):.3g}",
                remedy="Pass it to logits_processor= as it is, if it is a function of the ids.",
            )
        return ~masked

    def _accept(self, token: int) -> bool:
        accepted = bool(self.allowed()[token])
        self._ids.append(token)
        return accepted

    def _copy(self) -> Any:
        return None


def matcher_of(made: Any, width: int, prompt: Sequence[int]) -> MatcherOfEngine:
    """The matcher of a text that has just begun, of what an engine made; `prompt` are the ids before it.

    Raises:
        InputError: If it is no matcher.
    """
    if hasattr(made, "fill_next_token_bitmask") and hasattr(made, "accept_token"):
        return _XGrammar(made, width)
    if hasattr(made, "compute_bitmask") and hasattr(made, "consume_token"):
        return _LLGuidance(made, width)
    if hasattr(made, "get_tokens") and hasattr(made, "accepts_tokens"):
        return _OutlinesCore(made, width)
    if hasattr(made, "allowed") and hasattr(made, "advance"):
        return MatcherOfEngine(made, width)
    if callable(made):
        return _OneTextProcessor(made, width, prompt)
    raise InputError.of(
        "make",
        expected="a function that makes a matcher (xgrammar, llguidance, outlines_core, or one with allowed() and "
        "advance(token)) or a logits processor",
        got=f"one that makes {shown(made, 80)}",
        remedy="Pass e.g. ConstraintLogitsProcessor(lambda: xgrammar.GrammarMatcher(compiled_grammar)).",
    )


def _mask_of(allowed: Any, width: int) -> torch.Tensor:
    """`[V]`, bool: the ids of a mask, of a bit field (bytes, the lowest bit first), or of their numbers."""
    if isinstance(allowed, bytes):
        allowed = torch.from_numpy(np.unpackbits(np.frombuffer(allowed, np.uint8), bitorder="little")).bool()
    mask = torch.zeros(width, dtype=torch.bool)
    if isinstance(allowed, torch.Tensor) and allowed.dtype == torch.bool:
        known = min(width, len(allowed))
        mask[:known] = allowed[:known]
        return mask
    ids = torch.as_tensor(list(allowed), dtype=torch.int64)
    mask[ids[ids < width]] = True
    return mask
