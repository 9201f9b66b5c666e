"""A formula over a model's members: from their rows of logits to the weights of `ops.step`.

Roles that are the same member (model, prompt and adapter alike) are one here, with their weights added. A plain shift
gives plain numbers. Schedules, gates, log-probabilities and masks give tensors, measured on the members' full rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from proxytune import ops
from proxytune.errors import InputError
from proxytune.formulas.base import Term, terms_of
from proxytune.formulas.gates import Gate
from proxytune.formulas.plausibility import Plausibility
from proxytune.formulas.schedules import Schedule, Strength, strength_at
from proxytune.ops.combination import Combination, Weights
from proxytune.ops.entropy import entropy

__all__ = ["Weighing", "is_open", "opens", "picked", "weights_on"]


class Weighing:
    """What a formula makes of the members' rows.

    Attributes:
        numbers: One weight per member, the base's first; of schedules, at the first generated token.
        scheduled: Whether weights depend on how many tokens were generated.
        gate: Where the shift applies; None for everywhere.
        masked: Whether a mask leaves out tokens.
        needed: For each member, whether it has to run: a term of weight 0 does not, unless a mask looks at it.
        idle: The members that do not.
        plain: Whether the numbers are all there is to it.
        gated: Whether the numbers and a gate are.
    """

    def __init__(self, formula: Any, index: Mapping[str, int]) -> None:
        """Bind a formula to members; `index` is role → member.

        Raises:
            InputError: If one member's logits and log-probabilities are both in the sum.
        """
        count = max(index.values()) + 1
        self._weights: list[Strength] = [0.0] * count
        logs: dict[int, bool] = {}
        for term in terms_of(formula):
            i = index[term.member]
            self._weights[i] = self._weights[i] + term.weight
            if logs.setdefault(i, term.log) != term.log:
                raise _mixed(term)
        self.numbers = tuple(w.first if isinstance(w, Schedule) else w for w in self._weights)
        self.scheduled = any(isinstance(w, Schedule) for w in self._weights)
        self._logs = [i for i, log in sorted(logs.items()) if log]
        self.gate = getattr(formula, "gate", None)
        mask: Plausibility | None = getattr(formula, "mask", None)
        self._mask = mask
        self._masked_by = None if mask is None else index[mask.of]
        self.masked = mask is not None
        self.needed = tuple(
            i == 0 or i == self._masked_by or isinstance(w, Schedule) or w != 0.0 for i, w in enumerate(self._weights)
        )
        self.idle = tuple(i for i, needed in enumerate(self.needed) if not needed)
        if not self.scheduled and mask is None and not any(self.numbers[1:]) and self.numbers[0] == 1.0:
            self._logs = []  # the base alone: its log-probabilities are its logits up to a constant
        numbers = not (self.scheduled or self._logs or mask)
        self.plain, self.gated = numbers and self.gate is None, numbers and self.gate is not None

    def __call__(
        self,
        rows: Sequence[torch.Tensor | None],
        generated: torch.Tensor | None = None,
        opened: torch.Tensor | None = None,
    ) -> tuple[list[torch.Tensor], Weights]:
        """The rows of the members that ran, and their weights.

        Args:
            rows: Raw logits `[N, V_i]` of each member, whole rows; None for one that did not run.
            generated: `[N]`, int64: how many tokens were generated before each row's; needed by schedules.
            opened: `[N]`, bool: what `open` says of the base's rows, where that is known.
        """
        here = [i for i, x in enumerate(rows) if x is not None]
        found = [x for x in rows if x is not None]
        if self.plain:
            return found, tuple(self.numbers[i] for i in here)
        if self.leaves(rows, opened):
            return found, (1.0,)
        base, count, device = found[0], len(found[0]), found[0].device
        weights: Sequence[float] | torch.Tensor = [self.numbers[i] for i in here]
        if self.scheduled:
            at = torch.zeros(count, dtype=torch.int64, device=device) if generated is None else generated.to(device)
            weights = torch.stack([strength_at(self._weights[i], at) for i in here], -1)  # [N, M]
        offsets = floors = None
        if logs := [n for n, i in enumerate(here) if i in self._logs]:
            columns = [ops.log_normalisers(x).to(device) if n in logs else None for n, x in enumerate(found)]
            zero = torch.zeros(count, device=device)
            offsets = torch.stack([zero if x is None else x for x in columns], -1)  # [N, M]
        mask = self._mask
        if mask is not None and self._masked_by in here:
            x = found[here.index(self._masked_by)]
            floors = _floors(mask, x).to(device)  # [N]
        if self.gate is not None:
            shut = ~(self.open(base) if opened is None else opened.to(device))[:, None]  # [N, 1]
            if not isinstance(weights, torch.Tensor):
                weights = torch.tensor([weights], dtype=torch.float32, device=device)
            alone = torch.tensor([1.0] + [0.0] * (len(found) - 1), device=device)
            weights = torch.where(shut, alone, weights).contiguous()
            floors = None if floors is None else floors.masked_fill(shut[:, 0], -torch.inf)
        by = here.index(self._masked_by) if floors is not None and self._masked_by is not None else 0
        return found, Combination(weights, offsets, floors, by)

    def combined(
        self,
        members: Sequence[torch.Tensor | None],
        generated: torch.Tensor | None = None,
        opened: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The combined logits `[B, K, V]`, float32, of members' `[B, K, V_i]`; the others are `[B, K]`."""
        if (self.plain and self.numbers[0] == 1.0) or self.leaves(members, opened):
            ran = [i for i, x in enumerate(members) if x is not None]
            found = [x for x in members if x is not None]
            return ops.combine(found, [self.numbers[i] for i in ran[1:]])
        flat = [None if x is None else x.flatten(0, 1) for x in members]
        of_row = [None if x is None else x.flatten() for x in (generated, opened)]
        rows, weights = self(flat, *of_row)
        if not isinstance(weights, Combination):
            weights = Combination(weights)
        base = members[0]
        assert base is not None
        return ops.combine(rows, weights).view(*base.shape[:2], -1)

    def leaves(self, rows: Sequence[torch.Tensor | None], opened: torch.Tensor | None) -> bool:
        """Whether a shut gate leaves the base alone: `opened` says that no row asked, and so no companion ran."""
        waited = opened is not None and any(self.needed[1:])
        return waited and all(x is None for x in rows[1:])

    def open(self, base: torch.Tensor) -> torch.Tensor:
        """`[N]`, bool: where the gate is open, from the base's raw logits `[N, V]`; everywhere without a gate."""
        if self.gate is None:
            return torch.ones(len(base), dtype=torch.bool, device=base.device)
        self.gate.refuse_uncalibrated()
        return is_open(self.gate, base)


