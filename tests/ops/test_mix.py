"""Mixtures of embeddings: both implementations against float64, what they promise beside it, and what is refused."""

from __future__ import annotations

import importlib
import importlib.util
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from support import oracle
from support.decisions import poisoned, random_keys
from support.gpu import gpu, in_a_graph, needs_gpu, no_waiting

from proxytune.errors import InputError
from proxytune.ops.mix import mix
from proxytune.ops.noise import Noise

NAN, INF = float("nan"), float("inf")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
Mix = Callable[..., torch.Tensor]


@pytest.fixture(params=["torch", "triton"])
def impl(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "triton":
        if importlib.util.find_spec("triton") is None:
            pytest.skip("no Triton in this environment")
        if not torch.cuda.is_available():
            _round_as_a_gpu_does(monkeypatch)
    return str(request.param)


def _round_as_a_gpu_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter cuts bits off on the way to bfloat16, and takes its subnormal numbers for others; GPUs do not."""
    interpreter: Any = importlib.import_module("triton.runtime.interpreter")
    language: Any = importlib.import_module("triton.language")
    convert = interpreter._convert_float

    def rounding(x: Any, source: Any, target: Any, mode: Any) -> Any:
        if (source, target) == (language.float32, language.bfloat16):
            return torch.from_numpy(np.array(x)).bfloat16().view(torch.int16).numpy().view(np.uint16)
        if (source, target) == (language.bfloat16, language.float32):
            return torch.from_numpy(np.array(x).view(np.int16)).view(torch.bfloat16).float().numpy()
        return convert(x, source, target, mode)

    monkeypatch.setattr(interpreter, "_convert_float", rounding)


@pytest.fixture
def run(impl: str) -> Mix:
    """`mix` with the implementation."""

    def mixed(*args: Any, **kwargs: Any) -> torch.Tensor:
        with np.errstate(all="ignore"):  # the interpreter's arithmetic is numpy's
            return mix(*args, **{"impl": impl, "soft": None} | kwargs)

    return mixed


def bits(x: torch.Tensor) -> torch.Tensor:
    """Something that `torch.equal` compares bit by bit."""
    return x.contiguous().view(torch.int32 if x.element_size() == 4 else torch.int16)


def inputs(
    rows: int, candidates: int, width: int, dtype: torch.dtype = torch.float32, device: str = "cpu", size: int = 40
) -> dict[str, torch.Tensor]:
    """A table between memory that is NaN, ids that may be the same, weights of which some are 0."""
    g = torch.Generator().manual_seed(rows * 1000 + candidates * 10 + width)
    table = torch.randn(size, width, generator=g).to(dtype)
    ids = torch.randint(size, (rows, candidates), generator=g)
    weights = torch.rand(rows, candidates, generator=g)
    weights[:, 1::4] = 0.0
    weights /= weights.sum(1, keepdim=True)
    tokens = torch.randint(size, (rows,), generator=g)
    given = {"table": poisoned(table.to(device)), "ids": ids, "weights": weights, "tokens": tokens}
    return {name: x.to(device) for name, x in given.items()}


def keys(rows: int, seed: int = 0) -> dict[str, torch.Tensor]:
    return random_keys(np.random.default_rng(seed), rows)


def truth(
    table: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, sigma: float, noise: dict[str, torch.Tensor]
) -> tuple[Any, Any]:
    """The mixture in float64, `[B, D]`, and how far a float32 sum that is rounded to the table's dtype may be off."""
    rows, width = len(ids), table.shape[1]
    dtype = torch.finfo(table.dtype)
    own, w = table.cpu().double().numpy(), weights.cpu().double().numpy()
    x, slack = np.zeros((rows, width)), np.zeros((rows, width))
    for b in range(rows):
        terms = [w[b, k] * own[int(i)] for k, i in enumerate(ids[b]) if w[b, k] != 0]
        x[b] = sum(terms)
        slack[b] = 2 * len(terms) * oracle.UNIT * sum(abs(t) for t in terms)
        if sigma:
            coordinate = np.arange(width) + 31 * 2**27
            key = {name: int(value[b]) for name, value in noise.items()}
            first, second, _, _ = oracle.philox(
                key["seed"], coordinate, key["position"], key["row"], key["branch"] * 4 + 3
            )
            e = -np.log1p(-(first + 0.5) / 2.0**32)
            n = np.sqrt(2 * e) * np.cos(2 * np.pi * (second + 0.5) / 2.0**32)
            size = sigma * math.sqrt(float(np.mean(x[b] ** 2)))
            x[b] += size * n
            slack[b] += size * 1e-5 + 2 * oracle.UNIT * abs(x[b])
    return x, slack + dtype.eps / 2 * abs(x) + dtype.smallest_normal * dtype.eps


# --- against float64 --------------------------------------------------------------------------------------------------


# One coordinate, fewer than a vector has, a power of two, none, and more than one read of the largest block.
@pytest.mark.parametrize("width", [1, 7, 64, 1000, 2053])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sigma", [0.0, 0.3])
def test_the_matrix(run: Mix, impl: str, width: int, dtype: torch.dtype, sigma: float, device: str) -> None:
    for candidates in (1, 3, 10, 17):  # around multiples of the rows that the kernel reads at once
        for rows in (1, 3):
            given, key = inputs(rows, candidates, width, dtype, device), keys(rows)
            noise = Noise.of(rows, device=device, **key)
            out = run(**given, sigma=sigma, noise=noise)
            assert out.dtype == dtype
            assert out.shape == (rows, width)
            assert out.is_contiguous()
            expected, slack = truth(given["table"], given["ids"], given["weights"], sigma, key)
            off = abs(out.cpu().double().numpy() - expected)
            assert (off <= slack).all(), (candidates, rows, float((off - slack).max()))
            plain = mix(**given, soft=None, sigma=sigma, noise=noise, impl="torch")
            if not sigma:  # nothing but products and sums in one order
                assert torch.equal(bits(out), bits(plain)), (candidates, rows)


def test_a_table_of_float64_is_mixed_in_float64() -> None:
    given = inputs(3, 5, 20, torch.float64)
    out = mix(**given, soft=None)
    expected = (given["table"][given["ids"]] * given["weights"].double()[..., None]).sum(1)
    torch.testing.assert_close(out, expected, rtol=1e-15, atol=1e-15)


def test_arguments_lie_anywhere_in_memory(run: Mix, device: str) -> None:
    given, noise = inputs(3, 5, 33, torch.bfloat16, device), Noise.of(3, device=device, **keys(3))
    soft = torch.tensor([True, False, True], device=device)
    expected = run(**given, soft=soft, sigma=0.1, noise=noise)
    scattered = {
        "table": poisoned(given["table"].repeat_interleave(2, 0), pad=7)[::2],
        "ids": given["ids"].t().contiguous().t(),
        "weights": given["weights"].repeat(1, 2)[:, :5],
        "tokens": given["tokens"].repeat_interleave(3)[::3],
    }
    apart = Noise(*(x.repeat_interleave(2)[::2] for x in vars(noise).values()))
    assert torch.equal(expected, run(**scattered, soft=soft.repeat_interleave(2)[::2], sigma=0.1, noise=apart))
    same = given["table"][:1].expand(40, -1)  # a stride of 0
    assert torch.equal(run(**given | {"table": same}), run(**given | {"table": same.contiguous()}))


def test_nothing_of_what_memory_held_before_comes_out(
    run: Mix, impl: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = inputs(3, 5, 100, torch.float16, device)
    noise, soft = Noise.of(3, device=device), torch.tensor([True, False, True], device=device)
    expected = [run(**given), run(**given, soft=soft, sigma=0.1, noise=noise)]
    empty, made = torch.empty, [0]

    def filled(*args: Any, **kwargs: Any) -> torch.Tensor:
        made[0] += 1
        return empty(*args, **kwargs).fill_(NAN)

    monkeypatch.setattr(torch, "empty", filled)
    for before, after in zip(expected, [run(**given), run(**given, soft=soft, sigma=0.1, noise=noise)], strict=True):
        assert torch.equal(before, after)
    assert made[0] == 2 or impl == "torch"  # the kernel's outputs did come from here


# --- rows that are not mixed ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_hot_weights_give_the_row_itself(run: Mix, dtype: torch.dtype, device: str) -> None:
    """Bit for bit, also zeros of both signs and numbers below the normal ones, wherever among the candidates it is."""
    given = inputs(6, 6, 50, dtype, device)
    given["table"][:, :8] = torch.tensor([0.0, -0.0, 1e-7, -1e-7, 1.0, -1.0, 1e-39, 6e4], device=device).to(dtype)
    given["weights"] = torch.eye(6, device=device)
    given["tokens"] = given["ids"].diagonal().contiguous()
    assert torch.equal(bits(run(**given)), bits(given["table"][given["tokens"]]))


def test_rows_that_are_not_soft_are_the_token_s_row(run: Mix, device: str) -> None:
    given, noise = inputs(4, 5, 30, torch.bfloat16, device), Noise.of(4, device=device)
    given["table"][3] = torch.tensor([NAN, INF, -INF] * 10).to(given["table"])
    given["tokens"][2] = 3  # as it is, whatever it holds
    given["ids"][given["ids"] == 3] = 4
    given["weights"][1] = NAN
    soft = torch.tensor([True, False, False, True], device=device)
    out = run(**given, soft=soft, sigma=0.5, noise=noise)
    mixed = run(**given, sigma=0.5, noise=noise)
    own = given["table"][given["tokens"]]
    assert torch.equal(bits(out[~soft]), bits(own[~soft]))
    assert torch.equal(bits(out[soft]), bits(mixed[soft]))
    assert not torch.equal(mixed[soft], own[soft])


def test_a_weight_of_zero_silences_a_row_whatever_it_holds(run: Mix, device: str) -> None:
    for bad in (NAN, INF, -INF):
        given = inputs(3, 7, 20, torch.float32, device)
        silent = given["ids"].clone()
        given["ids"][given["weights"] == 0] = 5
        given["ids"][(given["weights"] != 0) & (silent == 5)] = 6
        expected = run(**given)
        given["table"][5] = bad
        assert torch.equal(run(**given), expected)
        given["weights"][:, 1] = -0.0
        assert torch.equal(run(**given), expected)


@pytest.mark.parametrize("sigma", [0.0, 0.1])
def test_a_mixture_that_is_not_finite_is_replaced_as_a_whole(run: Mix, sigma: float, device: str) -> None:
    for dtype in DTYPES:
        given, noise = inputs(5, 3, 40, dtype, device), Noise.of(5, device=device)
        given["weights"][:] = 0.25
        given["weights"][:, 2] = 0.5
        given["ids"] = torch.arange(15, device=device).view(5, 3)
        given["tokens"][:] = 30
        clean = run(**given, sigma=sigma, noise=noise)
        given["table"][0, 39], given["table"][4, 0], given["table"][8, 20] = NAN, INF, -INF
        given["weights"][3, 0] = NAN
        out = run(**given, sigma=sigma, noise=noise)
        assert torch.equal(bits(out[:4]), bits(given["table"][30].expand(4, -1)))
        assert torch.equal(bits(out[4]), bits(clean[4]))  # no other row notices


def test_what_overflows_the_table_s_dtype_is_not_finite(run: Mix, device: str) -> None:
    given = inputs(2, 2, 10, torch.float16, device)
    largest = torch.finfo(torch.float16).max
    given["table"][:] = largest
    given["weights"] = torch.tensor([[0.5, 0.5], [0.5, 0.501]], device=device)  # adds up to a little too much
    given["tokens"][:] = 1
    given["table"][1] = 2.0
    given["ids"] = torch.tensor([[2, 3], [2, 3]], device=device)
    out = run(**given)
    assert (out[0] == largest).all()
    assert (out[1] == 2.0).all()


# --- independence and order -------------------------------------------------------------------------------------------


def test_a_row_does_not_depend_on_the_others(run: Mix, device: str) -> None:
    given, key = inputs(5, 6, 300, torch.bfloat16, device), keys(5)
    soft = torch.tensor([True, True, False, True, True], device=device)
    whole = run(**given, soft=soft, sigma=0.2, noise=Noise.of(5, device=device, **key))
    for order in ([3], [0, 4], [4, 2, 0, 1, 3]):
        part = {name: x if name == "table" else x[order] for name, x in given.items()}
        noise = Noise.of(len(order), device=device, **{name: x[order] for name, x in key.items()})
        assert torch.equal(bits(run(**part, soft=soft[order], sigma=0.2, noise=noise)), bits(whole[order]))


def test_the_order_of_candidates_matters_by_rounding_alone(run: Mix, device: str) -> None:
    given = inputs(4, 10, 200, torch.float32, device)
    order = torch.randperm(10, generator=torch.Generator().manual_seed(0)).to(device)
    moved = given | {"ids": given["ids"][:, order], "weights": given["weights"][:, order]}
    torch.testing.assert_close(run(**moved), run(**given), rtol=1e-5, atol=1e-6)
    # Those without a weight may stand anywhere.
    padded = given | {
        "ids": torch.nn.functional.pad(given["ids"], (3, 2)),
        "weights": torch.nn.functional.pad(given["weights"], (3, 2)),
    }
    assert torch.equal(run(**padded), run(**given))


# --- the noise --------------------------------------------------------------------------------------------------------


def test_noise_has_the_relative_size_that_was_asked_for(run: Mix, impl: str, device: str) -> None:
    rows, width, sigma = (4, 2000, 0.25) if impl == "triton" and device == "cpu" else (16, 8000, 0.25)
    given, key = inputs(rows, 4, width, torch.float32, device), keys(rows, 3)
    given["table"] *= torch.logspace(-3, 3, len(given["table"]), device=device)[:, None]  # relative: whatever the size
    plain = run(**given).double()
    noise = Noise.of(rows, device=device, **key)
    added = run(**given, sigma=sigma, noise=noise).double() - plain
    n = added / (sigma * plain.square().mean(1, keepdim=True).sqrt())
    count = rows * width
    assert abs(float(n.mean())) < 4 / math.sqrt(count)
    assert abs(float(n.square().mean()) - 1) < 4 * math.sqrt(2 / count)
    assert abs(float((n**4).mean()) - 3) < 4 * math.sqrt(96 / count)
    related = torch.corrcoef(n) - torch.eye(rows, device=device)
    assert related.abs().max() < 4.5 / math.sqrt(width)
    # The same keys, the same noise; the next position, another. None at all below the smallest float32.
    assert torch.equal(run(**given, sigma=sigma, noise=noise).double() - plain, added)
    moved = run(**given, sigma=sigma, noise=noise.at(noise.position + 1)).double() - plain
    assert abs(float((moved * added).mean() / (moved.std() * added.std()))) < 0.2
    assert torch.equal(run(**given, sigma=1e-60, noise=noise).double(), plain)


# --- wrong use --------------------------------------------------------------------------------------------------------

TABLE, IDS = torch.zeros(9, 4), torch.zeros(2, 3, dtype=torch.int64)
GOOD = {"table": TABLE, "ids": IDS, "weights": torch.ones(2, 3) / 3, "tokens": IDS[:, 0], "soft": None}
WRONG = [
    ({"table": TABLE[0]}, r"table: expected rows to mix, \[N, D\].*; got shape \[4\]\. Pass an embedding's"),
    ({"table": TABLE[:, :0]}, r"table: .* got shape \[9, 0\]"),
    ({"table": TABLE.long()}, r"table: expected float32, .* or float64; got torch.int64\. If a module"),
    ({"table": torch.zeros(4, 9).t()}, r"table: .* inner stride of 1\); got strides \[1, 9\]\. Call"),
    ({"ids": IDS[0]}, r"ids: expected rows of the table \[B, K\], .* got shape \[3\], torch.int64, on cpu"),
    ({"ids": IDS.int()}, r"ids: .* got shape \[2, 3\], torch.int32, on cpu\. Pad shorter"),
    ({"ids": IDS[:0]}, r"ids: .* neither of them 0.* got shape \[0, 3\]"),
    ({"ids": IDS[:, :0]}, r"ids: .* got shape \[2, 0\]"),
    ({"ids": IDS.to("meta")}, r"ids: .* on cpu; got shape \[2, 3\], torch.int64, on meta"),
    ({"weights": torch.ones(2, 2)}, r"weights: expected \[2, 3\], torch.float32, on cpu, .*; got shape \[2, 2\]"),
    ({"weights": torch.ones(2, 3).half()}, r"weights: .* got shape \[2, 3\], torch.float16"),
    ({"tokens": IDS}, r"tokens: expected \[2\], torch.int64, .* got shape \[2, 3\]"),
    ({"tokens": IDS[:, 0].int()}, r"tokens: .* torch.int32, on cpu\. Weights are one per id"),
    ({"soft": IDS[:, 0]}, r"soft: expected \[2\], torch.bool, .* got shape \[2\], torch.int64"),
    ({"sigma": -0.1}, r"sigma: expected a number in \[0, 3.40282e\+38\]; got -0.1\. Leave it out"),
    ({"sigma": NAN}, r"sigma: .* got nan"),
    ({"sigma": INF}, r"sigma: .* got inf"),
    ({"sigma": True}, r"sigma: .* got True"),
    ({"sigma": "much"}, r"sigma: .* got 'much'"),
    ({"sigma": 0.1}, r"noise: expected a Noise together with sigma > 0; got None\. Pass Noise.of\(2"),
    ({"noise": Noise.of(3)}, r"noise: expected keys for 2 rows on cpu.* got shape \[3\]"),
    ({"noise": Noise.of(2, device="meta")}, r"noise: .* got shape \[2\], torch.int64, on meta"),
    ({"impl": "cuda"}, r"impl: expected 'auto', 'triton' or 'torch'; got 'cuda'"),
    ({"impl": "triton", "table": TABLE.double()}, r"impl='triton': expected a table of float32.* got torch.float64"),
]  # fmt: skip


@pytest.mark.parametrize(("wrong", "said"), WRONG)
def test_wrong_use_is_refused_before_anything_runs(
    wrong: dict[str, Any], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise AssertionError("something ran")

    monkeypatch.setattr(importlib.import_module("proxytune.ops.mix"), "mix_rows", fail)
    monkeypatch.setattr(importlib, "import_module", fail)
    with pytest.raises(InputError, match=said):
        mix(**GOOD | wrong)


def test_triton_is_refused_where_it_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(InputError, match="impl='triton': expected a GPU"):
        mix(**GOOD, impl="triton")


def test_inputs_are_read_only_and_the_result_carries_no_gradient(run: Mix, device: str) -> None:
    given, noise = inputs(3, 5, 33, torch.float32, device), Noise.of(3, device=device)
    before = {name: x.clone() for name, x in given.items()}
    table = torch.nn.Parameter(given["table"])
    out = run(**given | {"table": table}, sigma=0.1, noise=noise)
    assert not out.requires_grad
    assert all(torch.equal(x, before[name]) for name, x in given.items())


# --- inside torch.compile ---------------------------------------------------------------------------------------------


def test_inside_torch_compile_it_is_one_node_with_the_same_result() -> None:
    given, noise = inputs(3, 5, 40, torch.bfloat16), Noise.of(3, seed=5)
    soft = torch.tensor([True, False, True])
    graphs: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, inputs: object) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    def mixed(table: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        return mix(table, ids, weights, tokens=tokens, soft=soft, sigma=0.1, noise=noise)

    plain = mixed(**given)
    for backend in (keep, "aot_eager"):
        torch._dynamo.reset()
        out = torch.compile(mixed, backend=backend, fullgraph=True)(**given)
        assert torch.equal(out, plain)
    called = [str(node.target) for node in graphs[0].graph.nodes if node.op == "call_function"]
    assert len(graphs) == 1
    assert sum("proxytune" in name for name in called) == 1


def test_the_operator_passes_torchs_own_checks() -> None:
    given, noise = inputs(3, 5, 40), Noise.of(3)
    checks = ("test_schema", "test_faketensor")
    for soft, own in ((None, []), (torch.tensor([True, False, True]), list(vars(noise).values()))):
        arguments = (*given.values(), soft, 0.1, own, "torch")
        torch.library.opcheck(torch.ops.proxytune.mix.default, arguments, test_utils=checks)


# --- on a GPU ---------------------------------------------------------------------------------------------------------


def _real(rows: int, candidates: int, width: int = 4096) -> tuple[dict[str, torch.Tensor], Noise]:
    g = torch.Generator("cuda").manual_seed(0)
    table = torch.randn(128_256, width, generator=g, device="cuda").bfloat16()
    ids = torch.randint(128_256, (rows, candidates), generator=g, device="cuda")
    weights = torch.rand(rows, candidates, generator=g, device="cuda").softmax(1)
    given = {"table": table, "ids": ids, "weights": weights, "tokens": ids[:, 0].contiguous()}
    return given, Noise.of(rows, seed=3, position=7, device="cuda")


@gpu
@needs_gpu
@pytest.mark.parametrize("candidates", [10, 20])
@pytest.mark.parametrize("width", [4096, 8192, 16384])
def test_real_sizes_against_torch_and_float64(candidates: int, width: int) -> None:
    for rows in (1, 8, 64):
        given, noise = _real(rows, candidates, width)
        ours, plain = (mix(**given, soft=None, impl=name) for name in ("triton", "torch"))
        assert torch.equal(bits(ours), bits(plain))
        key = {name: x.cpu() for name, x in vars(noise).items()}
        for sigma in (0.0, 0.1):
            out = mix(**given, soft=None, sigma=sigma, noise=noise, impl="triton")
            expected, slack = truth(given["table"], given["ids"], given["weights"], sigma, key)
            assert (abs(out.cpu().double().numpy() - expected) <= slack).all()


@gpu
@needs_gpu
def test_batches_replays_and_waiting_on_a_gpu() -> None:
    given, noise = _real(64, 10)
    soft = torch.arange(64, device="cuda") % 3 > 0
    whole = mix(**given, soft=soft, sigma=0.1, noise=noise)
    one = {name: x if name == "table" else x[5:6] for name, x in given.items()}
    own = Noise(*(x[5:6] for x in vars(noise).values()))
    for impl in ("triton", "torch"):
        with no_waiting():
            alone = mix(**one, soft=soft[5:6], sigma=0.1, noise=own, impl=impl)
            beside = mix(**given, soft=soft, sigma=0.1, noise=noise, impl=impl)
        assert torch.equal(alone[0], beside[5])
    out = torch.empty_like(whole)
    replay = in_a_graph(lambda: out.copy_(mix(**given, soft=soft, sigma=0.1, noise=noise)) and None)
    out.zero_()
    replay()
    assert torch.equal(out, whole)
