"""The token ledger: never exceeded, whatever is charged, reserved and released, from however many threads."""

import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from proxytune.budget.ledger import Reservation, TokenLedger
from proxytune.errors import BudgetError, InputError

# Few ids and short texts, so that prefixes really meet; one budget that is generous and some that are not.
TEXTS = st.lists(st.integers(0, 2), max_size=6)
ACTIONS = st.lists(
    st.one_of(
        st.tuples(st.just("charge"), st.integers(0, 9), st.sampled_from("abc")),
        st.tuples(st.just("reserve"), st.integers(0, 9), st.sampled_from("abc")),
        st.tuples(st.just("spend"), st.integers(0, 5), st.integers(0, 20)),
        st.tuples(st.just("release"), st.just(0), st.integers(0, 20)),
        st.tuples(st.just("prefix"), TEXTS, st.sampled_from("abc")),
    ),
    max_size=25,
)


def perform(ledger: TokenLedger, actions: Sequence[tuple]) -> list[Reservation]:
    """Do them all; what cannot be afforded is left out."""
    reservations: list[Reservation] = []
    for kind, amount, other in actions:
        try:
            if kind == "charge":
                ledger.charge(amount, label=other)
            elif kind == "reserve":
                reservations.append(ledger.reserve(amount, label=other))
            elif kind == "prefix":
                ledger.charge_prefix(amount, label=other)
            elif reservations and kind == "spend":
                reservations[other % len(reservations)].spend(amount)
            elif reservations:
                reservations[other % len(reservations)].release()
        except BudgetError:
            pass
        assert_sound(ledger)
    return reservations


def assert_sound(ledger: TokenLedger) -> None:
    with ledger._lock:  # one moment: other threads go on
        assert 0 <= ledger._spent <= ledger.max_total_tokens
        assert ledger._held >= 0
        assert ledger._left() >= 0
        assert sum(ledger._by.values()) == ledger._spent
        assert len(ledger._paid) <= ledger._spent


@settings(max_examples=150, deadline=None)
@given(st.integers(1, 60), ACTIONS)
def test_never_exceeded_by_any_sequence(budget: int, actions: list[tuple]) -> None:
    ledger = TokenLedger(budget)
    reservations = perform(ledger, actions)
    assert ledger.spent + ledger.held + ledger.left == budget
    assert ledger.held == sum(r.left for r in reservations)
    for reservation in reservations:
        reservation.release()
    assert ledger.held == 0
    assert ledger.left == budget - ledger.spent
    assert sum(ledger.by.values()) == ledger.spent


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 60), st.lists(ACTIONS, min_size=2, max_size=4))
def test_never_exceeded_by_several_threads(budget: int, scripts: list[list[tuple]]) -> None:
    ledger = TokenLedger(budget)
    barrier = threading.Barrier(len(scripts))

    def run(script: list[tuple]) -> None:
        barrier.wait()
        for reservation in perform(ledger, script):
            reservation.release()

    with ThreadPoolExecutor(len(scripts)) as pool:
        list(pool.map(run, scripts))  # raises what a thread raised
    assert ledger.held == 0
    assert sum(ledger.by.values()) == ledger.spent <= budget


def test_threads_that_race_for_the_last_tokens_get_exactly_those() -> None:
    ledger = TokenLedger(10_000)

    def run(_: int) -> int:
        mine = 0
        while True:
            try:
                ledger.charge(3)
            except BudgetError:
                return mine
            mine += 3

    with ThreadPoolExecutor(4) as pool:
        assert sum(pool.map(run, range(4))) == ledger.spent == 9999


@settings(max_examples=200, deadline=None)
@given(st.lists(TEXTS, max_size=12))
def test_prefixes_cost_what_a_set_of_all_prefixes_says(texts: list[list[int]]) -> None:
    ledger, paid = TokenLedger(10_000), set()
    for text in texts:
        every = {tuple(text[:n]) for n in range(1, len(text) + 1)}
        assert ledger.cost_of_prefix(text) == len(every - paid)
        assert ledger.charge_prefix(text) == len(every - paid)
        paid |= every
        assert ledger.spent == len(paid)


def test_a_shared_prompt_is_paid_for_once_and_a_longer_one_for_its_extension() -> None:
    ledger = TokenLedger(100)
    assert ledger.charge_prefix((1, 2, 3)) == 3
    assert ledger.charge_prefix((1, 2, 3)) == 0
    assert ledger.charge_prefix([1, 2, 3, 4, 5]) == 2
    assert ledger.charge_prefix((1, 2)) == 0
    assert ledger.charge_prefix((1, 2, 9)) == 1
    assert ledger.charge_prefix((7, 8, 9, 10), 2) == 2
    assert ledger.by == {"prompt": 8}


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.int32, np.int64])
def test_the_same_ids_in_other_clothes(dtype: type) -> None:
    ids = np.array([5, 6, 7, 100], dtype)
    ledger = TokenLedger(100)
    assert ledger.charge_prefix(ids.tobytes(), 4) == 4
    assert ledger.charge_prefix(ids) == 0
    assert ledger.charge_prefix(torch.from_numpy(ids)) == 0
    assert ledger.charge_prefix(ids.tolist()) == 0


def test_the_nodes_of_a_tree_may_have_names() -> None:
    ledger = TokenLedger(100)
    assert ledger.charge_prefix("root/0", 10) == 10
    assert ledger.charge_prefix("root/0", 14) == 4
    assert ledger.charge_prefix("root/0", 9) == 0
    assert ledger.charge_prefix(0, 5) == 5
    assert ledger.cost_of_prefix(0, 6) == 1


