"""The cost model against rounds that are played out, sums over outcomes, and published sizes worked out by hand."""

import math
import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxytune.costs.roofline import PassBytes, bytes_per_token
from proxytune.costs.speculation import DraftCosts, acceptance_of, best_draft_length, expected_tokens, time_per_token
from proxytune.errors import InputError

pytestmark = pytest.mark.smoke

RATES = st.floats(0, 1)
LENGTHS = st.integers(0, 12)
TIMES = st.floats(1e-3, 1e3)
COSTS = st.builds(DraftCosts, TIMES, st.floats(0, 1e3), st.floats(0, 10), st.none() | TIMES)


def play(acceptance: float, k: int, rounds: int, seed: int = 0) -> Counter[str]:
    """Speculative rounds with a coin for each decision: what every member did, and what came out."""
    coin, seen = random.Random(seed), Counter[str]()
    for _ in range(rounds):
        for _ in range(k):
            seen["expert"] += 1  # drafts a token
        seen["base"] += 1
        seen["antiexpert"] += 1
        for _ in range(k):
            seen["drafted"] += 1
            if coin.random() >= acceptance:
                seen["rejected"] += 1
                break
            seen["accepted"] += 1
            seen["tokens"] += 1
        else:
            seen["expert"] += 1  # over the last drafted token: its logits are part of the sum behind it
        seen["tokens"] += 1  # the verifier's own: in the place of the rejected one, or after all accepted ones
    return seen


# No draft, the shortest, a usual and a long one; rates at both ends and between.
@pytest.mark.parametrize("k", [0, 1, 4, 9])
@pytest.mark.parametrize("acceptance", [0.0, 0.3, 0.7, 0.9, 1.0])
def test_tokens_passes_and_time_are_those_of_played_rounds(acceptance: float, k: int) -> None:
    rounds = 20_000
    seen = play(acceptance, k, rounds)
    # Tokens of a round lie in 1 … k + 1: five standard errors of their mean.
    slack = 5 * (k / 2) / math.sqrt(rounds)
    assert seen["tokens"] / rounds == pytest.approx(expected_tokens(acceptance, k), abs=slack + 1e-12)
    each = {"base": 10.0, "antiexpert": 2.0, "expert": 2.5}
    took = sum(seen[role] * time for role, time in each.items()) / seen["tokens"]
    costs = DraftCosts(each["base"] + each["antiexpert"], each["expert"])
    assert took == pytest.approx(time_per_token(acceptance, k, costs), rel=slack + 1e-12)
    if k:
        assert acceptance_of(seen["accepted"], seen["rejected"]) == pytest.approx(acceptance, abs=0.02)


def test_accepted_over_drafted_is_not_the_acceptance() -> None:
    k, rounds = 8, 20_000
    seen = play(0.7, k, rounds)
    assert seen["accepted"] / (k * rounds) < 0.35
    assert acceptance_of(seen["accepted"], seen["rejected"]) == pytest.approx(0.7, abs=0.02)
    assert math.isnan(acceptance_of(0, 0))


@given(RATES, LENGTHS)
def test_expected_tokens_is_the_mean_over_all_outcomes(a: float, k: int) -> None:
    ends = [a**n * (1 - a) for n in range(k)] + [a**k]  # n accepted, then a rejection; or all accepted
    assert sum(ends) == pytest.approx(1)
    assert expected_tokens(a, k) == pytest.approx(sum(p * (n + 1) for n, p in enumerate(ends)))
    assert 1 <= expected_tokens(a, k) <= k + 1


@given(st.floats(0, 0.999), LENGTHS)
def test_expected_tokens_is_the_published_formula(a: float, k: int) -> None:
    assert expected_tokens(a, k) == pytest.approx((1 - a ** (k + 1)) / (1 - a))


@given(st.lists(RATES, min_size=1, max_size=5), LENGTHS)
def test_rows_count_by_their_mean(rates: list[float], k: int) -> None:
    assert expected_tokens(rates, k) == pytest.approx(sum(expected_tokens(a, k) for a in rates) / len(rates))
    # Not the tokens at the mean rate: they are convex in the rate.
    assert expected_tokens([0.0, 1.0], 4) == 3.0 > expected_tokens(0.5, 4)


@given(RATES, COSTS, LENGTHS)
def test_the_best_length_beats_every_other_and_is_the_smallest(a: float, costs: DraftCosts, most: int) -> None:
    best = best_draft_length(a, costs, most)
    times = [time_per_token(a, k, costs) for k in range(most + 1)]
    assert times[best] == pytest.approx(min(times))
    assert all(time > times[best] * (1 + 1e-13) for time in times[:best])


@given(RATES, COSTS, LENGTHS, st.floats(0.01, 100))
def test_the_unit_of_time_does_not_matter(a: float, costs: DraftCosts, most: int, unit: float) -> None:
    plain = None if costs.plain is None else costs.plain * unit
    scaled = DraftCosts(costs.round * unit, costs.draft * unit, costs.position * unit, plain)
    one, other = (time_per_token(a, best_draft_length(a, c, most), c) for c in (costs, scaled))
    assert other == pytest.approx(one * unit)


@given(st.tuples(RATES, RATES), COSTS)
def test_what_is_accepted_more_often_is_never_slower(rates: tuple[float, float], costs: DraftCosts) -> None:
    low, high = sorted(rates)
    assert time_per_token(high, 5, costs) <= time_per_token(low, 5, costs) * (1 + 1e-9)


