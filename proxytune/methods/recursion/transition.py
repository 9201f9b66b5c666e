"""The stochastic transition of a recursion: keyed noise at the high-level state, and halting per position."""

from __future__ import annotations

from collections.abc import Collection

import torch

from proxytune.errors import InputError, UnsupportedModeError
from proxytune.ops.noise import LATENT, Noise, slotted

__all__ = ["Transition"]

_SLOT = 16
"""The slot of the stream `LATENT` for high-level states."""
_INDICES = 1 << 27
_AT_ONCE = 1 << 21
"""Variates drawn at a time: each takes 32 bytes of random words, and a prompt has millions."""


class Transition:
    """`h' = u + σ · rms(u) · n` for the rows of one batch, and the state of their recursion in one forward pass.

    A position halts once its state changes little from one cycle to the next: `rms(h_c − h_{c−1}) < halt · rms(h_c)`.
    It keeps that state in the remaining cycles, without further noise. Noise counts as change.

    Attributes:
        cycles: Number of cycles in a forward pass.
        used: `[R]`, int64: how many of them the last position of the last forward pass used.
        state: `[R, D]`: its state after the last cycle.
    """

    def __init__(
        self, noise: Noise, *, sigma: float, at: Collection[int], cycles: int, size: int, halt: float | None = None
    ) -> None:
        """`noise` has the keys of the R rows (positions unused); noise is added after the cycles in `at`, from 0.

        Raises:
            InputError: If the states have more coordinates than the noise stream has variates.
        """
        if cycles * size > _INDICES:
            raise InputError.of(
                "a recursion",
                expected=f"at most {_INDICES} state coordinates (cycles · hidden size) per position",
                got=f"{cycles} cycles of hidden size {size}",
                remedy="Check cycles() and state_size() of the adapter.",
            )
        self.cycles = cycles
        self.used: torch.Tensor | None = None
        self.state: torch.Tensor | None = None
        self._noise = noise
        self._sigma = sigma
        self._at = frozenset(at)
        self._size = size
        self._halt = halt
        self._before: torch.Tensor | None = None  # [R, T, D], the state after the previous cycle
        self._halted: torch.Tensor | None = None  # [R, T, 1], bool
        self._used: torch.Tensor | None = None  # [R, T, 1], int64

    def __call__(self, state: torch.Tensor, *, cycle: int, positions: torch.Tensor) -> torch.Tensor:
        """The state to continue with after a cycle.

        Args:
            state: u, `[R, T, D]`, the high-level module's output in this cycle.
            cycle: The number of the cycle, from 0.
            positions: `[1, T]` or `[R, T]`, int64, of the tokens, padding not counted.

        Returns:
            `[R, T, D]`, of the same dtype; u itself if there is no noise in this cycle and nothing has halted.

        Raises:
            UnsupportedModeError: If the shapes show a forward pass of other rows or another model.
        """
        self._check(state, cycle, positions)
        out = state
        if self._sigma and cycle in self._at:
            n = self._variates(positions.to(state.device).expand(state.shape[:2]), cycle)
            out = state + (self._sigma * _rms(state) * n).to(state.dtype)
        if self._halt is not None:
            out = self._with_halting(out, cycle)
        if cycle == self.cycles - 1:
            self.state = out[:, -1]
            self.used = (
                torch.full(out.shape[:1], self.cycles, device=out.device)
                if self._used is None
                else self._used[:, -1, 0]
            )
            self._before = self._halted = self._used = None
        return out

    def _with_halting(self, state: torch.Tensor, cycle: int) -> torch.Tensor:
        if cycle == 0 or self._before is None or self._halted is None or self._used is None:
            self._halted = torch.zeros_like(state[..., :1], dtype=torch.bool)
            self._used = torch.ones_like(self._halted, dtype=torch.int64)
            self._before = state
            return state
        assert self._halt is not None
        state = torch.where(self._halted, self._before, state)
        self._used = self._used + (~self._halted).long()
        self._halted = self._halted | (_rms(state - self._before) < self._halt * _rms(state))
        self._before = state
        return state

    def _variates(self, positions: torch.Tensor, cycle: int) -> torch.Tensor:
        """`[R, T, D]`, float32."""
        if self._noise.row.device != positions.device:
            keys = (self._noise.seed, self._noise.row, self._noise.position, self._noise.branch)
            self._noise = Noise(*(key.to(positions.device) for key in keys))
        rows, length = positions.shape
        noise, flat = self._noise, positions.reshape(-1)
        seed, row, branch = (x.repeat_interleave(length) for x in (noise.seed, noise.row, noise.branch))
        coordinates = torch.arange(self._size, device=positions.device) + cycle * self._size
        index = slotted(_SLOT, coordinates)[None]  # [1, D]
        out = torch.empty(rows * length, self._size, device=positions.device)
        step = max(1, _AT_ONCE // self._size)
        for start in range(0, len(out), step):
            part = slice(start, start + step)
            out[part] = Noise(seed[part], row[part], flat[part], branch[part]).normal(index, LATENT)
        return out.view(rows, length, self._size)

    def _check(self, state: torch.Tensor, cycle: int, positions: torch.Tensor) -> None:
        rows = len(self._noise.row)
        fits = state.ndim == 3 and state.shape[0] == rows and state.shape[2] == self._size
        fits = fits and positions.ndim == 2 and positions.shape[0] in (1, rows) and 0 <= cycle < self.cycles
        if not fits or positions.shape[1] != state.shape[1]:
            raise UnsupportedModeError.of(
                "a forward pass during stochastic recursion",
                expected=f"states [{rows}, T, {self._size}], positions [1 or {rows}, T], cycles below {self.cycles}",
                got=f"{list(state.shape)}, {list(positions.shape)}, cycle {cycle}",
                remedy="Let nothing else (another thread, a logits processor) run this model, or fix the adapter.",
            )


def _rms(x: torch.Tensor) -> torch.Tensor:
    """Root mean square over the last dimension, which is kept; float32."""
    return x.float().square().mean(-1, keepdim=True).sqrt()
