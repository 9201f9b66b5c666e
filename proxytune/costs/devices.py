"""How long a forward pass takes, roughly, from what it has to do: enough to choose a draft length by.

A pass reads its weights, does two operations per parameter and token, and every layer of it has to be launched. On a
CPU these come one after the other; on a GPU the host launches while the device works, so the longer of the two counts.
The figures are round ones for a kind of device, never measured at run time: the same call drafts the same lengths, and
so gives the same text, wherever it runs on that kind. `DraftCosts` of one's own take their place.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from proxytune.costs.roofline import PassBytes
from proxytune.costs.speculation import DraftCosts

__all__ = ["DECIDING", "DRAWING", "Machine", "Work", "draft_costs", "machine_of"]

DECIDING = 1.5e-3
"""Seconds that a round takes the host beside its passes: the verdict, what stands of it, rows brought in line."""
DRAWING = 2e-4
"""Seconds that a drafted token takes beside its pass."""


@dataclass(frozen=True)
class Work:
    """What a pass of a model has to do.

    Attributes:
        bytes: What it has to read.
        parameters: How many numbers take part in it.
        layers: How many layers it has.
    """

    bytes: PassBytes
    parameters: float
    layers: int


@dataclass(frozen=True)
class Machine:
    """A kind of device.

    Attributes:
        bandwidth: Bytes per second.
        operations: Floating-point operations per second, in the products of a decode step.
        launch: Seconds per layer that the host is busy, in eager mode.
        at_once: Whether the host launches while the device works.
    """

    bandwidth: float
    operations: float
    launch: float
    at_once: bool

    def seconds(self, work: Work, rows: int, positions: int = 1) -> float:
        """What a pass takes.

        Args:
            work: What it has to do.
            rows: B.
            positions: Tokens of each row.

        Returns:
            Seconds.
        """
        launched = work.layers * self.launch
        done = work.bytes.at(rows=rows) / self.bandwidth + 2.0 * work.parameters * rows * positions / self.operations
        return max(launched, done) if self.at_once else launched + done


_CPU = Machine(bandwidth=1e10, operations=5e10, launch=3e-4, at_once=False)
"""A few cores: ten further tokens take about as long as reading the weights once more."""
_GPU = Machine(bandwidth=2e12, operations=3e14, launch=3e-4, at_once=True)
"""A data-centre GPU with a recent host: below 600 MB per layer, eager mode waits for the host."""


def machine_of(device: str) -> Machine:
    """The figures of a kind of device.

    Args:
        device: The type of a device, such as "cuda".

    Returns:
        Those of a CPU, or of a GPU for everything else.
    """
    return _CPU if device == "cpu" else _GPU


def draft_costs(
    machine: Machine, verifying: Sequence[Work], drafting: Work | None, rows: int, *, member: bool
) -> DraftCosts:
    """What a round of speculation takes.

    Args:
        machine: Where it runs.
        verifying: The members that verify: base and antiexpert if the expert drafts, all otherwise.
        drafting: The draft; None for one without a model.
        rows: B.
        member: Whether the draft is a member of the composition, so that a plain step needs it too.

    Returns:
        Seconds.
    """
    ahead = 8  # a position's price is taken over some: the first ones may hide behind the launches

    def together(positions: int) -> float:
        return sum(machine.seconds(work, rows, positions) for work in verifying)

    one = together(1)
    draft = 0.0 if drafting is None else machine.seconds(drafting, rows)
    return DraftCosts(
        one + DECIDING,
        draft + (DRAWING if drafting is not None else 0.0),
        (together(1 + ahead) - one) / ahead,
        plain=one + draft if member else one,
    )
