"""Measures rows while they are decoded: log-probabilities, lengths, cycles, and final states.

The loop is not involved: a hook on the model reads the last position's logits, the stopping criteria see the tokens.
Nothing waits for the device. What comes after a row's end does not count.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import StoppingCriteriaList

from proxytune.errors import UnsupportedModeError
from proxytune.methods.recursion.transition import Transition

__all__ = ["Meter"]


class Meter:
    """Sums over each row's generated tokens, up to its end.

    Attributes:
        logprobs: `[R]`, float64, nats: of the tokens under the model's own distribution at temperature 1.
        lengths: `[R]`, int64: number of tokens, an EOS token included.
        cycles: `[R]`, int64: cycles used to predict them.
        states: `[R, D]`: the high-level state that each row's last token was predicted from; None if not kept.
    """

    def __init__(self, rows: int, transition: Transition, device: torch.device, *, keep_states: bool) -> None:
        self.logprobs = torch.zeros(rows, dtype=torch.float64, device=device)
        self.lengths = torch.zeros(rows, dtype=torch.int64, device=device)
        self.cycles = torch.zeros(rows, dtype=torch.int64, device=device)
        self.states: torch.Tensor | None = None
        self._going = torch.ones(rows, dtype=torch.bool, device=device)
        self._transition = transition
        self._keep_states = keep_states
        self._logits: torch.Tensor | None = None

    @contextmanager
    def watching(self, model: Any) -> Iterator[None]:
        """Read the logits of every forward pass within the context."""

        def hook(module: Any, args: Any, outputs: Any) -> None:
            logits = outputs.logits
            # A copy of a prompt's last position, so that the memory of the others is freed.
            self._logits = logits[:, -1] if logits.shape[1] == 1 else logits[:, -1].clone()

        handle = model.register_forward_hook(hook)
        try:
            yield
        finally:
            handle.remove()
            self._logits = None

    def around(self, criteria: StoppingCriteriaList) -> StoppingCriteriaList:
        """The same criteria in a new list that reports each step to the meter."""
        return _Metered(criteria, self)

    def count(self, tokens: torch.Tensor, done: torch.Tensor) -> None:
        """Count one step's tokens `[R]`; `done` `[R]` marks the rows that end with it.

        Raises:
            UnsupportedModeError: If the model ran without the transition.
        """
        logits, used, state = self._logits, self._transition.used, self._transition.state
        self._logits = self._transition.used = self._transition.state = None
        if logits is None or used is None or state is None:
            raise UnsupportedModeError.of(
                "stochastic recursion",
                expected="forward passes that call the transition in every cycle",
                got="a pass that did not call it in the last cycle",
                remedy="Run the model uncompiled; your own adapter has to call the transition in the last cycle too.",
            )
        device, going = self.lengths.device, self._going
        logprobs = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
        chosen = logprobs.gather(1, tokens.to(logprobs.device)[:, None])[:, 0].to(device, torch.float64)
        self.logprobs += torch.where(going, chosen, 0.0)
        self.lengths += going
        self.cycles += torch.where(going, used.to(device), 0)
        if self._keep_states:
            kept = state if self.states is None else self.states
            self.states = torch.where(going.to(state.device)[:, None], state, kept)
        self._going = going & ~done.to(device)


class _Metered(StoppingCriteriaList):
    """Criteria that report each step's tokens and ends to a meter."""

    def __init__(self, criteria: StoppingCriteriaList, meter: Meter) -> None:
        super().__init__(criteria)
        self._meter = meter

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> Any:
        done = super().__call__(input_ids, scores, **kwargs)
        self._meter.count(input_ids[:, -1], done)
        return done
