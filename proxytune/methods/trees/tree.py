"""The record of a tree: which branch left which at what token, how each was drawn, and its weight."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from proxytune.stats.importance import normalised

__all__ = ["Branch", "ForkTree"]


@dataclass(eq=False)
class Branch:
    """One continuation of a prompt, from the fork where it left another one.

    Attributes:
        number: Its number in the tree; the first is 0.
        parent: The branch that it left; None for the first.
        start: How many generated tokens it shares with its parent.
        log_weight: Log of its weight, the product of its draws' importance weights (in a fork tree those of Kool et al.
            2019, arXiv 1903.06059). Over the leaves of a tree, Σ weight · f is an unbiased estimate of E[f].
        tokens: Its own tokens, from `start` on.
        logprobs: Of each own token, nats, under the combined distribution at temperature 1.
        entropies: Of each own token's distribution, nats, raw.
        confidences: Of each own token's distribution: −mean log p of the 20 most probable, nats.
        forks: Own positions, in generated tokens, where it split or a penalty applied; its parent's not included.
        finished: Whether it ended by itself; False if the budget or the length cut it.
    """

    number: int
    parent: Branch | None = None
    start: int = 0
    log_weight: float = 0.0
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    entropies: list[float] = field(default_factory=list)
    confidences: list[float] = field(default_factory=list)
    forks: list[int] = field(default_factory=list)
    finished: bool = False

    def __repr__(self) -> str:
        left = "" if self.parent is None else f" of {self.parent.number} from token {self.start}"
        return f"Branch({self.number}{left}, {len(self.tokens)} own tokens{'' if self.finished else ', cut'})"

    def __len__(self) -> int:
        """Number of generated tokens on its path, its ancestors' included."""
        return self.start + len(self.tokens)

    def path(self) -> list[Branch]:
        """Its ancestors from the first on, and itself at the end."""
        return [self] if self.parent is None else [*self.parent.path(), self]

    def along(self, what: str) -> list[float]:
        """One value for each token of its path: "tokens", "logprobs", "entropies" or "confidences"."""
        out: list[float] = []
        steps = self.path()
        for one, then in zip(steps, [*steps[1:], None], strict=True):
            own = getattr(one, what)
            out += own if then is None else own[: then.start - one.start]
        return out


@dataclass(eq=False)
class ForkTree:
    """All branches of one prompt.

    Attributes:
        prompt: The prompt's row in the batch.
        branches: In the order of their numbers. Each is a leaf: a parent goes on as its own first child.
        planned: How many leaves were asked for, at most.
        no_room: Whether the budget kept a branch from beginning, or cut one.
    """

    prompt: int
    branches: list[Branch] = field(default_factory=list)
    planned: int = 1
    no_room: bool = False

    def __repr__(self) -> str:
        return f"ForkTree(prompt {self.prompt}, {len(self)} of {self.planned} leaves, {self.tokens} tokens)"

    def __iter__(self) -> Iterator[Branch]:
        """The branches, which are the leaves."""
        return iter(self.branches)

    def __len__(self) -> int:
        """Number of leaves."""
        return len(self.branches)

    @property
    def tokens(self) -> int:
        """Number of generated tokens, shared ones counted once."""
        return sum(len(branch.tokens) for branch in self.branches)

    @property
    def cut(self) -> int:
        """Number of leaves that the budget, the length or the time cut."""
        return sum(not branch.finished for branch in self.branches)

    @property
    def starved(self) -> bool:
        """Whether the budget had no room for all leaves that were planned, or not for all of their texts."""
        return self.no_room and (len(self) < self.planned or self.cut > 0)

    @property
    def counts(self) -> str:
        """How many leaves were planned, are here, and were cut, in words."""
        return f"{self.planned} texts planned, {len(self)} ran, {self.cut} of them cut"

    def weights(self) -> list[float]:
        """The leaves' self-normalised weights: they sum to 1 (arXiv 1903.06059, eq. 6)."""
        return normalised([branch.log_weight for branch in self.branches])

    def nested(self, decode: Callable[[Sequence[int]], str]) -> dict[str, Any]:
        """The tree as plain nested data, as `proxytune.view.page(trace, trees=[…])` takes it.

        A node is a stretch of tokens without a fork: its `text`, number of `tokens`, `weight` (the sum over its leaves)
        and `entropy` where it begins (nats); then its `children`, or, for a leaf, its number and whether it `finished`.

        Args:
            decode: A function from token ids to text.
        """
        weights = self.weights()
        below: dict[int, list[Branch]] = {}
        for branch in self.branches:
            if branch.parent is not None:
                below.setdefault(branch.parent.number, []).append(branch)

        def node(branch: Branch, begin: int, leaving: list[Branch]) -> dict[str, Any]:
            at = begin - branch.start
            end = min((one.start for one in leaving), default=len(branch))
            tokens = branch.tokens[at : end - branch.start]
            made: dict[str, Any] = {"text": decode(tokens), "tokens": len(tokens)}
            if at < len(branch.entropies):
                made["entropy"] = branch.entropies[at]
            if not leaving:
                return made | {"weight": weights[branch.number], "leaf": branch.number, "finished": branch.finished}
            children = [node(branch, end, [one for one in leaving if one.start > end])]
            children += [node(one, end, below.get(one.number, [])) for one in leaving if one.start == end]
            return made | {"weight": math.fsum(child["weight"] for child in children), "children": children}

        (root,) = (branch for branch in self.branches if branch.parent is None)
        return node(root, root.start, below.get(root.number, []))

    def render(self, decode: object = None) -> str:
        """Draw the tree as text, a line for each branch: where it left, the entropy there, its length and weight.

        Args:
            decode: A function from token ids to text; None for no text.
        """
        children: dict[int, list[Branch]] = {}
        for branch in self.branches:
            if branch.parent is not None:
                children.setdefault(branch.parent.number, []).append(branch)
        weights = self.weights()
        lines: list[str] = []

        def draw(branch: Branch, before: str, mark: str, further: str) -> None:
            at = ""
            if branch.parent is not None:
                entropy = branch.entropies[0] if branch.entropies else math.nan
                at = f" at token {branch.start}, H {entropy:.2f} nats"
            text = f"  {decode(branch.tokens)!r}" if callable(decode) else ""
            end = "" if branch.finished else ", cut"
            lines.append(
                f"{before}{mark}{branch.number}{at}: {len(branch.tokens)} tokens{end}, "
                f"weight {weights[branch.number]:.3f}{text}"
            )
            below = sorted(children.get(branch.number, []), key=lambda b: (b.start, b.number))
            for i, child in enumerate(below):
                last = i == len(below) - 1
                draw(child, before + further, "└─ " if last else "├─ ", "   " if last else "│  ")

        for root in self.branches:
            if root.parent is None:
                draw(root, "", "", "")
        return "\n".join(lines)
