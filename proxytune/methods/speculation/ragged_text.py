"""The texts of a batch whose rows have come differently far, laid out as in a loop in which they go together.

Processors and stopping criteria take a rectangle of ids in which all rows have the same number of generated tokens.
`RaggedText.upto(step)` is that rectangle for any number of tokens: rows that have more are cut, rows that have fewer
are filled up with padding, and what is said of them does not count.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

__all__ = ["RaggedText"]


class RaggedText:
    """Prompts and what was generated after each.

    Attributes:
        prompts: `[B, T]`, int64, padded at the left.
        counts: How many tokens each row has got.
        lengths: `[B]`, int64: the same on the device.
        pad: What stands behind a row's end.
    """

    def __init__(self, prompts: torch.Tensor, most: int, pad: int) -> None:
        """Begin with the prompts alone.

        Args:
            prompts: `[B, T]`, int64.
            most: How many tokens a row may get.
            pad: What stands behind a row's end.
        """
        self.prompts = prompts
        self.counts = [0] * prompts.shape[0]
        self.lengths = torch.zeros(prompts.shape[0], dtype=torch.int64, device=prompts.device)
        self.pad = pad
        self._most = most
        self._tokens = prompts.new_full((prompts.shape[0], most), pad)  # [B, most]

    def upto(self, step: int) -> torch.Tensor:
        """The batch as it stands when each row has got so many tokens.

        Args:
            step: How many.

        Returns:
            `[B, T + step]`, int64.
        """
        return torch.cat([self.prompts, self._tokens[:, :step]], 1)

    def steps(self, new: range, going: Sequence[bool]) -> list[int]:
        """The numbers of generated tokens that some row has when each gets so many more.

        Args:
            new: How many more tokens; 0 is for those it has.
            going: Which rows go on; the others do not count.

        Returns:
            In order; none above the most that a row may get.
        """
        found = {n + j for n, on in zip(self.counts, going, strict=True) if on for j in new}
        return sorted(n for n in found if n <= self._most)

    def written(self, new: torch.Tensor) -> RaggedText:
        """The same texts with something behind them, such as drafts.

        Args:
            new: `[B, N]`, int64; below 0 for nothing.

        Returns:
            New texts, with the counts of these.
        """
        out = RaggedText.__new__(RaggedText)
        out.prompts, out.counts, out.lengths = self.prompts, self.counts, self.lengths
        out.pad, out._most = self.pad, self._most
        column = self.lengths[:, None] + torch.arange(new.shape[1], device=new.device)
        wide = torch.nn.functional.pad(self._tokens, (0, new.shape[1]), value=self.pad)
        wide = wide.scatter(1, column, new.where(new >= 0, self.pad))
        out._tokens = wide[:, : self._most]
        return out

    def accept(self, new: torch.Tensor, counts: list[int]) -> None:
        """Take over what follows the texts, of each row its own number of tokens.

        Args:
            new: `[B, N]`, int64, behind each row's text.
            counts: How many tokens each row has from now on.
        """
        tokens = self.written(new)._tokens
        self.counts = counts
        self.lengths = torch.tensor(counts, device=self.prompts.device)
        beyond = torch.arange(self._most, device=tokens.device) >= self.lengths[:, None]
        self._tokens = tokens.masked_fill(beyond, self.pad)

    def last(self) -> torch.Tensor:
        """The last generated token of each row.

        Returns:
            `[B, 1]`, int64; each row has one.
        """
        return self._tokens.gather(1, self.lengths[:, None] - 1)

    def column(self, step: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Where among the next positions of each row it has so many tokens.

        Args:
            step: How many tokens.
            columns: How many positions there are: the first is that behind the text.

        Returns:
            `[B]`, int64: the position, clamped to those there are; `[B]`, bool: whether it is one of them.
        """
        column = step - self.lengths
        inside = column.clamp(0, columns - 1)
        return inside, column == inside