def is_open(gate: Gate, base: torch.Tensor) -> torch.Tensor:
    """`[N]`, bool: where a gate is open, from the base's raw logits `[N, V]`, or its log-probabilities."""
    limit = gate.entropy if gate.top1 is None else gate.top1
    assert limit is not None
    return opens(gate.top1 is not None, limit, base)


def opens(by_top1: bool, limit: float | torch.Tensor, base: torch.Tensor) -> torch.Tensor:
    """`is_open` of a gate in numbers: whether it goes by the largest probability, and its limit (nats otherwise)."""
    on_host = base.device.type == "cpu"  # where a few operations cost less than one call of a step
    if by_top1:
        lse = base.float().logsumexp(-1) if on_host else ops.log_normalisers(base)
        return (base.amax(-1).float() - lse).exp() < limit
    measured = entropy(base) if on_host else ops.step([base], want=("entropy",)).entropy
    assert measured is not None
    return measured > limit


def _floors(mask: Plausibility, x: torch.Tensor) -> torch.Tensor:
    """`[N]`: the least raw logit of each row `[N, V]` that a mask lets through."""
    if mask.share is not None:
        return ops.floor_of_top(x, mask.share)
    assert mask.top_p is not None
    return ops.floor_of_nucleus(x, mask.top_p)


def weights_on(place: torch.device, weights: Weights) -> Weights:
    """Weights for rows on a device."""
    if isinstance(weights, torch.Tensor):
        return weights.to(place)
    if not isinstance(weights, Combination):
        return weights
    w, offsets, floors = weights.weights, weights.offsets, weights.floors
    return Combination(
        w.to(place) if isinstance(w, torch.Tensor) else w,
        None if offsets is None else offsets.to(place),
        None if floors is None else floors.to(place),
        weights.floored_by,
    )


def picked(weights: Weights, index: torch.Tensor) -> Weights:
    """Weights of the rows `index`, int64 `[N]`."""
    if isinstance(weights, torch.Tensor):
        return weights.index_select(0, index.to(weights.device))
    if not isinstance(weights, Combination):
        return weights
    tensor = next((x for x in (weights.weights, weights.offsets, weights.floors) if isinstance(x, torch.Tensor)), index)
    return weights.pick(index.to(tensor.device))


def _mixed(term: Term) -> InputError:
    error = InputError.of(
        "formula",
        expected="logits or log-probabilities of a member",
        got=f"both of the member that is the {term.member}: two roles are the same model, prompt and adapter",
        remedy="Use log-probabilities, or logits, in all of the formula.",
    )
    assert isinstance(error, InputError)
    return error
