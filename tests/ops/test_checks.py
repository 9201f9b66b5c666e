"""What a step refuses, by its text, before anything is launched; which implementation it chooses; and `combine`."""

from __future__ import annotations

import importlib
import importlib.util
import math
from typing import Any

import pytest
import torch
from support.decisions import bits, logits

from proxytune import ops
from proxytune.errors import InputError
from proxytune.formulas.shift import shift
from proxytune.ops import dispatch
from proxytune.ops.noise import Noise
from proxytune.ops.sampling_params import SamplingParams

NAN, INF = float("nan"), float("inf")
X = torch.zeros(2, 9)


def _fail(*_: Any, **__: Any) -> None:
    raise AssertionError("something was launched")


@pytest.fixture
def nothing_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("decide", "kernels", "MemberRows"):
        monkeypatch.setattr(dispatch, name, _fail)
    for module in ("step", "verify"):
        monkeypatch.setattr(importlib.import_module(f"proxytune.ops.{module}"), "MemberRows", _fail)
    monkeypatch.setattr(importlib.import_module("proxytune.ops.verify"), "kernels", _fail)


def sampling(rows: int = 2, **settings: Any) -> SamplingParams:
    return SamplingParams.of(rows, **settings)


def noise(rows: int = 2) -> Noise:
    return Noise.of(rows)


MEMBERS = [
    ([], (), r"members: expected 1 to 8 tensors of logits, the base first; got 0\. Pass step\("),
    ([X] * 9, (1.0,) * 9, r"members: expected 1 to 8 tensors .* got 9\."),
    ([[0.0]], (1.0,), r"member 0: expected a tensor \[B, V\]; got a list\."),
    ([X, None], (1.0, 1.0), r"member 1: expected a tensor \[B, V\]; got a NoneType\."),
    ([X[0]], (1.0,), r"member 0: expected a tensor \[B, V\], neither of them 0; got shape \[9\]\. All members' logits"),
    ([X[None]], (1.0,), r"member 0: .* got shape \[1, 2, 9\]"),
    ([X[:0]], (1.0,), r"member 0: .* neither of them 0; got shape \[0, 9\]"),
    ([X[:, :0]], (1.0,), r"member 0: .* neither of them 0; got shape \[2, 0\]"),
    ([X, X[:1]], (1.0, 1.0), r"member 1: expected a tensor \[2, V\]; got shape \[1, 9\]"),
    ([X, X[0]], (1.0, 1.0), r"member 1: expected a tensor \[2, V\]; got shape \[9\]"),
    ([X, X[:, :0]], (1.0, 1.0), r"member 1: expected a tensor \[2, V\]; got shape \[2, 0\]"),
    ([X.double()], (1.0,), r"member 0: expected float32, float16 or bfloat16; got torch.float64\. Convert it first\."),
    ([X, X.long()], (1.0, 1.0), r"member 1: expected float32, float16 or bfloat16; got torch.int64"),
    ([X, X.bool()], (1.0, 1.0), r"member 1: .* got torch.bool"),
    ([X, X.to("meta")], (1.0, 1.0), r"member 1: expected logits on cpu, where the base's are; got meta"),
    ([torch.zeros(9, 2).T], (1.0,), r"member 0: expected columns next to each other .* got strides \[1, 2\]\. Call"),
    ([X, torch.zeros(2, 18)[:, ::2]], (1.0, 1.0), r"member 1: .*\(an inner stride of 1\); got strides \[18, 2\]"),
    ([X, X[:, :1].expand(-1, 9)], (1.0, 1.0), r"member 1: .* got strides \[9, 0\]"),
]  # fmt: skip


@pytest.mark.parametrize(("members", "weights", "says"), MEMBERS, ids=range(len(MEMBERS)))
@pytest.mark.usefixtures("nothing_runs")
def test_members_that_do_not_fit(members: Any, weights: Any, says: str) -> None:
    with pytest.raises(InputError, match=says):
        ops.step(members, weights)


