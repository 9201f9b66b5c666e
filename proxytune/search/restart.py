"""From a finished fork tree to the next round's prompts: which branches go on, and from which of their forks.

`AnswerHistory.select` draws the branches, favouring answers that came least often. Each restarts at a fork on its path,
where the distribution was undecided; a branch without forks restarts at the prompt.

```python
out = model.generate(**inputs, do_sample=True, custom_generate=tree, return_dict_in_generate=True)
history.record(prompt, answers)  # of the leaves, in their order
points = restart_points(out.trees[0], answers, history, 4, prompt=prompt, round=0)
starts = [[*prompt_ids, *point.tokens] for point in points]  # the prompts of round 1
```

Give the next round another seed or other stream_ids: noise is keyed by position, so the same noise after the same
prefix would repeat the text.
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

if TYPE_CHECKING:  # trees need torch, this module does not
    from proxytune.methods.trees.tree import Branch, ForkTree

__all__ = ["RestartPoint", "RestartRule", "forks_along", "restart_points"]

RestartRule = Literal["random", "last"]


@dataclass(frozen=True)
class RestartPoint:
    """A prefix from which the next round continues.

    The weights are those of the draw among branches (`Selection`). They do not cover the choice of the fork: texts
    continued from several prefixes are not a sample of the model's distribution, and no vote with these weights is
    unbiased.

    Attributes:
        branch: The branch's number in its tree.
        position: How many generated tokens are kept.
        tokens: Those tokens, without the prompt's.
        forks: Number of forks on the branch's path; 0 if there was none, and it restarts at the prompt.
        log_weight: Log importance weight of the branch under the distribution drawn from, in nats.
        log_prior_weight: The same under the prior.
    """

    branch: int
    position: int
    tokens: tuple[int, ...]
    forks: int
    log_weight: float
    log_prior_weight: float


def forks_along(branch: Branch) -> list[int]:
    """Positions of the forks on the path to a branch's end, its ancestors' included.

    Returns:
        Positions in generated tokens, ascending: where branches parted, or siblings repelled each other.
    """
    steps = branch.path()
    # An ancestor's forks count up to the one at which the path leaves it.
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
    """Choose the branches that go on, and the fork from which each restarts.

    Args:
        tree: A finished tree.
        answers: One per branch, in their order; None for no answer.
        history: The counts, this round's included.
        count: How many branches, from 1 to the number of branches.
        prompt: The prompt under which the answers are counted.
        round: Number of the round that has ended, at least 0.
        seed: The same seed chooses the same.
        fork: "random" for any fork on the path, uniformly; "last" for the last one.
        prior: `[branches]`, at least 0; `tree.weights()` to follow the model's distribution; None for uniform.

    Returns:
        One point per branch, in the order of the draw. Two may have the same tokens if their branches shared them.

    Raises:
        InputError: If it is no tree, there is not one answer per branch, or a setting is out of range.
    """
    choice("fork", fork, get_args(RestartRule))
    if not hasattr(tree, "branches"):
        raise InputError.of(
            "tree",
            expected="the tree of one prompt",
            got=f"a {type(tree).__name__}",
            remedy="Pass out.trees[0] for the first prompt of the batch.",
        )
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
