"""The logit algebra against a reference written element by element in float64, with every rule spelled out."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from proxytune.errors import InputError
from proxytune.formulas import ProxyTuning
from proxytune.formulas.registry import FORMULAS
from proxytune.formulas.shift import shift
from proxytune.validation import validate_alpha

INF, NAN = math.inf, math.nan
EPSILON = float(np.finfo(np.float32).eps)

# Logits of real models lie well within ±100; half an ulp at 100 is what rounding may cost.
finite = st.floats(-100, 100, width=32)
logit = st.one_of(finite, st.just(-INF))
alphas = st.floats(-4, 4)


def rows(width: int, elements: st.SearchStrategy[float] = logit, height: int = 3) -> st.SearchStrategy[torch.Tensor]:
    row = st.lists(elements, min_size=width, max_size=width)
    return st.lists(row, min_size=height, max_size=height).map(lambda x: torch.tensor(x, dtype=torch.float32))


@st.composite
def members(draw: st.DrawFn, elements: st.SearchStrategy[float] = logit) -> list[torch.Tensor]:
    """Base, expert and antiexpert of three rows; each width is drawn for itself."""
    return [draw(rows(draw(st.integers(1, 7)), elements)) for _ in range(3)]


def written_out(
    base: torch.Tensor, companions: Sequence[torch.Tensor], weights: Sequence[float]
) -> tuple[np.ndarray, np.ndarray]:
    """The combined logits in float64, and how large the terms of each sum are (for the rounding bound)."""
    out = base.double().numpy().copy()
    size = np.abs(np.where(np.isinf(out), 0, out))
    for r, c in np.ndindex(*out.shape):
        heard = [(z, w) for z, w in zip(companions, weights, strict=True) if w != 0]
        if any(c >= z.shape[1] for z, _ in heard):
            continue
        terms = [(float(z[r, c]), w) for z, w in heard]
        if out[r, c] == -INF or any(z == -INF for z, _ in terms):
            continue
        out[r, c] += sum(w * z for z, w in terms)
        size[r, c] += sum(abs(w * z) for z, w in terms)
    return out, size


def assert_equals_float64(got: torch.Tensor, want: np.ndarray, size: np.ndarray, terms: int = 2) -> None:
    """Equal up to the rounding of float32: each weight, product and addition may lose half an ulp of the terms."""
    assert got.dtype == torch.float32
    ours = got.double().numpy()
    assert ours.shape == want.shape
    exact = ~np.isfinite(want)
    np.testing.assert_array_equal(ours[exact], want[exact])
    bound = (terms + 2) * EPSILON / 2 * size * 1.01 + 1e-37
    error = np.abs(ours[~exact] - want[~exact])
    assert (error <= bound[~exact]).all(), (error - bound[~exact]).max()


@given(members(), alphas)
@settings(max_examples=150, deadline=None)
def test_it_is_what_the_definition_says(z: list[torch.Tensor], alpha: float) -> None:
    weights = ProxyTuning(alpha=alpha).weights()
    assert weights == (alpha, -alpha)
    assert_equals_float64(shift(z[0], z[1:], weights), *written_out(z[0], z[1:], weights))


@given(rows(4), st.lists(st.tuples(rows(4), alphas), max_size=4))
@settings(max_examples=60, deadline=None)
def test_any_number_of_companions(base: torch.Tensor, terms: list[tuple[torch.Tensor, float]]) -> None:
    companions, weights = [z for z, _ in terms], [w for _, w in terms]
    want, size = written_out(base, companions, weights)
    assert_equals_float64(shift(base, companions, weights), want, size, len(terms))


@given(members(finite), st.floats(-3, 3), st.floats(-3, 3))
@settings(max_examples=60, deadline=None)
def test_the_shift_is_linear_in_alpha(z: list[torch.Tensor], a: float, b: float) -> None:
    base, *companions = z

    def moved(alpha: float) -> torch.Tensor:
        # Around a base of zeros: the rounding of a large base would hide what is compared here.
        return shift(torch.zeros_like(base), companions, ProxyTuning(alpha=alpha).weights())

    torch.testing.assert_close(moved(a) + moved(b), moved(a + b), atol=20 * EPSILON * 300, rtol=0)


@pytest.mark.smoke
@given(members())
@settings(max_examples=60, deadline=None)
def test_at_weight_zero_the_base_is_returned_bit_by_bit(z: list[torch.Tensor]) -> None:
    z[1].fill_(NAN)  # whatever the companions say, it is not read
    out = shift(z[0], z[1:], (0.0, -0.0))
    assert torch.equal(out.view(torch.int32), z[0].view(torch.int32))
    assert out.data_ptr() != z[0].data_ptr()


@given(rows(5), rows(5), alphas)
@settings(max_examples=60, deadline=None)
def test_an_expert_equal_to_the_antiexpert_changes_nothing(
    base: torch.Tensor, companion: torch.Tensor, alpha: float
) -> None:
    assert torch.equal(shift(base, [companion, companion.clone()], ProxyTuning(alpha=alpha).weights()), base)


@given(rows(5, finite), rows(5, finite))
@settings(max_examples=60, deadline=None)
def test_with_the_antiexpert_as_base_and_alpha_one_the_expert_is_left(base: torch.Tensor, expert: torch.Tensor) -> None:
    out = shift(base, [expert, base.clone()], (1.0, -1.0))
    # One subtraction and one addition, each rounded at the size of the larger operand.
    bound = EPSILON * (base.abs() + (expert - base).abs())
    assert ((out - expert).abs() <= bound).all()


@pytest.mark.smoke
@pytest.mark.parametrize(
    ("widths", "shifted"),
    [
        # base, expert, antiexpert → how many ids are shifted
        ((6, 4, 4), 4),  # companions narrower: the tail keeps the base
        ((4, 6, 6), 4),  # wider: their tail is dropped
        ((6, 4, 5), 4),  # unequal among themselves: an id that only one of them has is not shifted
        ((5, 7, 3), 3),
        ((1, 1, 1), 1),
    ],
)
def test_widths(widths: tuple[int, int, int], shifted: int) -> None:
    base, expert, antiexpert = (torch.randn(2, w) for w in widths)
    out = shift(base, [expert, antiexpert], (1.0, -1.0))
    assert out.shape == base.shape
    assert torch.equal(out[:, shifted:], base[:, shifted:])
    want = base[:, :shifted] + (expert[:, :shifted] - antiexpert[:, :shifted])
    assert torch.equal(out[:, :shifted], want)
    assert not torch.equal(out[:, :shifted], base[:, :shifted])


def test_a_companion_without_weight_does_not_narrow_the_shift() -> None:
    base, wide, narrow = torch.zeros(1, 4), torch.ones(1, 4), torch.ones(1, 1)
    assert torch.equal(shift(base, [wide, narrow], (1.0, 0.0)), torch.ones(1, 4))


MAX = float(np.finfo(np.float32).max)


@pytest.mark.smoke
@pytest.mark.parametrize(
    ("base", "expert", "antiexpert", "weights", "want"),
    [
        # The base owns the support: nothing lifts a forbidden token, not even an overflow to +inf or a NaN.
        (-INF, 3.0, 1.0, (1.0, -1.0), -INF),
        (-INF, MAX, -MAX, (1.0, -1.0), -INF),
        (-INF, MAX, MAX, (2.0, -2.0), -INF),
        (-INF, INF, 0.0, (1.0, -1.0), -INF),
        (-INF, NAN, 0.0, (1.0, -1.0), -INF),
        (-INF, -INF, -INF, (1.0, -1.0), -INF),
        # A companion without an opinion does not shift, on either side, at either sign of α.
        (2.0, -INF, 1.0, (1.0, -1.0), 2.0),
        (2.0, 1.0, -INF, (1.0, -1.0), 2.0),
        (2.0, 1.0, -INF, (-1.0, 1.0), 2.0),
        (2.0, -INF, -INF, (1.0, -1.0), 2.0),
        # 0 · (−inf) is no shift by that companion; the other one is still heard.
        (2.0, 1.0, -INF, (1.0, 0.0), 3.0),
        (2.0, -INF, -INF, (0.0, 0.0), 2.0),
        # What is broken stays visible: it is never taken for "no shift".
        (2.0, NAN, 1.0, (1.0, -1.0), NAN),
        (2.0, 1.0, NAN, (1.0, -1.0), NAN),
        (NAN, 1.0, 0.0, (1.0, -1.0), NAN),
        (NAN, -INF, 0.0, (1.0, -1.0), NAN),
        (2.0, INF, 1.0, (1.0, -1.0), INF),
        (2.0, INF, INF, (1.0, -1.0), NAN),
        (2.0, 1.0, INF, (1.0, -1.0), NAN),
    ],
)
def test_infinities_and_nan(base: float, expert: float, antiexpert: float, weights: Any, want: float) -> None:
    # The neighbours are ordinary, and must stay untouched by what happens between them.
    z = [torch.tensor([[1.0, x, 1.0]]) for x in (base, expert, antiexpert)]
    out = shift(z[0], z[1:], weights)[0].tolist()
    assert out[1] == pytest.approx(want, abs=0, nan_ok=True)
    assert out[0] == out[2] == 1.0 + sum(weights)


@given(members(st.one_of(logit, st.sampled_from([MAX, -MAX]))), st.floats(-1e6, 1e6))
@example([torch.full((3, 1), x) for x in (-INF, MAX, -MAX)], 1e6)
@settings(max_examples=100, deadline=None)
def test_the_support_is_never_larger_than_the_bases(z: list[torch.Tensor], alpha: float) -> None:
    out = shift(z[0], z[1:], (alpha, -alpha))
    assert (out[z[0] == -INF] == -INF).all()
    # And never smaller, as long as nothing overflows: α and the logits of a model are far from that.
    tame = [torch.where(x.abs() == MAX, 0.0, x) for x in z]
    assert torch.equal(shift(tame[0], tame[1:], (alpha, -alpha)) == -INF, tame[0] == -INF)
    assert not shift(tame[0], tame[1:], (alpha, -alpha)).isnan().any()


@pytest.mark.parametrize(
    "dtypes", [(torch.bfloat16,) * 3, (torch.float16,) * 3, (torch.float32, torch.bfloat16, torch.float16)]
)
def test_arithmetic_is_in_float32_whatever_the_members_compute_in(dtypes: tuple[torch.dtype, ...]) -> None:
    z = [(torch.randn(4, 500) * 10).to(dtype) for dtype in dtypes]
    weights = (0.7, -0.7)
    want, size = written_out(*(z[0].float(), [x.float() for x in z[1:]], weights))
    assert_equals_float64(shift(z[0], z[1:], weights), want, size)
    # The bound means something: the same sum in the members' own dtype breaks it a thousandfold.
    coarse = z[0] + (0.7 * z[1].to(dtypes[0]) - 0.7 * z[2].to(dtypes[0]))
    if dtypes[0] != torch.float32:
        assert (coarse.double() - torch.from_numpy(want)).abs().max() > 1000 * EPSILON


@given(members(), alphas, st.permutations(range(3)))
@settings(max_examples=40, deadline=None)
def test_rows_permute_and_do_not_see_each_other(z: list[torch.Tensor], alpha: float, order: list[int]) -> None:
    weights = (alpha, -alpha)
    whole = shift(z[0], z[1:], weights)
    assert torch.equal(shift(z[0][order], [x[order] for x in z[1:]], weights), whole[order])
    for row in range(3):
        alone = shift(z[0][row : row + 1], [x[row : row + 1] for x in z[1:]], weights)
        assert torch.equal(alone, whole[row : row + 1])


@pytest.mark.parametrize("alpha", [0.0, 1.0])  # 0 returns early; neither may hand out the base's own memory
def test_inputs_are_not_modified(alpha: float) -> None:
    z = [torch.randn(2, 3, 5) for _ in range(3)]
    before = [x.clone() for x in z]
    out = shift(z[0], z[1:], (alpha, -alpha))
    out.fill_(7.0)
    for now, then in zip(z, before, strict=True):
        assert torch.equal(now, then)


def test_strided_and_expanded_rows() -> None:
    # Logits arrive as slices of longer sequences, and beams as one row expanded: neither is contiguous.
    whole = torch.randn(2, 6, 5)
    base, expert, antiexpert = whole[:, ::2], whole.flip(1)[:, ::2], whole[:, 1::2]
    weights = (0.5, -0.5)
    want = shift(base.contiguous(), [expert.contiguous(), antiexpert.contiguous()], weights)
    assert torch.equal(shift(base, [expert, antiexpert], weights), want)
    row = torch.randn(1, 5)
    spread = shift(row.expand(3, 5), [expert[0], antiexpert[0]], weights)
    assert torch.equal(spread, shift(row.repeat(3, 1), [expert[0], antiexpert[0]], weights))


def test_gradients_flow_to_every_member() -> None:
    # Scoring and interpretability tools differentiate the logits; the masked write must not cut the graph.
    z = [torch.randn(2, 4, requires_grad=True) for _ in range(3)]
    shift(z[0], z[1:], (0.5, -0.5)).sum().backward()
    for x, slope in zip(z, (1.0, 0.5, -0.5), strict=True):
        assert x.grad is not None
        torch.testing.assert_close(x.grad, torch.full((2, 4), slope))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_companions_on_a_gpu_are_waited_for_by_a_base_on_the_host() -> None:
    base = torch.zeros(8, 150_000)
    load = torch.randn(4096, 4096, device="cuda")
    for _ in range(20):
        load = load @ load * 1e-2  # keeps the GPU busy, so that an unfinished copy would be read
    expert, antiexpert = torch.full_like(base, 3.0).cuda(), torch.ones_like(base).cuda()
    assert torch.equal(shift(base, [expert, antiexpert], (1.0, -1.0)), torch.full_like(base, 2.0))


@pytest.mark.parametrize(("companions", "weights"), [(2, (1.0,)), (1, (1.0, -1.0)), (0, (1.0,))])
def test_as_many_weights_as_companions(companions: int, weights: tuple[float, ...]) -> None:
    match = rf"formula: expected one weight for each of {companions} companions; got {len(weights)} weights"
    with pytest.raises(InputError, match=match):
        shift(torch.zeros(1, 2), [torch.zeros(1, 2)] * companions, weights)


# --- offsets and floors ----------------------------------------------------------------------------------------------

# Multiples of a quarter: sums and products of these are exact in float32, so that equal means equal.
quarter = st.integers(-64, 64).map(lambda n: n / 4)
exact = st.one_of(quarter, st.just(-INF))
weight = st.sampled_from([-1.5, -1.0, 0.0, 0.25, 1.0, 2.0])


@dataclass(frozen=True)
class Terms:
    """Three rows of one to eight members: logits, weights, offsets, and floors of one of them."""

    z: list[torch.Tensor]
    weights: torch.Tensor
    offsets: torch.Tensor
    floors: torch.Tensor
    floored_by: int

    def sum(self, **changes: Any) -> torch.Tensor:
        """Their sum; with one row of weights for all if the weights are a list."""
        of: Any = {name: getattr(self, name) for name in ("z", "weights", "offsets", "floors", "floored_by")} | changes
        z, w = of.pop("z"), of.pop("weights")
        own, theirs = (w[:, 0], w[:, 1:]) if isinstance(w, torch.Tensor) else (w[0], w[1:])
        return shift(z[0], z[1:], theirs, own, **of)


@st.composite
def terms(draw: st.DrawFn, elements: st.SearchStrategy[float] = exact) -> Terms:
    z = [draw(rows(draw(st.integers(1, 5)), elements)) for _ in range(draw(st.integers(1, 8)))]
    weights, offsets = draw(rows(len(z), weight)), draw(rows(len(z), quarter))
    floors = torch.tensor(draw(st.lists(exact, min_size=3, max_size=3)))
    return Terms(z, weights, offsets, floors, draw(st.integers(0, len(z) - 1)))


@given(terms())
@settings(max_examples=40, deadline=None)
def test_an_offset_is_the_same_as_other_logits(of: Terms) -> None:
    moved = [z - of.offsets[:, i : i + 1] for i, z in enumerate(of.z)]
    assert torch.equal(of.sum(floors=None), of.sum(z=moved, offsets=None, floors=None))


@given(terms())
@settings(max_examples=40, deadline=None)
def test_a_floor_is_the_same_as_a_mask_on_the_base(of: Terms) -> None:
    width = of.z[0].shape[1]
    member = of.z[of.floored_by][:, :width]
    member = torch.nn.functional.pad(member, (0, width - member.shape[1]), value=-INF)
    masked = of.z[0].masked_fill(member < of.floors[:, None], -INF)
    assert torch.equal(of.sum(), of.sum(z=[masked, *of.z[1:]], floors=None))
    assert not of.sum().isnan().any()


@given(terms())
@settings(max_examples=30, deadline=None)
def test_no_offset_and_no_floor_change_no_bit(of: Terms) -> None:
    plain = of.sum(offsets=None, floors=None)
    nothing = of.sum(offsets=torch.zeros_like(of.offsets), floors=torch.full_like(of.floors, -INF))
    assert torch.equal(nothing, plain)
    numbers = of.weights[0].tolist()
    assert torch.equal(of.sum(weights=numbers)[0], of.sum(weights=of.weights[:1].expand(3, -1))[0])


@given(terms(st.one_of(logit, st.sampled_from([NAN, INF]))))
@settings(max_examples=40, deadline=None)
def test_rows_with_offsets_and_floors_do_not_see_each_other(of: Terms) -> None:
    whole, base = of.sum(), of.z[0].clone()
    in_place = of.sum(z=[base, *of.z[1:]], out=base)
    assert in_place is base
    for row in range(3):
        at = slice(row, row + 1)
        alone = Terms([z[at] for z in of.z], of.weights[at], of.offsets[at], of.floors[at], of.floored_by).sum()
        # What is broken may be NaN or +inf.
        for x in (whole[at], in_place[at]):
            assert torch.equal(torch.where(x < INF, x, 7e7), torch.where(alone < INF, alone, 7e7))


@given(terms(logit), st.booleans())
@settings(max_examples=40, deadline=None)
def test_offsets_and_floors_are_what_the_definition_says(of: Terms, per_row: bool) -> None:
    """Element by element in float64."""
    weights = of.weights if per_row else of.weights[:1].expand(3, -1)
    got = of.sum() if per_row else of.sum(weights=of.weights[0].tolist())
    want, size = np.empty(got.shape), np.zeros(got.shape)
    for r, c in np.ndindex(*got.shape):
        each = [
            (float(z[r, c]) if c < z.shape[1] else -INF, float(w), float(o))
            for z, w, o in zip(of.z, weights[r], of.offsets[r], strict=True)
        ]
        heard = [x for i, x in enumerate(each) if i and x[1] != 0]
        if each[0][0] == -INF or each[of.floored_by][0] < of.floors[r]:
            want[r, c] = -INF
            continue
        if any(z == -INF for z, _, _ in heard):
            heard = []
        want[r, c] = sum(w * (z - o) for z, w, o in (each[0], *heard))
        size[r, c] = sum(abs(w) * (abs(z) + abs(o)) for z, w, o in (each[0], *heard))
    assert_equals_float64(got, want, size, 2 * len(of.z))


def test_gradients_flow_past_floors_and_offsets() -> None:
    z = [torch.randn(2, 4, requires_grad=True) for _ in range(2)]
    floors = z[1].detach().sort(1).values[:, 1]
    out = shift(z[0], z[1:], (0.5,), 2.0, offsets=torch.ones(2, 2), floors=floors, floored_by=1)
    allowed = out > -INF
    assert allowed.sum(1).tolist() == [3, 3]
    out[allowed].sum().backward()
    for x, slope in zip(z, (2.0, 0.5), strict=True):
        assert torch.equal(x.grad, allowed * slope)  # type: ignore[arg-type]


# --- α -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "alpha",
    # No numbers; numbers that are not finite, in every spelling; one that no float can hold; and what only looks like
    # a number: booleans, a one-element tensor or array (α is one number for all rows), complex.
    [
        None, "1.0", [1.0], {}, NAN, INF, -INF, np.float32("nan"), np.float64("inf"), 10**400, True, False,
        np.bool_(True), 1 + 0j, np.array([1.0]), torch.tensor(1.0),
    ],
    ids=lambda alpha: repr(alpha)[:20],
)  # fmt: skip
def test_alpha_is_refused_by_what_it_is(alpha: Any) -> None:
    match = r"alpha: expected a finite number .*; got " + re.escape(repr(alpha)) + r"\. Pass e\.g\. alpha=1\.0\."
    with pytest.raises(InputError, match=match):
        validate_alpha(alpha)
    with pytest.raises(InputError, match=match):
        ProxyTuning(alpha=alpha)
    with pytest.raises(InputError, match=match):
        ProxyTuning().with_alpha(alpha)


@pytest.mark.parametrize(
    "alpha", [0, -0.0, 3, -2.5, 1e308, np.float32(0.5), np.float64(0.5), np.int64(2), Fraction(1, 4)]
)
def test_alpha_becomes_a_float(alpha: Any) -> None:
    value = validate_alpha(alpha)
    assert type(value) is float
    assert value == float(alpha)
    assert ProxyTuning(alpha=alpha).weights() == (value, -value)


def test_a_formula_is_a_value() -> None:
    formula = ProxyTuning(alpha=0.5)
    assert formula.with_alpha(2) == ProxyTuning(alpha=2.0)
    assert formula == ProxyTuning(alpha=0.5)  # with_alpha makes another one
    assert FORMULAS[formula.name] is ProxyTuning
    with pytest.raises(TypeError):
        ProxyTuning(0.5)  # type: ignore[misc]  # which number it is has to be said


def test_a_narrow_companion_ends_the_shift_only_where_it_has_a_weight() -> None:
    base = torch.zeros(2, 4)
    wide, narrow = torch.ones(2, 4), torch.full((2, 2), 5.0)
    weights = torch.tensor([[2.0, 0.0], [2.0, 1.0]])
    want = [[2.0, 2.0, 2.0, 2.0], [7.0, 7.0, 0.0, 0.0]]
    assert shift(base, [wide, narrow], weights).tolist() == want
    assert [shift(base[:1], [wide[:1], narrow[:1]], row.tolist())[0].tolist() for row in weights] == want
