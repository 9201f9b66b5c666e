"""`proxytune.ops.verify` in `bench_kernels.py`: drafts accepted or rejected, and the token after them.

The composition to compare with is the published algorithm (Leviathan et al. 2023, arXiv 2211.17192): warped softmax of
target and draft at all positions, ratios against uniforms, a cumulative product of the decisions, the positive part of
the difference at the first rejection, and a draw from it by `torch.multinomial`. The record has the mean number of
drafts accepted.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from _kernels.cases import TEMPERATURE, TRUNCATED, WEIGHTS, Case, combined, members
from proxytune import ops
from proxytune.ops.noise import Noise
from proxytune.ops.sampling_params import SamplingParams

OURS, PLAIN = "proxytune", "plain"
Given = list[torch.Tensor]
"""The members' rows, then the draft's, then the drafted tokens."""


@dataclass(frozen=True)
class Round:
    """One round of verification: B rows, K drafts, V = `width`."""

    case: Case
    rows: int
    drafts: int = 4
    width: int = 128_256


ROUNDS_OF_DRAFTS = tuple(Round(case, rows) for rows in (1, 8) for case in (TEMPERATURE, TRUNCATED))


def given(what: Round, device: str) -> Given:
    """Logits at all positions, the draft's logits, and draft tokens drawn from them."""
    each = what.drafts + 1
    rows = members(what.rows * each, what.width, torch.bfloat16, device)
    random = torch.Generator(device).manual_seed(2)
    z = combined(rows).view(what.rows, each, -1)[:, :-1].flatten(0, 1)
    draft = (z + 0.4 * torch.randn(z.shape, generator=random, device=device)).bfloat16()
    sampling, noise = _keys(what, device)
    texts = torch.arange(what.rows, device=device).repeat_interleave(what.drafts)
    step = torch.arange(what.drafts, device=device).repeat(what.rows)
    own = noise.pick(texts)
    tokens = ops.step([draft], sampling=sampling.pick(texts), noise=own.at(own.position + step)).tokens
    assert tokens is not None
    return [*rows, draft, tokens.view(what.rows, what.drafts)]


def ours(what: Round, device: str, impl: ops.Impl) -> Callable[[Given], tuple[torch.Tensor, torch.Tensor]]:
    """Verification by `proxytune.ops.verify`; settings and noise are made once, as before a decoding loop."""
    sampling, noise = _keys(what, device)

    def run(x: Given) -> tuple[torch.Tensor, torch.Tensor]:
        *rows, draft, drafted = x
        out = ops.verify(rows, WEIGHTS, drafted=drafted, draft=draft, sampling=sampling, noise=noise, impl=impl)
        return out.tokens, out.accepted

    return run


def plain(what: Round) -> Callable[[Given], tuple[torch.Tensor, torch.Tensor]]:
    """Verification as a composition of torch functions and transformers' warpers."""
    warpers = LogitsProcessorList([TemperatureLogitsWarper(what.case.temperature)])
    if what.case.top_k:
        warpers.append(TopKLogitsWarper(what.case.top_k))
    if what.case.top_p < 1:
        warpers.append(TopPLogitsWarper(what.case.top_p))

    def run(x: Given) -> tuple[torch.Tensor, torch.Tensor]:
        *rows, draft, drafted = x
        texts, most = drafted.shape
        p = warpers(None, combined(rows)).softmax(1).view(texts, most + 1, -1)
        q = warpers(None, draft.float()).softmax(1).view(texts, most, -1)
        ratio = p[:, :-1].gather(2, drafted[..., None]) / q.gather(2, drafted[..., None])
        agreed = torch.rand(texts, most, device=p.device) <= ratio[..., 0]
        accepted = agreed.long().cumprod(1).sum(1)
        text = torch.arange(texts, device=p.device)
        here = p[text, accepted]
        rest = (here - q[text, accepted.clamp(max=most - 1)]).clamp(min=0)
        law = torch.where((accepted == most)[:, None], here, rest)
        final = torch.multinomial(law, 1)
        place = torch.arange(most + 1, device=p.device)
        drafted = torch.nn.functional.pad(drafted, (0, 1), value=-1)
        tokens = torch.where(place < accepted[:, None], drafted, torch.where(place == accepted[:, None], final, -1))
        return tokens, accepted

    return run


def shape(what: Round) -> dict[str, Any]:
    """The round's sizes, for the JSON."""
    return {"case": what.case.name, "rows": what.rows, "drafts": what.drafts, "width": what.width}


def _keys(what: Round, device: str) -> tuple[SamplingParams, Noise]:
    place = torch.device(device)
    case = what.case
    assert case.temperature is not None
    settings = {"temperature": case.temperature, "top_k": case.top_k, "top_p": case.top_p}
    return SamplingParams.of(what.rows, device=place, **settings), Noise.of(what.rows, seed=1, position=7, device=place)
