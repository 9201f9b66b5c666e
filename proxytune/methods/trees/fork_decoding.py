"""The fork tree: one prompt, several branches that part where the entropy is high.

All live branches of all prompts are one batch. Where a row forks, its children are drawn without replacement
(Gumbel-top-k, Kool et al. 2019, arXiv 1903.06059) and get copies of its row of the cache; a finished row leaves.
Whether a row forks, and into how many, is decided from earlier draws only, so the leaves' weights are unbiased under
any rule.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Self

from proxytune.budget.ledger import TokenLedger
from proxytune.methods.trees.checks import Where, refuse_settings
from proxytune.methods.trees.frontier import ForkFrontier
from proxytune.methods.trees.loop import TreeLoop
from proxytune.methods.trees.output import TreeOutput
from proxytune.validation import named_settings

__all__ = ["ForkDecoding", "TreeOutput", "Where"]


@named_settings
@dataclass(frozen=True, eq=False, kw_only=True)
class ForkDecoding(TreeLoop):
    """A loop for `model.generate(..., custom_generate=ForkDecoding(threshold=…))`, for composed and plain causal LMs.

    With sampling, children are drawn without replacement, and a branch that does not fork draws as `FusedDecoding`
    does. In greedy decoding a fork's children are the most probable tokens, weighted by their probabilities. A tree
    depends only on its prompt, the seed and the settings, not on the other prompts.

    Attributes:
        threshold: Entropy in nats above which a token is a fork, measured after the processors that had to run, at
            temperature 1: a number or a calibrated `ForkThreshold`. Needed with `where="forks"`.
        branches: Maximum number of leaves of a tree (W).
        children: Maximum number of children of a fork, the continuing branch included; with `where="start"` always W.
        min_gap: Minimum distance between two forks on a path, in tokens.
        where: "forks"; "random" for forks at random positions, an ablation; "start" for one fork at the first token
            (with greedy decoding this is chain-of-thought decoding, Wang & Zhou 2024, arXiv 2402.10200).
        share: With "random", the probability that a position is a fork.
        fork_temperature: Temperature above the threshold; None for the call's own everywhere.
        max_total_tokens: A hard budget for each prompt, including the prompt, with shared tokens counted once; a row
            forks only if its children can be finished. None for no limit.
        reserve: With a budget, how many generated tokens a text is counted with before it begins: what an answer
            usually takes. A longer one goes on while the budget lasts, and is cut where it ends. None for the most that
            a text can have, so that no child is ever cut.
        seed: The key of all draws; None for a new one in each call, from torch's default generator.
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

    def asking_for(self, leaves: int) -> Self:
        """The same loop with another number of branches."""
        return replace(self, branches=leaves)

    def _start(self, prompts: int, length: int, ledgers: list[TokenLedger] | None) -> ForkFrontier:
        return ForkFrontier(
            prompts,
            branches=self.branches,
            children=self.branches if self.where == "start" else self.children,
            min_gap=self.min_gap,
            length=length,
            reserve=self.reserve,
            ledgers=ledgers,
        )