WEIGHTS = [
    ((1.0,), r"weights: expected 2 finite numbers, or float32 \[2, 2\] on cpu; got 1 numbers\. The base's"),
    ((1.0, 1.0, 1.0), r"got 3 numbers"),
    ((1.0, NAN), r"weights: expected 2 finite numbers.* got nan"),
    ((1.0, -INF), r"got -inf"),
    ((1.0, "1"), r"got '1'"),
    ((None, 1.0), r"got None"),
    ((1.0, 1j), r"got 1j"),
    (torch.ones(2), r"weights: .* got shape \[2\], torch.float32"),
    (torch.ones(2, 3), r"got shape \[2, 3\], torch.float32"),
    (torch.ones(1, 2), r"got shape \[1, 2\], torch.float32"),
    (torch.ones(2, 2, dtype=torch.float64), r"got shape \[2, 2\], torch.float64"),
    (torch.ones(2, 2, device="meta"), r"got a tensor on meta"),
]  # fmt: skip


@pytest.mark.parametrize(("weights", "says"), WEIGHTS, ids=range(len(WEIGHTS)))
@pytest.mark.usefixtures("nothing_runs")
def test_weights_that_do_not_fit(weights: Any, says: str) -> None:
    with pytest.raises(InputError, match=says):
        ops.step([X, X], weights)


REQUESTS: list[tuple[dict[str, Any], str]] = [
    ({"want": "tokens"}, r"want: expected names of tokens, logprobs, .*; got 'tokens'\. Pass e\.g\. want=\("),
    ({"want": ("tokens", "perplexity")}, r"want: expected names of .* got 'perplexity'"),
    ({"want": (1,)}, r"want: .* got 1"),
    ({"draws": 0}, r"draws: expected a whole number of draws, from 1 to 9; got 0\. There are no more"),
    ({"draws": -1}, r"draws: expected a whole number of draws, from 1 to 9; got -1"),
    ({"draws": 10, "sampling": sampling(), "noise": noise()}, r"draws: expected .*, from 1 to 9; got 10"),
    ({"draws": 2.0}, r"draws: .* got 2\.0"),
    ({"draws": True}, r"draws: .* got True"),
    ({"draws": 2}, r"sampling: expected SamplingParams together with draws=2; got None\. Pass SamplingParams\.of"),
    ({"noise": noise()}, r"sampling: expected SamplingParams together with noise; got None"),
    ({"want": ("tokens", "keys")}, r"sampling: expected SamplingParams together with keys; got None"),
    ({"want": ("kept",)}, r"sampling: .* together with kept"),
    ({"want": ("fork",)}, r"sampling: .* together with fork"),
    ({"want": ("temperature",)}, r"sampling: .* together with temperature"),
    ({"want": ("draw_logprobs",)}, r"sampling: .* together with draw_logprobs"),
    ({"sampling": sampling()}, r"noise: expected a Noise together with sampling; got None\. Pass Noise\.of"),
    ({"sampling": sampling(3), "noise": noise()}, r"sampling: expected .* for 2 rows on cpu.* got shape \[3\] on cpu"),
    ({"sampling": sampling(), "noise": noise(3)}, r"noise: expected keys and settings for 2 rows .* got shape \[3\]"),
    ({"sampling": sampling(), "noise": noise().at(torch.zeros(3))}, r"noise: .* got shape \[3\]"),
    ({"sampling": sampling(), "noise": noise().at(torch.zeros(2, device="meta"))}, r"noise: .* \[2\] on meta"),
    ({"sampling": sampling(top_k=10), "noise": noise()}, r"top_k: expected at most 9, the width .*; got 10\. Lower"),
    ({"sampling": sampling(top_k=torch.tensor([0, 10])), "noise": noise()}, r"top_k: expected at most 9, .*; got 10"),
]  # fmt: skip


@pytest.mark.parametrize(("request_", "says"), REQUESTS, ids=range(len(REQUESTS)))
@pytest.mark.usefixtures("nothing_runs")
def test_requests_that_cannot_be_answered(request_: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError, match=says):
        ops.step([X], **request_)


def test_the_largest_requests_that_can() -> None:
    got = ops.step([X], sampling=sampling(top_k=9), noise=noise(), draws=9, want=ops.OUTPUTS)
    assert got.tokens is not None
    assert got.tokens.sort().values.tolist() == [list(range(9))] * 2


@pytest.mark.usefixtures("nothing_runs")
def test_a_control_what_fits_would_be_launched() -> None:
    with pytest.raises(AssertionError, match="something was launched"):
        ops.step([X])


