"""What `bench_kernels.py` measures: the decisions, the logits, and compositions of torch functions to compare with.

The plain compositions are what one writes without these kernels: every step a torch function over the whole `[B, V]`.
They use the package's `shift`, for the same arithmetic, and draw by an exponential race, which a CUDA graph can capture
and torch.compile can fuse.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from proxytune import ops
from proxytune.formulas.shift import shift
from proxytune.ops.noise import Noise
from proxytune.ops.sampling_params import SamplingParams

ALPHA = 0.5
WEIGHTS = (1.0, ALPHA, -ALPHA)
ROWS_LIKE = ("peaked", "flat")
Members = list[torch.Tensor]
Outputs = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Case:
    """One decision: the outputs requested from `proxytune.ops.step`, and its settings (None, 0 and 1 for off)."""

    name: str
    want: tuple[str, ...]
    temperature: float | None = None
    top_k: int = 0
    top_p: float = 1.0


_DRAWN = ("tokens", "logprobs", "entropy")
STATISTICS = Case("statistics", ("lse", "entropy", "varentropy", "argmax", "kl"))
TEMPERATURE = Case("temperature draw", _DRAWN, 0.7)
TRUNCATED = Case("k50 + p.9", _DRAWN, 0.7, 50, 0.9)
FLAT = Case("p.9, T 2", _DRAWN, 2.0, 0, 0.9)
"""On a flat row more candidates than one program stores: the row is sorted."""
GREEDY = Case("greedy", ("tokens",))
CASES = (STATISTICS, TEMPERATURE, TRUNCATED)


def members(rows: int, width: int, dtype: torch.dtype, device: str, rows_like: str = "peaked") -> Members:
    """Logits of base, expert and antiexpert, `[B, V]` each.

    "peaked" rows fall off as a power of the rank, like a language model's, with entropies from about half a nat to
    three; "flat" rows are normal with a standard deviation of 2 (entropy about log V − 2).
    """
    random = torch.Generator(device).manual_seed(rows * 1_000_003 + width)

    def normal() -> torch.Tensor:
        return torch.randn(rows, width, generator=random, device=device)

    if rows_like == "flat":
        base = 2 * normal()
    else:
        rank = normal().argsort(1).float() + 1  # [B, V], its own order in each row
        steep = torch.linspace(1.7, 3.2, rows, device=device) if rows > 1 else torch.full((1,), 2.2, device=device)
        base = 15 - steep[:, None] * rank.log() + 0.3 * normal()
    return [z.to(dtype) for z in (base, base + 0.3 * normal(), base + 0.3 * normal())]


def decision(case: Case, rows: int, device: str, impl: ops.Impl) -> Callable[[Members], Outputs]:
    """The decision by `proxytune.ops.step`; settings and noise are made once, as before a decoding loop."""
    sampling = noise = None
    if case.temperature is not None:
        sampling = SamplingParams.of(
            rows, temperature=case.temperature, top_k=case.top_k, top_p=case.top_p, device=torch.device(device)
        )
        noise = Noise.of(rows, seed=1, position=7, device=torch.device(device))

    def run(logits: Members) -> Outputs:
        out = ops.step(logits, WEIGHTS, sampling=sampling, noise=noise, want=case.want, impl=impl)
        return {name: getattr(out, name) for name in case.want}

    return run


# --- compositions ---------------------------------------------------------------------------------------------------


def plain(case: Case) -> Callable[[Members], Outputs]:
    """The decision as a composition of torch functions, in the order and with the sort of transformers' warpers."""

    def greedy(logits: Members) -> Outputs:
        return {"tokens": combined(logits).argmax(1, keepdim=True)}

    def statistics(logits: Members) -> Outputs:
        z = combined(logits)
        logp, p, surprise = _distribution(z)
        entropy = (p * surprise).sum(1)
        base = logits[0].float().log_softmax(1)
        best = z.argmax(1, keepdim=True)
        return {
            "lse": (z.gather(1, best) - logp.gather(1, best))[:, 0],
            "entropy": entropy,
            "varentropy": (p * (surprise - entropy[:, None]).square()).sum(1),
            "argmax": best[:, 0],
            "kl": (p * torch.where(p > 0, logp - base, 0.0)).sum(1),
        }

    def draw(logits: Members) -> Outputs:
        z = combined(logits)
        logp, p, surprise = _distribution(z)
        s = z / case.temperature
        if case.top_k:
            s = s.masked_fill(s < s.topk(case.top_k, 1).values[:, -1:], -torch.inf)
        if case.top_p < 1:
            ascending, order = s.sort(1)
            outside = ascending.softmax(1).cumsum(1) <= 1 - case.top_p
            outside[:, -1] = False
            s = s.masked_fill(torch.zeros_like(outside).scatter(1, order, outside), -torch.inf)
        tokens = _race(s)
        return {"tokens": tokens, "logprobs": logp.gather(1, tokens), "entropy": (p * surprise).sum(1)}

    return greedy if case is GREEDY else statistics if case is STATISTICS else draw


def plain_candidates(case: Case) -> Callable[[Members], Outputs]:
    """The truncated draw for small k: top-k first, the rest among these k."""

    def draw(logits: Members) -> Outputs:
        z = combined(logits)
        logp, p, surprise = _distribution(z)
        s, ids = (z / case.temperature).topk(case.top_k, 1)  # ties with the k-th are cut, unlike in the others
        mass = s.softmax(1)
        s = s.masked_fill(mass.cumsum(1) - mass >= case.top_p, -torch.inf)
        tokens = ids.gather(1, _race(s))
        return {"tokens": tokens, "logprobs": logp.gather(1, tokens), "entropy": (p * surprise).sum(1)}

    return draw


def transformers_chain(case: Case) -> Callable[[Members], Outputs]:
    """Tokens only, as `generate()` draws them: warpers, softmax, multinomial; no entropy, no logprobs."""
    warpers = LogitsProcessorList([TemperatureLogitsWarper(case.temperature)])
    if case.top_k:
        warpers.append(TopKLogitsWarper(case.top_k))
    if case.top_p < 1:
        warpers.append(TopPLogitsWarper(case.top_p))

    def draw(logits: Members) -> Outputs:
        s = warpers(None, combined(logits))
        return {"tokens": torch.multinomial(s.softmax(1), 1)}

    return draw


def flashinfer(case: Case) -> Callable[[Members], Outputs]:
    """Tokens only, by FlashInfer's sampling kernels on the shifted logits; ImportError if it is missing."""
    from flashinfer import sampling  # optional, and only for GPUs

    def draw(logits: Members) -> Outputs:
        s = combined(logits) / case.temperature
        if case.top_k:
            tokens = sampling.top_k_top_p_sampling_from_logits(
                s, case.top_k, case.top_p, filter_apply_order="top_k_first"
            )
        else:
            tokens = sampling.sampling_from_logits(s)
        return {"tokens": tokens[:, None]}

    return draw


def combined(logits: Members) -> torch.Tensor:
    """The steered logits, `[B, V]` float32."""
    return shift(logits[0], logits[1:], WEIGHTS[1:])


def _distribution(z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Log-probabilities, probabilities, and −log p with 0 where masked."""
    logp = z.log_softmax(1)
    p = logp.exp()
    return logp, p, torch.where(p > 0, -logp, 0.0)


def _race(s: torch.Tensor) -> torch.Tensor:
    p = s.softmax(1)
    return (p / torch.empty_like(p).exponential_()).argmax(1, keepdim=True)
