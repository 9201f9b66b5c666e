"""A round's tokens in the log of a recorded call."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from proxytune.generation.call_log import CallLog
from proxytune.methods.speculation.round import Commit, RoundResult
from proxytune.models.ensemble import Ensemble

__all__ = ["add_round"]


def add_round(
    log: CallLog, ensemble: Ensemble, logits: Sequence[torch.Tensor], result: RoundResult, commit: Commit, usable: int
) -> None:
    """Add the tokens that a round added to the texts; `logits` are those of the members, `[B, K + 1, V_i]`."""
    where = [(row, j) for row, kept in enumerate(commit.kept) for j in range(kept)]
    if not where:
        return
    row, column = torch.tensor(where, device=logits[0].device).unbind(1)
    start = torch.tensor(commit.start, device=row.device)[row]
    rows: list[torch.Tensor | None] = [x[row.to(x.device), column.to(x.device)] for x in logits]
    weighing = ensemble.weighing
    gate = None if weighing is None or weighing.gate is None or rows[0] is None else weighing.open(rows[0])
    taken = torch.tensor(commit.accepted, device=row.device)[row]
    tokens = result.verification.tokens
    log.add(
        ensemble.weigh(rows, start + column, gate), rows, tokens[row.to(tokens.device), column.to(tokens.device)],
        start + column, usable=usable, row=row, gate=gate, drafted=column < taken,
    )  # fmt: skip