# --- settings ---------------------------------------------------------------------------------------------------------

SETTINGS: list[tuple[dict[str, Any], str]] = [
    ({"rows": 0}, r"sampling: expected at least one row; got 0"),
    ({"temperature": 0.0}, r"temperature: .* ≥ 1e-30; got 0\.0\. For the argmax, leave `sampling` out"),
    ({"temperature": -1.0}, r"temperature: .* got -1\.0"),
    ({"temperature": NAN}, r"temperature: .* got nan"),
    ({"temperature": INF}, r"temperature: .* got inf"),
    ({"temperature": True}, r"temperature: .* got True"),
    ({"temperature": "1"}, r"temperature: .* got '1'"),
    ({"temperature": 1e-50}, r"temperature: expected a finite number ≥ 1e-30; got 1e-50"),
    ({"temperature": 1e300}, r"temperature: expected a finite number ≥ 1e-30 in float32; got 1e\+300"),
    ({"temperature": torch.tensor([1.0, NAN])}, r"temperature: .* got nan"),
    ({"temperature": torch.ones(3)}, r"temperature: .* or a tensor \[B\] for 2 rows; got shape \[3\]"),
    ({"temperature": torch.ones(2, 1)}, r"temperature: .* got shape \[2, 1\]"),
    ({"temperature": torch.tensor(1.0)}, r"temperature: .* got shape \[\]"),
    ({"top_k": -1}, r"top_k: expected a whole number ≥ 0; got -1"),
    ({"top_k": 1.5}, r"top_k: expected a whole number ≥ 0; got 1\.5"),
    ({"top_k": NAN}, r"top_k: .* got nan"),
    ({"top_k": True}, r"top_k: .* got True"),
    ({"top_k": 2**31}, r"top_k: .* got 2147483648"),
    ({"top_k": torch.tensor([1, -2])}, r"top_k: .* got -2"),
    ({"top_p": 0.0}, r"top_p: expected a number in \(0, 1\]; got 0\.0"),
    ({"top_p": 1.0001}, r"top_p: .* got 1\.0001"),
    ({"top_p": -0.5}, r"top_p: .* got -0\.5"),
    ({"top_p": NAN}, r"top_p: .* got nan"),
    ({"top_p": 1e-60}, r"top_p: expected a number in \(0, 1\] in float32; got 1e-60"),
    ({"min_p": -0.1}, r"min_p: expected a number in \[0, 1\]; got -0\.1"),
    ({"min_p": 1.1}, r"min_p: .* got 1\.1"),
    ({"min_p": NAN}, r"min_p: .* got nan"),
    ({"fork_threshold": 1.0}, r"fork_threshold: expected a threshold and a fork_temperature, or neither; got .*=None"),
    ({"fork_temperature": 1.0}, r"fork_threshold: .* got fork_threshold=None, fork_temperature=1\.0"),
    ({"fork_threshold": NAN, "fork_temperature": 1.0}, r"fork_threshold: expected finite nats; got nan"),
    ({"fork_threshold": INF, "fork_temperature": 1.0}, r"fork_threshold: expected finite nats; got inf"),
    ({"fork_threshold": 1.0, "fork_temperature": 0.0}, r"fork_temperature: expected a finite number ≥ 1e-30; got 0\.0"),
    ({"fork_threshold": 1.0, "fork_temperature": NAN}, r"fork_temperature: .* got nan"),
]  # fmt: skip


@pytest.mark.parametrize(("settings", "says"), SETTINGS, ids=range(len(SETTINGS)))
def test_settings_out_of_range(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError, match=says):
        SamplingParams.of(settings.pop("rows", 2), **settings)


def test_settings_at_the_ends_of_their_ranges() -> None:
    s = SamplingParams.of(2, temperature=1e-30, top_k=2**31 - 1, top_p=1.0, min_p=1.0)
    assert s.largest_k == 2**31 - 1
    assert s.top_k.tolist() == [2**31 - 1] * 2
    assert s.all_truncated
    assert s.log_min_p.tolist() == [0.0, 0.0]
    off = SamplingParams.of(3, top_k=0, top_p=1.0, min_p=0.0)
    assert not off.some_truncated
    assert not off.all_truncated
    assert off.log_min_p.tolist() == [-INF] * 3
    some = SamplingParams.of(3, top_k=torch.tensor([0, 4, 0]), top_p=torch.tensor([1.0, 1.0, 0.5]))
    assert some.truncated.tolist() == [False, True, True]
    assert (some.some_truncated, some.all_truncated, some.largest_k) == (True, False, 4)
    assert SamplingParams.of(1, min_p=0.25).log_min_p.item() == pytest.approx(math.log(0.25))


