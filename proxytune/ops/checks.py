"""Argument checks of `step`, `verify` and `mix`: shapes, dtypes and strides, never values on the device."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch

from proxytune.errors import InputError
from proxytune.formulas.checks import MOST_MEMBERS
from proxytune.ops.combination import Combination, Weights
from proxytune.ops.noise import Noise
from proxytune.ops.outputs import OF_DRAWS, OUTPUTS
from proxytune.ops.sampling_params import SamplingParams
from proxytune.validation import finite, whole

__all__ = ["DTYPES", "MAX_MEMBERS", "refuse_drafts", "refuse_ids", "refuse_members", "refuse_mixture", "refuse_request"]

MAX_MEMBERS = MOST_MEMBERS
"""Base and companions together."""

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
"""Dtypes that logits may have."""

_LARGEST = torch.finfo(torch.float32).max


def refuse_members(members: Sequence[torch.Tensor], weights: Weights) -> None:
    """Raise InputError if logits and weights, or a Combination, are not as `proxytune.ops.step` says."""
    if not 1 <= len(members) <= MAX_MEMBERS:
        raise InputError.of(
            "members",
            expected=f"1 to {MAX_MEMBERS} tensors of logits, the base first",
            got=f"{len(members)}",
            remedy="Pass step([base, expert, antiexpert], (1.0, alpha, -alpha)).",
        )
    base = members[0]
    for i, x in enumerate(members):
        if not isinstance(x, torch.Tensor):
            raise InputError.of(f"member {i}", expected="a tensor [B, V]", got=f"a {type(x).__name__}", remedy=_FIT)
        shape = x.shape
        if len(shape) != 2 or shape[0] != base.shape[0] or 0 in shape:
            fits = f"[{base.shape[0]}, V]" if i and base.ndim == 2 else "[B, V], neither of them 0"
            raise InputError.of(f"member {i}", expected=f"a tensor {fits}", got=f"shape {list(x.shape)}", remedy=_FIT)
        if x.dtype not in DTYPES:
            raise InputError.of(
                f"member {i}", expected="float32, float16 or bfloat16", got=str(x.dtype), remedy="Convert it first."
            )
        if x.device != base.device:
            raise InputError.of(
                f"member {i}", expected=f"logits on {base.device}, where the base's are", got=str(x.device), remedy=_FIT
            )
        if not x.is_contiguous() and shape[1] > 1 and x.stride(1) != 1:
            raise InputError.of(
                f"member {i}",
                expected="columns next to each other (an inner stride of 1)",
                got=f"strides {list(x.stride())}",
                remedy="Call .contiguous() on it.",
            )
    if isinstance(weights, Combination):
        _refuse_combination(base, len(members), weights)
        weights = weights.weights
    if isinstance(weights, torch.Tensor):
        if weights.shape != (base.shape[0], len(members)) or weights.dtype != torch.float32:
            got = f"shape {list(weights.shape)}, {weights.dtype}"
        elif weights.device != base.device:
            got = f"a tensor on {weights.device}"
        else:
            return
    elif len(weights) != len(members):
        got = f"{len(weights)} numbers"
    else:
        wrong = [w for w in weights if not isinstance(w, int | float) or not abs(w) <= _LARGEST]
        if not wrong:
            return
        got = repr(wrong[0])
    raise InputError.of(
        "weights",
        expected=f"{len(members)} finite numbers, or float32 [{base.shape[0]}, {len(members)}] on {base.device}",
        got=got,
        remedy="The base's weight comes first: (1.0, alpha, -alpha).",
    )


def _refuse_combination(base: torch.Tensor, members: int, c: Combination) -> None:
    """Raise InputError if offsets or floors are not as `proxytune.ops.Combination` says; weights are not looked at."""
    rows = len(base)
    remedies = {
        "offsets": "Stack ops.log_normalisers(x) of each member on dim 1; 0 for members that stay logits.",
        "floors": "Pass e.g. ops.floor_of_top(x, share=0.1).",
    }
    for name, x, shape in (("offsets", c.offsets, (rows, members)), ("floors", c.floors, (rows,))):
        if x is not None and not isinstance(x, torch.Tensor):
            got = f"a {type(x).__name__}"
        elif x is not None and (x.shape != shape or x.dtype != torch.float32 or x.device != base.device):
            got = _described(x)
        else:
            continue
        raise InputError.of(
            name, expected=f"float32 {list(shape)} on {base.device}, or None", got=got, remedy=remedies[name]
        )
    whole("floored_by", c.floored_by, "of a member", least=0, most=members - 1, remedy="0 is the base.")


_FIT = "All members' logits are of the same rows: pass e.g. outputs.logits[:, -1]."


def refuse_request(
    base: torch.Tensor, sampling: SamplingParams | None, noise: Noise | None, draws: int, want: Collection[str]
) -> None:
    """Raise InputError if `step` cannot serve this request for the base's logits `[B, V]`.

    That is: an unknown output name, k or `draws` > V, a draw without settings or noise or with those of another batch
    size, or an output of draws without `sampling`.
    """
    width = base.shape[1]
    unknown = [name for name in want if name not in OUTPUTS]
    if unknown or isinstance(want, str):
        raise InputError.of(
            "want",
            expected=f"names of {', '.join(OUTPUTS)}",
            got=repr(want if isinstance(want, str) else unknown[0]),
            remedy='Pass e.g. want=("tokens", "entropy").',
        )
    whole("draws", draws, "of draws", least=1, most=width, remedy="There are no more tokens than the logits' width.")
    if sampling is None:
        if noise is not None or draws != 1 or set(OF_DRAWS) & set(want):
            what = "noise" if noise is not None else f"draws={draws}" if draws != 1 else min(set(OF_DRAWS) & set(want))
            raise InputError.of(
                "sampling",
                expected=f"SamplingParams together with {what}",
                got="None",
                remedy="Pass SamplingParams.of(B).",
            )
        return
    if noise is None:
        raise InputError.of(
            "noise", expected="a Noise together with sampling", got="None", remedy="Pass Noise.of(B, seed=0)."
        )
    _refuse_settings(base, len(base), sampling, noise)


def refuse_ids(base: torch.Tensor, sampling: SamplingParams, ids: torch.Tensor) -> None:
    """Raise InputError if `ids` is not int64 `[B, K]` on the logits' device, or the settings are for other rows."""
    rows = base.shape[0]
    if ids.ndim != 2 or len(ids) != rows or ids.dtype != torch.int64 or ids.device != base.device:
        raise InputError.of(
            "ids",
            expected=f"token ids [{rows}, K], torch.int64, on {base.device}",
            got=f"shape {list(ids.shape)}, {ids.dtype}, on {ids.device}",
            remedy="Pad shorter rows with −1.",
        )
    _refuse_settings(base, rows, sampling, None)


