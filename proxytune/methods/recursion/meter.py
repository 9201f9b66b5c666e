"""What is measured of rows while they are decoded: log-probabilities, lengths, cycles, and the states they ended in.

The loop knows nothing of it: the last position's logits are seen by a hook on the model, the tokens by the list of
stopping criteria. Nothing waits for the device. What comes after a row's end does not count.
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
        lengths: `[R]`, int64: how many tokens, an EOS token among them.
        cycles: `[R]`, int64: the cycles that were used to predict them.
        states: `[R, D]`: the high-level state that each row's last token was predicted from; None if not kept.
    """

    def __init__(self, rows: int, transition: Transition, device: torch.device, *, keep_states: bool) -> None:
        """Start at 0.

        Args:
            rows: The number of rows R.
            transition: What tells cycles and states.
            device: Where the ids are.
            keep_states: Whether to keep the states.
        """
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
        """See the logits of every forward pass within the context.

        Args:
            model: The model.
        """

        def hook(module: Any, args: Any, outputs: Any) -> None:
            logits = outputs.logits
            # Of the logits of a whole prompt a copy, so that they can go.
            self._logits = logits[:, -1] if logits.shape[1] == 1 else logits[:, -1].clone()

        handle = model.register_forward_hook(hook)
        try:
            yield
        finally:
            handle.remove()
            self._logits = None

    def around(self, criteria: StoppingCriteriaList) -> StoppingCriteriaList:
        """The same criteria, which tell the meter of each step.

        Args:
            criteria: The criteria; they stay as they are.

        Returns:
            A new list.
        """
        return _Metered(criteria, self)

    def count(self, tokens: torch.Tensor, done: torch.Tensor) -> None:
        """Count one step.

        Args:
            tokens: `[R]`, int64: what was drawn.
            done: `[R]`, bool: which rows are at their end.

        Raises:
            UnsupportedModeError: If the model ran without the transition.
        """
        logits, used, state = self._logits, self._transition.used, self._transition.state
        self._logits = self._transition.used = self._transition.state = None
        if logits is None or used is None or state is None:
            raise UnsupportedModeError.of(
                "stochastic recursion",
                expected="forward passes in which every cycle goes through the transition",
                got="one that went past it",
                remedy="Run the model as it is, not compiled; if the adapter is your own, see that it calls the "
                "transition in the last cycle too.",
            )
        device, going = self.lengths.device, self._going
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
        own = wide.gather(1, tokens.to(wide.device)[:, None])[:, 0].to(device, torch.float64)
        self.logprobs += torch.where(going, own, 0.0)
        self.lengths += going
        self.cycles += torch.where(going, used.to(device), 0)
        if self._keep_states:
            kept = state if self.states is None else self.states
            self.states = torch.where(going.to(state.device)[:, None], state, kept)
        self._going = going & ~done.to(device)


class _Metered(StoppingCriteriaList):
    """Criteria that tell a meter what came, and what they said to it."""

    def __init__(self, criteria: StoppingCriteriaList, meter: Meter) -> None:
        super().__init__(criteria)
        self._meter = meter

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> Any:
        done = super().__call__(input_ids, scores, **kwargs)
        self._meter.count(input_ids[:, -1], done)
        return done