KEYS: list[tuple[dict[str, Any], str]] = [
    ({"seed": True}, r"noise: seed: expected a whole number from -9223372036854775808 to 9223372036854775807, .* True"),
    ({"seed": 1.0}, r"noise: seed: .* for each of 2 rows; got 1\.0\. Pass e\.g\. Noise\.of"),
    ({"seed": 2**63}, r"noise: seed: .* got 9223372036854775808"),
    ({"seed": -(2**63) - 1}, r"noise: seed: .* got -9223372036854775809"),
    ({"seed": None}, r"noise: seed: .* got None"),
    ({"seed": torch.tensor([1, 2, 3])}, r"noise: seed: .* got shape \[3\], torch.int64"),
    ({"seed": torch.tensor([1.0, 2.0])}, r"noise: seed: .* got shape \[2\], torch.float32"),
    ({"row": torch.tensor([True, False])}, r"noise: row: .* got shape \[2\], torch.bool"),
    ({"row": torch.tensor([0, -1])}, r"noise: row: expected a whole number from 0 to 4294967295.* got -1"),
    ({"row": torch.tensor([0, 2**32])}, r"noise: row: .* got 4294967296"),
    ({"position": -1}, r"noise: position: expected a whole number from 0 to 4294967295.* got -1"),
    ({"position": 2**32}, r"noise: position: .* got 4294967296"),
    ({"position": torch.tensor(5)}, r"noise: position: .* got shape \[\], torch.int64"),
    ({"branch": 2**30}, r"noise: branch: expected a whole number from 0 to 1073741823.* got 1073741824"),
    ({"branch": False}, r"noise: branch: .* got False"),
]  # fmt: skip


@pytest.mark.parametrize(("keys", "says"), KEYS, ids=range(len(KEYS)))
def test_keys_out_of_range(keys: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError, match=says):
        Noise.of(2, **keys)


def test_keys_at_the_ends_of_their_ranges() -> None:
    n = Noise.of(2, seed=-(2**63), row=torch.tensor([0, 2**32 - 1]), position=2**32 - 1, branch=2**30 - 1)
    assert n.seed.tolist() == [-(2**63)] * 2
    assert n.row.tolist() == [0, 2**32 - 1]
    assert n.position.tolist() == [2**32 - 1] * 2
    assert n.branch.tolist() == [2**30 - 1] * 2
    assert Noise.of(3).row.tolist() == [0, 1, 2]
    assert Noise.of(2, seed=torch.tensor([1, 2], dtype=torch.int32)).seed.dtype == torch.int64


def test_keys_at_another_position_are_those_made_there_or_refused() -> None:
    noise = Noise.of(2, seed=3, position=7)
    moved = noise.at(8)
    assert (moved.position.tolist(), moved.position.dtype) == ([8, 8], torch.int64)
    z, sampling = torch.randn(2, 100, generator=torch.Generator().manual_seed(0)), SamplingParams.of(2)
    got, want = (ops.step([z], sampling=sampling, noise=n).tokens for n in (moved, Noise.of(2, seed=3, position=8)))
    assert torch.equal(got, want)
    for position in (-1, [8, 8], True):
        with pytest.raises(InputError, match=r"noise: position: expected a whole .* got (-1|\[8, 8\]|True)"):
            noise.at(position)
    with pytest.raises(InputError, match=r"noise: expected keys and settings for 2 rows .* got shape \[\] on cpu"):
        ops.step([z], sampling=sampling, noise=noise.at(torch.tensor(8)))


