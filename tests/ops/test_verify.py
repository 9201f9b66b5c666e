"""Verification of drafts: against an oracle that goes position by position, and the law of what comes out."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from support.decisions import MIXED, RowsElsewhere, Tally
from support.draws import counts_of, law, sigmas
from support.verifications import Drafts, Verify, check, drafts, same, truth

from proxytune import ops
from proxytune.errors import InputError, UnsupportedModeError
from proxytune.ops.noise import Noise
from proxytune.ops.outputs import VerifyOutput
from proxytune.ops.sampling_params import SamplingParams
from proxytune.ops.torch_impl import verify as torch_verify

NAN, INF = float("nan"), float("inf")


@pytest.fixture
def verify(impl: str, monkeypatch: pytest.MonkeyPatch) -> Verify:
    """`ops.verify` with the implementation."""
    if impl == "torch without waiting":
        monkeypatch.setattr(importlib.import_module("proxytune.ops.verify"), "MemberRows", RowsElsewhere)

    def run(*args: Any, **kwargs: Any) -> VerifyOutput:
        with np.errstate(all="ignore"):
            return ops.verify(*args, impl=impl.partition(" ")[0], **kwargs)  # type: ignore[arg-type]

    return run


# --- against the oracle -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("most", [0, 1, 2, 3, 4, 5])
@pytest.mark.parametrize("given", [False, True])
def test_the_matrix_of_lengths_members_and_dtypes(verify: Verify, slow_one: bool, most: int, given: bool) -> None:
    if slow_one and most in (2, 4):
        pytest.skip("the interpreter is slow: the lengths around it are enough")
    tally = Tally()
    # One tile, a tile and a column, three tiles; the six texts have six kinds of settings.
    widths = [1025 if most == 1 else 90] if slow_one else [1, 2, 129, 1023, 1024, 1025, 2500]
    for at, width in enumerate(widths, most if slow_one else 0):
        members = 1 + (at + most) % 5
        heads = [width, width, max(1, width - 3), width + 70, max(1, width // 2)][:members]
        dtypes = MIXED[at % 3 :] + MIXED[: at % 3]
        forks = {"fork_threshold": 2.0, "fork_temperature": 1.5} if at % 3 == 2 else {}
        case = drafts(
            3 if slow_one and given else 6, most, *heads, seed=10 * at + most, dtypes=dtypes,
            given=given, ragged=at % 2 == 1, per_row=members % 2 == 0,
        )  # fmt: skip
        tally += check(replace(case, settings=case.settings | forks), verify)
    tally.assert_rare()


@pytest.mark.parametrize("apart", [0.0, 0.3, 1.5])
@pytest.mark.parametrize("settings", [{}, {"top_k": 20}, {"top_p": 0.8}, {"min_p": 0.05}, {"top_k": 30, "top_p": 0.9}])
def test_drafts_near_and_far(verify: Verify, slow_one: bool, settings: dict[str, Any], apart: float) -> None:
    if slow_one and (apart == 0.3 or len(settings) == 1):
        pytest.skip("the interpreter is slow: near and far, plain and truncated are enough")
    most, texts = (1, 12) if slow_one else (3, 24)
    case = drafts(texts, most, 200 if slow_one else 1500, apart=apart, settings=settings, seed=4)
    check(case, verify).assert_rare()
    accepted = truth(case).accepted
    assert apart > 0 or (accepted == most).all(), "p is q, and a draft was rejected"
    assert apart == 0 or ((accepted < most).sum() > 4 and (accepted > 0).any()), "the case is too easy"


@pytest.mark.parametrize("other", [1100, 1400, 5])
def test_a_draft_s_head_may_be_narrower_or_wider(verify: Verify, slow_one: bool, other: int) -> None:
    case = drafts(1 if slow_one else 6, 2, 1200, draft=other, settings={"temperature": 1.3}, seed=2)
    check(case, verify).assert_rare()
    assert check(past_the_end(case), verify).unsure == 0


def past_the_end(case: Drafts) -> Drafts:
    drafted = case.drafted.clone()
    drafted[:, 0] = case.members[0].shape[1] + 7
    return replace(case, drafted=drafted)


def test_a_draft_past_the_base_s_width_is_rejected(verify: Verify, slow_one: bool) -> None:
    for given in (False, True):
        case = past_the_end(drafts(2 if slow_one else 6, 1, 200, draft=250, given=given))
        assert (truth(case).accepted == 0).all()
        check(case, verify)


def test_rows_lie_anywhere_in_memory(verify: Verify, slow_one: bool) -> None:
    width = 140 if slow_one else 1100
    case = drafts(2 if slow_one else 6, 2, width, width - 9, width + 99, dtypes=MIXED, seed=1, odd_memory=True)
    check(case, verify)
    packed = [x.contiguous() for x in case.members]
    same(case.verify(verify), replace(case, members=packed, draft=case.draft.contiguous()).verify(verify))  # type: ignore[union-attr]


def test_random_trials(verify: Verify, slow_one: bool) -> None:
    g = np.random.default_rng(3)
    tally = Tally()
    for seed in range(2 if slow_one else 60):
        width = int(np.exp(g.uniform(1, np.log(300 if slow_one else 3000))))
        widths = [width + int(g.integers(0, 9)) * i for i in range(int(g.integers(1, 9)))]
        case = drafts(
            int(g.integers(1, 7)), int(g.integers(0, 6)), *widths, draft=max(1, width + int(g.integers(-3, 4))),
            apart=float(g.choice([0.0, 0.1, 0.5, 2.0])), seed=seed, given=g.random() < 0.3, ragged=g.random() < 0.5,
            per_row=g.random() < 0.5, odd_memory=g.random() < 0.3, shifted=g.random() < 0.5,
        )  # fmt: skip
        tally += check(case, verify)
    tally.assert_rare()


# --- what it is the same as -------------------------------------------------------------------------------------------


@pytest.mark.smoke
def test_without_a_draft_it_is_the_step_s_draw_bit_for_bit(verify: Verify, impl: str, slow_one: bool) -> None:
    width, texts = (200, 3) if slow_one else (2300, 6)
    for most in (0, 2):
        case = drafts(texts, most, width, width, width - 5, seed=7, dtypes=MIXED, ragged=True)
        none = replace(case, drafted=torch.full_like(case.drafted, -1))
        steps = none.steps(most + 1, case.members, case.weights)
        with np.errstate(all="ignore"):
            run = lambda *a, **k: ops.step(*a, impl=impl.partition(" ")[0], **k)  # type: ignore[arg-type]  # noqa: E731
            tokens = steps.step(run, ["tokens"]).tokens
        assert tokens is not None
        tokens = tokens.view(texts, most + 1)
        assert torch.equal(none.verify(verify).tokens[:, 0], tokens[:, 0])
        # After as many accepted drafts as there are, the same at the later position.
        got = case.verify(verify)
        for b in range(texts):
            n = int(got.accepted[b])
            if n == most or case.drafted[b, n] < 0:
                assert got.tokens[b, n] == tokens[b, n]


def test_a_text_does_not_depend_on_the_texts_around_it(verify: Verify, slow_one: bool) -> None:
    case = drafts(6, 1 if slow_one else 3, 150 if slow_one else 2100, 100, seed=9, per_row=True)
    whole = case.verify(verify)
    for text in (1, 2) if slow_one else range(6):
        same(whole, case.only([text]).verify(verify), [text])
    order = [4, 2, 0, 5, 1, 3]
    same(whole, case.only(order).verify(verify), order)


# --- rows without a distribution --------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("settings", [{}, {"top_k": 9}])
@pytest.mark.parametrize("given", [False, True])
def test_a_position_without_a_distribution_ends_the_text(
    verify: Verify, slow_one: bool, value: float, settings: dict[str, Any], given: bool
) -> None:
    if slow_one and (value == INF or given):
        pytest.skip("the interpreter is slow")
    case = drafts(3, 2, 120, apart=0.0, settings=settings, seed=5)
    rows = case.members[0].clone()
    rows[1, :] = value if value == -INF else rows[1]
    rows[1, 3] = value
    rows[8, 3] = value  # after all drafts of the last text
    rows[8, :] = value if value == -INF else rows[8]
    case = replace(case, members=[rows], draft=None if given else case.draft)
    check(case, verify)
    if not given:  # p is q: everything is accepted up to there
        want = truth(case)
        assert want.sure.all()
        assert want.accepted.tolist() == [1, 2, 2]
        assert want.tokens[0, 1:].tolist() == [-1, -1]
        assert want.tokens[2, 2] == -1


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("settings", [{}, {"top_p": 0.7}])
def test_a_draft_s_row_without_a_distribution_is_no_draft(
    verify: Verify, slow_one: bool, value: float, settings: dict[str, Any]
) -> None:
    if slow_one and value == INF:
        pytest.skip("the interpreter is slow")
    case = drafts(3, 2, 120, apart=0.0, settings=settings, seed=6)
    rows = case.draft.clone()  # type: ignore[union-attr]
    rows[3] = value if value == -INF else rows[3]
    rows[3, 60] = value  # the second draft of the second text
    broken = replace(case, draft=rows)
    check(broken, verify)
    drafted = case.drafted.clone()
    drafted[1, 1] = -1
    same(replace(case, drafted=drafted).verify(verify), broken.verify(verify))


@pytest.mark.parametrize("settings", [{}, {"top_k": 12}])
def test_a_rejected_draft_where_nothing_is_left_is_a_draw_from_p(
    verify: Verify, impl: str, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rounding may do it when p is q; here q is made e times as large, so that it happens to most drafts."""
    case = drafts(8, 1, 40, apart=0.0, settings=settings, seed=8)
    home = importlib.import_module("proxytune_kernels.launch") if impl == "triton" else torch_verify
    name = "_laws" if impl == "triton" else "distribution_of"
    real, calls = getattr(home, name), []

    def larger(*args: Any) -> Any:
        found = real(*args)
        calls.append(1)
        if len(calls) != 2:  # the rows first, then the draft's
            return found
        if impl == "triton":
            found.laws[:, 2] -= 1
            return found
        return replace(found, log_total=found.log_total - 1)

    monkeypatch.setattr(home, name, larger)
    got = case.verify(verify)
    assert 0 < int((got.accepted == 0).sum()) < 8
    z = case.members[0].view(8, 2, 40)[:, 0]
    kept = z >= z.topk(settings.get("top_k", 40), dim=1).values[:, -1:]
    for b in (got.accepted == 0).nonzero()[:, 0].tolist():
        assert kept[b, got.tokens[b, 0]]
        assert got.tokens[b, 1] == -1
    assert not torch.equal(got.tokens[:, 0], case.drafted[:, 0]), "the draft's own noise again"


