"""Launches the kernels: sizes, workspaces, and which parts of them are needed."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
import triton

from proxytune_kernels.candidates import LISTED
from proxytune_kernels.decide import resolve
from proxytune_kernels.distribution import LAW, laws_of
from proxytune_kernels.measure import FIELDS, steer_tiles
from proxytune_kernels.mix import mix_rows
from proxytune_kernels.prepared import Recorder, again
from proxytune_kernels.runs import LEFT, RUN, WORDS
from proxytune_kernels.verify import residue, settle
from proxytune_kernels.wide import resolve_wide

__all__ = [
    "GROUP", "PER_READ", "PER_READ_MIX", "TILE",
    "again", "mix", "nucleus", "registers", "shape_of_mix", "step", "verify",
]  # fmt: skip

TILE = 1024
"""Columns per tile of K1. It keys the noise, so it is part of the contract and must not be tuned."""
GROUP = 128
"""Columns per group maximum."""
PER_READ = 8
"""Groups that K2 reads at once; up to PER_READ · GROUP candidates stay in registers."""
AT_ONCE = 64
"""Groups that K2 reads at once where it needs no masks."""
PER_READ_MIX = 4
"""Rows of the table that the mixing kernel loads at once."""
FIRST = 31 << 27
"""The counter's first word for coordinate 0 of a mixture's noise; see `proxytune.ops.noise.slotted`."""

_ALONE = SimpleNamespace(weights=(1.0,), offsets=None, floors=None, floored_by=0)
_STATISTICS = ("lse", "entropy", "varentropy", "kl", "confidence", "temperature")
_OF_ROWS = frozenset({"lse", "entropy", "varentropy", "kl", "confidence", "logprobs"})


def step(
    members: Sequence[torch.Tensor],
    combination: Any,
    sampling: Any,
    noise: Any,
    draws: int,
    want: Collection[str],
    repeated: bool = False,
) -> dict[str, torch.Tensor]:
    """Combine, measure and draw: at most three launches, no wait for the device.

    The arguments are those of `proxytune.ops.step`, already checked: `combination` is a `proxytune.ops.Combination` of
    contiguous tensors, and settings and keys are contiguous. Returns the outputs by name, see
    `proxytune.ops.StepOutput`. With `repeated`, `again` may repeat the call with other logits and positions.
    """
    base = members[0]
    rows, width = base.shape
    device = base.device
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        # Triton launches on the current device and its stream, whatever device the tensors are on.
        with torch.cuda.device(device):
            return step(members, combination, sampling, noise, draws, want, repeated)
    tiles = triton.cdiv(width, TILE)
    n_groups = tiles * (TILE // GROUP)
    groups_padded = triton.next_power_of_2(n_groups)
    sample = sampling is not None
    forks = sample and sampling.fork_threshold is not None
    moments = forks or not {"entropy", "varentropy"}.isdisjoint(want)
    truncated = sample and sampling.some_truncated
    in_groups = truncated or "confidence" in want
    raw = moments or not _OF_ROWS.isdisjoint(want)

    recorder = Recorder(device)
    if repeated and combination.offsets is None and combination.floors is None:
        recorder.start(members, combination.weights, sampling, noise, draws, want)
    new = recorder.new
    part = new(rows, len(FIELDS), tiles)
    groups = new(rows, n_groups) if in_groups else part
    scores = new(rows, width) if "scores" in want else part
    shared = {
        "M": len(members),
        "PER_ROW": isinstance(combination.weights, torch.Tensor),
        "TILE": TILE,
        "GROUP": GROUP,
        "FIELDS": len(FIELDS),
    }
    flags = {"RAW": raw, "MOMENTS": moments, "KL": "kl" in want, "LIVE": "kept" in want}
    read = _read(members, combination)
    # Unused ones are never read; a pointer has to be given all the same.
    one = part
    temperature = sampling.temperature if sample else one
    fork_temperature = sampling.fork_temperature if forks else one
    recorder.launch(
        steer_tiles, tiles * rows,
        *read, temperature, fork_temperature, part, groups, scores,
        width, min(x.shape[1] for x in members), tiles, width,
        **shared, **flags, MASS=sample, FORK=forks, GROUPS=in_groups, SCORES="scores" in want,
        num_warps=_warps(members, 1),
    )  # fmt: skip
    out: dict[str, torch.Tensor] = {"scores": scores}
    if set(want) <= {"scores"}:
        return {name: out[name] for name in want}

    block = PER_READ * GROUP if in_groups else 1
    left = new(rows, LEFT.value)
    of_noise = (noise.seed, noise.row, noise.position, noise.branch) if sample else (one,) * 4
    statistics = new(len(_STATISTICS), rows)
    argmax, kept = new(2, rows, dtype=torch.int64)
    tokens = new(rows, draws, dtype=torch.int64)
    logprobs, draw_logprobs, keys = new(3, rows, draws)
    fork = new(rows, dtype=torch.bool)
    recorder.launch(
        resolve, rows,
        *read, temperature, fork_temperature, sampling.fork_threshold if forks else one,
        sampling.top_k if truncated else one, sampling.top_p if truncated else one,
        sampling.log_min_p if truncated else one, *of_noise,
        part, groups,
        new(rows, groups_padded + LISTED.value if in_groups else 1, dtype=torch.int32),
        new(rows, block, dtype=torch.int32), left,
        statistics, argmax, kept, fork, tokens, logprobs, draw_logprobs, keys,
        rows, tiles, n_groups, draws,
        **shared, **flags, PER_READ=PER_READ, AT_ONCE=min(AT_ONCE, groups_padded),
        TILES_PADDED=triton.next_power_of_2(tiles), GROUPS_PADDED=groups_padded, ONE=draws == 1,
        ARGMAX="argmax" in want or not sample, SAMPLE=sample, FORK=forks, TRUNCATED=truncated,
        CONFIDENCE="confidence" in want,
        **_of_row(members, in_groups),
    )  # fmt: skip
    if truncated:
        of_draw = (one, one, kept, tokens, logprobs, draw_logprobs, keys)
        _resolve_wide(recorder, members, read, sampling, of_noise, left, of_draw, 1, draws)
    out |= {name: statistics[i] for i, name in enumerate(_STATISTICS)}
    out |= {"argmax": argmax, "kept": kept, "fork": fork, "tokens": tokens, "logprobs": logprobs}
    out |= {"draw_logprobs": draw_logprobs, "keys": keys}
    out = {name: out[name] for name in want}
    recorder.keep(out)
    return out


def verify(
    members: Sequence[torch.Tensor],
    combination: Any,
    drafted: torch.Tensor,
    draft: torch.Tensor | None,
    sampling: Any,
    noise: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Accept or reject drafts and draw the token after them: at most eight launches, no wait for the device.

    The arguments are those of `proxytune.ops.verify`, already checked and contiguous. Returns tokens `[B, K + 1]` and
    accepted `[B]`, int64, see `proxytune.ops.VerifyOutput`.
    """
    device = drafted.device
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            return verify(members, combination, drafted, draft, sampling, noise)
    texts, most = drafted.shape
    target = _laws(members, combination, sampling, most + 1)
    given = draft is None
    # Unused ones are never read; a pointer has to be given all the same.
    proposal = target if draft is None else _laws([draft], _ALONE, sampling, most)
    rows = list(members) if draft is None else [draft]
    read = (
        *_read(members, combination), *_read(rows[:1], _ALONE)[:3],
        sampling.top_k, sampling.top_p, sampling.log_min_p, noise.seed, noise.row, noise.position, noise.branch,
    )  # fmt: skip
    of_rows = (target.laws, target.bounds, proposal.laws, proposal.bounds, drafted)
    width, other = members[0].shape[1], rows[0].shape[1]
    tiles = triton.cdiv(width, TILE)
    shared = {
        "M": len(members), "PER_ROW": isinstance(combination.weights, torch.Tensor), "TILE": TILE,
        "K_PADDED": triton.next_power_of_2(most + 1), "GIVEN": given, "TRUNCATED": sampling.some_truncated,
    }  # fmt: skip
    masses = torch.empty(texts, tiles, device=device)
    if most and not sampling.all_truncated:
        residue[(texts * tiles,)](
            *read, *of_rows, masses,
            most, width, other, min(x.shape[1] for x in (*members, *rows)), tiles,
            **shared, num_warps=_warps(members, 1), enable_fp_fusion=False,
        )  # fmt: skip
    tokens = torch.empty(texts, most + 1, dtype=torch.int64, device=device)
    accepted = torch.empty(texts, dtype=torch.int64, device=device)
    settle[(texts,)](
        *read, target.part, *of_rows, masses, tokens, accepted, torch.empty(texts * (most + 1), device=device),
        most, width, other, tiles,
        **shared, FIELDS=len(FIELDS), TILES_PADDED=triton.next_power_of_2(tiles),
        FORK=sampling.fork_threshold is not None, num_warps=_warps(members, 4), enable_fp_fusion=False,
    )  # fmt: skip
    return tokens, accepted


