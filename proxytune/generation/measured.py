"""What a trace keeps of a decision: measured from the members' rows once the token is known, on their device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from proxytune import ops
from proxytune.generation.sampler import MembersAndWeights, row_on
from proxytune.models.weighing import weights_on

__all__ = ["Measured", "measured"]

ABSENT = -1
"""An id that stands for none: of a member that did not run."""


@dataclass(frozen=True, eq=False)
class Measured:
    """N decisions, S sources and k likeliest tokens of each, on the device.

    Attributes:
        of_token: `[N, 4]`, float32, nats: log-probability, entropy, KL(combined ‖ base), shift of the token.
        rank: `[N]`, int64: how many tokens the base held for likelier.
        top_ids: `[N, S, k]`, int64; `ABSENT` from a member that did not run.
        top_logprobs: `[N, S, k]`, float32, nats.
    """

    of_token: torch.Tensor
    rank: torch.Tensor
    top_ids: torch.Tensor
    top_logprobs: torch.Tensor


def measured(
    drawn_from: MembersAndWeights,
    rows: Sequence[torch.Tensor | None],
    tokens: torch.Tensor,
    *,
    usable: int,
    top: int,
    impl: ops.Impl = "auto",
) -> Measured:
    """Measure N decisions; nothing waits for the device.

    Args:
        drawn_from: The rows `[N, V_i]` of the members that ran and their weights, the base's first, as `ops.step` takes
            them, before any logits processor.
        rows: Raw logits `[N, V_i]` of all members, the base's first; None for one that did not run.
        tokens: `[N]`, int64: the token that was taken; a negative one counts as 0.
        usable: How many of the base's ids can be drawn.
        top: k.
        impl: As in `ops.step`.
    """
    base = rows[0]
    assert base is not None
    place = base.device
    tokens = tokens.to(place).clamp(min=0)[:, None]  # [N, 1]
    taken = [row_on(place, x)[:, :usable] for x in drawn_from[0]]
    found = ops.step(taken, weights_on(place, drawn_from[1]), want=("scores", "lse", "entropy", "kl"), impl=impl)
    assert found.scores is not None
    assert found.lse is not None
    assert found.entropy is not None
    assert found.kl is not None
    normalisers = [None if x is None else _normaliser(row_on(place, x)[:, :usable]) for x in rows]
    held = row_on(place, base)[:, :usable]
    of_base = held.gather(1, tokens)  # [N, 1]
    first = normalisers[0]
    assert first is not None
    logprob = found.scores.gather(1, tokens)[:, 0] - found.lse
    shift = logprob - (of_base[:, 0].float() - first)
    tops = [_top(found.scores, found.lse, top)]
    for x, normaliser in zip(rows, normalisers, strict=True):
        if x is None or normaliser is None:
            tops.append((torch.full_like(tops[0][0], ABSENT), torch.full_like(tops[0][1], -torch.inf)))
        else:
            tops.append(_top(row_on(place, x)[:, :usable], normaliser, top))
    return Measured(
        torch.stack((logprob, found.entropy, found.kl, shift), -1),
        (held > of_base).sum(1),
        torch.stack([ids for ids, _ in tops], 1),
        torch.stack([logprobs for _, logprobs in tops], 1),
    )


def _normaliser(rows: torch.Tensor) -> torch.Tensor:
    """Log Σ exp of each row, float32 `[N]`."""
    # On a CPU a few operations cost less than one call of a step.
    return rows.float().logsumexp(-1) if rows.device.type == "cpu" else ops.log_normalisers(rows)


def _top(rows: torch.Tensor, normaliser: torch.Tensor, top: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and log-probabilities `[N, k]` of the likeliest; `ABSENT` past the end of a narrow vocabulary."""
    best = rows.topk(min(top, rows.shape[1]), -1)
    ids, logprobs = best.indices, best.values.float() - normaliser[:, None]
    if missing := top - ids.shape[1]:
        ids = torch.nn.functional.pad(ids, (0, missing), value=ABSENT)
        logprobs = torch.nn.functional.pad(logprobs, (0, missing), value=-torch.inf)
    return ids, logprobs
