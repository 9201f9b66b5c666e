"""The share of forks, watched."""

from __future__ import annotations

import math

import torch

from proxytune.validation import finite, whole

__all__ = ["Watch"]


class Watch:
    """A count of forks, and a look at their share once per window.

    The band is `share ± (margin + 4 · √(inflation · share (1 − share) / window))`. `inflation` makes room for tokens
    not being independent: entropies of neighbours, and of the rows of one prompt, are alike. At 4 a window is worth a
    quarter of its tokens.
    """

    def __init__(
        self, share: float | None, *, window: int = 4096, margin: float = 0.02, inflation: float = 4.0
    ) -> None:
        """Start at zero.

        Args:
            share: What the share of forks should be; None to count only.
            window: After how many tokens the share is looked at.
            margin: How far it may be off apart from noise.
            inflation: By how much the variance of a share exceeds that of independent tokens; ≥ 1.

        Raises:
            InputError: If a value is out of its range.
        """
        window = whole("window", window, least=1, remedy="Pass e.g. window=4096.")
        inflation = finite("inflation", inflation, least=1.0, remedy="Leave it out for the default.")
        margin = finite("margin", margin, least=0.0, remedy="Leave it out for the default.")
        self._share, self._window = share, window
        self.band: tuple[float, float] | None = None
        if share is not None:
            half = margin + 4 * math.sqrt(inflation * share * (1 - share) / window)
            self.band = max(0.0, share - half), min(1.0, share + half)
        self.clear()

    def clear(self) -> None:
        """Start again at zero."""
        self._recent: torch.Tensor | None = None  # [2], int64: forks and tokens since the last look
        self._before = (0, 0)
        self._unread = 0  # at most so many tokens are in `_recent`

    def add(self, forks: torch.Tensor, counted: torch.Tensor) -> tuple[float, int] | None:
        """Count the tokens of a step. Waits for the device once per window.

        Args:
            forks: `[...]`, bool.
            counted: `[...]`, bool: which tokens count.

        Returns:
            The share of forks in the window and its length in tokens, when one ends outside of its band; else None.
        """
        new = torch.stack(((forks & counted).sum(), counted.sum()))  # [2]
        self._recent = new if self._recent is None else self._recent.to(new.device) + new
        self._unread += counted.numel()
        if self.band is None or self._unread < self._window:
            return None
        found, tokens = self._recent.tolist()
        if tokens < self._window:  # not all of them counted
            self._unread = tokens
            return None
        self._before = (self._before[0] + found, self._before[1] + tokens)
        self._recent, self._unread = None, 0
        share = found / tokens
        return None if self.band[0] <= share <= self.band[1] else (share, tokens)

    def counts(self) -> tuple[int, int]:
        """How many forks and tokens were counted so far. Waits for the device.

        Returns:
            Forks, and tokens in all.
        """
        found, tokens = (0, 0) if self._recent is None else self._recent.tolist()
        return self._before[0] + found, self._before[1] + tokens
