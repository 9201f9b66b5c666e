"""How long a decision takes on an H200, modelled: a step in Triton's interpreter, with a clock that operations move.

    TRITON_INTERPRET=1 python -m _kernels.latency 32000 128256   # in benches/; prints JSON

A program issues its operations in the order of the source. Each occupies the multiprocessor for its instructions, and
its result is there some cycles after its operands. Barriers, branches, and what needs a barrier (a reduction across
warps, a change of layout) wait for their operands, and hold up all that follows. So loads that do not depend on each
other overlap, chains add up, and loops run as often as they do for these logits. Data is in the L2 cache, where the
kernel before has left it, or in the L1 cache if the program has read that line before.

Left out: the assembler's own order, bank conflicts, registers, and what programs do to each other.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import json
import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from proxytune_kernels.launch import RUN
from triton.runtime import interpreter

from _kernels import cases
from _kernels.cases import TRUNCATED, WEIGHTS

# Cycles on an H100: Luo et al. 2024 (arXiv 2402.13499), latencies of the memories.
L1, SHARED, L2 = 41, 29, 263
CLOCK = 1.755
"""GHz, of the card measured there; an H200 may go to 1.98."""
# Of the same order since Volta: Jia et al. 2018 (arXiv 1804.06826). An atomic waits until the stores before it are in
# the L2 cache, and goes there.
ARITHMETIC, SHUFFLE, BARRIER, BRANCH, ATOMIC = 5, 24, 26, 16, 2 * L2
# Of a multiprocessor, per cycle: 32-bit operations, lanes that load or shuffle, bytes from the L2 cache.
LANES, MOVED, BYTES = 128, 32, 64
REDUX = SHUFFLE + ARITHMETIC
"""Cycles to combine the int32 numbers of a warp: one instruction since sm_80."""
BUDGET = Path(__file__).parents[1] / "results" / "kernels_budget.json"
MULTIPROCESSORS = 132
COPY = 4.3e12
"""Bytes per second that a copy reads and writes on an H200 (4.8e12 by its data sheet)."""
LAUNCH = 1.3
"""µs of an empty kernel behind another in a CUDA graph, H100: hazyresearch.stanford.edu/blog/2025-05-27-no-bubbles."""
# Instructions (the special function unit's count eightfold, for its 16 lanes), and cycles until the result.
COSTS = {
    "precise_divf": (16, 80), "fdiv": (16, 80), "exp": (9, 40), "exp2": (8, 30), "log": (16, 80), "sqrt": (9, 50),
    "umulhi": (2, 10), "clampf": (2, 10), "addptr": (0.5, ARITHMETIC),
}  # fmt: skip
FREE = frozenset(
    {"splat", "broadcast", "bitcast", "make_range", "unsplat", "reshape", "get_program_id", "split", "join", "fabs"}
)
CONVERSION = SHARED + BARRIER + SHARED
"""Cycles to change which thread has which number of a block."""
WIDE = 8
"""Neighbouring columns that one thread loads at once."""


class _Clock:
    """One program's time in cycles, and what it went to."""

    def __init__(self, warps: int) -> None:
        self.warps = warps
        self.now = 0.0
        self.spent: collections.Counter[str] = collections.Counter()
        self.lines: set[int] = set()
        self.stored: list[Any] = []

    def pass_to(self, when: float, kind: str) -> None:
        if when > self.now:
            self.spent[kind] += when - self.now
            self.now = when

    def wait(self, operands: list[Any]) -> None:
        self.pass_to(*self.ready(operands))

    def ready(self, operands: list[Any]) -> tuple[float, str]:
        return max((getattr(x, "when", (0.0, "")) for x in operands), default=(0.0, ""))

    def arithmetic(self, instructions: float, elements: int) -> None:
        # All warps compute the same of a small block; four of them do at once.
        self.pass_to(self.now + instructions * max(elements / LANES, self.warps / min(4, self.warps)), "arithmetic")

    def later(self, result: Any, operands: list[Any], latency: float, kind: str) -> Any:
        """Note when a result will be there that nothing but its operands waits for."""
        when, of = self.ready(operands)
        for handle in result if isinstance(result, tuple | list) else (result,):
            handle.when = max(when, self.now) + latency, of if when > self.now else kind
        return result

    def done(self, result: Any, latency: float, kind: str) -> Any:
        """Note when a result, or several, will be there, and what one then has waited for."""
        for handle in result if isinstance(result, tuple | list) else (result,):
            handle.when = self.now + latency, kind
        return result


