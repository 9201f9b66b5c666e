"""The checks of arguments, each once: what is accepted, as what it comes back, what is refused, and what is said."""

from __future__ import annotations

import math
import subprocess
import sys
from array import array
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch

from proxytune.errors import InputError
from proxytune.validation import (
    as_float,
    as_int,
    choice,
    finite,
    numbers,
    proper_share,
    refuse_seed,
    share,
    shown,
    token_ids,
    validate_alpha,
    whole,
)

NAN, INF = math.nan, math.inf

WHOLE: list[tuple[Any, int]] = [
    (0, 0), (7, 7), (-3, -3), (1 << 70, 1 << 70), (np.int8(5), 5), (np.uint64(1 << 63), 1 << 63),
    (np.array(4), 4), (torch.tensor(4), 4),
]  # fmt: skip
NOT_WHOLE: list[Any] = [
    None, True, False, np.bool_(True), torch.tensor(True), 2.0, np.float64(2.0), NAN, INF, "2", b"2", Fraction(2),
    2 + 0j, [2], (2,), np.array([2]), torch.tensor([2]), torch.tensor(2.0), {}, object(),
]  # fmt: skip
REAL: list[tuple[Any, float]] = [
    (0, 0.0), (-2, -2.0), (1.5, 1.5), (np.float32(0.5), 0.5), (np.float64(0.5), 0.5), (np.int64(2), 2.0),
    (Fraction(1, 4), 0.25),
]  # fmt: skip
NOT_REAL: list[Any] = [
    None, True, False, np.bool_(True), "1.0", b"1", 1 + 0j, [1.0], np.array([1.0]), np.array(1.0), torch.tensor(1.0),
    NAN, INF, -INF, np.float32("nan"), np.float64("inf"), 10**400, {}, object(),
]  # fmt: skip


def refusal(call: Callable[[], Any]) -> str:
    with pytest.raises(InputError) as caught:
        call()
    return str(caught.value)


def test_it_needs_no_torch() -> None:
    code = "import sys, proxytune.validation; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


# --- numbers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("value", "number"), WHOLE, ids=repr)
def test_a_whole_number_comes_back_as_an_int(value: Any, number: int) -> None:
    for got in (as_int(value), whole("n", value, least=None)):
        assert type(got) is int
        assert got == number


@pytest.mark.parametrize("value", NOT_WHOLE, ids=lambda x: repr(x)[:20])
def test_what_is_no_whole_number_is_refused(value: Any) -> None:
    assert as_int(value) is None
    assert refusal(lambda: whole("n", value)) == (
        f"n: expected a whole number of tokens, at least 0; got {value!r}. Pass such a number."
    )


@pytest.mark.parametrize(
    ("value", "bounds", "said"),
    [
        (-1, {}, "a whole number of tokens, at least 0"),
        (0, {"least": 1}, "a whole number of tokens, at least 1"),
        (17, {"least": 1, "most": 16}, "a whole number of tokens, from 1 to 16"),
        (0, {"least": 1, "most": 16}, "a whole number of tokens, from 1 to 16"),
        (1, {"what": "of children", "least": 2}, "a whole number of children, at least 2"),
        (1, {"what": "", "least": 2}, "a whole number, at least 2"),
        (0.5, {"what": "", "least": None}, "a whole number"),
    ],
)
def test_a_whole_number_out_of_its_range_is_refused(value: Any, bounds: dict[str, Any], said: str) -> None:
    assert refusal(lambda: whole("n", value, **bounds, remedy="Do so.")) == f"n: expected {said}; got {value}. Do so."


def test_both_ends_of_a_range_of_whole_numbers_are_in_it() -> None:
    assert [whole("n", n, least=1, most=3) for n in (1, 2, 3)] == [1, 2, 3]


@pytest.mark.parametrize(("value", "number"), REAL, ids=repr)
def test_a_finite_number_comes_back_as_a_float(value: Any, number: float) -> None:
    for got in (as_float(value), finite("x", value), validate_alpha(value)):
        assert type(got) is float
        assert got == number


@pytest.mark.parametrize("value", NOT_REAL, ids=lambda x: repr(x)[:20])
def test_what_is_no_finite_number_is_refused(value: Any) -> None:
    assert not math.isfinite(as_float(value))
    assert refusal(lambda: finite("x", value)) == f"x: expected a finite number; got {value!r}. Pass such a number."
    assert refusal(lambda: validate_alpha(value)) == (
        f"alpha: expected a finite number (0 is the base, 1 the full shift); got {value!r}. Pass e.g. alpha=1.0."
    )
    for said in (refusal(lambda: share("x", value)), refusal(lambda: finite("x", value, least=-9, below=9))):
        assert said.startswith("x: expected a number in ")
        assert f"; got {value!r}. " in said


