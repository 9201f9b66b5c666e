"""Texts of a batch whose rows differ in length, viewed as rectangles for processors and stopping criteria.

Those expect all rows to have the same number of generated tokens. `RaggedText.upto(step)` is the batch at any such
number: longer rows are cut, shorter ones padded, and results for the padded rows are ignored.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

__all__ = ["RaggedText"]


class RaggedText:
    """Prompts and the tokens generated after each.

    Attributes:
        prompts: `[B, T]`, int64, padded at the left.
        counts: Generated tokens of each row.
        lengths: `[B]`, int64: the same on the device.
        pad: The id that fills the space after a row's end.
    """

    def __init__(self, prompts: torch.Tensor, most: int, pad: int) -> None:
        """Start with the prompts alone; a row may get `most` tokens."""
        self.prompts = prompts
        self.counts = [0] * prompts.shape[0]
        self.lengths = torch.zeros(prompts.shape[0], dtype=torch.int64, device=prompts.device)
        self.pad = pad
        self._most = most
        self._tokens = prompts.new_full((prompts.shape[0], most), pad)  # [B, most]

    def upto(self, step: int) -> torch.Tensor:
        """The batch `[B, T + step]`, int64, with `step` generated tokens in each row."""
        return torch.cat([self.prompts, self._tokens[:, :step]], 1)

    def steps(self, new: range, going: Sequence[bool]) -> list[int]:
        """The distinct lengths `count + j` of unfinished rows for j in `new`, in order, none above the maximum."""
        lengths = {n + j for n, on in zip(self.counts, going, strict=True) if on for j in new}
        return sorted(n for n in lengths if n <= self._most)

    def written(self, new: torch.Tensor) -> RaggedText:
        """A copy with `new` `[B, N]` written after each row's text (ids below 0 are skipped); the counts stay."""
        out = RaggedText.__new__(RaggedText)
        out.prompts, out.counts, out.lengths = self.prompts, self.counts, self.lengths
        out.pad, out._most = self.pad, self._most
        column = self.lengths[:, None] + torch.arange(new.shape[1], device=new.device)
        wide = torch.nn.functional.pad(self._tokens, (0, new.shape[1]), value=self.pad)
        wide = wide.scatter(1, column, new.where(new >= 0, self.pad))
        out._tokens = wide[:, : self._most]
        return out

    def accept(self, new: torch.Tensor, counts: list[int]) -> None:
        """Append the first tokens of `new` `[B, N]` to each row, so that it has `counts` tokens from now on."""
        tokens = self.written(new)._tokens
        self.counts = counts
        self.lengths = torch.tensor(counts, device=self.prompts.device)
        beyond = torch.arange(self._most, device=tokens.device) >= self.lengths[:, None]
        self._tokens = tokens.masked_fill(beyond, self.pad)

    def last(self) -> torch.Tensor:
        """The last generated token of each row, `[B, 1]`, int64; each row has one."""
        return self._tokens.gather(1, self.lengths[:, None] - 1)

    def column(self, step: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Which of `columns` new positions of each row gives it `step` tokens.

        Returns:
            `[B]`, int64: the column, clamped to the existing ones; `[B]`, bool: whether it exists.
        """
        column = step - self.lengths
        inside = column.clamp(0, columns - 1)
        return inside, column == inside
