"""What `bench_kernels.py` does on a GPU, in order of importance; `cuda.py` runs and times it.

First every decision is checked, then the kernels and the eager compositions are timed everywhere, then other libraries,
then torch.compile of the compositions, which takes longest. What the deadline leaves out is recorded as not run.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from _kernels.cases import CASES, STATISTICS, TRUNCATED, WEIGHTS, Case

WIDTHS = (32_000, 128_256, 151_936, 256_000)
ROWS = (1, 8, 64, 256)
MAIN = (64, 128_256)
"""Rows and columns of the target figures."""
COMPILED = ((1, 128_256), MAIN)
"""Shapes at which torch.compile is timed first; max-autotune runs only here."""
BYTES = 2  # bfloat16

OURS = "proxytune"
EAGER, EAGER_CANDIDATES = "eager", "eager, top-k first"
COMPILE, AUTOTUNE = "torch.compile", "torch.compile, max-autotune"
PEERS = ("FlashInfer", "transformers")


@dataclass(frozen=True)
class Cell:
    """One decision at one shape, `[B, V]` = `[rows, width]`; `rows_like` is one of `cases.ROWS_LIKE`."""

    case: Case
    rows: int
    width: int
    rows_like: str = "peaked"

    @property
    def bytes(self) -> int:
        """Bytes of the members' rows."""
        return len(WEIGHTS) * self.rows * self.width * BYTES


class Bench(Protocol):
    """Runs and times the work; tests use a fake."""

    def describe(self) -> dict[str, Any]:
        """The device and the versions."""
        ...

    def bandwidth(self) -> float:
        """Bytes per second that a large copy reads and writes."""
        ...

    def check(self, cell: Cell) -> str | None:
        """What is wrong with the kernels' decision; None if nothing is."""
        ...

    def time(self, cell: Cell, what: str) -> dict[str, float]:
        """Microseconds, "cold" and "warm"; ImportError if a library is missing."""
        ...


def cells(widths: tuple[int, ...] = WIDTHS, rows: tuple[int, ...] = ROWS) -> list[Cell]:
    """All shapes with peaked rows, and flat rows at one of them."""
    flat = (MAIN[0] if MAIN[0] in rows else rows[-1], MAIN[1] if MAIN[1] in widths else widths[-1])
    return [Cell(case, b, v) for v in widths for b in rows for case in CASES] + [
        Cell(case, *flat, "flat") for case in CASES
    ]


def plan(all_cells: list[Cell]) -> Iterator[tuple[Cell, str]]:
    """What to time, most important first."""
    first = [c for c in all_cells if (c.rows, c.width) in COMPILED and c.rows_like == "peaked"]
    rest = [c for c in all_cells if c not in first]
    for cell in (*first, *rest):
        yield cell, OURS
        yield cell, EAGER
    for cell in (*first, *rest):
        if cell.case is TRUNCATED:
            yield cell, EAGER_CANDIDATES
        if cell.case is not STATISTICS:
            yield cell, PEERS[0]
    for cell in first:
        yield cell, COMPILE
    for cell in first:
        yield cell, AUTOTUNE
    for cell in rest:
        yield cell, COMPILE
    # Last: if torch.multinomial cannot be captured, the failed capture leaves the generator unusable.
    for cell in (*first, *rest):
        if cell.case is not STATISTICS:
            yield cell, PEERS[1]


def floor_us(cell: Cell, bandwidth: float) -> float:
    """Microseconds to read the members' rows once, at the bandwidth of a copy."""
    return cell.bytes / bandwidth * 1e6


def check(bench: Bench, all_cells: list[Cell]) -> None:
    """Compare the kernels' decisions with float64.

    Raises:
        SystemExit: If one is wrong.
    """
    for cell in all_cells:
        wrong = bench.check(cell)
        if wrong:
            raise SystemExit(f"{cell.case.name}, B={cell.rows}, V={cell.width}, {cell.rows_like}: {wrong}")


def measure(
    bench: Bench,
    deadline: float,
    all_cells: list[Cell],
    clock: Callable[[], float] = time.monotonic,
    keep: Callable[[dict[str, Any]], object] = lambda _: None,
) -> dict[str, Any]:
    """Check all cells, then time them, until the deadline (seconds from now).

    `keep` is called with the results so far after each.

    Returns:
        JSON values.

    Raises:
        SystemExit: If a decision is wrong, since its time would mean nothing.
    """
    start = clock()
    check(bench, all_cells)
    checked = clock() - start
    bandwidth = bench.bandwidth()
    records = {
        cell: {
            "case": cell.case.name,
            "rows": cell.rows,
            "width": cell.width,
            "rows_like": cell.rows_like,
            "floor_us": round(floor_us(cell, bandwidth), 3),
            "times": {},
        }
        for cell in all_cells
    }

    def found() -> dict[str, Any]:
        return {
            "status": "run",
            **bench.describe(),
            "copy_gb_per_s": round(bandwidth / 1e9, 1),
            "deadline_s": deadline,
            "checked_s": round(checked, 1),
            "seconds": round(clock() - start, 1),
            "cells": [record | _derived(record) for record in records.values() if record["times"]],
        }

    longest: dict[str, float] = {}  # per kind of work; the next of the kind must still fit
    for cell, what in plan(all_cells):
        before = clock()
        times = records[cell]["times"]
        if before - start + 1.2 * longest.get(what, 0.0) > deadline:
            times[what] = "not run: deadline"
            continue
        try:
            times[what] = {k: round(v, 3) for k, v in bench.time(cell, what).items()}
        except ImportError:
            times[what] = "not run: not installed"
        except Exception as error:  # a failing peer is recorded, and the others continue
            if what == OURS:
                raise
            first, _, _ = str(error).strip().partition("\n")
            times[what] = f"not run: {type(error).__name__}: {first}"
        longest[what] = max(longest.get(what, 0.0), clock() - before)
        keep(found())
    return found()


def _derived(record: dict[str, Any]) -> dict[str, Any]:
    """Share of the floor, and the others' times relative to ours, cold and warm."""
    ours = record["times"].get(OURS)
    if not isinstance(ours, dict):
        return {}
    times = {
        what: {temper: round(t[temper] / ours[temper], 3) for temper in ours}
        for what, t in record["times"].items()
        if what != OURS and isinstance(t, dict)
    }
    return {"share_of_floor": {"cold": round(record["floor_us"] / ours["cold"], 4)}, "times_ours": times}
