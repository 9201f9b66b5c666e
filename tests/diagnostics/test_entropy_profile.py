"""Entropies of simulated runs: the profile, the change of forks, the on-policy signature."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from support.simulated import FAST, assert_same, covered, run, shuffled, text

from proxytune.diagnostics import entropy_profile, fork_change, on_policy_signature
from proxytune.errors import InputError
from proxytune.stats.bootstrap import Interval
from proxytune.trace import Trace


def policy(seed: int, mean: float = 1.0, *, prompts: int = 25, given: bool = False) -> Trace:
    """Entropies are exponential, around a level of the prompt's own, which has this mean."""
    rng = np.random.default_rng(seed)
    levels = mean * rng.gamma(4, 1 / 4, size=prompts)
    return run(
        [
            text(i, entropy=rng.exponential(level, size=rng.integers(5, 40)), given=given)
            for i, level in enumerate(levels)
            for _ in range(2)
        ]
    )


def test_means_and_shares_cover_the_truth() -> None:
    found = [entropy_profile(policy(seed), threshold=1.0, **FAST) for seed in range(40)]
    share = 0.3319  # E[exp(−1/level)] of a gamma level of shape 4 and mean 1
    assert sum(1.0 in one.mean for one in found) >= 34
    assert sum(share in one.above for one in found if one.above) >= 34
    assert sum(1.0 in one.places[3].value for one in found) >= 34


def test_the_profile_in_closed_form() -> None:
    texts = [text(i, entropy=[0.0, 1.0, 2.0, 3.0], fork=[0, 0, 0, 1]) for i in range(5)]
    found = entropy_profile(run([*texts, text(0, entropy=[0, 1, 2, 3, 9, 9], fork=[0, 0, 0, 1, 1, 1])]), bins=2)
    assert found.mean.value == pytest.approx(54 / 26)
    assert found.above is not None
    assert found.above.value == pytest.approx(8 / 26)
    assert [(one.first, one.last, one.value.value, one.tokens) for one in found.places] == [
        (0, 1, 0.5, 12),
        (2, 3, 2.5, 12),
    ]
    assert (found.left_out, found.prompts, found.texts, found.tokens) == (2, 5, 6, 26)
    assert found.quantiles[0.5] == 2.0
    assert found.quantiles[0.99] == 9.0
    assert sum(found.shares) == pytest.approx(1)
    assert found.says.startswith("The mean entropy is 2.08 [")
    assert entropy_profile(run(texts), threshold=3.0).above == Interval(0, 0, 0)
    assert entropy_profile(run([text(i, entropy=[0.0]) for i in range(5)])).mean == Interval(0, 0, 0)


def test_leaves_count_by_their_weights() -> None:
    texts = [text(i, entropy=[1.0], facts={"weight": 0.9}) for i in range(5)]
    texts += [text(i, entropy=[5.0, 5.0], facts={"weight": 0.1}) for i in range(5)]
    found = entropy_profile(run(texts))
    assert found.mean.value == pytest.approx((0.9 * 1 + 0.1 * 10) / (0.9 + 0.2))
    assert found.quantiles[0.75] == 1.0


def test_a_changed_share_of_forks_is_covered() -> None:
    def change(seed: int) -> Interval:
        return fork_change(policy(seed), policy(seed + 500, 0.5), threshold=1.0, **FAST).change

    after = 0.1375  # E[exp(−2/level)]
    assert covered(after - 0.3319, change, 40) >= 34


def test_planning_execution_and_kept_forks_in_closed_form() -> None:
    def checkpoint(*entropy: float) -> Trace:
        return run([text(i, entropy=entropy, tokens=[1, 2, 3, 4]) for i in range(6)])

    found = fork_change(checkpoint(0, 1, 2, 3), checkpoint(2, 0, 0, 4), threshold=1.0)
    assert [one.value for one in found.forks] == [0.5, 0.5]
    assert [one.value for one in found.planning if one] == [2.5, 3.0]
    assert [one.value for one in found.execution if one] == [0.5, 0.0]
    assert found.kept is not None
    assert found.kept.value == 0.5
    assert "no difference" in found.says
    certain = fork_change(checkpoint(0, 0, 0, 3), checkpoint(0, 0, 0, 0), share=0.25)
    assert certain.threshold == 1.5
    assert certain.planning[1] is None
    assert "fewer forks" in certain.says
    others = run([text(i, entropy=[2.0], tokens=[9]) for i in range(6)])
    assert fork_change(checkpoint(0, 1, 2, 3), others).kept is None


def test_the_signature_covers_the_truth() -> None:
    def ratio(seed: int) -> Interval:
        return on_policy_signature(policy(seed, 0.5), policy(seed + 500, 1.75, given=True), **FAST).ratio

    assert covered(3.5, ratio, 40) >= 34
    both = run([*policy(0, 0.5), *policy(500, 1.75, given=True)])
    one = on_policy_signature(both, **FAST)
    assert_same(one, on_policy_signature(policy(0, 0.5), policy(500, 1.75, given=True), **FAST))
    assert one.ratio.value == pytest.approx(one.elsewhere.value / one.own.value)


def test_the_order_of_texts_does_not_matter() -> None:
    trace = policy(3)
    assert_same(entropy_profile(trace, **FAST), entropy_profile(shuffled(trace), **FAST))
    assert_same(fork_change(trace, policy(4), **FAST), fork_change(shuffled(trace), shuffled(policy(4)), **FAST))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda: entropy_profile(run([text(i, entropy=[np.nan]) for i in range(5)])), "a finite entropy at each token"),
        (lambda: entropy_profile(policy(0), threshold=-1), "threshold: expected a finite number of nats ≥ 0"),
        (lambda: entropy_profile(policy(0), bins=0), "bins: expected"),
        (lambda: on_policy_signature(policy(0)), "at least 5 prompts that both have; got 0, of 25 and 0"),
        (
            lambda: on_policy_signature(run([text(i) for i in range(9)]), policy(0, given=True)),
            "own texts with some entropy; got 0 nats",
        ),
        (lambda: fork_change(policy(0), policy(0, prompts=3)), "fork_change: expected at least 5 prompts"),
    ],
)
def test_what_cannot_be_told_is_refused(wrong: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        wrong()