def test_infinities_are_numbers_but_not_finite() -> None:
    assert as_float(INF) == INF
    assert as_float(-INF) == -INF
    assert math.isnan(as_float(10**400))  # no float holds it


@pytest.mark.parametrize(
    ("bounds", "inside", "outside", "said"),
    [
        ({"least": 0.0}, [0, 5], [-1e-300], "a finite number ≥ 0"),
        ({"above": 0.0}, [1e-300], [0, -0.0, -1], "a finite number > 0"),
        ({"least": 0.0, "most": 1.0}, [0, 1], [-0.1, 1.1], "a number in [0, 1]"),
        ({"least": 0.0, "below": 1.0}, [0, 0.999], [-0.1, 1], "a number in [0, 1)"),
        ({"above": 0.0, "most": 100.0}, [1e-9, 100], [0, 100.1], "a number in (0, 100]"),
        ({"above": 0.0, "below": 1.0}, [0.5], [0, 1], "a number in (0, 1)"),
        ({"what": "of nats", "least": 0.0}, [1], [-1], "a finite number of nats ≥ 0"),
    ],
)
def test_a_finite_number_keeps_to_its_range(
    bounds: dict[str, Any], inside: list[float], outside: list[float], said: str
) -> None:
    for value in inside:
        assert finite("x", value, **bounds) == value
    for value in outside:
        message = refusal(lambda value=value: finite("x", value, **bounds))
        assert message == f"x: expected {said}; got {value!r}. Pass such a number."


def test_shares() -> None:
    assert [share("level", 1), share("level", 0.2), share("eta", 100, 100.0)] == [1.0, 0.2, 100.0]
    assert refusal(lambda: share("eta", 101, 100.0)) == (
        "eta: expected a number in (0, 100]; got 101. The largest is 100."
    )
    assert refusal(lambda: share("level", 0)) == "level: expected a number in (0, 1]; got 0. The largest is 1."
    assert proper_share(np.float32(0.25)) == 0.25
    for value in (0, 1, 1.0, -0.2, 20, True, "0.2", NAN):
        assert refusal(lambda value=value: proper_share(value)) == (
            f"share: expected a number in (0, 1); got {value!r}. Pass e.g. share=0.2 for a fifth of the tokens."
        )


@pytest.mark.parametrize(
    "values",
    [[1, 2.5], (1.0, 2.5), np.array([1, 2.5], np.float32), torch.tensor([1, 2.5]), array("d", [1, 2.5])],
    ids=lambda x: type(x).__name__,
)
def test_numbers_come_back_as_float64(values: Any) -> None:
    got = numbers("x", values)
    assert got.dtype == np.float64
    assert got.tolist() == [1.0, 2.5]


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ([], "a sequence of numbers, not empty; got []. Pass one number for each."),
        (["a"], "a sequence of numbers, not empty; got ['a']. Pass one number for each."),
        (["1.5"], "a sequence of numbers, not empty; got ['1.5']. Pass one number for each."),
        ([[1], [1, 2]], "a sequence of numbers, not empty; got [[1], [1, 2]]. Pass one number for each."),
        (1.5, "a sequence of numbers, not empty; got shape []. Pass one number for each."),
        (np.ones((2, 3)), "a sequence of numbers, not empty; got shape [2, 3]. Pass one number for each."),
        ([1.0, NAN], "finite numbers; got nan at index 1. Look at it."),
        ([-INF, NAN], "finite numbers; got -inf at index 0. Look at it."),
    ],
    ids=repr,
)
def test_what_are_no_finite_numbers_are_refused(values: Any, said: str) -> None:
    assert refusal(lambda: numbers("x", values, remedy="Look at it.")) == f"x: expected {said}"


# --- token ids -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "ids",
    [[3, 0, 9], (3, 0, 9), range(3, 4), np.array([3, 0]), torch.tensor([3, 0]), [np.int64(3), torch.tensor(0)], []],
    ids=repr,
)
def test_token_ids_come_back_as_a_tuple_of_ints(ids: Any) -> None:
    got = token_ids("ids", ids)
    assert isinstance(got, tuple)
    assert all(type(token) is int for token in got)
    assert list(got) == [int(token) for token in ids]


