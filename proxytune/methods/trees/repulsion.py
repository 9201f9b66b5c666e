"""Bookkeeping on the host for siblings that repel each other. No tensors, no model.

Rows advance in lock step, and the siblings of a prompt choose one after the other. A sibling's penalties are known
before its own draw: from the siblings before it in this step, and from the texts of earlier steps. So its draw has
`q(v) ∝ p(v) · exp(−penalty(v))`; it is the argmax of `log p(v) + Gumbel(v) − penalty(v)`.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

from proxytune.budget.ledger import TokenLedger
from proxytune.methods.trees.frontier import Frontier, RowDraws
from proxytune.methods.trees.tree import Branch

__all__ = ["MOST_FOLLOWERS", "SiblingFrontier"]

MOST_FOLLOWERS = 32
"""How many continuations of an n-gram repel at most: the most frequent; of equally frequent ones the first seen."""

_Context = tuple[int, ...]


class SiblingFrontier(Frontier):
    """Branches that begin at the prompt and repel each other.

    Attributes:
        penalties: Of the last step: for each row token → nats subtracted; empty where it drew from p itself.
    """

    def __init__(
        self,
        prompts: int,
        *,
        siblings: int,
        repulsion: float,
        ngram: int | None,
        ngram_repulsion: float,
        length: int,
        ledgers: Sequence[TokenLedger] | None,
        reserve: int | None = None,
    ) -> None:
        """Begin the siblings of each prompt, as many as can be finished but at least one.

        The arguments are those of `SiblingDecoding` and `Frontier`. Log-weights begin at −log of the number of
        siblings.
        """
        super().__init__(prompts, planned=siblings, length=length, reserve=reserve, ledgers=ledgers)
        self.penalties: list[dict[int, float]] = []
        self._repulsion = repulsion
        self._ngram = ngram if ngram_repulsion else None  # of no effect otherwise
        self._ngram_repulsion = ngram_repulsion
        self._places = prompts
        self._place: dict[Branch, int] = {}  # the same number for the same prompt and text
        self._said: list[dict[_Context, Counter[int]]] = [
            {} for _ in range(prompts)
        ]  # n-grams of all siblings of a prompt
        self._own: dict[Branch, dict[_Context, Counter[int]]] = {}
        for tree in self.trees:
            started = self._start(tree, siblings)
            for live in started:
                live.branch.log_weight = -math.log(len(started))
                self._place[live.branch] = tree.prompt
                self._own[live.branch] = {}

    def most_draws(self) -> int:
        """The maximum number of draws a step needs: one more than the repelled tokens of a row.

        Only the best unrepelled token can be chosen, and at most all repelled ones come before it.
        """
        before: Counter[int] = Counter()  # at each place
        most = 0
        for live in self._live:
            place = self._place[live.branch]
            repelled = before[place] if self._repulsion else 0
            most = max(most, repelled + len(self._followers(live.tree.prompt, live.branch)))
            before[place] += 1
        return most + 1

    def advance(self, drawn: Sequence[RowDraws]) -> tuple[list[int], list[int]]:
        """Choose each row's token in turn; the rows stay as they are. A place is a fork if its first row says so."""
        chosen: dict[int, Counter[int]] = {}
        forks: dict[int, bool] = {}
        after: dict[tuple[int, int], int] = {}
        tokens = []
        self.penalties = []
        texts: list[tuple[int, Branch]] = []
        for live, one in zip(self._live, drawn, strict=True):
            place = self._place[live.branch]
            counts = chosen.setdefault(place, Counter())
            penalties: dict[int, float] = {}
            if forks.setdefault(place, one.at_fork):
                followers = self._followers(live.tree.prompt, live.branch)
                penalties = {token: self._ngram_repulsion * times for token, times in followers.items()}
                for token, times in counts.items() if self._repulsion else ():
                    penalties[token] = penalties.get(token, 0.0) + self._repulsion * times
            best = _best(one, penalties)
            if penalties:
                live.branch.forks.append(len(live.branch))
            live.append(one, best)
            token = one.tokens[best]
            counts[token] += 1
            if (place, token) not in after:
                after[place, token] = self._places
                self._places += 1
            self._place[live.branch] = after[place, token]
            self.penalties.append(penalties)
            tokens.append(token)
            texts.append((live.tree.prompt, live.branch))
        # Only now: this step's n-grams repel from the next step on.
        for prompt, branch in texts:
            self._remember(prompt, branch)
        return list(range(len(tokens))), tokens

    def _followers(self, prompt: int, branch: Branch) -> dict[int, int]:
        """How often each token followed this branch's last n − 1 tokens in its siblings' texts."""
        if self._ngram is None or len(branch) < self._ngram - 1:
            return {}
        context = tuple(branch.tokens[1 - self._ngram :])
        counts = self._said[prompt].get(context)
        if counts is None:
            return {}
        others = counts - self._own[branch].get(context, Counter())
        return dict(others.most_common(MOST_FOLLOWERS))

    def _remember(self, prompt: int, branch: Branch) -> None:
        if self._ngram is None or len(branch) < self._ngram:
            return
        *context, token = branch.tokens[-self._ngram :]
        for texts in (self._said[prompt], self._own[branch]):
            texts.setdefault(tuple(context), Counter())[token] += 1


def _best(one: RowDraws, penalties: dict[int, float]) -> int:
    """The index of the draw with the largest key after its penalty; the first of equal ones."""
    if not penalties:
        return 0
    keys = [
        key - penalties.get(token, 0.0) if token >= 0 else -math.inf
        for token, key in zip(one.tokens, one.keys, strict=True)
    ]
    return keys.index(max(keys))
