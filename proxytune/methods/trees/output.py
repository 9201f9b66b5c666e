"""What a tree loop returns: the leaves of all trees as one batch, with their weights."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers.utils import ModelOutput

from proxytune.budget.ledger import TokenLedger
from proxytune.errors import BudgetWarning
from proxytune.generation.call_log import CallLog
from proxytune.methods.trees.tree import ForkTree

__all__ = ["TreeOutput", "leaves_of", "note_leaves", "warn_of_shortage"]


@dataclass
class TreeOutput(ModelOutput):
    """The leaves of all trees, prompt by prompt, in the order of their branches' numbers.

    Attributes:
        sequences: `[L, T]`, int64: prompt and generated tokens, padded at the right.
        prompts: `[L]`, int64: the prompt's row in the batch.
        log_weights: `[L]`, float64, nats: over a tree's leaves, Σ exp(log_weight) · f is an unbiased estimate of E[f].
        weights: `[L]`, float64: the same, self-normalised per tree.
        trees: One for each prompt.
        ledgers: One for each prompt; None without a budget.
    """

    sequences: torch.Tensor | None = None
    prompts: torch.Tensor | None = None
    log_weights: torch.Tensor | None = None
    weights: torch.Tensor | None = None
    trees: list[ForkTree] | None = None
    ledgers: list[TokenLedger] | None = None


def leaves_of(
    trees: list[ForkTree], texts: torch.Tensor, pad: torch.Tensor, ledgers: list[TokenLedger] | None
) -> TreeOutput:
    """Gather the leaves of trees over the prompts `texts`, `[B, T]`, int64, padded at the left."""
    leaves = [(tree.prompt, branch) for tree in trees for branch in tree]
    longest = max(len(branch) for _, branch in leaves)
    generated = torch.full((len(leaves), longest), int(pad), dtype=torch.int64)
    for row, (_, branch) in enumerate(leaves):
        generated[row, : len(branch)] = torch.tensor(branch.along("tokens"))
    prompts = torch.tensor([prompt for prompt, _ in leaves])
    text = texts.index_select(0, prompts.to(texts.device))
    return TreeOutput(
        sequences=torch.cat([text, generated.to(text.device)], 1),
        prompts=prompts,
        log_weights=torch.tensor([branch.log_weight for _, branch in leaves], dtype=torch.float64),
        weights=torch.tensor([w for tree in trees for w in tree.weights()], dtype=torch.float64),
        trees=trees,
        ledgers=ledgers,
    )


def note_leaves(log: CallLog, out: TreeOutput) -> None:
    """Tell a recorded call whose text each leaf is, what it weighs, and where it was at a fork."""
    assert out.prompts is not None
    assert out.weights is not None
    assert out.trees is not None
    log.origins = out.prompts.tolist()
    log.facts = [{"weight": weight} for weight in out.weights.tolist()]
    leaves = [branch for tree in out.trees for branch in tree]
    forks = torch.zeros(len(leaves), max(map(len, leaves)), dtype=torch.bool)
    for row, branch in enumerate(leaves):
        path = branch.path()
        for one, then in itertools.zip_longest(path, path[1:]):
            # Where a child leaves, both have drawn at the fork.
            forks[row, [at for at in one.forks if then is None or at <= then.start]] = True
    log.mark(fork=forks)


def warn_of_shortage(loop: str, budget: int | None, trees: Sequence[ForkTree], further: str = "") -> None:
    """Say by one BudgetWarning in how many trees the budget had no room for all texts; `further` ends the advice."""
    short = [tree for tree in trees if tree.starved]
    if short:
        others = f", and so for {len(short) - 1} more" if len(short) > 1 else ""
        warnings.warn(
            f"{loop}: prompt {short[0].prompt}{others}: {short[0].counts}: max_total_tokens={budget} had no room for "
            "more. A vote over few texts is surer than it should be. Lower max_new_tokens to what an answer takes, or "
            f"raise max_total_tokens{further}.",
            BudgetWarning,
            stacklevel=2,
        )
