"""Decisions on a GPU: checked against float64, and timed under CUDA graphs. `gpu.py` decides what to run."""

from __future__ import annotations

import math
import statistics
import subprocess
import time
from collections.abc import Callable
from typing import Any

import torch
import triton

from _kernels import cases
from _kernels import mix as kernels_mix
from _kernels.cases import WEIGHTS, Case, Members, Outputs
from _kernels.gpu import AUTOTUNE, EAGER, EAGER_CANDIDATES, OURS, Cell, cells, measure
from proxytune import ops


def run(
    deadline: float, keep: Callable[[dict[str, Any]], object] = lambda _: None, *, dry: bool = False
) -> dict[str, Any]:
    """The GPU part of the JSON, kept as it goes; without a GPU, the reason why it was not run.

    `dry` runs a little of it on a CPU.
    """
    if not (dry or torch.cuda.is_available()):
        return {"status": "not run", "reason": "no CUDA device"}
    bench = CpuBench() if dry else CudaBench()
    start = time.monotonic()
    mixtures = (kernels_mix.Mixture(2, 64, 3, 50),) if dry else kernels_mix.MIXTURES
    mix = {"mix": kernels_mix.measure_gpu(bench, mixtures, bench.DEVICE)}
    left = deadline - (time.monotonic() - start)
    all_cells = cells((1100,), (1,))[1:2] if dry else cells()
    return measure(bench, left, all_cells, keep=lambda found: keep(found | mix)) | mix


def races(
    bench: CudaBench, all_cells: list[Cell], repeats: int, keep: Callable[[list[dict[str, Any]]], object]
) -> list[dict[str, Any]]:
    """Repeat each decision; in how many repetitions some output had other bits than the first. `keep` is told."""
    found = []
    for cell in all_cells:
        logits = bench.members(cell)
        decide = cases.decision(cell.case, cell.rows, bench.DEVICE, bench.IMPL)
        first = {name: x.clone() for name, x in decide(logits).items()}
        differ = torch.zeros((), dtype=torch.int64, device=bench.DEVICE)
        for _ in range(repeats):
            again = decide(logits)
            equal = torch.stack([(again[name] == x).all() for name, x in first.items()])
            differ += ~equal.all()
        of = {"case": cell.case.name, "rows": cell.rows, "width": cell.width, "rows_like": cell.rows_like}
        found.append(of | {"repeats": repeats, "differ": int(differ)})
        keep(found)
    return found


# --- correctness ----------------------------------------------------------------------------------------------------