# --- which implementation ---------------------------------------------------------------------------------------------

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def test_choose(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_has_triton", lambda: True)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert ops.choose("auto", CPU) == "torch"
    assert ops.choose("auto", CUDA) == "triton"
    assert ops.choose("auto", torch.device("meta")) == "torch"
    assert ops.choose("torch", CUDA) == "torch"
    assert ops.choose("triton", CUDA) == "triton"
    with pytest.raises(InputError, match=r"impl='triton': expected a GPU, and Triton installed; got tensors on cpu\."):
        ops.choose("triton", CPU)
    with pytest.raises(InputError, match=r"impl: expected 'auto', 'triton' or 'torch'; got 'cuda'\. Leave it out"):
        ops.choose("cuda", CPU)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert ops.choose("triton", CPU) == "triton"
    assert ops.choose("auto", CPU) == "torch"  # the interpreter runs only where it is asked for
    monkeypatch.setattr(dispatch, "_has_triton", lambda: False)
    assert ops.choose("auto", CUDA) == "torch"
    with pytest.raises(InputError, match=r"got no Triton in this environment"):
        ops.choose("triton", CUDA)


@pytest.mark.usefixtures("nothing_runs")
def test_a_step_refuses_another_word_and_triton_where_it_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(InputError, match=r"impl: expected 'auto', 'triton' or 'torch'; got 'fast'"):
        ops.step([X], impl="fast")  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"impl='triton': expected a GPU"):
        ops.step([X], impl="triton")


# --- combine ----------------------------------------------------------------------------------------------------------


@pytest.fixture(params=["torch", "triton"])
def either(request: pytest.FixtureRequest) -> str:
    if request.param == "triton" and importlib.util.find_spec("triton") is None:
        pytest.skip("no Triton in this environment")
    return str(request.param)


@pytest.mark.parametrize("shape", [(3,), (2, 3), ()])
@pytest.mark.parametrize("dtypes", [(torch.float32,), (torch.bfloat16, torch.float16, torch.float32)])
def test_combine_is_the_shift_bit_for_bit(
    shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...], either: str, device: str
) -> None:
    rows = math.prod(shape)
    members = logits(rows, 300, 290, 310, dtypes=dtypes)
    members[0][0, 5] = -INF
    members[1][0, 7] = -INF
    members[2][-1, 9] = NAN
    members[1][-1, 11] = INF
    members = [x.view(*shape, -1).to(device) for x in members]
    for weights in ((0.7, -0.7), (0.0, 1.0), (0.0, 0.0), (-1.5, 2.0)):
        ours = ops.combine(members, weights, impl=either)  # type: ignore[arg-type]
        expected = shift(members[0], members[1:], weights)
        assert ours.shape == members[0].shape
        assert ours.dtype == torch.float32
        assert torch.equal(bits(ours), bits(expected)), weights
    alone = ops.combine(members[:1], (), impl=either)  # type: ignore[arg-type]
    assert torch.equal(alone, members[0].float())


def test_combine_leaves_to_the_shift_what_the_kernels_cannot_do(either: str, device: str) -> None:
    base, expert = (x.to(device) for x in logits(2, 20, 20))
    # More companions than a step takes, a gradient, no rows, a companion that broadcasts.
    many = ops.combine([base] + [expert] * 8, (0.1,) * 8, impl=either)  # type: ignore[arg-type]
    assert torch.equal(many, shift(base, [expert] * 8, (0.1,) * 8))
    with_graph = base.clone().requires_grad_()
    ops.combine([with_graph, expert], (1.0,), impl=either).sum().backward()  # type: ignore[arg-type]
    assert torch.equal(with_graph.grad, torch.ones_like(base))  # type: ignore[arg-type]
    assert ops.combine([base[:0], expert[:0]], (1.0,), impl=either).shape == (0, 20)  # type: ignore[arg-type]
    assert torch.equal(
        ops.combine([base, expert[:1]], (1.0,), impl=either),  # type: ignore[arg-type]
        base + expert[:1],
    )
    with pytest.raises(InputError, match=r"formula: expected one weight for each of 1 companions; got 2 weights"):
        ops.combine([base, expert], (1.0, 2.0), impl=either)  # type: ignore[arg-type]


def test_combine_does_not_write_into_the_base(device: str) -> None:
    base, expert = (x.to(device) for x in logits(2, 20, 20))
    before = base.clone()
    ops.combine([base, expert], (1.0,)).fill_(0.0)
    assert torch.equal(base, before)
