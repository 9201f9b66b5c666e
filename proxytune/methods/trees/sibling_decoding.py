"""Siblings of one prompt that repel each other where the entropy is high.

At a fork, a sibling draws a token v from `q(v) ∝ p(v) · exp(−λ · (number of earlier siblings that chose v there))`: a
decoding-time form of the diversity bonus of "Outcome-based Exploration for LLM Reasoning" (arXiv 2509.06941), with λ =
0.5. "There" means after the same text; elsewhere a sibling draws from p. Its importance weight, the product of p / q
along its text, corrects for q exactly: weighted votes and pass rates are those of p.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Self

import torch

from proxytune.budget.ledger import TokenLedger
from proxytune.generation.sampler import MembersAndWeights, Sampler
from proxytune.methods.trees.checks import refuse_settings
from proxytune.methods.trees.frontier import Frontier
from proxytune.methods.trees.loop import TreeLoop
from proxytune.methods.trees.output import TreeOutput
from proxytune.methods.trees.repulsion import SiblingFrontier
from proxytune.validation import finite, named_settings

__all__ = ["SiblingDecoding", "TreeOutput"]

_MOST_NATS = 1000.0


@named_settings
@dataclass(frozen=True, eq=False, kw_only=True)
class SiblingDecoding(TreeLoop):
    """A loop for `model.generate(..., custom_generate=SiblingDecoding(threshold=…))`, for composed and plain models.

    The prompt is forwarded once; then all siblings of all prompts are one batch. They choose in turn, so a sibling's
    penalties are known before its own draw. Its log-weight is Σ (log p − log q) over its tokens, minus log N; over the
    siblings of a prompt Σ exp(log_weight) · f is an unbiased estimate of E[f] under p. One sibling alone, with N times
    its weight, gives one too. The more often a sibling is repelled, the more its weight varies.

    p is the distribution after temperature and truncation, and penalties apply after these: otherwise q could lose
    tokens that p has, which no weight can correct. So q has the support of p, and all weights are finite. With
    `repulsion=0` and no n-grams the siblings are independent, and all weights are 1 / N.

    A sibling draws with the noise of its own number: the same seed gives the same siblings, whatever the other prompts.
    The first draws as `FusedDecoding` does, until n-grams repel it.

    Attributes:
        threshold: Entropy in nats above which a position is a fork, see `ForkDecoding`. Needed with `where="forks"` if
            anything repels, and with `fork_temperature`.
        siblings: Number of continuations of each prompt (N); with a budget, at most.
        repulsion: λ, nats for each sibling that chose a token at the same place, in [0, 1000].
        ngram: n ≥ 2: at forks, also repel tokens that ended the same n-gram in other siblings' texts (finished ones
            included, the prompt not), at most the 32 most frequent. None for off.
        ngram_repulsion: Nats for each such occurrence, in [0, 1000].
        where: "forks"; "random" for repulsion at random positions, an ablation.
        share: With "random", the probability that a place is one of them.
        fork_temperature: Temperature above the threshold; None for the call's own everywhere.
        max_total_tokens: A hard budget for each prompt, including the prompt, counted once. As many siblings begin as
            can be finished, at least one, which may be cut. None for no limit.
        reserve: With a budget, how many tokens a sibling is counted with before it begins, see `ForkDecoding`.
        seed: The key of all draws; None for a new one in each call, from torch's default generator.
        stream_ids: `[B]`, which stream of the seed each prompt draws from [0, 1, 2, …].
        impl: "triton", "torch" or "auto".

    Raises:
        InputError: If a setting is out of its range.
    """

    siblings: int = 8
    repulsion: float = 0.5
    ngram: int | None = None
    ngram_repulsion: float = 0.5

    _why_sampling: ClassVar[str] = (
        "Greedy siblings would all be the same, and one moved off the argmax by a penalty has no weight."
    )

    def __post_init__(self) -> None:
        for name in ("repulsion", "ngram_repulsion"):
            remedy = "Pass 0 for no repulsion; 0.5 is usual."
            finite(name, getattr(self, name), "of nats", least=0.0, most=_MOST_NATS, remedy=remedy)
        least = {"siblings": 1} if self.ngram is None else {"siblings": 1, "ngram": 2}
        repels = self.repulsion > 0 or (self.ngram is not None and self.ngram_repulsion > 0)
        needed = self.fork_temperature is not None or (repels and self.where == "forks")
        refuse_settings(self, least, needed=needed, allowed=("forks", "random"))

    def asking_for(self, leaves: int) -> Self:
        """The same loop with another number of siblings."""
        return replace(self, siblings=leaves)

    def _start(self, prompts: int, length: int, ledgers: list[TokenLedger] | None) -> SiblingFrontier:
        return SiblingFrontier(
            prompts,
            siblings=self.siblings,
            repulsion=self.repulsion,
            ngram=self.ngram,
            ngram_repulsion=self.ngram_repulsion,
            length=length,
            reserve=self.reserve,
            ledgers=ledgers,
        )

    def _gains(
        self, sampler: Sampler, rows: MembersAndWeights, frontier: Frontier, tokens: Sequence[int]
    ) -> torch.Tensor | None:
        """Gain log p − log q of each token: `log Σ p(v) exp(−penalty(v)) + penalty(token)`, float64 `[rows]`.

        The tokens without a penalty are summed on the device; 1 minus the rest would lose its digits where almost all
        of p is repelled.
        """
        assert isinstance(frontier, SiblingFrontier)
        most = max(map(len, frontier.penalties))
        if not most:
            return None
        # Padded with −1 in rows with fewer penalties.
        ids = torch.tensor([[*p, *[-1] * (most - len(p))] for p in frontier.penalties])  # [rows, K]
        nats = torch.tensor([[*p.values(), *[0.0] * (most - len(p))] for p in frontier.penalties], dtype=torch.float64)
        penalty = torch.tensor(
            [p.get(t, 0.0) for p, t in zip(frontier.penalties, tokens, strict=True)], dtype=torch.float64
        )
        repelled = torch.tensor([bool(p) for p in frontier.penalties])
        logprobs, rest = sampler.draw_logprobs(rows, ids)
        place = rest.device
        left = torch.cat([rest.double()[:, None], logprobs.double() - nats.to(place)], 1).logsumexp(1)
        return torch.where(repelled.to(place), left + penalty.to(place), 0.0)