def wrong(case: Case, logits: Members, out: Outputs, again: Outputs) -> str | None:
    """Compare a decision `out` with float64, and its tokens with those of torch's (`again`).

    Returns:
        What is wrong; None if nothing is.
    """
    rows = logits[0].shape[0]
    part = max(1, (1 << 24) // logits[0].shape[1])  # rows at a time: float64 is large
    for start in range(0, rows, part):
        there = slice(start, start + part)
        few = [x[there] for x in logits]
        said = _wrong(case, few, {k: v[there] for k, v in out.items()})
        if said:
            return f"rows from {start}: {said}"
    if "tokens" in out:
        differ = int((out["tokens"] != again["tokens"]).sum())
        # The noise agrees up to rounding, so nearly tied keys may swap two tokens.
        if differ > max(1, rows // 100):
            return f"{differ} of {rows} tokens differ from torch's"
    return None


def _wrong(case: Case, logits: Members, out: Outputs) -> str | None:
    z = sum(w * x.double() for w, x in zip(WEIGHTS, logits, strict=True))
    assert isinstance(z, torch.Tensor)
    logp = z.log_softmax(1)
    p = logp.exp()
    entropy = -(p * logp).sum(1)
    true = {"entropy": entropy}
    if "lse" in out:
        true["lse"] = z.logsumexp(1)
        true["varentropy"] = (p * (logp + entropy[:, None]).square()).sum(1)
        true["kl"] = (p * (logp - logits[0].double().log_softmax(1))).sum(1)
    if "tokens" in out:
        tokens = out["tokens"]
        if not bool(((tokens >= 0) & (tokens < z.shape[1])).all()):
            return "no token"
        true["logprobs"] = logp.gather(1, tokens)
        if not bool(_may_be_drawn(case, z, tokens).all()):
            return "a token outside the support"
    for name, expected in true.items():
        off = float((out[name].double() - expected).abs().max())
        scale = 1.0 + float(expected.abs().max())
        if not off <= 5e-5 * scale:
            return f"{name} is off by {off:.3g}"
    # In float32 rounding may tie several at the maximum; the first of them counts.
    if "argmax" in out and not bool((out["argmax"] == _first_largest(logits)).all()):
        return "argmax is not the first of the largest"
    return None


def _first_largest(logits: Members) -> torch.Tensor:
    z = cases.combined(logits)
    column = torch.arange(z.shape[1], device=z.device)
    return torch.where(z == z.amax(1, keepdim=True), column, z.shape[1]).amin(1)


def _may_be_drawn(case: Case, z: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Whether float64 keeps the tokens, with a tolerance for float32 rounding at the edges."""
    own = z.gather(1, tokens)
    edge = 1e-5 * (1 + own.abs())
    kept = own > -torch.inf
    if case.top_k:
        best = z.topk(case.top_k, 1).values
        kept &= own >= best[:, -1:] - edge
        best = (best / case.temperature).softmax(1)
        above = torch.where(z.topk(case.top_k, 1).values > own + edge, best, 0.0).sum(1, keepdim=True)
        kept &= above <= case.top_p + 1e-4
    return kept


# --- times ----------------------------------------------------------------------------------------------------------


class CudaBench:
    """Times under CUDA graphs.

    A graph holds many decisions in a row and its time is divided by their number, so launches cost nothing. Cold: each
    decision has its own rows, and a large read before the graph evicts them from the L2 cache. Warm: all use the same
    rows.
    """

    DEVICE = "cuda"
    IMPL: ops.Impl = "triton"
    STEPS = 32
    REPLAYS = 15
    BACKEND = "inductor"

    def __init__(self) -> None:
        properties = torch.cuda.get_device_properties(0)
        self._l2 = int(getattr(properties, "L2_cache_size", 50 << 20))
        # Read, not written: evicting written lines would add to the decisions' time.
        self._eviction = torch.zeros(self._l2, dtype=torch.float32, device="cuda")  # four times the cache
        self._logits: tuple[tuple[Any, ...], Members] | None = None

    def describe(self) -> dict[str, Any]:
        """The device and the versions."""
        return {
            "device": torch.cuda.get_device_name(0),
            "l2_bytes": self._l2,
            "torch": torch.__version__,
            "triton": triton.__version__,
            "cuda": torch.version.cuda,
            "driver": _driver(),
        }

    def bandwidth(self) -> float:
        """Bytes per second read and written by a copy of a gigabyte."""
        a = torch.zeros(1 << 28, dtype=torch.float32, device="cuda")
        b = torch.empty_like(a)
        return 2 * a.nbytes / (self.replayed([lambda: b.copy_(a)] * 4, cold=False) * 1e-6)

    def check(self, cell: Cell) -> str | None:
        """What is wrong with the kernels' decision; None if nothing is."""
        logits = self.members(cell)
        ours = cases.decision(cell.case, cell.rows, self.DEVICE, self.IMPL)(logits)
        again = cases.decision(cell.case, cell.rows, self.DEVICE, "torch")(logits)
        return wrong(cell.case, logits, ours, again)

    def time(self, cell: Cell, what: str) -> dict[str, float]:
        """Microseconds of a decision, cold and warm."""
        function = self._function(cell, what)
        logits = self.members(cell)
        # Few copies of large rows evict each other from the cache; small rows need many.
        copies = max(2, min(self.STEPS, math.ceil(4 * self._l2 / cell.bytes)))
        apart = [[x.clone() for x in logits] for _ in range(copies)]
        return {
            "cold": self.replayed([lambda x=x: function(x) for x in apart], cold=True),
            "warm": self.replayed([lambda: function(logits)] * copies, cold=False),
        }

    def _function(self, cell: Cell, what: str) -> Callable[[Members], Any]:
        if what == OURS:
            return cases.decision(cell.case, cell.rows, self.DEVICE, self.IMPL)
        if what == EAGER_CANDIDATES:
            return cases.plain_candidates(cell.case)
        if what == "FlashInfer":
            return cases.flashinfer(cell.case)
        if what == "transformers":
            return cases.transformers_chain(cell.case)
        plain = cases.plain(cell.case)
        if what == EAGER:
            return plain
        # Reset each time: after eight recompilations dynamo would silently fall back to eager. CUDA graphs are captured
        # here, as for all others, so the mode is the one without its own.
        torch._dynamo.reset()
        mode = "max-autotune-no-cudagraphs" if what == AUTOTUNE else "default"
        how = {"mode": mode} if self.BACKEND == "inductor" else {}
        return torch.compile(plain, fullgraph=True, dynamic=False, backend=self.BACKEND, **how)

    def members(self, cell: Cell) -> Members:
        """The logits of a cell; those of the last one are kept."""
        key = (cell.rows, cell.width, cell.rows_like)
        if self._logits is None or self._logits[0] != key:
            self._logits = None
            torch.cuda.empty_cache()
            made = cases.members(cell.rows, cell.width, torch.bfloat16, self.DEVICE, cell.rows_like)
            self._logits = key, made
        return self._logits[1]

    def replayed(self, calls: list[Callable[[], Any]], cold: bool) -> float:
        """Microseconds per call: the median over replays of one graph of all calls."""
        replay, release = self._captured(calls)
        took = []
        spent = time.monotonic()
        for number in range(self.REPLAYS + 2):
            if cold:
                self._eviction.amax()
            milliseconds = self._timed(replay)
            if number >= 2:  # the first two upload the graph
                took.append(milliseconds)
            if len(took) >= 5 and time.monotonic() - spent > 1.0:  # enough for slow ones
                break
        release()
        return statistics.median(took) * 1000 / len(calls)

    def _captured(self, calls: list[Callable[[], Any]]) -> tuple[Callable[[], Any], Callable[[], Any]]:
        """A graph of all calls: what replays it, and what frees it."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                calls[0]()
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for call in calls:
                call()
        return graph.replay, graph.reset

    def _timed(self, replay: Callable[[], Any]) -> float:
        """Milliseconds of a replay."""
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        replay()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end)


def _driver() -> str:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return "unknown"


class CpuBench(CudaBench):
    """The same without a GPU, for tests and dry runs: in Triton's interpreter, without graphs, and nothing is timed.

    Whatever asks a CUDA device is here: the device's name, the bandwidth, the capture of a graph, and its time.
    """

    DEVICE = "cpu"
    STEPS = 2
    REPLAYS = 1
    BACKEND = "eager"

    def __init__(self, impl: ops.Impl = "triton") -> None:
        self.IMPL = impl
        self._l2, self._logits, self._eviction = 1 << 16, None, torch.zeros(1)

    def describe(self) -> dict[str, Any]:
        """No device."""
        return {"device": "none", "torch": torch.__version__, "triton": triton.__version__}

    def bandwidth(self) -> float:
        """A round number."""
        return 1e9

    def replayed(self, calls: list[Callable[[], Any]], cold: bool) -> float:
        """Run all calls; a round number."""
        super().replayed(calls, cold)
        return 2.0 if cold else 1.0

    def _captured(self, calls: list[Callable[[], Any]]) -> tuple[Callable[[], Any], Callable[[], Any]]:
        for call in calls:
            call()
        return lambda: None, lambda: None

    def _timed(self, replay: Callable[[], Any]) -> float:
        replay()
        return 1.0