# --- the law ----------------------------------------------------------------------------------------------------------

V = 6
P0, P1 = (torch.randn(n, V, generator=torch.Generator().manual_seed(s)) * 1.3 for n, s in ((1, 0), (V, 1)))
TABLE = torch.cat([P0, P1])  # [1 + V, V]: the first token's logits, and the second's after each first one


def proposals() -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(5)
    far = torch.randn(TABLE.shape, generator=g) * 1.5
    masked = far.clone()
    masked[:, 1] = -INF  # p has mass there
    return {"far": far, "close": TABLE + 0.15 * torch.randn(TABLE.shape, generator=g), "equal": TABLE.clone(),
            "zeros in q": masked}  # fmt: skip


def spread_out(rows: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
    out = torch.full((len(rows), int(at.max()) + 1), -INF)
    out[:, at] = rows
    return out


def one_round(
    p: torch.Tensor, q: torch.Tensor, at: torch.Tensor, first: torch.Tensor, length: torch.Tensor, most: int,
    given: bool, sampling: SamplingParams, noise: Noise,
) -> VerifyOutput:  # fmt: skip
    """Draft after texts of no token or of the one token `first`, `[B]`, and verify; `noise` is at their ends."""
    # Rows of the tables: 0, or 1 + the first token; what is past the second token never matters.
    here = torch.where(length == 0, 0, 1 + torch.searchsorted(at, first))
    drafted, rows, rows_of_q = [], [], []
    for j in range(most):
        rows.append(p[here])
        rows_of_q.append(q[here])
        x = ops.step([spread_out(q[here], at)], sampling=sampling, noise=noise.at(length + j), impl="torch").tokens
        assert x is not None
        drafted.append(x[:, 0])
        here = 1 + torch.searchsorted(at, x[:, 0].contiguous())
    rows.append(p[here])
    return ops.verify(
        [spread_out(torch.stack(rows, 1).flatten(0, 1), at)],
        drafted=torch.stack(drafted, 1),
        draft=None if given else spread_out(torch.stack(rows_of_q, 1).flatten(0, 1), at),
        sampling=sampling, noise=noise, impl="torch",
    )  # fmt: skip


def two_tokens(
    p: torch.Tensor, q: torch.Tensor, n: int, most: int, at: torch.Tensor, *, given: bool = False, **settings: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """A loop of rounds over a table until each text has two tokens: `[n, 2]`, and the drafts accepted at first, `[n]`.

    Drafts are drawn with the keys of the positions they are for, so a later round drafts with noise again that drafts
    behind a rejected one had.
    """
    firsts, tokens = [], []
    each = 4096 if at is NEXT else 256  # narrow rows spend their time in calls, wide ones in memory
    for start in range(0, n, each):
        count = min(each, n - start)
        length = torch.zeros(count, dtype=torch.int64)
        noise = Noise.of(count, seed=3, row=torch.arange(start, start + count), position=0)
        sampling = SamplingParams.of(count, **settings)
        got = one_round(p, q, at, at[length], length, most, given, sampling, noise)
        firsts.append(got.accepted)
        texts = torch.nn.functional.pad(got.tokens, (0, 1), value=-1)[:, :2].clone()
        # Keys and settings are a text's own, so those that have their two tokens need not be there.
        left = (got.accepted == 0).nonzero()[:, 0]
        if len(left):
            length = torch.ones_like(left)
            streams = noise.pick(left).at(length)
            got = one_round(p, q, at, texts[left, 0], length, most, given, sampling.pick(left), streams)
            texts[left, 1] = got.tokens[:, 0]
        tokens.append(texts)
    return torch.searchsorted(at, torch.cat(tokens)), torch.cat(firsts)


def joint(p: torch.Tensor, temperature: float = 1.0, kept: Callable[[torch.Tensor], torch.Tensor] | None = None) -> Any:
    rows = [law(row, temperature, None if kept is None else kept(row)) for row in p]
    return np.stack([rows[0][i] * rows[1 + i] for i in range(V)]).ravel()


def total_variation(counts: Any, p: Any) -> tuple[float, float]:
    """The distance of frequencies from a law, and how large that is on average where the law is right."""
    n = counts.sum()
    return float(abs(counts / n - p).sum() / 2), float(np.sqrt(2 * p * (1 - p) / (math.pi * n)).sum() / 2)


def look(tokens: torch.Tensor, p: Any) -> tuple[float, float]:
    """σ of the joint law of two tokens, and its distance as a multiple of the usual one."""
    counts = counts_of(tokens[:, 0] * V + tokens[:, 1], V * V)
    distance, usual = total_variation(counts, p)
    return sigmas(counts, p), distance / usual


NEXT = torch.arange(V)
APART = torch.tensor([0, 5, 1023, 1024, 1500, 2049])  # over three tiles: both levels of the draw


@pytest.mark.parametrize("most", [1, 3])
@pytest.mark.parametrize("kind", ["far", "close", "equal", "zeros in q"])
@pytest.mark.parametrize("given", [False, True])
def test_two_tokens_have_the_law_of_plain_sampling(kind: str, most: int, given: bool) -> None:
    q, n = proposals()[kind], 12_000
    tokens, accepted = two_tokens(TABLE, q, n, most, NEXT, given=given, top_k=V)
    sigma, distance = look(tokens, joint(TABLE))
    assert abs(sigma) < 4
    assert distance < 1.6
    # Accepted is 1 − TV(p, q) of the first drafts; of given ones p(x).
    p0, q0 = law(TABLE[0]), law(q[0])
    share = float((p0 * q0).sum()) if given else float(np.minimum(p0, q0).sum())
    assert abs(float((accepted > 0).float().mean()) - share) <= 4 * math.sqrt(share * (1 - share) / n) + 1e-9
    # The control: the drafts' own law, where it is another.
    if kind in ("far", "close"):
        assert look(tokens, joint(q))[0] > 6


@pytest.mark.parametrize("kind", ["far", "close", "zeros in q"])
def test_two_tokens_over_tiles(kind: str) -> None:
    tokens, _ = two_tokens(TABLE, proposals()[kind], 1500, 2, APART)
    sigma, distance = look(tokens, joint(TABLE))
    assert abs(sigma) < 4
    assert distance < 1.6


@pytest.mark.slow
@pytest.mark.parametrize("given", [False, True])
def test_two_tokens_over_tiles_at_length(given: bool) -> None:
    tokens, _ = two_tokens(TABLE, proposals()["far"], 30_000, 2, APART, given=given, temperature=0.8)
    sigma, distance = look(tokens, joint(TABLE, 0.8))
    assert abs(sigma) < 4
    assert distance < 1.6
    assert look(tokens, joint(TABLE))[0] > 6


def test_a_truncated_law_and_what_it_masks() -> None:
    """Tokens that p masks and q has, and the other way round; p and q are cut each for itself."""
    p = TABLE.clone()
    p[:, 4] = -INF
    tokens, _ = two_tokens(p, proposals()["far"], 12_000, 2, NEXT, top_k=3, temperature=1.2)
    sigma, distance = look(tokens, joint(p, 1.2, lambda row: row >= row.topk(3).values[-1]))
    assert abs(sigma) < 4
    assert distance < 1.6
    assert not (tokens == 4).any()


def _not_subtracted(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    return p


@pytest.mark.parametrize("wrong", ["residual", "noise", "decision"])
def test_the_controls_a_wrong_verification_is_seen(wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if wrong == "residual":
        monkeypatch.setattr(torch_verify, "_residual", _not_subtracted)
    elif wrong == "noise":  # the draft's own words
        monkeypatch.setattr(torch_verify, "_WORD", 0)
    else:
        monkeypatch.setattr(Noise, "uniform", lambda self, _: torch.full_like(self.row, 0.5, dtype=torch.float32))
    tokens, _ = two_tokens(TABLE, proposals()["far"], 12_000, 2, NEXT, top_k=V)
    sigma, distance = look(tokens, joint(TABLE))
    assert sigma > 6
    assert distance > 2


# --- wrong use --------------------------------------------------------------------------------------------------------


@pytest.mark.smoke
@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda c: {"drafted": c.drafted.int()}, "drafted: expected token ids"),
        (lambda c: {"drafted": c.drafted[0]}, "drafted: expected token ids"),
        (lambda c: {"drafted": c.drafted[:, :1]}, "members: expected 4 rows"),
        (lambda c: {"members": [c.members[0][:4]]}, "members: expected 6 rows of logits: 2 texts of 2 drafts"),
        (lambda c: {"draft": c.draft[:3]}, r"draft: expected logits \[4, V\]"),
        (lambda c: {"draft": c.draft.double()}, "draft: expected logits"),
        (lambda c: {"draft": c.draft.t().contiguous().t()}, "inner stride of 1"),
        (lambda c: {"sampling": SamplingParams.of(6)}, r"sampling: .* for 2 rows.*Pass SamplingParams\.of\(2, …"),
        (lambda c: {"noise": Noise.of(6)}, "noise: expected keys and settings for 2 rows"),
        (lambda c: {"sampling": SamplingParams.of(2, top_k=61)}, "top_k: expected at most 60"),
        (lambda c: {"draft": c.draft[:, :9], "sampling": SamplingParams.of(2, top_k=10)}, "at most 9, the width of"),
        (lambda c: {"weights": (1.0, 2.0)}, "weights: expected 1 finite numbers"),
        (lambda c: {"impl": "fast"}, "impl: expected"),
    ],
)  # fmt: skip
def test_wrong_use_is_refused(change: Any, says: str) -> None:
    case = drafts(2, 2, 60, settings={})
    given = {"members": case.members, "weights": (1.0,), "drafted": case.drafted, "draft": case.draft}
    given |= case.prepared() | change(case)
    with pytest.raises(InputError, match=says):
        ops.verify(given.pop("members"), given.pop("weights"), **given)


def test_inside_a_graph_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    with pytest.raises(UnsupportedModeError, match="verify: expected a call outside torch.compile"):
        drafts(2, 2, 60, settings={}).verify(ops.verify)


def test_the_comparison_sees_other_tokens() -> None:
    case = drafts(6, 3, 90)

    def other(*args: Any, noise: Noise, **kwargs: Any) -> VerifyOutput:
        return ops.verify(*args, noise=noise.at(noise.position + 1), **kwargs)

    with pytest.raises(AssertionError, match="text"):
        check(case, other)
    assert truth(case).sure.all()


# --- on a GPU ---------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("width", [50_257, 151_936])
@pytest.mark.parametrize("given", [False, True])
def test_real_vocabularies_on_a_gpu(width: int, given: bool) -> None:
    tally = Tally()
    for seed in range(3):
        small = drafts(6, 4, width, width - 64, width + 128, seed=seed, dtypes=(torch.bfloat16,), given=given)
        case = replace(
            small, members=[x.cuda() for x in small.members], drafted=small.drafted.cuda(),
            draft=None if small.draft is None else small.draft.cuda(),
            settings={k: x.cuda() for k, x in small.settings.items()},
            keys={k: x.cuda() for k, x in small.keys.items()},
        )  # fmt: skip
        tally += check(case, lambda *a, **k: ops.verify(*a, impl="triton", **k))
        same(case.verify(ops.verify), case.verify(ops.verify))
        texts = [4, 0]
        same(case.verify(ops.verify), case.only(texts).verify(ops.verify), texts)
        torch.cuda.synchronize()
        prepared = case.prepared()
        torch.cuda.set_sync_debug_mode("error")
        try:  # nothing waits for the device
            ops.verify(case.members, case.weights, drafted=case.drafted, draft=case.draft, **prepared)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert tally.unsure <= 0.1 * tally.draws
