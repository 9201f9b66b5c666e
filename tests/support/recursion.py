"""Recurrent models and their reference: modules driven by hand, one row at a time, with noise of another making.

The reference strips the padding, keeps no cache, forwards every prefix anew in float64, and makes its noise from the
oracle's Philox in numpy. It shares with the product the words of the counter and nothing else.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from support.oracle import philox
from support.tiny import BOS, EOS, PAD
from transformers import HrmTextConfig, HrmTextForCausalLM

from proxytune.methods.recursion.output import RecursionOutput

NEW, SEED, SIZE, VOCAB = 7, 11, 32, 96
LATENT, SLOT = 3, 16
# The product's noise is float32, and the models' norms are in float32 whatever their dtype: differences of 1e-7, which
# wide weights and up to five cycles magnify. One wrong variate is worth 1e-2 and more.
CLOSE = 5e-4


def hrm(cycles: int = 3, dtype: torch.dtype = torch.float64, **more: Any) -> Any:
    """A random model; its weights are drawn wide, so that noise at its state changes tokens."""
    torch.manual_seed(3)
    config = HrmTextConfig(
        **{
            "vocab_size": VOCAB,
            "hidden_size": SIZE,
            "intermediate_size": 2 * SIZE,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "head_dim": 8,
            "max_position_embeddings": 128,
            "initializer_range": 0.3,
            "H_cycles": cycles,
            "L_cycles": 2,
            "prefix_lm": False,
            "pad_token_id": PAD,
            "bos_token_id": BOS,
            "eos_token_id": EOS,
        }
        | more
    )
    model = HrmTextForCausalLM(config).to(dtype).eval()
    model.generation_config.pad_token_id = PAD
    return model


@functools.cache
def model_of(cycles: int = 3) -> Any:
    return hrm(cycles)


def prompts(rows: int = 3, length: int = 8) -> torch.Tensor:
    return torch.randint(3, VOCAB, (rows, length), generator=torch.Generator().manual_seed(5))


def padded() -> tuple[torch.Tensor, torch.Tensor]:
    """Three rows of 8, 5 and 2 tokens, padded at the left."""
    ids, mask = prompts(), torch.ones(3, 8, dtype=torch.long)
    for row, n in ((1, 3), (2, 6)):
        ids[row, :n], mask[row, :n] = PAD, 0
    return ids, mask


def run(model: Any, loop: Any, ids: torch.Tensor, mask: torch.Tensor | None = None, **settings: Any) -> Any:
    given = {"max_new_tokens": NEW, "do_sample": False, "return_dict_in_generate": True, "eos_token_id": None}
    mask = torch.ones_like(ids) if mask is None else mask
    return model.generate(ids, attention_mask=mask, custom_generate=loop, **given | settings)


def hooks_of(model: Any) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_hooks_with_kwargs) for m in model.modules())


@dataclass(frozen=True)
class How:
    """One trajectory's noise."""

    sigma: float = 0.3
    at: tuple[int, ...] = (0, 1, 2)
    halt: float | None = None
    row: int = 0
    trajectory: int = 0
    seed: int = SEED


def variates(how: How, length: int, cycle: int, size: int = SIZE) -> torch.Tensor:
    """`[T, D]`, float64: Box and Muller on words of the oracle."""
    index = SLOT * 2**27 + cycle * size + np.arange(size)
    words = philox(how.seed, index[None], np.arange(length)[:, None], how.row, how.trajectory * 4 + LATENT)
    u, v = ((w.astype(np.float64) + 0.5) / 2.0**32 for w in words[:2])
    return torch.from_numpy(np.sqrt(-2 * np.log1p(-u)) * np.cos(2 * np.pi * v))


def rms(x: torch.Tensor) -> torch.Tensor:
    return x.pow(2).mean(-1, keepdim=True).sqrt()


class Recurring:
    """The transition written out, position by position, for one row."""

    def __init__(self, how: How, length: int) -> None:
        self.how, self.states = how, []
        self.used: list[int | None] = [None] * length

    def __call__(self, u: torch.Tensor, cycle: int) -> torch.Tensor:
        """`[T, D]`."""
        n = variates(self.how, len(u), cycle, u.shape[1])
        new = u + self.how.sigma * rms(u) * n if cycle in self.how.at else u.clone()
        for t in range(len(u)):
            if self.used[t] is not None:
                new[t] = self.states[-1][t]
            elif self.how.halt is not None and cycle > 0:
                change = rms(new[t] - self.states[-1][t]) / rms(new[t])
                self.used[t] = cycle + 1 if float(change) < self.how.halt else None
        self.states.append(new)
        return new


@torch.no_grad()
def reference(model: Any, ids: list[int], how: How) -> tuple[torch.Tensor, list[int]]:
    """Logits `[T, V]` after each token, and the cycles that its position used."""
    inner, cycles, t = model.model, model.config.H_cycles, len(ids)
    x = inner.embed_tokens(torch.tensor([ids])) * inner.embedding_scale
    causal = torch.full((t, t), -torch.inf, dtype=x.dtype).triu(1)[None, None]
    common = {"attention_mask": causal, "position_embeddings": inner.rotary_emb(x, torch.arange(t)[None])}
    high, low, recurring = x, torch.zeros_like(x), Recurring(how, t)
    for cycle in range(cycles):
        for _ in range(model.config.L_cycles):
            low = inner.L_module(low + high, **common)
        high = recurring(inner.H_module(high + low, **common)[0], cycle)[None].to(x.dtype)
    return model.lm_head(high)[0], [cycles if used is None else used for used in recurring.used]


@dataclass
class Text:
    """A trajectory by the reference."""

    ids: list[int]
    mean: float
    cycles: int


def continued(model: Any, prompt: list[int], how: How, *, ids: list[int] | None = None, new: int = NEW) -> Text:
    """Greedy decoding, or the given ids under the same noisy model."""
    out, total, cycles = [], 0.0, 0
    for step in range(new if ids is None else len(ids)):
        logits, used = reference(model, prompt + out, how)
        out.append(int(logits[-1].argmax()) if ids is None else ids[step])
        total += float(logits[-1].log_softmax(-1)[out[-1]])
        cycles += used[-1]
    return Text(out, total / len(out), cycles)


def check(out: RecursionOutput, model: Any, ids: torch.Tensor, mask: torch.Tensor, how: How, numbers: range) -> None:
    """Every trajectory is the reference's: tokens, mean log-probability, cycles."""
    for b in range(len(ids)):
        for i, number in enumerate(numbers):
            mine = replace(how, row=b, trajectory=number)
            want = continued(model, ids[b][mask[b].bool()].tolist(), mine)
            assert out.trajectories.sequences[b, i, ids.shape[1] :].tolist() == want.ids, f"row {b}, {number}"
            assert float(out.trajectories.mean_logprobs[b, i]) == pytest.approx(want.mean, abs=CLOSE)
            assert int(out.trajectories.cycles[b, i]) == want.cycles


MODES: dict[str, dict[str, Any]] = {
    "cache": {},
    "no-cache": {"use_cache": False},
    "static": {"cache_implementation": "static"},
    "chunked": {"prefill_chunk_size": 3},
    "static-chunked": {"cache_implementation": "static", "prefill_chunk_size": 3},
}