def _constant(handle: Any) -> bool:
    """Whether it follows from the program's number and its arguments alone."""
    return getattr(handle, "when", (0.0, ""))[1] == ""


def _in_steps(handle: Any) -> bool:
    """Whether integers go in equal steps for WIDE neighbours, so that one thread computes the first of them."""
    x = handle.data
    if x.dtype.kind not in "iub" or x.size == 1:
        return x.size == 1
    if x.shape[-1] % WIDE:
        return x.shape[-1] == 1
    steps = np.diff(x.reshape(-1, WIDE).astype(np.int64), axis=1)
    return bool((steps == steps[:, :1]).all())


class _Model:
    """The clocks of all programs that have run: by kernel, cycles and what they went to."""

    def __init__(self) -> None:
        self.found: dict[str, list[_Clock]] = {}
        self.clock = _Clock(1)
        self.inside = False

    def operation(self, name: str, original: Any, builder: Any, *arguments: Any) -> Any:
        if self.inside:
            return original(builder, *arguments)
        self.inside = True
        try:
            result = original(builder, *arguments)
        finally:
            self.inside = False
        operands = [x for x in arguments if isinstance(x, interpreter.TensorHandle)]
        clock = self.clock
        if name == "barrier":
            clock.wait(clock.stored)
            clock.stored.clear()
            clock.pass_to(clock.now + BARRIER, "barriers")
        elif name in ("load", "masked_load"):
            self._move(operands, name)
            lines = {int(x) >> 7 for x in self._there(operands, name)}
            latency = L1 if lines <= clock.lines else L2
            clock.lines |= lines
            clock.later(result, operands[:2], latency, "loads")
        elif name in ("store", "masked_store"):
            clock.stored += operands
            self._move(operands, name)
            clock.lines -= {int(x) >> 7 for x in self._there(operands, name)}
        elif name in ("atomic_rmw", "atomic_cas"):
            clock.wait(operands + clock.stored)
            clock.lines.clear()
            clock.done(result, ATOMIC, "atomics")
        elif name == "gather":
            clock.wait(operands)
            clock.pass_to(clock.now + 2 * operands[0].data.size / MOVED + CONVERSION - SHARED, "shuffles")
            clock.done(result, SHARED, "shuffles")
        elif all(map(_constant, operands)):
            pass  # found out before the kernel waits for anything, or by the compiler
        elif name == "expand_dims":
            clock.wait(operands)
            if operands[0].data.size > 4:
                clock.pass_to(clock.now + CONVERSION - SHARED, "shuffles")
            clock.done(result, SHARED if operands[0].data.size > 4 else 0.0, "shuffles")
        elif name in FREE:
            clock.later(result, operands, 0.0, "arithmetic")
        else:
            handle = result if hasattr(result, "data") else result[0]
            instructions, latency = COSTS.get(name, (1, ARITHMETIC))
            if handle.data.dtype.itemsize == 8 or any(x.data.dtype.itemsize == 8 for x in operands):
                instructions *= 2
            if handle.data.ndim and all(map(_in_steps, operands)):
                instructions /= min(WIDE, handle.data.size)
            clock.arithmetic(instructions, handle.data.size)
            clock.later(result, operands, latency, "arithmetic")
        return result

    def _there(self, operands: list[Any], name: str) -> Any:
        pointers = operands[0].data
        return np.unique(
            pointers[operands[-1 if name == "masked_store" else 1].data.astype(bool)] if "masked" in name else pointers
        )

    def _move(self, operands: list[Any], name: str) -> None:
        """The time that the loads of all lanes take to be issued, or their bytes to arrive."""
        pointers = operands[0]
        together = WIDE if _in_steps(pointers) and (pointers.data.ndim == 2 or pointers.data.size == 1) else 1
        if getattr(pointers, "when", (0, ""))[1] == "" and _in_steps(pointers):
            together = WIDE
        there = self._there(operands, name)
        sectors = sum(x >> 2 not in self.clock.lines for x in np.unique(there >> 5).tolist())
        # Lanes without an address take a place among the instructions only.
        instructions = pointers.data.size / together / LANES
        self.clock.pass_to(
            self.clock.now + max(instructions, there.size / together / MOVED, 32 * sectors / BYTES), "bytes to move"
        )

    def combination(self, original: Any, scan: bool, op: Any, given: Any) -> Any:
        operands = [x.handle for x in given]
        clock = self.clock
        self.inside = True
        try:
            result = original(op, given)
        finally:
            self.inside = False
        x = operands[0].data
        words = sum(1 if h.data.dtype.itemsize <= 4 else 2 for h in operands)
        length = x.shape[op.axis or 0] if op.axis is not None else x.size
        others = x.size // length
        clock.arithmetic(words * (2 if scan else 1), x.size)
        along = others > 1 and op.axis == x.ndim - 1  # then a thread has WIDE neighbours
        lanes = max(1, min(32, length // WIDE)) if along else min(32, max(2, length))
        steps = math.log2(lanes)
        crossing = clock.warps > 1 and (length > 32 if others == 1 else not along)
        if others == 1:
            one = REDUX if not scan and x.dtype == np.int32 else steps * (SHUFFLE + ARITHMETIC)
            latency = one + (words - 1) * steps * 2
            between = min(clock.warps, length // 32)
        elif along:
            clock.pass_to(clock.now + words * steps * others * lanes / 32, "shuffles")
            latency = steps * (SHUFFLE + ARITHMETIC)
            between = 1
        else:
            clock.pass_to(clock.now + words * clock.warps * others / MOVED, "shuffles")
            latency, between = 0.0, clock.warps
        if crossing:
            clock.wait(operands)
            if scan:  # all threads read what the warps before have, and one lane more than theirs
                latency += CONVERSION + between * ARITHMETIC + SHUFFLE
            else:
                latency += 2 * CONVERSION + math.log2(between) * (SHUFFLE + ARITHMETIC)
            # Behind a barrier nothing is issued before it.
            clock.pass_to(clock.now + latency - SHARED, "reductions")
            latency = SHARED
        of = [y.handle for y in (result if isinstance(result, tuple | list) else [result])]
        clock.later(of, operands, latency, "reductions")
        return result

    def branch(self, tensor: Any) -> None:
        if not self.inside and not _constant(tensor.handle):
            self.clock.wait([tensor.handle])
            self.clock.pass_to(self.clock.now + BRANCH, "branches")


@contextmanager
def modelled() -> Iterator[dict[str, list[_Clock]]]:
    """Clocks of all programs that run while this is open, by kernel."""
    model = _Model()
    builder = interpreter.InterpreterBuilder
    saved: list[tuple[Any, str, Any]] = []

    def put(owner: Any, name: str, value: Any) -> None:
        saved.append((owner, name, getattr(owner, name)))
        setattr(owner, name, value)

    for name in dir(builder):
        if name.startswith("create_"):
            put(builder, name, _method(model, name.removeprefix("create_"), getattr(builder, name)))
    for of, scan in ((interpreter.ReduceOps, False), (interpreter.ScanOps, True)):
        put(of, "apply_impl", _combined(model, of.apply_impl, scan))
    call, to_index = interpreter.GridExecutor.__call__, builder.set_grid_idx
    patch = interpreter._patch_lang_tensor

    def launched(self: Any, *arguments: Any, **named: Any) -> Any:
        clocks = model.found.setdefault(self.fn.__name__, [])

        def started(builder: Any, *at: int) -> None:
            model.clock = _Clock(named["num_warps"])
            clocks.append(model.clock)
            to_index(builder, *at)

        builder.set_grid_idx = started
        return call(self, *arguments, **named)

    def patched(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        for name in ("__bool__", "__index__"):
            setattr(tensor, name, _noticed(model, getattr(tensor, name)))

    # Compiled code does not look for overflows.
    of = interpreter.interpreter_builder
    put(of, "options", dataclasses.replace(of.options, sanitize_overflow=False))
    put(builder, "set_grid_idx", to_index)
    put(interpreter.GridExecutor, "__call__", launched)
    put(interpreter, "_patch_lang_tensor", patched)
    try:
        yield model.found
    finally:
        for owner, name, value in reversed(saved):
            setattr(owner, name, value)


def _method(model: _Model, name: str, original: Any) -> Any:
    return lambda builder, *arguments: model.operation(name, original, builder, *arguments)


def _combined(model: _Model, original: Any, scan: bool) -> Any:
    return lambda op, given: model.combination(original, scan, op, given)


def _noticed(model: _Model, original: Any) -> Any:
    def noticed(tensor: Any) -> Any:
        model.branch(tensor)
        return original(tensor)

    return noticed


@functools.cache
def decision(width: int) -> dict[str, dict[str, float]]:
    """The kernels of a decision "k50 + p.9" on one row like a language model's, three members in bfloat16.

    Returns:
        By kernel, of its slowest program: "µs", and the cycles that it spent on or waited for loads, reductions, …
    """
    logits = cases.members(1, width, torch.bfloat16, "cpu")
    decide = cases.decision(TRUNCATED, 1, "cpu", "triton")
    with np.errstate(all="ignore"), modelled() as found:
        decide(logits)
    out: dict[str, dict[str, float]] = {}
    for kernel, clocks in found.items():
        for clock in clocks:
            clock.wait(clock.stored)
        slowest = max(clocks, key=lambda clock: clock.now)
        cycles = {kind: float(round(n)) for kind, n in slowest.spent.most_common()}
        out[kernel] = {"µs": round(slowest.now / CLOCK / 1000, 2), **cycles}
    return out


def shares(found: dict[str, dict[str, float]], width: int, per_column: float) -> dict[str, float]:
    """The share of a copy's bandwidth that a whole decision reaches, all launches in one graph.

    Args:
        found: What `decision` gives.
        width: Columns of a row.
        per_column: K1's instructions per column.

    Returns:
        By number of rows: the time to read the members' rows once, over that of the decision.
    """
    out = {}
    for rows in (1, 8, 64):
        floor = rows * width * len(WEIGHTS) * 2 / COPY * 1e6
        issued = rows * width * per_column / (LANES * MULTIPROCESSORS * CLOCK * 1000)
        runs = rows * math.ceil(width / RUN)
        # K2 has a multiprocessor for each row; of the third kernel, two programs' registers fit on one.
        rounds = math.ceil(runs / (2 * MULTIPROCESSORS))
        spent = max(floor, issued) + found["steer_tiles"]["µs"]
        spent += found["resolve"]["µs"] + rounds * found["resolve_wide"]["µs"] + 3 * LAUNCH
        out[str(rows)] = round(floor / spent, 3)
    return out


def main() -> None:
    found = {width: decision(int(width)) for width in sys.argv[1:]}
    budget = json.loads(BUDGET.read_text(encoding="utf-8"))
    per_column = max(of["sm_90"]["steer_tiles: truncated"]["per_column"] for of in budget.values())
    share = {width: shares(of, int(width), per_column) for width, of in found.items()}
    print(json.dumps({"decision": found, "share of bandwidth": share}, ensure_ascii=False))


if __name__ == "__main__":
    main()