def nucleus(x: torch.Tensor, sampling: Any) -> torch.Tensor:
    """The smallest logit that top-p keeps, float32 `[B]`, for settings with top-p alone at temperature 1.

    NaN in rows with NaN or +inf; −inf in rows of −inf only. Three launches, and no wait for the device.
    """
    if x.device.type == "cuda" and x.device.index != torch.cuda.current_device():
        with torch.cuda.device(x.device):
            return nucleus(x, sampling)
    found = _laws([x], _ALONE, sampling, 1)
    key = found.bounds
    floor = (key ^ ((key >> 31) & 0x7FFFFFFF)).view(torch.float32)  # as `rows.value_of`
    top = found.part[:, 0].amax(1)
    return floor.masked_fill(top == -3.0e38, -torch.inf).masked_fill(top == torch.inf, torch.nan)


class _Laws(NamedTuple):
    part: torch.Tensor
    laws: torch.Tensor
    bounds: torch.Tensor


def _laws(members: Sequence[torch.Tensor], combination: Any, sampling: Any, each: int) -> _Laws:
    """Tile sums and distributions of rows; `each` neighbouring rows have one text's settings."""
    rows, width = members[0].shape
    device = members[0].device
    tiles = triton.cdiv(width, TILE)
    n_groups = tiles * (TILE // GROUP)
    groups_padded = triton.next_power_of_2(n_groups)
    truncated, forks = sampling.some_truncated, sampling.fork_threshold is not None

    def new(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    def spread(x: torch.Tensor) -> torch.Tensor:
        return x[:, None].expand(-1, each).contiguous()

    part = new(rows, len(FIELDS), tiles)
    groups = new(rows, n_groups) if truncated else part
    shared = {
        "M": len(members), "PER_ROW": isinstance(combination.weights, torch.Tensor), "GROUP": GROUP,
        "FIELDS": len(FIELDS), "FORK": forks,
    }  # fmt: skip
    read = _read(members, combination)
    steer_tiles[(tiles * rows,)](
        *read, spread(sampling.temperature), spread(sampling.fork_temperature) if forks else part, part, groups, part,
        width, min(x.shape[1] for x in members), tiles, width,
        **shared, TILE=TILE, RAW=forks, MOMENTS=forks, KL=False, LIVE=False, MASS=True, GROUPS=truncated, SCORES=False,
        num_warps=_warps(members, 1), enable_fp_fusion=False,
    )  # fmt: skip
    laws, bounds = new(rows, len(LAW)), new(rows, dtype=torch.int32)
    block = PER_READ * GROUP if truncated else 1
    left = new(rows, LEFT.value)
    laws_of[(rows,)](
        *read, sampling.temperature, sampling.fork_temperature if forks else part,
        sampling.fork_threshold if forks else part, sampling.top_k, sampling.top_p, sampling.log_min_p,
        part, groups, new(rows, groups_padded + LISTED.value if truncated else 1, dtype=torch.int32),
        new(rows, block, dtype=torch.int32), left, laws, bounds, each, tiles, n_groups,
        **shared, PER_READ=PER_READ, AT_ONCE=min(AT_ONCE, groups_padded), TRUNCATED=truncated,
        TILES_PADDED=triton.next_power_of_2(tiles), GROUPS_PADDED=groups_padded,
        **_of_row(members, truncated), enable_fp_fusion=False,
    )  # fmt: skip
    if truncated:
        _resolve_wide(Recorder(device), members, read, sampling, None, left, (laws, bounds, *(part,) * 5), each, 1)
    return _Laws(part, laws, bounds)


def _resolve_wide(
    recorder: Recorder, members: Sequence[torch.Tensor], read: Any, sampling: Any, noise: Any, left: torch.Tensor,
    out: Any, each: int, draws: int,
) -> None:  # fmt: skip
    """Truncate what `resolve`, or `laws_of` without noise, has left; narrow rows always fit, and need no launch."""
    rows, width = members[0].shape
    if width <= PER_READ * GROUP:
        return
    runs = triton.cdiv(width, RUN)
    padded = triton.next_power_of_2(runs)
    recorder.launch(
        resolve_wide, runs * rows,
        *read, sampling.top_k, sampling.top_p, sampling.log_min_p, *((left,) * 4 if noise is None else noise),
        recorder.new(rows * runs * WORDS, dtype=torch.int64), left, *out, each, runs, draws,
        M=len(members), PER_ROW=isinstance(read[3], torch.Tensor), RUNS_PADDED=padded,
        KEYS=noise is not None, LAW=len(LAW), num_warps=8, **_bound(registers(padded), members[0]),
    )  # fmt: skip


def _of_row(members: Sequence[torch.Tensor], truncated: bool) -> dict[str, int]:
    """Warps and registers of a kernel with one program per row."""
    if not truncated:
        return {"num_warps": _warps(members, 4)}
    return {"num_warps": 8, **_bound(registers(), members[0])}


def registers(runs: int = 1) -> int:
    """Registers that a thread may take on NVIDIA's GPUs, where a row of `runs` (padded) is truncated.

    Without a bound, their assembler spills a few registers so that more programs fit.
    """
    return 128 if runs <= 64 else 255


def _bound(most: int, x: torch.Tensor) -> dict[str, int]:
    return {"maxnreg": most} if x.is_cuda and torch.version.hip is None else {}


def _warps(members: Sequence[torch.Tensor], up_to_five: int) -> int:
    """Warps of a program, given those that five members need: with more, its threads would run out of registers."""
    return up_to_five if len(members) <= 5 else 2 * up_to_five


def _read(members: Sequence[torch.Tensor], combination: Any) -> tuple[Any, ...]:
    """The kernels' first six arguments."""
    c = combination
    read = list(members) if c.floors is None else [*members, members[c.floored_by]]
    strides, widths = tuple(x.stride(0) for x in read), tuple(x.shape[1] for x in read)
    return tuple(read), strides, widths, c.weights, c.offsets, c.floors


def mix(
    table: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
    tokens: torch.Tensor,
    soft: torch.Tensor | None,
    sigma: float,
    noise: Any,
) -> torch.Tensor:
    """Mix rows of a table: one launch, no wait for the device.

    The arguments are those of `proxytune.ops.mix.mix`, already checked, all but the table contiguous; `sigma` is not
    read without `noise`. Returns `[B, D]`, in the table's dtype.
    """
    device = table.device
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            return mix(table, ids, weights, tokens, soft, sigma, noise)
    rows, candidates = ids.shape
    width = table.shape[1]
    out = torch.empty((rows, width), dtype=table.dtype, device=device)
    keys = (ids,) * 4 if noise is None else (noise.seed, noise.row, noise.position, noise.branch)
    block, warps = shape_of_mix(width)
    mix_rows[(rows,)](
        table, ids, weights, tokens, tokens if soft is None else soft, *keys, out,
        sigma, width, candidates, table.stride(0),
        BLOCK=block, PER_READ=PER_READ_MIX, SOFT=soft is not None, NOISE=noise is not None, FIRST=FIRST,
        num_warps=warps, enable_fp_fusion=False,
    )  # fmt: skip
    return out


def shape_of_mix(width: int) -> tuple[int, int]:
    """Coordinates (D rounded up to a power of two) and warps of a mixing program; independent of the batch.

    A thread holds 16 coordinates for 512 to 8,192 of them.
    """
    block = triton.next_power_of_2(width)
    return block, min(16, max(1, block // 512))