def test_a_revision_pays_for_what_it_adds_to_the_text_it_revises() -> None:
    ledger = TokenLedger(100)
    prompt, answer, critique = [1, 2, 3], [4, 5], [6, 7, 8, 9]
    ledger.charge_prefix(prompt)
    ledger.charge(len(answer), label="parallel", text=prompt + answer)
    assert ledger.charge_prefix(prompt + answer + critique, label="critique") == 4
    assert ledger.by == {"prompt": 3, "parallel": 2, "critique": 4}
    # Two samples that happen to start alike were both generated.
    ledger.charge(len(answer), label="parallel", text=prompt + answer)
    assert ledger.by["parallel"] == 4


def test_a_text_that_was_not_paid_for_is_not_taken_for_paid() -> None:
    ledger = TokenLedger(100)
    with pytest.raises(InputError, match="5 unpaid tokens of 5.*charge_prefix"):
        ledger.charge(2, text=[1, 2, 3, 4, 5])
    assert ledger.spent == 0
    assert ledger.cost_of_prefix([1, 2, 3, 4, 5]) == 5


def test_children_that_were_started_can_be_finished() -> None:
    ledger = TokenLedger(100)
    with ledger.reserve(60, label="fork") as children:
        assert not ledger.can_afford(41)
        assert ledger.can_afford(40)
        with pytest.raises(BudgetError, match="at most 40, which are left of max_total_tokens=100"):
            ledger.charge(41)
        ledger.charge(40, label="others")
        children.spend(25)
        children.spend(25)
        assert (ledger.spent, ledger.held, children.left) == (90, 10, 10)
    assert (ledger.spent, ledger.held, ledger.left) == (90, 0, 10)
    assert ledger.by == {"others": 40, "fork": 50}
    children.release()
    assert ledger.left == 10
    with pytest.raises(BudgetError, match="at most the 0 tokens"):
        children.spend(1)


def test_a_reservation_is_given_back_also_after_an_error() -> None:
    ledger = TokenLedger(10)
    with pytest.raises(RuntimeError), ledger.reserve(8):
        raise RuntimeError
    assert ledger.left == 10


def test_a_refused_charge_leaves_nothing_behind() -> None:
    ledger = TokenLedger(5)
    ledger.charge(3, label="a")
    for refused in (
        lambda: ledger.charge(3, label="b"),
        lambda: ledger.charge_prefix([1, 2, 3], label="b"),
        lambda: ledger.charge_prefix("node", 3, label="b"),
        lambda: ledger.reserve(3, label="b"),
    ):
        with pytest.raises(BudgetError, match="Stop here and vote"):
            refused()
    assert ledger.by == {"a": 3}
    assert ledger.cost_of_prefix([1, 2, 3]) == ledger.cost_of_prefix("node", 3) == 3
    ledger.charge(2)  # to the last token


def test_a_budget_below_the_prompt_says_what_the_prompt_needs() -> None:
    ledger = TokenLedger(10)
    message = r"'prompt' of 12 tokens, 0 of them already.*at most 10.*needs max_total_tokens of at least 12"
    with pytest.raises(BudgetError, match=message):
        ledger.charge_prefix(range(12))


@pytest.mark.parametrize("budget", [0, -1, 1.5, 10.0, "10", None, True, float("nan")])
def test_budgets_are_positive_whole_numbers(budget: object) -> None:
    with pytest.raises(InputError, match="max_total_tokens: expected a whole number of tokens, at least 1; got"):
        TokenLedger(budget)


@pytest.mark.parametrize("tokens", [-1, 0.5, "1", None, False])
def test_charges_are_whole_numbers(tokens: object) -> None:
    ledger = TokenLedger(10)
    reservation = ledger.reserve(5)
    for charge in (ledger.charge, ledger.reserve, ledger.can_afford, reservation.spend):
        with pytest.raises(InputError, match="tokens: expected a whole number of tokens, at least 0; got"):
            charge(tokens)
    assert (ledger.spent, ledger.held) == (0, 5)


def test_more_than_reserved_is_refused() -> None:
    ledger = TokenLedger(10)
    reservation = ledger.reserve(5, label="fork")
    with pytest.raises(BudgetError, match="reservation for 'fork': expected at most the 5 tokens.*got 6"):
        reservation.spend(6)
    assert (ledger.spent, reservation.left) == (0, 5)


@pytest.mark.parametrize(
    ("key", "length", "message"),
    [
        ([1, -2], None, "expected token ids"),
        ([1.5], None, "expected token ids"),
        (None, None, "expected token ids"),
        (torch.tensor([[1, 2]]), None, "expected token ids"),
        ("node", None, "how many tokens the prefix named 'node' has"),
        ([1, 2], 3, "at most the 2 ids"),
        (b"abc", 2, "bytes of `length` ints"),
        (b"abc", None, "bytes of `length` ints"),
        (b"abc", 0, "bytes of `length` ints"),
        ([1], -1, "length: expected a whole number"),
    ],
)
def test_what_is_no_prefix_is_refused(key: object, length: int | None, message: str) -> None:
    ledger = TokenLedger(10)
    with pytest.raises(InputError, match=message):
        ledger.charge_prefix(key, length)
    assert ledger.spent == 0
