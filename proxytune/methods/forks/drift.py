"""Monitors the share of forks."""

from __future__ import annotations

import math

import torch

from proxytune.validation import finite, whole

__all__ = ["Watch"]


class Watch:
    """Counts forks, and compares their share with a band once per window; the band is that of `ForkThreshold`.

    At `inflation` 4, a window counts as a quarter of its tokens, as entropies of neighbours and of one prompt's rows
    are alike.
    """

    def __init__(
        self, share: float | None, *, window: int = 4096, margin: float = 0.02, inflation: float = 4.0
    ) -> None:
        """`share` is the target (None to count only), `window` in tokens; InputError if a value is out of range."""
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
        """Restart at zero."""
        self._recent: torch.Tensor | None = None  # [2], int64: forks and tokens since the last look
        self._before = (0, 0)
        self._unread = 0  # an upper bound of the tokens in `_recent`

    def add(self, forks: torch.Tensor, counted: torch.Tensor) -> tuple[float, int] | None:
        """Count the tokens of a step; returns (share, tokens) of a window that ends outside its band, else None.

        Waits for the device once per window.
        """
        new = torch.stack(((forks & counted).sum(), counted.sum()))  # [2]
        self._recent = new if self._recent is None else self._recent.to(new.device) + new
        self._unread += counted.numel()
        if self.band is None or self._unread < self._window:
            return None
        forked, tokens = self._recent.tolist()
        if tokens < self._window:  # not all of them counted
            self._unread = tokens
            return None
        self._before = (self._before[0] + forked, self._before[1] + tokens)
        self._recent, self._unread = None, 0
        share = forked / tokens
        return None if self.band[0] <= share <= self.band[1] else (share, tokens)

    def counts(self) -> tuple[int, int]:
        """Forks and tokens counted so far. Waits for the device."""
        forks, tokens = (0, 0) if self._recent is None else self._recent.tolist()
        return self._before[0] + forks, self._before[1] + tokens
