"""How members' logits enter the sum: weights, and where a formula needs them, offsets and floors."""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import c_float
from dataclasses import dataclass
from functools import lru_cache

import torch

__all__ = ["Combination", "Weights", "in_float32"]


@dataclass(frozen=True, eq=False)
class Combination:
    """Weights with offsets and floors, to be passed as `weights` to `step`, `verify`, `draw_logprobs` and `combine`.

    A row's logits are `Σ w_i (z_i − offset_i)`, forbidden (−inf) where the raw logit of one member is below the row's
    floor. The rules for −inf, NaN and widths are those of plain weights (`proxytune.formulas.shift.shift`).

    Offsets of `log_normalisers` turn a member's logits into log-probabilities; floors of `floor_of_top` and
    `floor_of_nucleus` are plausibility masks (contrastive decoding, arXiv 2210.15097; DExperts, 2105.03023). Take them
    from the members' full rows, before columns are cut off.

    Attributes:
        weights: One finite number of any sign per member, the base's first; or float32 `[B, M]`, e.g. for a gate: `(w,
            …)` in open rows, `(1, 0, …)` in shut ones.
        offsets: `[B, M]`, float32: what is subtracted from each member's logits; None for 0. −inf, the normaliser of a
            row of −inf only, subtracts nothing; NaN or +inf gives a row of NaN if the member has a weight.
        floors: `[B]`, float32: the least raw logit that is allowed; None or −inf for no floor. Ids past that member's
            width are below every other floor. NaN gives a row of NaN.
        floored_by: The member that `floors` look at, 0 for the base. It needs no weight; NaN or +inf in it gives NaN.
            In rows without a floor it is not looked at.
    """

    weights: Sequence[float] | torch.Tensor
    offsets: torch.Tensor | None = None
    floors: torch.Tensor | None = None
    floored_by: int = 0

    def pick(self, index: torch.Tensor | slice) -> Combination:
        """The same for the rows `index`, int64 `[N]`, repeats allowed, or a slice of rows."""

        def of(x: torch.Tensor) -> torch.Tensor:
            return x[index] if isinstance(index, slice) else x.index_select(0, index)

        return Combination(
            of(self.weights) if isinstance(self.weights, torch.Tensor) else self.weights,
            None if self.offsets is None else of(self.offsets),
            None if self.floors is None else of(self.floors),
            self.floored_by,
        )


Weights = Sequence[float] | torch.Tensor | Combination
"""Numbers, one per member; float32 `[B, M]`; or a Combination."""


def in_float32(weights: Weights) -> Combination:
    """As a Combination of contiguous tensors, numbers rounded to float32 as the kernels read them: 1e-50 becomes 0."""
    if isinstance(weights, tuple):
        return _of_numbers(weights)
    c = weights if isinstance(weights, Combination) else Combination(weights)
    w = c.weights
    return Combination(
        w.contiguous() if isinstance(w, torch.Tensor) else tuple(c_float(x).value for x in w),
        None if c.offsets is None else c.offsets.contiguous(),
        None if c.floors is None else c.floors.contiguous(),
        c.floored_by,
    )


@lru_cache(maxsize=64)  # a loop has the same weights in each step
def _of_numbers(weights: tuple[float, ...]) -> Combination:
    return Combination(tuple(c_float(x).value for x in weights))
