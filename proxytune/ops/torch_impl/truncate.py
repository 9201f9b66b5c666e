"""Exact top-k, top-p and min-p from few tokens: the candidates that can be kept, and the bounds."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from proxytune.ops.sampling_params import SamplingParams
from proxytune.ops.torch_impl.rows import CLAMP, GROUP, MASKED, MemberRows

__all__ = ["Truncation", "largest", "mean_of_largest", "truncate"]


@dataclass(frozen=True, eq=False)
class Truncation:
    """What truncation leaves of each row; undefined in rows without truncation.

    Attributes:
        ids: `[B, n]`, int64: the candidates, by falling logit; columns past the end are padding.
        z: `[B, n]`, float32: their logits.
        relative: `[B, n]`: (z − top) / T.
        kept: `[B, n]`, bool: which can be drawn.
        log_kept: `[B, 1]`: log Σ e^relative over those.
        lowest: `[B, 1]`: the least z / T that top-k keeps; −inf for all.
        nucleus: `[B, 1]`: the least z / T that top-p keeps; −inf for all.
        least: `[B, 1]`: the least `relative` that min-p keeps.
    """

    ids: torch.Tensor
    z: torch.Tensor
    relative: torch.Tensor
    kept: torch.Tensor
    log_kept: torch.Tensor
    lowest: torch.Tensor
    nucleus: torch.Tensor
    least: torch.Tensor

    def pick(self, index: torch.Tensor | slice) -> Truncation:
        """What is left of the rows `index`, `[N]`, int64."""
        return Truncation(**{name: x[index] for name, x in vars(self).items()})

    def keeps(self, s: torch.Tensor, relative: torch.Tensor) -> torch.Tensor:
        """Whether tokens are within all bounds, be they candidates or not; s = z / T and `relative`, `[B, N]`."""
        return (s > -torch.inf) & (s >= self.lowest) & (s >= self.nucleus) & (relative >= self.least)


def truncate(
    rows: MemberRows,
    groups: torch.Tensor,
    top: torch.Tensor,
    temperature: torch.Tensor,
    total: torch.Tensor,
    sampling: SamplingParams,
) -> Truncation:
    """Find the candidates and the bounds.

    `groups` `[B, groups]` are the groups' maxima; `total` `[B]`, Σ e^((z − top) / T) over all columns, matters for
    top-p without top-k.
    """
    k, p = sampling.top_k[:, None], sampling.top_p[:, None]  # [B, 1]
    inverse = temperature.reciprocal()[:, None]
    on_cpu = rows.device.type == "cpu"
    take = sampling.truncated.long() * torch.where(sampling.top_k > 0, sampling.top_k, 32)  # groups, per row
    while True:
        if on_cpu:
            ids, floor = _candidates(groups, take, temperature)
        else:
            ids, floor = torch.arange(rows.width, device=top.device).expand(rows.count, -1), None
        z = rows.at(ids)
        # As in transformers, tokens tie if their logits are equal after the (rounded) division by T.
        s = z / temperature[:, None]
        if floor is None:
            s, order = s.sort(dim=1, descending=True, stable=True)
        else:
            above = (s >= (floor / temperature)[:, None]) & (s > -torch.inf)
            s, order = s.masked_fill_(~above, -torch.inf).topk(max(1, int(above.sum(1).max())), dim=1)
        ids, z = ids.gather(1, order), z.gather(1, order)
        real = s > -torch.inf
        relative = (z - top[:, None]) * inverse
        e = relative.clamp(min=CLAMP).exp() * real
        reached = e.cumsum(1)  # sequential, so that a row's sums do not depend on the width of the batch
        if floor is None:
            break
        # If these candidates do not suffice, take more groups.
        found = real.sum(1)
        nothing_below = (floor - top) * inverse[:, 0] < sampling.log_min_p
        enough = torch.where(
            sampling.top_k > 0,
            (found >= sampling.top_k) | (nothing_below & (sampling.top_p == 1)),
            nothing_below | ((reached[:, -1] >= sampling.top_p * total) & (sampling.top_p < 1)),
        )
        enough |= ~sampling.truncated | (floor == -torch.inf) | ~(top < torch.inf)
        if enough.all():
            break
        take = torch.where(enough, take, take * 4)

    lowest = s.gather(1, (k.long() - 1).clamp(min=0, max=s.shape[1] - 1))
    lowest = torch.where(k > 0, lowest, -torch.inf)  # [B, 1]
    inside = real & (s >= lowest)
    total_inside = torch.where(k > 0, (e * inside).cumsum(1)[:, -1:], total[:, None])
    reaching = (reached >= p * total_inside) & inside & (p < 1)
    at = reaching.int().argmax(1, keepdim=True)  # the first
    nucleus = torch.where(reaching.gather(1, at), s.gather(1, at), -torch.inf)
    kept = inside & (s >= nucleus) & (relative >= sampling.log_min_p[:, None])

    log_kept = (e * kept).cumsum(1)[:, -1:].log()
    return Truncation(ids, z, relative, kept, log_kept, lowest, nucleus, sampling.log_min_p[:, None])


def largest(keys: torch.Tensor, draws: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The `draws` largest of `[B, n]` and their columns, `[B, draws]`, falling; −inf where there are fewer columns."""
    missing = draws - keys.shape[1]
    if missing > 0:
        keys = torch.nn.functional.pad(keys, (0, missing), value=-torch.inf)
    if draws == 1:
        value, index = keys.max(1, keepdim=True)  # the first of equal ones, as in the kernel
        return value, index
    value, index = keys.topk(draws, dim=1)
    return value, index


def mean_of_largest(rows: MemberRows, groups: torch.Tensor, top: torch.Tensor, count: int) -> torch.Tensor:
    """The mean of each row's `count` largest logits (or all unmasked, if fewer), relative to the largest, `[B]`."""
    # The n largest tokens lie in the n groups with the largest maxima.
    best = groups.topk(min(count, groups.shape[1]), dim=1).indices.sort(1).values
    z, _ = largest(rows.at(_members_of(best)), count)
    relative = z - top[:, None]
    real = relative > MASKED
    return relative.masked_fill(~real, 0.0).sum(1) / real.sum(1)


def _members_of(groups: torch.Tensor) -> torch.Tensor:
    """The columns `[B, n · GROUP]` of groups `[B, n]`."""
    return (groups[..., None] * GROUP + torch.arange(GROUP, device=groups.device)).flatten(1)


def _candidates(
    groups: torch.Tensor, take: torch.Tensor, temperature: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The columns `[B, n]` of the best groups, at least `take` per row, and a bound `[B]` of the logits.

    Every column whose logit reaches the bound, or ties with it after the division by T, is among them. The bound is
    −inf if all groups are taken.
    """
    count = groups.shape[1]
    take = take.clamp(max=count)
    most = max(1, int(take.max()))
    best = groups.topk(most, dim=1).values
    floor = best.gather(1, (take[:, None] - 1).clamp(min=0))[:, 0]
    floor = torch.where(take >= count, -torch.inf, floor)
    t = temperature[:, None]
    live = (groups / t >= floor[:, None] / t) & (groups > -torch.inf)
    width = max(1, int(live.sum(1).max()))
    # In the order of the columns; rows with fewer live groups are padded with columns past the end.
    number = torch.arange(count, device=groups.device).masked_fill(~live, count)
    return _members_of(number.topk(width, dim=1, largest=False).values.sort(1).values), floor
