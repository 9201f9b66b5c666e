"""The draw of one token for one row with top-k, on the CPU: what `draw` finds, to the bit, in a third of the calls.

A decoding loop for one text spends its time in calls on arrays of a few numbers. One row needs no index of rows, no
candidates of several lengths, and nothing that only other outputs are made of.
"""

from __future__ import annotations

import math

import numpy as np
import torch

from proxytune.ops.noise import TOKENS, Noise
from proxytune.ops.sampling_params import SamplingParams
from proxytune.ops.torch_impl.arrays import Array
from proxytune.ops.torch_impl.rows import CLAMP, FINITE, GROUP, MemberRows, kept_scratch

__all__ = ["token_of_one_row"]

_WIDE = 4096
"""Columns from which on the largest are looked for in the groups with the largest maxima."""


@np.errstate(all="ignore")
def token_of_one_row(rows: MemberRows, sampling: SamplingParams, noise: Noise) -> Array | None:
    """The token `[1, 1]`, int64, of one row with top-k; None where another way has to be taken."""
    settings = sampling.arrays
    k = int(settings.top_k[0])
    if k == 0 or sampling.fork_threshold is not None:
        return None
    scratch, padded = kept_scratch(1, rows.width), -(-rows.width // GROUP) * GROUP
    held = scratch.get("z", 1, padded)
    held[:, rows.width :] = -math.inf
    _, finite = rows.read(
        slice(0, 1),
        slice(0, rows.width),
        torch.from_numpy(held[:, : rows.width]),
        lambda name: torch.from_numpy(scratch.get(name, 1, rows.width)),
    )
    if not (finite or held.max() < np.inf):  # the maximum is NaN if there is one
        return None
    t = settings.temperature[0]
    ids, z = _largest(held, k, t)
    rising = np.sort(z)
    top = rising[-1] if len(rising) else -np.inf
    if not top > FINITE:  # nothing but −inf
        return None
    inverse = np.float32(1.0) / t
    falling = rising[::-1]
    relative = (falling - top) * inverse
    kept = count = len(falling)
    if (log_min_p := settings.log_min_p[0]) > -np.inf:
        kept = int((relative >= log_min_p).sum())
    # Sequential sums, as in `truncate`.
    reached = np.maximum(relative, np.float32(CLAMP), out=relative)
    torch.from_numpy(reached).exp_().cumsum_(0)
    if (p := settings.top_p[0]) < 1:
        short = int(reached.searchsorted(p * reached[-1]))  # the first that reaches p has that many before it
        if short < count:
            tied = falling / t
            kept = min(kept, int((tied >= tied[short]).sum()))
    if kept < count:
        inside = z >= falling[kept - 1]
        ids, z = ids[inside], z[inside]
    log_kept = torch.from_numpy(reached[kept - 1 : kept]).log_().numpy()
    logprobs = (z - top) * inverse - log_kept
    best = (logprobs + noise.gumbel(ids[None], TOKENS)[0]).argmax()
    return ids[best : best + 1, None]


def _largest(held: Array, k: int, t: Array) -> tuple[Array, Array]:
    """The k largest logits of a row `[1, V]`, padded with −inf, and those that tie with the k-th after division by T.

    Returns:
        Their ids by rising id and the logits, `[n]`.
    """
    ids, z = None, held[0]
    groups = len(z) // GROUP
    if len(z) >= _WIDE and k < groups:
        tops = z.reshape(-1, GROUP).max(1)
        ids = _reaching(z, np.partition(tops, groups - k)[groups - k], t)
        z = z[ids]
    inside = _reaching(z, np.partition(z, len(z) - k)[len(z) - k] if k < len(z) else -np.inf, t)
    return inside if ids is None else ids[inside], z[inside]


def _reaching(z: Array, least: Array, t: Array) -> Array:
    """Where logits reach `least`, or tie with it after division by T, but are above −inf."""
    if least == -np.inf:
        return np.flatnonzero(z > -np.inf)
    return np.flatnonzero(z >= least if t == 1 else z / t >= least / t)
