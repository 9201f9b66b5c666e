"""The host's side of a tree: which rows are live, who may fork, what it costs. No tensors, no model."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from proxytune.budget.ledger import Reservation, TokenLedger
from proxytune.errors import BudgetError
from proxytune.methods.trees.tree import Branch, ForkTree
from proxytune.stats.importance import log_importance

__all__ = ["ForkFrontier", "Frontier", "LiveBranch", "RowDraws"]


@dataclass(frozen=True)
class RowDraws:
    """What one step found in one row.

    Attributes:
        tokens: The draws in the order of their keys; −1 where no more are left.
        draw_logprobs: Of each, under the distribution drawn from, nats.
        keys: Of each, log p + Gumbel.
        logprobs: Of each, under the combined distribution, nats.
        entropy: Of the combined distribution, nats.
        confidence: Of the combined distribution, nats.
        at_fork: Whether the row is at a place to fork.
    """

    tokens: Sequence[int]
    draw_logprobs: Sequence[float]
    keys: Sequence[float]
    logprobs: Sequence[float]
    entropy: float
    confidence: float
    at_fork: bool


@dataclass(eq=False)
class LiveBranch:
    """A branch that goes on: one row of the batch.

    Attributes:
        tree: Its tree.
        branch: Its record.
        reservation: The tokens that it may still use; None for no limit.
        last_fork: Where it last split or began, in generated tokens; None if it never did.
    """

    tree: ForkTree
    branch: Branch
    reservation: Reservation | None
    last_fork: int | None = None

    def append(self, one: RowDraws, i: int) -> None:
        """Record a draw, and pay for it.

        Args:
            one: What was found in the row.
            i: Which of the draws.
        """
        self.branch.tokens.append(one.tokens[i])
        self.branch.logprobs.append(one.logprobs[i])
        self.branch.entropies.append(one.entropy)
        self.branch.confidences.append(one.confidence)
        if self.reservation is not None:
            self.reservation.spend(1)


class Frontier(ABC):
    """The live branches of all prompts, in the order of the batch's rows.

    Attributes:
        trees: One for each prompt.
    """

    def __init__(self, prompts: int, *, length: int, ledgers: Sequence[TokenLedger] | None) -> None:
        """Mark out a tree for each prompt, without a branch.

        Args:
            prompts: Number of prompts.
            length: The most generated tokens on a path.
            ledgers: A ledger for each prompt, which has been charged for the prompt; None for no limit.
        """
        self.trees = [ForkTree(i) for i in range(prompts)]
        self._length = length
        self._ledgers = ledgers
        self._live: list[LiveBranch] = []

    @property
    def rows(self) -> list[tuple[int, int]]:
        """Prompt and branch number of each live row."""
        return [(live.tree.prompt, live.branch.number) for live in self._live]

    @property
    def branches(self) -> list[Branch]:
        """The live branches."""
        return [live.branch for live in self._live]

    @abstractmethod
    def most_draws(self) -> int:
        """How many draws a step needs at most."""

    @abstractmethod
    def advance(self, drawn: Sequence[RowDraws]) -> tuple[list[int], list[int]]:
        """Append the draws.

        Args:
            drawn: One for each live row.

        Returns:
            For each row of the new batch, which old row it goes on from, and its token.
        """

    def retire(self, done: Sequence[bool], *, halt: bool = False) -> list[int]:
        """Let finished rows go, and those whose tokens are spent.

        Args:
            done: Of each live row, whether a stopping criterion holds.
            halt: Whether the others are cut here, since the time is up.

        Returns:
            The rows that stay.
        """
        keep, live_on = [], []
        for row, (live, ended) in enumerate(zip(self._live, done, strict=True)):
            spent = live.reservation is not None and live.reservation.left == 0
            if ended or spent or halt or len(live.branch) >= self._length:
                live.branch.finished = bool(ended)
                if live.reservation is not None:
                    live.reservation.release()
            else:
                keep.append(row)
                live_on.append(live)
        self._live = live_on
        return keep

    def _start(self, tree: ForkTree, most: int) -> list[LiveBranch]:
        """Begin branches at the prompt: as many as can be finished, at least one; they share nothing that is generated.

        The first is the parent of the others.
        """
        started: list[LiveBranch] = []
        for reservation in self._reserve(tree.prompt, self._length, most, short=True):
            parent = started[0].branch if started else None
            started.append(LiveBranch(tree, Branch(len(tree), parent), reservation))
            tree.branches.append(started[-1].branch)
        self._live += started
        return started

    def _reserve(self, prompt: int, tokens: int, most: int, *, short: bool = False) -> list[Reservation | None]:
        """Reservations of so many tokens each, until the ledger has no more; the first may be short."""
        if self._ledgers is None:
            return [None] * most
        ledger = self._ledgers[prompt]
        out: list[Reservation | None] = []
        while len(out) < most:
            try:
                wanted = min(tokens, ledger.left) if short and not out else tokens
                out.append(ledger.reserve(wanted, label="generated"))
            except BudgetError:
                break
        return out


class ForkFrontier(Frontier):
    """Trees whose branches fork into children drawn without replacement."""

    def __init__(
        self,
        prompts: int,
        *,
        branches: int,
        children: int,
        min_gap: int,
        length: int,
        ledgers: Sequence[TokenLedger] | None,
    ) -> None:
        """Plant one branch for each prompt.

        Args:
            prompts: Number of prompts.
            branches: The most leaves of a tree.
            children: The most children of a fork, the branch that goes on among them.
            min_gap: The least distance between forks on a path, in tokens.
            length: The most generated tokens on a path.
            ledgers: A ledger for each prompt, which has been charged for the prompt; None for no limit.
        """
        super().__init__(prompts, length=length, ledgers=ledgers)
        self._branches = branches
        self._children = children
        self._min_gap = min_gap
        for tree in self.trees:
            self._start(tree, 1)

    def most_draws(self) -> int:
        """How many draws a step needs at most: one more than the children of a fork, for the threshold κ."""
        room = max((self._branches - len(live.tree) + 1 for live in self._live), default=1)
        most = min(self._children, room)
        return most + 1 if most > 1 else 1

    def can_fork(self) -> list[bool]:
        """Of each live row, whether a fork is allowed now; what the distribution says comes on top."""
        return [
            len(live.tree) < self._branches
            and (live.last_fork is None or len(live.branch) - live.last_fork >= self._min_gap)
            for live in self._live
        ]

    def advance(self, drawn: Sequence[RowDraws]) -> tuple[list[int], list[int]]:
        """Append the draws, and split the rows that fork.

        Args:
            drawn: One for each live row.

        Returns:
            For each row of the new batch, which old row it goes on from, and its token.
        """
        allowed = self.can_fork()
        parents, tokens, born = [], [], []
        for row, (live, one, may) in enumerate(zip(list(self._live), drawn, allowed, strict=True)):
            # Counted anew for each row: an earlier row of the same prompt may have taken the last place.
            room = self._branches - len(live.tree) + 1
            # How many tokens there are to draw does not depend on the draws, so it may decide.
            most = min(self._children, room, sum(token >= 0 for token in one.tokens))
            left = self._length - len(live.branch)
            reserved = self._reserve(live.tree.prompt, left, most - 1) if may and one.at_fork else []
            start, before = len(live.branch), live.branch.log_weight
            parents.append(row)
            tokens.append(one.tokens[0])
            if reserved:
                kappa = one.keys[len(reserved) + 1] if len(reserved) + 1 < len(one.keys) else -math.inf
                live.last_fork = start
                live.branch.forks.append(start)
                live.branch.log_weight = before + log_importance(one.draw_logprobs[0], kappa)
            live.append(one, 0)
            for i, reservation in enumerate(reserved, 1):
                branch = Branch(len(live.tree), live.branch, start)
                branch.log_weight = before + log_importance(one.draw_logprobs[i], kappa)
                live.tree.branches.append(branch)
                child = LiveBranch(live.tree, branch, reservation, start)
                child.append(one, i)
                born.append((row, one.tokens[i], child))
        self._live += [child for _, _, child in born]
        return parents + [row for row, _, _ in born], tokens + [token for _, token, _ in born]
