"""A tree's bookkeeping on the host: which rows are live, which may fork, what they cost. No tensors, no model."""

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
    """One step's result for one row.

    Attributes:
        tokens: The draws, the largest key first; −1 where no tokens are left.
        draw_logprobs: Of each draw, under the distribution drawn from, nats.
        keys: Of each draw, log p + Gumbel.
        logprobs: Of each draw, under the combined distribution, nats.
        entropy: Of the combined distribution, nats.
        confidence: Of the combined distribution, nats.
        at_fork: Whether this is a fork by the loop's rule (`where`); `can_fork` has to allow it too.
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

    def has_room(self) -> bool:
        """Whether the budget has another token for it, reserved or still free."""
        return self.reservation is None or self.reservation.left > 0 or self.reservation.extend(1)

    def append(self, one: RowDraws, i: int) -> None:
        """Record draw `i`, and charge it to the budget."""
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

    def __init__(
        self,
        prompts: int,
        *,
        planned: int,
        length: int,
        ledgers: Sequence[TokenLedger] | None,
        reserve: int | None = None,
    ) -> None:
        """Make an empty tree of at most `planned` leaves for each prompt.

        `length` is the maximum number of generated tokens on a path, `reserve` how many of them are reserved before a
        text begins (None for all). `ledgers` holds one ledger per prompt, already charged for the prompt; None for no
        limit.
        """
        self.trees = [ForkTree(i, planned=planned) for i in range(prompts)]
        self._length = length
        self._reserved = length if reserve is None else min(reserve, length)
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
        """The maximum number of draws a step needs."""

    @abstractmethod
    def advance(self, drawn: Sequence[RowDraws]) -> tuple[list[int], list[int]]:
        """Append the draws of each live row; returns the old row that each new row continues, and its token."""

    def retire(self, done: Sequence[bool], *, halt: bool = False) -> list[int]:
        """Drop finished rows and those without tokens left, and return the rows that stay.

        `done` says for each live row whether a stopping criterion holds; `halt` cuts all others too (out of time).
        """
        keep, live_on = [], []
        for row, (live, ended) in enumerate(zip(self._live, done, strict=True)):
            full = len(live.branch) >= self._length
            room = ended or full or live.has_room()
            live.tree.no_room |= not room
            if ended or halt or full or not room:
                live.branch.finished = bool(ended)
                if live.reservation is not None:
                    live.reservation.release()
            else:
                keep.append(row)
                live_on.append(live)
        self._live = live_on
        return keep

    def _start(self, tree: ForkTree, most: int) -> list[LiveBranch]:
        """Begin branches at the prompt, as many as can be finished but at least one; the first is their parent."""
        started: list[LiveBranch] = []
        for reservation in self._reserve(tree.prompt, self._reserved, most, short=True):
            parent = started[0].branch if started else None
            started.append(LiveBranch(tree, Branch(len(tree), parent), reservation))
            tree.branches.append(started[-1].branch)
        self._live += started
        return started

    def _reserve(self, prompt: int, tokens: int, most: int, *, short: bool = False) -> list[Reservation | None]:
        """Reservations of `tokens` each, while the ledger lasts; with `short` the first may be smaller."""
        if self._ledgers is None:
            return [None] * most
        ledger = self._ledgers[prompt]
        out: list[Reservation | None] = []
        while len(out) < most:
            try:
                wanted = min(tokens, ledger.left) if short and not out else tokens
                out.append(ledger.reserve(wanted, label="generated"))
            except BudgetError:
                self.trees[prompt].no_room = True
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
        reserve: int | None = None,
    ) -> None:
        """Begin one branch for each prompt; the arguments are those of `ForkDecoding` and `Frontier`."""
        super().__init__(prompts, planned=branches, length=length, reserve=reserve, ledgers=ledgers)
        self._branches = branches
        self._children = children
        self._min_gap = min_gap
        for tree in self.trees:
            self._start(tree, 1)

    def most_draws(self) -> int:
        """The maximum number of draws a step needs: one more than the children of a fork, for the threshold κ."""
        room = max((self._branches - len(live.tree) + 1 for live in self._live), default=1)
        most = min(self._children, room)
        return most + 1 if most > 1 else 1

    def can_fork(self) -> list[bool]:
        """Whether each live row is allowed to fork now, whatever its distribution says."""
        return [
            len(live.tree) < self._branches
            and (live.last_fork is None or len(live.branch) - live.last_fork >= self._min_gap)
            for live in self._live
        ]

    def advance(self, drawn: Sequence[RowDraws]) -> tuple[list[int], list[int]]:
        """Append the draws, and split the rows that fork; see `Frontier.advance`."""
        allowed = self.can_fork()
        parents, tokens, born = [], [], []
        for row, (live, one, may) in enumerate(zip(list(self._live), drawn, allowed, strict=True)):
            # Recomputed for each row: an earlier row of the same prompt may have taken the last place.
            room = self._branches - len(live.tree) + 1
            # The number of drawable tokens does not depend on the draws, so weights stay unbiased.
            most = min(self._children, room, sum(token >= 0 for token in one.tokens))
            left = self._reserved - len(live.branch)
            forks = may and one.at_fork and left > 0
            reserved = self._reserve(live.tree.prompt, left, most - 1) if forks else []
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
