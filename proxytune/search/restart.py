"""From a finished fork tree to the next round's starts: which branches go on, and from which of their forks.

Branches are drawn by `AnswerHistory.select`, so those whose answers were seen least are the likeliest. Each goes on
from a fork on its way, where the distribution was undecided; one without forks starts anew from the prompt.

```python
out = model.generate(**inputs, do_sample=True, custom_generate=tree, return_dict_in_generate=True)
history.record(prompt, answers)  # of the leaves, in their order
points = restart_points(out.trees[0], answers, history, 4, prompt=prompt, round=0)
starts = [[*prompt_ids, *point.tokens] for point in points]  # the prompts of round 1
```

The next round needs another seed or other rows: noise is keyed by position, and the same noise after the same prefix
makes the same text again.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

from numpy.typing import ArrayLike

from proxytune.errors import InputError
from proxytune.search.answer_history import AnswerHistory
from proxytune.search.keyed_noise import keyed_uniforms, round_key
from proxytune.validation import Ids, choice

if TYPE_CHECKING:  # trees need torch, what is done with them here does not
    from proxytune.methods.trees.tree import Branch, ForkTree

__all__ = ["RestartPoint", "RestartRule", "forks_along", "restart_points"]

RestartRule = Literal["random", "last"]


@dataclass(frozen=True)
class RestartPoint:
    """Where a round goes on.

    The weights are those of the draw among branches (`Selection`). They say nothing of the fork, which is not part of
    the model's law: texts that go on from several prefixes are no sample of it, and no vote with these weights is
    unbiased.

    Attributes:
        branch: The branch's number in its tree.
        position: How many generated tokens the start keeps.
        tokens: Those tokens, without the prompt's.
        forks: Of how many forks on the branch's way it is one; 0 if there was none, and it starts at the prompt.
        log_weight: Natural logarithm of the branch's weight under the selected law.
        log_prior_weight: Likewise under the prior.
    """

    branch: int
    position: int
    tokens: tuple[int, ...]
    forks: int
    log_weight: float
    log_prior_weight: float


def forks_along(branch: Branch) -> list[int]:
    """The forks on the way to a branch's end, its ancestors' included.

    Args:
        branch: The branch.

    Returns:
        Positions in generated tokens, ascending: the token there was drawn from several.
    """
    steps = branch.path()
    # An ancestor's forks count up to the one at which the way leaves it.
    return [
        fork
        for one, then in zip(steps, [*steps[1:], None], strict=True)
        for fork in sorted(one.forks)
        if then is None or fork <= then.start
    ]


def restart_points(
    tree: ForkTree,
    answers: Sequence[Hashable | None],
    history: AnswerHistory,
    count: int,
    *,
    prompt: str | Ids,
    round: int,
    seed: int = 0,
    fork: RestartRule = "random",
    prior: ArrayLike | None = None,
) -> list[RestartPoint]:
    """Choose the branches that go on, and for each the fork it goes on from.

    Args:
        tree: A finished tree.
        answers: The answer of each of its branches, in their order; None for no answer.
        history: The counts, of this round too.
        count: How many branches, from 1 to as many as there are.
        prompt: The prompt under which they are counted.
        round: The number of the round that has ended, at least 0.
        seed: The same seed chooses the same.
        fork: "random" for any of the forks on the way, all alike; "last" for the last one.
        prior: `[branches]`, at least 0; `tree.weights()` to follow the model's law. None for all the same.

    Returns:
        One point for each branch, in the order of the draw. Two may have the same tokens, where their branches shared
        them.

    Raises:
        InputError: If there is not one answer for each branch, or a setting is out of its range.
    """
    choice("fork", fork, get_args(RestartRule))
    if len(answers) != len(tree):
        raise InputError.of(
            "answers",
            expected=f"{len(tree)}, one for each branch of the tree",
            got=f"{len(answers)}",
            remedy="Pass None for branches without an answer.",
        )
    selected = history.select(prompt, answers, count, round=round, seed=seed, prior=prior)
    uniforms = keyed_uniforms(round_key("fork", prompt, round, seed), len(tree))
    points = []
    for row, index in enumerate(selected.indices):
        branch = tree.branches[index]
        forks = forks_along(branch)
        chosen = -1 if fork == "last" else int(uniforms[index] * len(forks))
        position = forks[chosen] if forks else 0
        points.append(
            RestartPoint(
                branch=branch.number,
                position=position,
                tokens=tuple(int(token) for token in branch.along("tokens")[:position]),
                forks=len(forks),
                log_weight=float(selected.log_weights[row]),
                log_prior_weight=float(selected.log_prior_weights[row]),
            )
        )
    return points