def refuse_drafts(
    base: torch.Tensor, drafted: torch.Tensor, draft: torch.Tensor | None, sampling: SamplingParams, noise: Noise
) -> None:
    """Raise InputError if drafts, their logits or settings are not as `proxytune.ops.verify` says."""
    if drafted.ndim != 2 or drafted.dtype != torch.int64 or drafted.device != base.device:
        raise InputError.of(
            "drafted",
            expected=f"token ids [B, K], torch.int64, on {base.device}",
            got=_described(drafted),
            remedy="Pad shorter drafts with −1.",
        )
    rows, most = drafted.shape
    if len(base) != rows * (most + 1):
        raise InputError.of(
            "members",
            expected=f"{rows * (most + 1)} rows of logits: {rows} texts of {most} drafts, {most + 1} each",
            got=f"{len(base)}",
            remedy="Pass K + 1 rows per text: row j holds the logits after its first j drafts.",
        )
    if draft is not None and most:
        if draft.ndim != 2 or len(draft) != rows * most or draft.dtype not in DTYPES or draft.device != base.device:
            raise InputError.of(
                "draft",
                expected=f"logits [{rows * most}, V], float32, float16 or bfloat16, on {base.device}",
                got=_described(draft),
                remedy="Pass the logits that the drafts were drawn from, or None if they were not drawn.",
            )
        refuse_members([draft], (1.0,))
        if sampling.largest_k > draft.shape[1]:
            raise InputError.of(
                "top_k",
                expected=f"at most {draft.shape[1]}, the width of the draft's logits",
                got=f"{sampling.largest_k}",
                remedy="Lower it.",
            )
    _refuse_settings(base, rows, sampling, noise)


