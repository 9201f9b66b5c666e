"""The fork tree: one prompt, several branches that part where the distribution is undecided.

All live branches of all prompts are one batch. Where a row forks, its children are drawn without replacement
(Gumbel-top-k, Kool et al. 2019, arXiv 1903.06059) and take copies of its row of the cache; a finished row leaves. What
is decided before a draw (whether, and how many children) depends on what was drawn before only, so the leaves' weights
are unbiased whatever the rule. The host has to know the tree, so it reads one small record per step.
"""

from __future__ import annotations

from dataclasses import dataclass

from proxytune.budget.ledger import TokenLedger
from proxytune.methods.trees.checks import Where, refuse_settings
from proxytune.methods.trees.frontier import ForkFrontier
from proxytune.methods.trees.loop import TreeLoop
from proxytune.methods.trees.output import TreeOutput

__all__ = ["ForkDecoding", "TreeOutput", "Where"]


@dataclass(frozen=True, eq=False, kw_only=True)
class ForkDecoding(TreeLoop):
    """A loop for `model.generate(..., custom_generate=ForkDecoding(threshold=…))`, for composed and plain causal LMs.

    With sampling, children are drawn without replacement, and a branch that does not fork draws as `FusedDecoding`
    does; in greedy decoding a fork's children are the most probable tokens, and weigh their probabilities. A tree
    depends on its prompt, the seed and the settings, not on the batch around it.

    Attributes:
        threshold: Entropy in nats above which a token is a fork, of the distribution after the processors that had to
            run, at temperature 1: a number or a calibrated `ForkThreshold`. Needed with `where="forks"`.
        branches: The most leaves of a tree (W).
        children: The most children of a fork, the branch that goes on among them; at the start all W.
        min_gap: The least distance between two forks on a path, in tokens.
        where: "forks"; "random" for forks at random positions, the ablation; "start" for one fork at the first token
            (with greedy decoding this is chain-of-thought decoding, Wang & Zhou 2024, arXiv 2402.10200).
        share: With "random", the chance of a position to be a fork.
        fork_temperature: The temperature above the threshold; None for the call's own everywhere.
        max_total_tokens: A hard budget for each prompt, its own tokens included, shared ones counted once; a row forks
            only if its children can be finished. None for no limit.
        seed: The key of all draws; None for another one in each call, from torch's default generator.
        stream_ids: `[B]`, which stream of the seed each prompt draws from [0, 1, 2, …].
        impl: "triton", "torch" or "auto".

    Raises:
        InputError: If a setting is out of its range.
    """

    branches: int = 8
    children: int = 2
    min_gap: int = 1

    def __post_init__(self) -> None:
        least = {"branches": 1, "children": 2, "min_gap": 1}
        refuse_settings(self, least, needed=self.where == "forks" or self.fork_temperature is not None)

    def _start(self, prompts: int, length: int, ledgers: list[TokenLedger] | None) -> ForkFrontier:
        return ForkFrontier(
            prompts,
            branches=self.branches,
            children=self.branches if self.where == "start" else self.children,
            min_gap=self.min_gap,
            length=length,
            ledgers=ledgers,
        )
