"""The record of a tree: which branch left which at what token, what each was drawn with, and what it weighs."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

from proxytune.stats.importance import normalised

__all__ = ["Branch", "ForkTree"]


@dataclass(eq=False)
class Branch:
    """One continuation of a prompt, from the fork where it left another on.

    Attributes:
        number: Its number in the tree; the first is 0.
        parent: The branch that it left; None for the first.
        start: How many generated tokens it shares with its parent.
        log_weight: Natural logarithm of its weight: the product of its draws' importance weights along the way (of a
            fork tree those of Kool et al. 2019, arXiv 1903.06059). Over the leaves of a tree, Σ weight · f is an
            unbiased estimate of E[f].
        tokens: Its own tokens, from `start` on.
        logprobs: Of each own token, nats, under the combined distribution at temperature 1.
        entropies: Of each own token's distribution, nats, raw.
        confidences: Of each own token's distribution: −mean log p of the 20 most probable, nats.
        forks: Own positions, as numbers of generated tokens, at which it split, or siblings of it repelled it; its
            parent's are not among them.
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

    def __len__(self) -> int:
        """How many tokens were generated on the way to its end, its ancestors' included."""
        return self.start + len(self.tokens)

    def path(self) -> list[Branch]:
        """Its ancestors from the first on, and itself at the end."""
        return [self] if self.parent is None else [*self.parent.path(), self]

    def along(self, what: str) -> list[float]:
        """A record of every token on the way to its end.

        Args:
            what: "tokens", "logprobs", "entropies" or "confidences".

        Returns:
            One value for each of `len(branch)` tokens.
        """
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
        branches: In the order of their numbers. Every one of them is a leaf, since a parent goes on as its own first
            child.
    """

    prompt: int
    branches: list[Branch] = field(default_factory=list)

    def __iter__(self) -> Iterator[Branch]:
        """The branches, which are the leaves."""
        return iter(self.branches)

    def __len__(self) -> int:
        """How many leaves there are."""
        return len(self.branches)

    @property
    def tokens(self) -> int:
        """How many tokens were generated in all, shared ones counted once."""
        return sum(len(branch.tokens) for branch in self.branches)

    def weights(self) -> list[float]:
        """The leaves' weights, self-normalised: they sum to 1 (arXiv 1903.06059, eq. 6).

        Returns:
            One for each branch.
        """
        return normalised([branch.log_weight for branch in self.branches])

    def render(self, decode: object = None) -> str:
        """Draw the tree in text: a line for each branch, with where it left, the entropy there and its weight.

        Args:
            decode: A function from token ids to text; None for no text.

        Returns:
            The sampler, without colours.
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

        draw(self.branches[0], "", "", "")
        return "\n".join(lines)