def test_the_first_token_ids_of_a_sequence() -> None:
    assert token_ids("ids", [3, 4, 5], length=2) == (3, 4)
    assert token_ids("ids", [3, 4, 5], length=9) == (3, 4, 5)


@pytest.mark.parametrize("dtype", [np.int8, np.int16, np.int32, np.int64])
def test_token_ids_from_bytes(dtype: Any) -> None:
    ids = np.array([3, 0, 9], dtype)
    assert token_ids("ids", ids.tobytes(), length=3) == (3, 0, 9)
    assert token_ids("ids", b"", length=0) == ()


@pytest.mark.parametrize(("ids", "length"), [(b"abc", 2), (b"abc", None), (b"abc", 0), (b"", 3)])
def test_bytes_of_another_length_are_refused(ids: bytes, length: int | None) -> None:
    said = refusal(lambda: token_ids("ids", ids, length=length))
    assert said.startswith("ids: expected bytes of `length` ints, each 1, 2, 4 or 8 bytes wide; got ")
    assert f"{len(ids)} bytes and length={length}" in said


@pytest.mark.parametrize(
    "ids",
    [None, 5, True, 1.5, [-1], [1, -2], [1.0], [1.5], [True], [np.bool_(True)], [None], ["a"], "ab", [[1, 2]],
     torch.tensor([[1, 2]]), torch.tensor([0.5]), object()],
    ids=lambda x: repr(x)[:20],
)  # fmt: skip
def test_what_are_no_token_ids_are_refused(ids: Any) -> None:
    assert refusal(lambda: token_ids("ids", ids)) == (
        f"ids: expected token ids (whole numbers, at least 0); got {shown(ids, 80)}. "
        "Pass e.g. input_ids[0].tolist(), without padding."
    )


def test_a_single_token_id_none_and_no_token_ids_are_right_where_they_are_asked_for() -> None:
    assert token_ids("end_ids", 0, single=True) == (0,)
    assert token_ids("end_ids", np.int64(7), single=True, empty=False) == (7,)
    assert token_ids("end_ids", None, optional=True) == ()
    assert token_ids("end_ids", {5}, single=True) == (5,)
    for ids in (None, [], -1, True, 1.5, "ab"):
        said = refusal(lambda ids=ids: token_ids("end_ids", ids, single=True, empty=False))
        assert said.startswith(f"end_ids: expected a token id or several (whole numbers, at least 0); got {ids!r}. ")
        assert "tokenizer.encode(" in said
    assert "expected a text or token ids (whole" in refusal(lambda: token_ids("prompt", 3.0, "a text or token ids"))


# --- seeds and choices -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [None, 0, -(1 << 63), (1 << 63) - 1, np.int64(5)], ids=repr)
def test_seeds_of_64_bits(seed: Any) -> None:
    refuse_seed(seed, "FusedDecoding")


@pytest.mark.parametrize("seed", [1 << 63, -(1 << 63) - 1, True, 0.5, 1.0, "1", [1], NAN], ids=repr)
def test_what_is_no_seed_is_refused(seed: Any) -> None:
    assert refusal(lambda: refuse_seed(seed, "FusedDecoding")) == (
        f"seed: expected a whole number of 64 bits, or None; got {seed!r}. Pass e.g. FusedDecoding(seed=0)."
    )


def test_a_choice() -> None:
    words = ("auto", "triton", "torch")
    assert [choice("impl", word, words) for word in words] == list(words)
    for value in ("cuda", "", None, True, 0, ["auto"], np.array(["auto", "torch"])):
        assert refusal(lambda value=value: choice("impl", value, words)) == (
            f"impl: expected 'auto', 'triton' or 'torch'; got {value!r}. Use one of these."
        )
    assert refusal(lambda: choice("impl", "tritn", words)).endswith("got 'tritn'. Did you mean 'triton'?")
    assert (
        refusal(lambda: choice("x", "b", ("a",), remedy="Leave it out.")) == "x: expected 'a'; got 'b'. Leave it out."
    )
    assert "expected 'cycle', 'once' or a tuple of cycles; got 1." in refusal(
        lambda: choice("when", 1, ("cycle", "once"), "a tuple of cycles")
    )


def test_a_value_that_is_shown() -> None:
    assert shown("a") == "'a'"
    assert shown([1] * 100) == repr([1] * 100)
    assert len(shown([1] * 100, 80)) == 80
    assert shown(10**5000) == "an int that cannot be shown"
