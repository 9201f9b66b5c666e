"""Tracks the generations in which a logits processor is called, by the prefixes alone, and records its steps.

A processor is given nothing but the ids so far. They show whether a text continues, whether a position is repeated
(assisted decoding verifies positions that the draft has asked about), and which rows have ended.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from proxytune.errors import InputError

__all__ = ["CallTracker", "ForkRecord"]


@dataclass(frozen=True, eq=False)
class ForkRecord:
    """The decisions of one generation; B rows, T generated positions.

    Attributes:
        entropy: `[B, T]`, float32, nats; NaN after a row's end, if the end-of-text tokens are known.
        fork: `[B, T]`, bool; False there.
        temperature: `[B, T]`, float32; NaN there.
    """

    entropy: torch.Tensor
    fork: torch.Tensor
    temperature: torch.Tensor


class CallTracker:
    """Follows the generations of one processor, one after the other.

    A prefix one id longer than the last continues its text; any other begins a new generation, unless it repeats a
    prefix of that text. Ids are compared only where the lengths leave it open, as comparing waits for the device.

    Attributes:
        asked_again: Whether some position was repeated since the last `reset`.
        keeps: Whether steps are recorded.
    """

    def __init__(self, *, keeps: bool) -> None:
        self.keeps = keeps
        self.reset()

    def reset(self) -> None:
        """Forget everything; the next call begins a generation."""
        self.asked_again = False
        self._last: torch.Tensor | None = None  # [B, T]: the ids of the last call
        self._begin(0)

    def _begin(self, start: int) -> None:
        self._start = start
        self._steps: list[tuple[torch.Tensor, ...]] = []
        self._mixed: torch.Tensor | None = None

    def follow(self, input_ids: torch.Tensor, ends: Sequence[int]) -> torch.Tensor | None:
        """Register a call with prefixes `[B, T]`; returns which rows `[B]` have not ended, None if `ends` is empty."""
        rows, length = input_ids.shape
        last = self._last
        if last is None or last.shape[0] != rows:
            self._begin(length)
        elif length == last.shape[1] + 1:
            if self.keeps:
                other = (input_ids[:, :-1] != last.to(input_ids.device)).any()
                self._mixed = other if self._mixed is None else self._mixed.to(other.device) | other
        elif self._start < length <= last.shape[1] and torch.equal(
            # The last id may differ: after a rejected draft the text continues differently.
            input_ids[:, : length - 1],
            last[:, : length - 1].to(input_ids.device),
        ):
            self.asked_again = True
            del self._steps[length - self._start :]
        else:
            self._begin(length)
        self._last = input_ids
        if not ends:
            return None
        generated = input_ids[:, self._start :]
        return ~torch.isin(generated, torch.tensor(list(ends), device=input_ids.device)).any(-1)

    def note(
        self, entropy: torch.Tensor, fork: torch.Tensor, temperature: torch.Tensor, live: torch.Tensor | None
    ) -> None:
        """Record a step, `[B]` each, if steps are recorded; rows outside `live` get NaN and no fork."""
        if not self.keeps:
            return
        if live is not None:
            entropy, temperature = (torch.where(live, x, torch.nan) for x in (entropy, temperature))
            fork = fork & live
        self._steps.append((entropy, fork, temperature))

    def record(self) -> ForkRecord:
        """The record of the last generation, on the device of the scores.

        Raises:
            InputError: If steps are not recorded, there are none yet, or two generations could not be told apart.
        """
        if not self.keeps or not self._steps:
            raise InputError.of(
                "record",
                expected="a generation with record=True",
                got="no generation yet" if self.keeps else "record=False",
                remedy="Pass record=True to the processor, and generate first.",
            )
        if self._mixed is not None and bool(self._mixed):
            raise InputError.of(
                "record",
                expected="one generation",
                got="two generations that look like one: the second's prompt is one token longer than the first's last "
                "text",
                remedy="Call reset() on the processor between them.",
            )
        device = self._steps[-1][0].device
        return ForkRecord(
            *(torch.stack([x.to(device) for x in column], 1) for column in zip(*self._steps, strict=True))
        )