def refuse_mixture(
    table: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
    tokens: torch.Tensor,
    soft: torch.Tensor | None,
    sigma: float,
    noise: Noise | None,
) -> None:
    """Raise InputError if arguments are not as `proxytune.ops.mix.mix` says."""
    if table.ndim != 2 or 0 in table.shape or table.shape[1] > _WIDEST:
        raise InputError.of(
            "table",
            expected=f"rows to mix, [N, D], neither of them 0, D at most {_WIDEST}",
            got=f"shape {list(table.shape)}",
            remedy="Pass an embedding's weight, or a module's outputs as [B · K, D].",
        )
    if table.dtype not in (*DTYPES, torch.float64):
        raise InputError.of(
            "table",
            expected="float32, float16, bfloat16 or float64",
            got=str(table.dtype),
            remedy="If a module dequantises the table, mix the module's outputs.",
        )
    if table.shape[1] > 1 and table.stride(1) != 1:
        raise InputError.of(
            "table",
            expected="columns next to each other (an inner stride of 1)",
            got=f"strides {list(table.stride())}",
            remedy="Call .contiguous() on it.",
        )
    if ids.ndim != 2 or 0 in ids.shape or ids.dtype != torch.int64 or ids.device != table.device:
        raise InputError.of(
            "ids",
            expected=f"rows of the table [B, K], neither of them 0, torch.int64, on {table.device}",
            got=_described(ids),
            remedy="Pad shorter rows with any id of weight 0.",
        )
    rows, candidates = ids.shape
    wanted = {"weights": (weights, (rows, candidates), torch.float32), "tokens": (tokens, (rows,), torch.int64)}
    if soft is not None:
        wanted["soft"] = (soft, (rows,), torch.bool)
    for name, (x, shape, dtype) in wanted.items():
        if x.shape != shape or x.dtype != dtype or x.device != table.device:
            raise InputError.of(
                name,
                expected=f"{list(shape)}, {dtype}, on {table.device}, for ids {list(ids.shape)}",
                got=_described(x),
                remedy="Weights are one per id, tokens and soft one per row.",
            )
    finite("sigma", sigma, least=0.0, most=_LARGEST, remedy="Leave it out for no noise.")
    if noise is None:
        if sigma > 0:
            raise InputError.of(
                "noise",
                expected="a Noise together with sigma > 0",
                got="None",
                remedy=f"Pass Noise.of({rows}, seed=0, position=…).",
            )
        return
    for x in (noise.seed, noise.row, noise.position, noise.branch):
        if x.shape != (rows,) or x.dtype != torch.int64 or x.device != table.device:
            raise InputError.of(
                "noise",
                expected=f"keys for {rows} rows on {table.device}, these as torch.int64",
                got=_described(x),
                remedy=f"Pass Noise.of({rows}, …, device=table.device).",
            )


_WIDEST = 1 << 27
"""Coordinates that have independent noise, see `proxytune.ops.noise.slotted`."""


def _described(x: torch.Tensor) -> str:
    return f"shape {list(x.shape)}, {x.dtype}, on {x.device}"


def _refuse_settings(base: torch.Tensor, rows: int, sampling: SamplingParams, noise: Noise | None) -> None:
    width = base.shape[1]
    s = sampling
    whole, real = torch.int64, torch.float32
    given = {"sampling": [(s.temperature, real), (s.top_k, torch.int32), (s.top_p, real), (s.log_min_p, real)]}
    if noise is not None:
        given["noise"] = [(noise.seed, whole), (noise.row, whole), (noise.position, whole), (noise.branch, whole)]
    if s.fork_threshold is not None and s.fork_temperature is not None:
        given["sampling"] += [(s.fork_threshold, real), (s.fork_temperature, real)]
    made_by = {"sampling": "SamplingParams", "noise": "Noise"}
    for name, tensors in given.items():
        for t, dtype in tensors:
            if t.shape != (rows,) or t.device != base.device or t.dtype != dtype:
                raise InputError.of(
                    name,
                    expected=f"keys and settings for {rows} rows on {base.device}, these as {dtype}",
                    got=f"shape {list(t.shape)} on {t.device}, {t.dtype}",
                    remedy=f"Pass {made_by[name]}.of({rows}, …, device=logits.device).",
                )
    if sampling.largest_k > width:
        raise InputError.of(
            "top_k",
            expected=f"at most {width}, the width of the logits",
            got=f"{sampling.largest_k}",
            remedy="Lower it.",
        )
