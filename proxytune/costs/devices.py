"""Rough time of a forward pass from its work, accurate enough to choose a draft length.

A pass reads its weights, does two operations per parameter and token, and launches every layer. On a CPU these times
add up; on a GPU the host launches while the device computes, so the longer one counts. The figures are round numbers,
never measured at run time, so that a call drafts the same lengths, and gives the same text, on every device of a kind.
Pass your own `DraftCosts` to replace them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from proxytune.costs.roofline import PassBytes
from proxytune.costs.speculation import DraftCosts

__all__ = ["DECIDING", "DRAWING", "Machine", "Work", "draft_costs", "machine_of"]

DECIDING = 1.5e-3
"""Host overhead of one round, in seconds: verification, bookkeeping, realigning rows."""
DRAWING = 2e-4
"""Host overhead of one drafted token, in seconds."""


@dataclass(frozen=True)
class Work:
    """What one forward pass reads (`bytes`), and how many parameters and layers take part in it."""

    bytes: PassBytes
    parameters: float
    layers: int


@dataclass(frozen=True)
class Machine:
    """A kind of device.

    Attributes:
        bandwidth: Bytes per second.
        operations: Floating-point operations per second, in the matrix products of a decode step.
        launch: Host seconds per layer, in eager mode.
        at_once: Whether the host launches while the device computes.
    """

    bandwidth: float
    operations: float
    launch: float
    at_once: bool

    def seconds(self, work: Work, rows: int, positions: int = 1) -> float:
        """Seconds of one pass over `rows` rows of `positions` tokens each."""
        launched = work.layers * self.launch
        done = work.bytes.at(rows=rows) / self.bandwidth + 2.0 * work.parameters * rows * positions / self.operations
        return max(launched, done) if self.at_once else launched + done


_CPU = Machine(bandwidth=1e10, operations=5e10, launch=3e-4, at_once=False)
"""A few cores: computing ten more tokens takes about as long as reading float32 weights once more."""
_GPU = Machine(bandwidth=2e12, operations=3e14, launch=3e-4, at_once=True)
"""A data-centre GPU with a recent host: below 600 MB per layer, the host's launches take longer than reading."""


def machine_of(device: str) -> Machine:
    """The figures of a type of device, such as "cuda": a CPU's for "cpu", a GPU's for everything else."""
    return _CPU if device == "cpu" else _GPU


def draft_costs(
    machine: Machine,
    verifying: Sequence[Work],
    drafting: Work | None,
    rows: int,
    *,
    member: bool,
    plain: Sequence[Work] | None = None,
) -> DraftCosts:
    """The costs in seconds of a round of speculation over `rows` rows; arguments as in `DraftCosts.of_bytes`.

    `plain` are the passes of a step without drafts, if they are not those of a round.
    """
    ahead = 8  # average a position's cost over several: the first ones may hide behind the launches

    def together(positions: int) -> float:
        return sum(machine.seconds(work, rows, positions) for work in verifying)

    one = together(1)
    draft = 0.0 if drafting is None else machine.seconds(drafting, rows)
    return DraftCosts(
        one + DECIDING,
        draft + (DRAWING if drafting is not None else 0.0),
        (together(1 + ahead) - one) / ahead,
        plain=(one + draft if member else one) if plain is None else sum(machine.seconds(w, rows) for w in plain),
    )
