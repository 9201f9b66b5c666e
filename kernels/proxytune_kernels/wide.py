"""Rows with too many candidates for the registers of one program: sorted by many programs, and decided by the last."""

from __future__ import annotations

import triton
import triton.language as tl

from proxytune_kernels.draw import draw_runs
from proxytune_kernels.runs import LEFT, runs_of, sort_run, truncate_runs

__all__ = ["resolve_wide"]


@triton.jit
def resolve_wide(
    members, strides, widths, weights, offsets, floors, top_k, top_p, log_min_p, seed, stream, position, branch,
    store, left, laws, bounds, kept, tokens, logprobs, draw_logprobs, keys,
    each, runs, draws,
    M: tl.constexpr, PER_ROW: tl.constexpr, RUNS_PADDED: tl.constexpr, KEYS: tl.constexpr, LAW: tl.constexpr,
):  # fmt: skip
    """Truncate the rows that the kernel before has `left`; the others are passed over. Grid (rows · runs).

    With KEYS behind `resolve`, draw as it does; else behind `laws_of`, complete the distributions, LAW numbers a row.
    `each` neighbouring rows have the settings of one text. `store` and `left`: workspaces, see the package.
    """
    run = tl.program_id(0) % runs
    row = (tl.program_id(0) // runs).to(tl.int64)
    left += row * LEFT
    temperature = tl.load(left)
    if temperature > 0.0:
        top = tl.load(left + 1)
        inverse = tl.div_rn(1.0, temperature)
        of_runs = runs_of(store, row, runs)
        noise = None
        if KEYS:
            noise = (
                tl.load(seed + row), tl.load(position + row).to(tl.uint32),
                tl.load(stream + row).to(tl.uint32), tl.load(branch + row).to(tl.uint32),
            )  # fmt: skip
        logits = (members, strides, widths, weights, offsets, floors)
        sort_run(logits, noise, of_runs, row, run, top, inverse, M, PER_ROW, KEYS)
        # All threads have written before one of them says so, and none reads before it has seen that all are done.
        tl.debug_barrier()
        done = tl.atomic_add(left + 4, 1.0, sem="acq_rel", scope="gpu")
        tl.debug_barrier()
        if done == runs - 1:
            text = row // each
            least, bound, n, mass = truncate_runs(
                of_runs, runs, top, temperature, tl.load(left + 2),
                tl.load(top_k + text), tl.load(top_p + text), tl.load(log_min_p + text), RUNS_PADDED,
            )  # fmt: skip
            if KEYS:
                draw_runs(
                    of_runs, noise, (tokens, logprobs, draw_logprobs, keys), row, runs, bound, mass, top,
                    inverse, tl.load(left + 3), draws, RUNS_PADDED,
                )  # fmt: skip
                tl.store(kept + row, n.to(tl.int64))
            else:
                tl.store(laws + row * LAW + 2, tl.log(mass))
                tl.store(bounds + row, least)
