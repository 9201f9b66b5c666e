"""The cost model of speculation compared with measurement, round by round.

`proxytune.costs.speculation` predicts a round from three times: a pass of the verifying members, a pass of the draft,
and the cost of each further position. They are timed here on the members alone, and so are whole generations at fixed
draft lengths. The host overhead of a round is in the measurement only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from transformers.cache_utils import DynamicCache

from proxytune.costs.speculation import DraftCosts, best_draft_length, expected_tokens, time_per_token
from proxytune.methods.speculation.decoding import SpeculativeDecoding
from proxytune.models.members.cache_name import CACHE
from proxytune.throughput.counters import FirstToken, now
from proxytune.throughput.methods import generated
from proxytune.throughput.subjects import Cell, Subject

__all__ = ["LENGTHS", "compare_drafts", "measured_costs"]

LENGTHS = (0, 1, 2, 4, 8)
_VERIFYING = ("base", "antiexpert")


def measured_costs(subject: Subject, cell: Cell, *, rounds: int = 7, ahead: int = 8) -> DraftCosts:
    """The cost of a round in milliseconds, from passes of the members alone, timed in turns; the medians count.

    The cost of a further position is averaged over `ahead` of them.
    """
    ids = subject.prompts(cell)

    def passing(role: str, positions: int) -> float:
        model: Any = subject.models[role]
        cache = caches[role]
        began = now(subject.device)
        model(input_ids=ids[:, :1].expand(-1, positions), **{CACHE: cache})
        took = now(subject.device) - began
        cache.crop(-positions)
        return 1000 * took

    with torch.no_grad():
        caches: dict[str, Any] = {}
        for role in (*_VERIFYING, "expert"):
            caches[role] = DynamicCache(config=subject.models[role].config)
            subject.models[role](input_ids=ids, **{CACHE: caches[role]}, logits_to_keep=1)
        taken: dict[str, list[float]] = {"one": [], "many": [], "draft": []}
        for _ in range(rounds + 1):
            taken["one"].append(sum(passing(role, 1) for role in _VERIFYING))
            taken["draft"].append(passing("expert", 1))
            taken["many"].append(sum(passing(role, 1 + ahead) for role in _VERIFYING))
    one, many, draft = (float(np.median(taken[name][1:])) for name in ("one", "many", "draft"))
    return DraftCosts(one, draft, max(0.0, (many - one) / ahead))


def compare_drafts(
    subject: Subject,
    cell: Cell,
    *,
    rate: float | None = None,
    lengths: Sequence[int] = LENGTHS,
    rounds: int = 3,
    report: Callable[[str, float], object] = lambda *_: None,
) -> dict[str, Any]:
    """Predict and time rounds at fixed draft lengths; `rate` is the acceptance planted in random models.

    `report` is called with a name and the rounds done, before each of the `rounds` + 1.

    Returns:
        JSON values: `costs_ms`, a line for each length, and the best length `predicted` and `measured`.
    """
    if rate is not None:
        subject.accept(rate)
    report(f"{subject.name}: cost model", 0)
    costs = measured_costs(subject, cell)
    ids, config = subject.prompts(cell), cell.config
    taken: dict[int, list[float]] = {k: [] for k in lengths}
    last: dict[int, Any] = {}
    for done in range(rounds + 1):
        report(f"{subject.name}: cost model, round {done + 1}", done)
        for k in lengths:
            told = FirstToken(subject.device)
            out = generated(subject.steered, SpeculativeDecoding(seed=0, draft_tokens=k), ids, config, told)
            assert told.at is not None
            taken[k].append(1000 * (now(subject.device) - told.at))
            last[k] = out
    lines = []
    for k in lengths:
        out, verified = last[k], last[k].rounds - 1  # the cost model leaves out the prompt's round
        rates = _rates(out)
        took = float(np.median(taken[k][1:]))  # the first one warms up
        lines.append(
            {
                "draft_length": k,
                "rounds": verified,
                "acceptance": round(float(np.mean(rates)), 4),
                "tokens_per_round": {
                    "predicted": round(expected_tokens(rates, k), 4),
                    "measured": round((cell.new - 1) / verified, 4),
                },
                "ms_per_round": {
                    "predicted": round(costs.of_round(k, rates), 4),
                    "measured": round(took / verified, 4),
                },
                "ms_per_token": {
                    "predicted": round(time_per_token(rates, k, costs), 4),
                    "measured": round(took / (cell.new - 1), 4),
                },
            }
        )
    longest = max(lengths)
    seen = [line["acceptance"] for line in lines if line["draft_length"] == longest]
    return {
        "at": cell.name,
        "planted": rate,
        "costs_ms": {
            "round": round(costs.round, 4),
            "draft": round(costs.draft, 4),
            "position": round(costs.position, 4),
        },
        "lines": lines,
        "best": {
            "predicted": min(lengths, key=lambda k: (time_per_token(seen[0], k, costs), k)),
            "measured": min(lines, key=lambda line: line["ms_per_token"]["measured"])["draft_length"],
            "of_all": best_draft_length(seen[0], costs, 16),
        },
    }


def _rates(out: Any) -> list[float]:
    """The acceptance of each row; 0 where no draft token was tested."""
    return [
        accepted / (accepted + rejected) if accepted + rejected else 0.0
        for accepted, rejected in zip(out.accepted.tolist(), out.rejected.tolist(), strict=True)
    ]
