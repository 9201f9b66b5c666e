"""Where in a generation a logits processor is called, told from the prefixes alone, and what it notes on the way.

`generate()` tells a processor nothing but the ids so far. They say when a text goes on, when a position is asked again
(assisted decoding verifies what a draft has asked before), and which rows have ended.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from proxytune.errors import InputError

__all__ = ["CallTracker", "ForkRecord"]


@dataclass(frozen=True, eq=False)
class ForkRecord:
    """What was decided at each step of one generation; B rows, T generated positions.

    Attributes:
        entropy: `[B, T]`, float32, nats; NaN after a row has ended, where its end is known.
        fork: `[B, T]`, bool; False there.
        temperature: `[B, T]`, float32; NaN there.
    """

    entropy: torch.Tensor
    fork: torch.Tensor
    temperature: torch.Tensor


class CallTracker:
    """Follows the generations of one processor, one after the other.

    A text goes on when there is one id more than before; anything else begins a new generation, unless it repeats a
    text that has been seen already. Ids are compared only where the lengths leave it open, since comparing waits for
    the device.

    Attributes:
        asked_again: Whether some position was asked more than once since the last `reset`.
        keeps: Whether steps are noted.
    """

    def __init__(self, *, keeps: bool) -> None:
        """Start before the first generation.

        Args:
            keeps: Whether to note the steps.
        """
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
        """Take a call in.

        Args:
            input_ids: The whole prefix, `[B, T]`, int64.
            ends: The end-of-text tokens; empty if they are not known.

        Returns:
            `[B]`, bool: which rows have not ended; None if that is not known.
        """
        rows, length = input_ids.shape
        last = self._last
        if last is None or last.shape[0] != rows:
            self._begin(length)
        elif length == last.shape[1] + 1:
            if self.keeps:
                other = (input_ids[:, :-1] != last.to(input_ids.device)).any()
                self._mixed = other if self._mixed is None else self._mixed.to(other.device) | other
        elif self._start < length <= last.shape[1] and torch.equal(
            # The last id may be another: where a draft was rejected, the text goes on differently.
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
        """Note a step, if steps are noted.

        Args:
            entropy: `[B]`, nats.
            fork: `[B]`, bool.
            temperature: `[B]`.
            live: `[B]`, bool: which rows have not ended; None for all.
        """
        if not self.keeps:
            return
        if live is not None:
            entropy, temperature = (torch.where(live, x, torch.nan) for x in (entropy, temperature))
            fork = fork & live
        self._steps.append((entropy, fork, temperature))

    def record(self) -> ForkRecord:
        """What was noted in the generation that was followed last.

        Returns:
            The record, on the device of the scores.

        Raises:
            InputError: If steps are not noted, there are none yet, or two generations could not be told apart.
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
                got="two that follow each other as if one text went on: the second's prompt is one token longer than "
                "the first's last text",
                remedy="Call reset() on the processor between them.",
            )
        device = self._steps[-1][0].device
        return ForkRecord(
            *(torch.stack([x.to(device) for x in column], 1) for column in zip(*self._steps, strict=True))
        )