def test_the_ends() -> None:
    costs = DraftCosts(10.0, 1.0, 0.1)
    assert best_draft_length(0.0, costs, 8) == 0
    assert best_draft_length(1.0, costs, 8) == 8
    assert best_draft_length(0.9, costs, 0) == 0
    assert best_draft_length(0.0, DraftCosts(10.0, 0.0), 8) == 0  # all equally good: nothing is drafted
    assert best_draft_length(0.1, DraftCosts(10.0, 0.0), 8) == 8  # a draft that costs nothing
    assert costs.of_round(0) == 11.0  # a plain step: one pass of each member
    assert costs.of_round(3) == pytest.approx(14.3)
    # A third model rests while nothing is drafted, so it is not worth waking it for little.
    third = DraftCosts(11.0, 1.0, plain=11.0)
    assert third.of_round(0) == 11.0
    assert best_draft_length(0.1, third, 8) == 0


def test_published_sizes() -> None:
    """Floors of one step and of speculation over the tuned model's, by hand from the parameters in billions."""
    sizes = {"13B": 13.02, "7B": 6.74, "32B": 32.76, "1.5B": 1.54}
    model = {name: PassBytes(2e9 * size) for name, size in sizes.items()}
    heavy = DraftCosts.of_bytes([model["13B"], model["7B"]], model["7B"])
    light = DraftCosts.of_bytes([model["32B"], model["1.5B"]], model["1.5B"])
    tuned, large = model["13B"].at(), model["32B"].at()
    assert time_per_token(0.0, 0, heavy) / tuned == pytest.approx((13.02 + 2 * 6.74) / 13.02)
    assert best_draft_length(0.7, heavy, 16) == 2
    assert time_per_token(0.7, 2, heavy) / tuned == pytest.approx((13.02 + (1 + 2 + 0.49) * 6.74) / 13.02 / 2.19)
    assert best_draft_length(0.7, light, 16) == 6
    tokens = 1 + 0.7 + 0.49 + 0.343 + 0.2401 + 0.16807 + 0.117649
    passes = 1 + 6 + 0.7**6  # the antiexpert's, the drafting ones, and the last, where it was accepted
    assert time_per_token(0.7, 6, light) / large == pytest.approx((32.76 + passes * 1.54) / 32.76 / tokens)


@given(st.lists(RATES, min_size=1, max_size=4), LENGTHS, COSTS)
def test_the_last_pass_is_made_if_any_row_needs_it(rates: list[float], k: int, costs: DraftCosts) -> None:
    none = math.prod(1 - a**k for a in rates)
    without = costs.round + k * (costs.draft + costs.position)
    expected = without + (1 - none) * costs.draft
    if k == 0 and costs.plain is not None:
        expected = costs.plain
    assert costs.of_round(k, rates) == pytest.approx(expected)
    assert costs.of_round(k) == pytest.approx(costs.of_round(k, 1.0))


def test_bytes_are_weights_and_caches_of_every_pass() -> None:
    base, small = PassBytes(1000, 10), PassBytes(100, 2)
    assert base.at(context=7, rows=3) == 1000 + 210
    # Four rounds of three drafted tokens, ten tokens in each of two rows.
    got = bytes_per_token([(4, base), (4, small), (16, small)], 20, context=5, rows=2)
    assert got == (4 * 1100 + 20 * 120) / 20
    costs = DraftCosts.of_bytes([base, small], small, context=5, rows=2)
    assert (costs.round, costs.draft, costs.position, costs.plain) == (1220, 120, 0, None)
    assert costs.of_round(3) * 4 / 20 == got
    assert DraftCosts.of_bytes([base, small, small], None).of_round(5) == 1200
    assert DraftCosts.of_bytes([base], small, member=False).of_round(0) == 1000


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: expected_tokens(1.1, 2), "acceptance.*1.1"),
        (lambda: expected_tokens(math.nan, 2), "acceptance.*nan"),
        (lambda: expected_tokens([], 2), "acceptance"),
        (lambda: expected_tokens([0.5, -0.1], 2), "acceptance"),
        (lambda: expected_tokens(0.5, -1), "draft_length.*-1"),
        (lambda: expected_tokens(0.5, 1.5), "draft_length"),
        (lambda: best_draft_length(0.5, DraftCosts(1, 1), -1), "most"),
        (lambda: best_draft_length(2.0, DraftCosts(1, 1), 3), "acceptance"),
        (lambda: DraftCosts(-1, 1), "round"),
        (lambda: DraftCosts(1, math.inf), "draft"),
        (lambda: DraftCosts(0, 0), "costs something"),
        (lambda: DraftCosts(1, 1, plain=0.0), "costs something"),
        (lambda: DraftCosts(1, 1, position=math.nan), "position"),
        (lambda: DraftCosts.of_bytes([], None), "costs something"),
        (lambda: PassBytes(-1), "weights"),
        (lambda: PassBytes(1).at(rows=0), "rows"),
        (lambda: PassBytes(1).at(context=-1), "context"),
        (lambda: bytes_per_token([(1, PassBytes(1))], 0), "tokens"),
        (lambda: bytes_per_token([(-1, PassBytes(1))], 1), "passes"),
        (lambda: acceptance_of(-1, 0), "accepted"),
        (lambda: acceptance_of(1, 0.5), "rejected"),
    ],
)
def test_wrong_use_is_refused(call, words) -> None:
    with pytest.raises(InputError, match=words):
        call()
