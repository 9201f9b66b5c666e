"""Stochastic recursion: against modules driven by hand, one row at a time, with noise of another making.

The reference strips the padding, keeps no cache, forwards every prefix anew in float64, and makes its noise from the
oracle's Philox in numpy. It shares with the product the words of the counter and nothing else.
"""

from __future__ import annotations

import copy
import functools
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.oracle import philox
from support.tiny import BOS, EOS, PAD, shared, tokenizer
from transformers import (
    HrmTextConfig,
    HrmTextForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    LogitsProcessor,
    StaticCache,
    StoppingCriteria,
    StopStringCriteria,
)
from transformers.generation.configuration_utils import CompileConfig
from transformers.modeling_outputs import CausalLMOutputWithPast

import proxytune
from proxytune import FusedDecoding, RecursionDecoding
from proxytune.errors import InputError, NumericalError, UnsupportedModeError, UnsupportedModelError
from proxytune.methods.recursion import LatentRecursion, register_recursion
from proxytune.methods.recursion.adapters import HrmTextRecursion, recursion_of
from proxytune.methods.recursion.output import RecursionOutput
from proxytune.methods.recursion.selection import select_one
from proxytune.methods.recursion.transition import Transition
from proxytune.ops.noise import Noise

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


# --- the reference --------------------------------------------------------------------------------------------------


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


# --- the same as the reference, whatever the cache and the padding ---------------------------------------------------

MODES: dict[str, dict[str, Any]] = {
    "cache": {},
    "no-cache": {"use_cache": False},
    "static": {"cache_implementation": "static"},
    "chunked": {"prefill_chunk_size": 3},
    "static-chunked": {"cache_implementation": "static", "prefill_chunk_size": 3},
}


@pytest.mark.smoke
@pytest.mark.parametrize("padding", ["none", "left"])
@pytest.mark.parametrize("mode", MODES)
def test_every_trajectory_is_that_of_the_reference(mode: str, padding: str) -> None:
    model = model_of()
    ids, mask = padded() if padding == "left" else (prompts(2), torch.ones(2, 8, dtype=torch.long))
    how = How(halt=1.0)  # wide: some positions halt, some do not
    loop = RecursionDecoding(sigma=how.sigma, trajectories=3, seed=SEED, halt=how.halt)
    out = run(model, loop, ids, mask, **MODES[mode])
    check(out, model, ids, mask, how, range(3))
    assert torch.isfinite(out.trajectories.mean_logprobs).all()
    assert 3 < int(out.trajectories.cycles.min()) < 3 * NEW


@pytest.mark.parametrize("when", ["once", "cycle", (1,), (0, 2)])
def test_when(when: Any) -> None:
    model, ids = model_of(), prompts(2)
    at = {"once": (0,), "cycle": (0, 1, 2)}.get(when, when)
    out = run(model, RecursionDecoding(sigma=0.5, when=when, trajectories=2, seed=SEED), ids)
    check(out, model, ids, torch.ones_like(ids), How(sigma=0.5, at=at), range(2))


@pytest.mark.smoke
def test_logits_at_every_position() -> None:
    # One forward pass, also at positions that nothing is drawn from; noise at padding must not be seen.
    model, (ids, mask) = model_of(), padded()
    noise = Noise.of(3, seed=SEED, branch=4)
    transition = Transition(noise, sigma=0.4, at=(0, 1, 2), cycles=3, size=SIZE)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad(), HrmTextRecursion().perturbed(model, transition):
        got = model(input_ids=ids, attention_mask=mask, position_ids=positions).logits
    for b in range(3):
        kept = mask[b].bool()
        want, _ = reference(model, ids[b][kept].tolist(), How(sigma=0.4, row=b, trajectory=4))
        assert torch.allclose(got[b][kept], want, atol=CLOSE, rtol=0)
        plain, _ = reference(model, ids[b][kept].tolist(), How(sigma=0.0))
        assert float((want - plain).abs().max()) > 0.1  # the noise is seen at all
    assert hooks_of(model) == 0


def test_prefix_lm() -> None:
    # Prompts that attend in both directions: what belongs to a row goes along with its trajectories.
    model = hrm(2, prefix_lm=True)
    ids, mask = padded()
    settings = {"token_type_ids": torch.ones_like(ids)}
    plain = model.generate(ids, attention_mask=mask, max_new_tokens=NEW, eos_token_id=None, **settings)
    none = run(model, RecursionDecoding(sigma=0.0, trajectories=2), ids, mask, **settings)
    assert torch.equal(none.sequences, plain)
    loop = RecursionDecoding(sigma=0.3, trajectories=3, seed=SEED, select=None)
    out = run(model, loop, ids, mask, **settings)
    alone = run(
        model,
        RecursionDecoding(sigma=0.3, trajectories=[2], stream_ids=[1], seed=SEED),
        ids[1:2, 3:],
        mask[1:2, 3:],
        token_type_ids=torch.ones(1, 5, dtype=torch.long),
    )
    assert torch.equal(out.trajectories.sequences[1, 2, 3:], alone.sequences[0])


def test_prompts_of_embeddings() -> None:
    model, (ids, mask) = model_of(), padded()
    loop = RecursionDecoding(sigma=0.3, trajectories=2, seed=SEED)
    want = run(model, loop, ids, mask)
    given = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None, "return_dict_in_generate": True}
    embedded = model.model.embed_tokens(ids).detach()
    got = model.generate(inputs_embeds=embedded, attention_mask=mask, custom_generate=loop, **given)
    assert torch.equal(got.trajectories.sequences, want.trajectories.sequences[..., 8:])
    assert torch.equal(got.sequences, want.sequences[:, 8:])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_transition_in_lower_precision(dtype: torch.dtype) -> None:
    u = torch.randn(2, 5, 64).to(dtype)
    transition = Transition(Noise.of(2, seed=SEED), sigma=0.25, at=(1,), cycles=2, size=64)
    assert transition(u, cycle=0, positions=torch.arange(5)[None]) is u
    got = transition(u, cycle=1, positions=torch.arange(5)[None])
    assert got.dtype == dtype
    for b in range(2):
        wide = u[b].double()
        noise = 0.25 * rms(wide) * variates(How(row=b), 5, 1, 64)
        same = u[b] + noise.to(dtype)  # noise rounded into the dtype, then added in it
        err, allowed = (got[b].double() - wide - noise).abs(), (same.double() - wide - noise).abs()
        assert float(err.max()) <= float(allowed.max()) + 1e-6


def test_the_noise_is_standard_normal_and_independent() -> None:
    # Over positions, rows, trajectories and cycles: each is a key of its own.
    size, length = 64, 50
    noise = Noise.of(8, seed=1, row=torch.arange(8) // 2, branch=torch.arange(8) % 2)
    transition = Transition(noise, sigma=1.0, at=(0, 1), cycles=2, size=size)
    u = torch.ones(8, length, size)  # rms 1: what is added is n
    n = torch.stack([transition(u, cycle=c, positions=torch.arange(length)[None]) - 1 for c in (0, 1)])
    flat = n.flatten().double()
    assert abs(float(flat.mean())) < 4 / len(flat) ** 0.5
    assert abs(float(flat.var()) - 1) < 4 * (2 / len(flat)) ** 0.5
    assert abs(float((flat**4).mean()) - 3) < 4 * (96 / len(flat)) ** 0.5
    for one, other in ((n[0], n[1]), (n[:, ::2], n[:, 1::2]), (n[:, :-2], n[:, 2:]), (n[:, :, 1:], n[:, :, :-1])):
        assert abs(float((one * other).mean())) < 4 / one.numel() ** 0.5


# --- no noise, no difference -----------------------------------------------------------------------------------------


@pytest.mark.smoke
@pytest.mark.parametrize("halt", [None, 1e-9])
def test_without_noise_nothing_changes(halt: float | None) -> None:
    (ids, mask), model = padded(), hrm(dtype=torch.float32)
    want = model.generate(ids, attention_mask=mask, max_new_tokens=NEW, do_sample=False, eos_token_id=None)
    out = run(model, RecursionDecoding(sigma=0.0, trajectories=3, seed=1, halt=halt), ids, mask)
    assert torch.equal(out.sequences, want)
    assert bool((out.trajectories.sequences == want[:, None]).all())
    assert torch.equal(out.trajectories.cycles, torch.full((3, 3), 3 * NEW))
    quiet = run(model, RecursionDecoding(sigma=0.0, trajectories=1), ids, mask, return_dict_in_generate=False)
    assert torch.equal(quiet, want)
    assert out.trajectories.values is None


def test_draws_are_those_of_the_fused_loop() -> None:
    model, ids = model_of(), prompts(2)
    warm = {"do_sample": True, "temperature": 0.8, "top_k": 20}
    out = run(model, RecursionDecoding(sigma=0.0, trajectories=3, seed=SEED, select=None), ids, **warm)
    assert out.chosen is None
    for i in range(3):
        loop = FusedDecoding(seed=SEED, stream_ids=[0, 1], branch_ids=[i, i])
        assert torch.equal(out.trajectories.sequences[:, i], run(model, loop, ids, **warm).sequences)
    with pytest.raises(InputError, match="branch"):
        run(model, FusedDecoding(branch_ids=[0]), ids, **warm)
    first = run(model, FusedDecoding(seed=SEED), ids, **warm).sequences
    assert torch.equal(out.trajectories.sequences[:, 0], first)
    assert torch.equal(out.sequences.view(2, 3, -1), out.trajectories.sequences)


def test_sampling_with_noise() -> None:
    # What is drawn is drawn from the noisy model, and scored by it at temperature 1.
    model, ids = model_of(), prompts(2)
    loop = RecursionDecoding(sigma=0.3, trajectories=2, seed=SEED)
    out = run(model, loop, ids, do_sample=True, temperature=0.7, top_p=0.9, num_return_sequences=2)
    assert out.trajectories.sequences.shape[:2] == (4, 2)  # two rows for each prompt
    assert out.chosen.shape == (4,)
    texts = out.trajectories.sequences
    assert len({tuple(text.tolist()) for text in texts[:2].flatten(0, 1)}) == 4
    for b in range(4):
        for i in range(2):
            want = continued(model, ids[b // 2].tolist(), How(row=b, trajectory=i), ids=texts[b, i, 8:].tolist())
            assert float(out.trajectories.mean_logprobs[b, i]) == pytest.approx(want.mean, abs=CLOSE)


# --- keys ------------------------------------------------------------------------------------------------------------


@pytest.mark.smoke
def test_trajectories_differ_and_are_the_same_alone() -> None:
    model, (ids, mask) = model_of(), padded()
    out = run(model, RecursionDecoding(sigma=0.4, trajectories=4, seed=SEED), ids, mask).trajectories
    for b in range(3):
        assert len({tuple(text.tolist()) for text in out.sequences[b]}) > 1
    for b, i in ((0, 0), (1, 3), (2, 2)):
        alone = RecursionDecoding(sigma=0.4, trajectories=[i], stream_ids=[b], seed=SEED)
        got = run(model, alone, ids[b : b + 1][:, mask[b].bool()])
        start = int((mask[b] == 0).sum())
        assert torch.equal(got.sequences[0], out.sequences[b, i, start:])
        assert float(got.trajectories.mean_logprobs) == pytest.approx(float(out.mean_logprobs[b, i]), abs=CLOSE)
    more = run(model, RecursionDecoding(sigma=0.4, trajectories=6, seed=SEED), ids, mask).trajectories
    assert torch.equal(more.sequences[:, :4], out.sequences)
    other = run(model, RecursionDecoding(sigma=0.4, trajectories=4, seed=SEED + 1), ids, mask).trajectories
    assert not torch.equal(other.sequences, out.sequences)


def test_without_a_seed_calls_differ() -> None:
    model, ids = model_of(), prompts(2)
    loop = RecursionDecoding(sigma=0.6, trajectories=2)
    first, second = (run(model, loop, ids).trajectories.sequences for _ in range(2))
    assert not torch.equal(first, second)
    torch.manual_seed(9)
    third = run(model, loop, ids).trajectories.sequences
    torch.manual_seed(9)
    assert torch.equal(run(model, loop, ids).trajectories.sequences, third)


# --- halting and ends ------------------------------------------------------------------------------------------------


def test_halting_goes_by_row() -> None:
    model, ids = model_of(5), prompts(3)
    # Noise in the first cycle only, so that the later ones can settle; at this threshold some do.
    how, free = How(at=(0,), halt=1.0), How(at=(0,))
    loop = RecursionDecoding(sigma=how.sigma, when="once", trajectories=2, seed=SEED, halt=how.halt)
    out = run(model, loop, ids)
    check(out, model, ids, torch.ones_like(ids), how, range(2))
    cycles = out.trajectories.cycles
    assert int(cycles.min()) < 5 * NEW
    assert len(set(cycles.flatten().tolist())) > 1
    # Position by position: of the same prompt, some halt and some do not.
    _, used = reference(model, ids[0].tolist(), how)
    assert 1 < min(used) < max(used) == 5
    assert set(reference(model, ids[0].tolist(), free)[1]) == {5}


def test_a_halted_row_is_kept_and_its_neighbour_goes_on() -> None:
    transition = Transition(Noise.of(2, seed=1), sigma=0.5, at=(3,), cycles=4, size=4, halt=0.1)
    where = torch.zeros(1, 1, dtype=torch.long)
    still, moving = torch.ones(4), [torch.full((4,), 2.0**c) for c in range(4)]
    for cycle in range(4):
        u = torch.stack([still if cycle < 2 else still * 9, moving[cycle]])[:, None]
        out = transition(u, cycle=cycle, positions=where)
        if cycle < 3:
            assert torch.equal(out[1], u[1])
    assert torch.equal(out[0, 0], still)  # neither what came after, nor noise
    assert not torch.equal(out[1], u[1])
    assert transition.used.tolist() == [2, 4]
    # The next forward pass starts anew, also of another length.
    transition(torch.ones(2, 3, 4), cycle=0, positions=torch.zeros(1, 3, dtype=torch.long))


def test_rows_end_by_themselves() -> None:
    model, ids = model_of(), prompts(2)
    how = How(sigma=0.4)
    free = run(model, RecursionDecoding(sigma=0.4, trajectories=4, seed=SEED), ids).trajectories
    ends = int(free.sequences[0, 1, 10])
    loop = RecursionDecoding(sigma=0.4, trajectories=4, seed=SEED, select=lambda text: -len(text))
    out = run(model, loop, ids, eos_token_id=ends)
    lengths = []
    for b in range(2):
        for i in range(4):
            text = free.sequences[b, i, 8:].tolist()
            n = text.index(ends) + 1 if ends in text else NEW
            lengths.append(n)
            want = continued(model, ids[b].tolist(), How(how.sigma, row=b, trajectory=i), ids=text[:n])
            assert int(out.trajectories.lengths[b, i]) == n
            assert float(out.trajectories.mean_logprobs[b, i]) == pytest.approx(want.mean, abs=CLOSE)
            assert int(out.trajectories.cycles[b, i]) == 3 * n
            assert set(out.trajectories.sequences[b, i, 8 + n :].tolist()) <= {PAD}
    assert min(lengths) < NEW
    # The shortest were selected: nothing is left of the longer ones but what the batch needs.
    shortest = [min(lengths[:4]), min(lengths[4:])]
    assert out.sequences.shape[1] == 8 + max(shortest)
    assert out.scores.tolist() == [[-float(n) for n in lengths[:4]], [-float(n) for n in lengths[4:]]]


def test_stop_strings() -> None:
    model, ids = hrm(vocab_size=259), prompts(1)
    settings = {"sigma": 0.3, "trajectories": 3, "seed": SEED}
    free = run(model, RecursionDecoding(**settings, select=None), ids, max_new_tokens=12).trajectories.sequences[0]
    letters = [[tokenizer().decode(t) for t in text[8:]] for text in free]
    stop = next(c for c in letters[0] if c.isascii() and c.isprintable() and c.strip())
    criteria = [StopStringCriteria(tokenizer(), [stop])]
    out = run(
        model, RecursionDecoding(**settings, select=None), ids, max_new_tokens=12, stopping_criteria=criteria
    ).trajectories
    for i, text in enumerate(letters):
        assert int(out.lengths[0, i]) == (text.index(stop) + 1 if stop in text else 12)


class EndsAt(StoppingCriteria):
    """A row's end without an EOS token: the first of these tokens that it generates."""

    def __init__(self, ends: list[int]) -> None:
        self.ends = torch.tensor(ends)

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> Any:
        return torch.isin(input_ids[:, 8:], self.ends).any(1)


@pytest.mark.parametrize("pad", [PAD, None])
def test_nothing_stands_behind_a_row_s_end(pad: int | None) -> None:
    model, ids = hrm(), prompts(2)
    model.generation_config.pad_token_id = model.config.pad_token_id = pad
    settings: dict[str, Any] = {"sigma": 0.4, "trajectories": 4, "seed": SEED}
    free = run(model, RecursionDecoding(**settings), ids).trajectories.sequences
    ends = [int(free[0, 1, 9]), int(free[1, 2, 10])]
    for select in ("logprob", None):
        out = run(model, RecursionDecoding(**settings, select=select), ids, stopping_criteria=[EndsAt(ends)])
        texts, lengths = out.trajectories.sequences, out.trajectories.lengths
        assert len(set(lengths.flatten().tolist())) > 1
        for b in range(2):
            for i in range(4):
                n = 8 + int(lengths[b, i])
                assert torch.equal(texts[b, i, :n], free[b, i, :n])
                filler = int(texts[b, i, n - 1]) if pad is None else pad
                assert set(texts[b, i, n:].tolist()) <= {filler}
        if select is None:
            assert torch.equal(out.sequences, texts.flatten(0, 1))
        else:
            assert torch.equal(out.sequences, texts[[0, 1], out.chosen][:, : out.sequences.shape[1]])
    # The fillers are seen at all: the loop itself goes on.
    assert int(lengths.min()) < texts.shape[2] - 8


def test_constraints_know_the_prompt() -> None:
    model, ids = model_of(), prompts(2)
    allowed = [[10, 11, 12], [20, 21, 22]]
    out = run(
        model,
        RecursionDecoding(sigma=0.5, trajectories=3, seed=SEED),
        ids,
        prefix_allowed_tokens_fn=lambda row, _: allowed[row],
    )
    for b in range(2):
        assert set(out.trajectories.sequences[b, :, 8:].flatten().tolist()) <= set(allowed[b])
    assert torch.isfinite(out.trajectories.mean_logprobs).all()


# --- selection -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def found() -> tuple[torch.Tensor, Any]:
    ids = prompts(3)
    return ids, run(model_of(), RecursionDecoding(sigma=0.4, trajectories=5, seed=SEED, select=None), ids)


def chosen_by(ids: torch.Tensor, **settings: Any) -> Any:
    return run(model_of(), RecursionDecoding(sigma=0.4, trajectories=5, seed=SEED, **settings), ids)


def test_select_by_logprob(found: tuple[torch.Tensor, Any]) -> None:
    ids, every = found
    out = chosen_by(ids)
    texts = every.trajectories.sequences
    for b in range(3):
        hows = [How(sigma=0.4, row=b, trajectory=i) for i in range(5)]
        written = texts[b, :, 8:].tolist()
        means = [continued(model_of(), ids[b].tolist(), hows[i], ids=written[i]).mean for i in range(5)]
        assert int(out.chosen[b]) == int(np.argmax(means))
        assert torch.equal(out.sequences[b], texts[b, int(np.argmax(means))])
    assert torch.equal(out.scores, every.trajectories.mean_logprobs)


@pytest.mark.parametrize("modulus", [2, 3, None])
def test_select_by_vote(found: tuple[torch.Tensor, Any], modulus: int | None) -> None:
    ids, every = found

    def answer(text: list[int]) -> int | None:
        return None if sum(text) % 5 == 0 else sum(text) % (modulus or 1)

    out = chosen_by(ids, select="vote", answer=None if modulus is None else answer)
    for b in range(3):
        texts = every.trajectories.sequences[b, :, 8:].tolist()
        means = every.trajectories.mean_logprobs[b].tolist()
        answers = [tuple(t) if modulus is None else answer(t) for t in texts]
        counts = [-1 if a is None else answers.count(a) for a in answers]
        if max(counts) < 0:
            counts = [0] * 5
        want = max(range(5), key=lambda i: (counts[i], means[i]))
        assert int(out.chosen[b]) == want
        assert out.scores[b].tolist() == [-np.inf if a is None else answers.count(a) for a in answers]


def test_select_by_a_verifier(found: tuple[torch.Tensor, Any]) -> None:
    ids, every = found
    seen = []

    def verifier(text: list[int]) -> float:
        seen.append(text)
        return float(text[0] % 2)

    out = chosen_by(ids, select=verifier)
    texts, means = every.trajectories.sequences[:, :, 8:].tolist(), every.trajectories.mean_logprobs.tolist()
    assert seen == [text for row in texts for text in row]
    for b in range(3):
        want = max(range(5), key=lambda i: (texts[b][i][0] % 2, means[b][i]))
        assert int(out.chosen[b]) == want


def test_ties_and_what_is_no_number() -> None:
    texts = [[1], [2], [3]]
    assert select_one(lambda _: 1.0, texts, [-2.0, -1.0, -1.0]) == (1, [1.0, 1.0, 1.0])
    assert select_one("logprob", texts, [float("nan"), -5.0, -7.0])[0] == 1
    assert select_one("value", texts, [-1.0] * 3, values=[float("nan"), 0.5, 0.6])[0] == 2
    assert select_one("vote", texts, [-1.0, -2.0, -0.5]) == (2, [1.0, 1.0, 1.0])
    # No answer never wins, however many there are; where there is nothing else, the likeliest text is taken.
    assert select_one("vote", texts, [0.0, 0.0, -9.0], answer=lambda t: t[0] if t[0] == 3 else None)[0] == 2
    assert select_one("vote", texts, [-3.0, -1.0, -9.0], answer=lambda _: None)[0] == 1
    # 1 and 1.0 are one answer.
    assert select_one("vote", texts, [-3.0, -2.0, -1.0], answer=lambda t: [1, 1.0, 7][t[0] - 1])[0] == 1
    with pytest.raises(InputError, match="returns a number; got None"):
        select_one(lambda _: None, texts, [0.0] * 3)  # type: ignore[arg-type,return-value]
    with pytest.raises(InputError, match="hashable"):
        select_one("vote", texts, [0.0] * 3, answer=lambda t: t)  # type: ignore[arg-type,return-value]
    with pytest.raises(InputError, match="hashable"):
        select_one("vote", texts, [0.0] * 3, answer=np.array)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("answers", "scores", "chosen"),
    [
        ([None, None, 3, None, None, 3, None, None], [-np.inf] * 2 + [2.0] + [-np.inf] * 2 + [2.0] + [-np.inf] * 2, 2),
        ([5, None, None, None, None, None, None, None], [1.0] + [-np.inf] * 7, 0),
        ([5, 6, 6, 6, 6, 6, 6, 6], [1.0] + [7.0] * 7, 1),
        ([None] * 8, [-np.inf] * 8, 0),
    ],
)
def test_no_answer_scores_below_every_answer(answers: list[int | None], scores: list[float], chosen: int) -> None:
    texts, means = [[i] for i in range(8)], [-float(i) for i in range(8)]  # the first is the likeliest
    got = select_one("vote", texts, means, answer=lambda t: answers[t[0]])
    assert got == (chosen, scores)
    assert chosen == int(np.argmax(got[1]))


def test_of_trajectories_without_an_answer_the_likeliest_is_chosen(found: tuple[torch.Tensor, Any]) -> None:
    ids, every = found
    out = chosen_by(ids, select="vote", answer=lambda _: None)
    assert torch.equal(out.chosen, every.trajectories.mean_logprobs.argmax(1))
    assert bool((out.scores == -torch.inf).all())


@pytest.mark.parametrize(
    "answer",
    [
        lambda t: torch.tensor(7),
        lambda t: torch.tensor([7, 8]),
        lambda t: ("seven", (torch.tensor(7),)),
        lambda t: frozenset([torch.tensor(7)]),
        lambda t: None if t == [1] else object(),
    ],
)
def test_answers_that_are_told_apart_by_identity_are_refused(answer: Any) -> None:
    with pytest.raises(InputError, match=r"answer: expected .*; got .*by identity.*Return an int, a str or a tuple"):
        select_one("vote", [[1], [2], [3]], [0.0] * 3, answer=answer)
    # By value: numpy's numbers, and what holds None.
    for seven in (np.int64(7), (7, None), frozenset({7})):
        assert select_one("vote", [[1], [2]], [0.0] * 2, answer=lambda _, x=seven: x)[1] == [2.0, 2.0]  # type: ignore[misc]


# --- a model of one's own, with a value head ------------------------------------------------------------------------

CYCLES = 4


class Thinker(LlamaForCausalLM):
    """A transformer with a recurrent head: a state is made anew four times from itself and the last layer's output."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        self.core = torch.nn.Linear(config.hidden_size, config.hidden_size)
        self.q = torch.nn.Linear(config.hidden_size, 1)
        self.transition: Any = None

    def states(self, x: torch.Tensor, move: Any) -> torch.Tensor:
        h = x
        for cycle in range(CYCLES):
            h = move(torch.tanh(self.core(h) + x), cycle)
        return h

    def forward(self, input_ids: Any = None, position_ids: Any = None, **kwargs: Any) -> Any:
        kwargs.pop("logits_to_keep", None)
        kwargs.pop("return_dict", None)
        outputs = self.model(input_ids=input_ids, position_ids=position_ids, **kwargs)

        def move(h: torch.Tensor, cycle: int) -> torch.Tensor:
            return h if self.transition is None else self.transition(h, cycle=cycle, positions=position_ids)

        h = self.states(outputs.last_hidden_state, move)
        return CausalLMOutputWithPast(logits=self.lm_head(h), past_key_values=outputs.past_key_values)


class ThinkerRecursion:
    def cycles(self, model: Any) -> int:
        return CYCLES

    def state_size(self, model: Any) -> int:
        return int(model.config.hidden_size)

    @contextmanager
    def perturbed(self, model: Any, transition: Transition) -> Iterator[None]:
        model.transition = transition
        try:
            yield
        finally:
            model.transition = None

    def value_head(self, model: Any) -> Any:
        return lambda states: model.q(states)[:, 0]


@functools.cache
def thinker() -> Any:
    torch.manual_seed(2)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=SIZE,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        initializer_range=0.4,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
    )
    model = Thinker(config).double().eval()
    model.generation_config.pad_token_id = PAD
    register_recursion(Thinker, ThinkerRecursion())
    return model


@torch.no_grad()
def thought(model: Any, text: list[int], how: How) -> tuple[torch.Tensor, float, int]:
    """Logits after a text, the value of its last state, and the cycles that it used."""
    x = model.model(input_ids=torch.tensor([text]), use_cache=False).last_hidden_state[0]
    recurring = Recurring(how, len(text))
    h = model.states(x, recurring)
    return model.lm_head(h)[-1], float(model.q(h)[-1]), recurring.used[-1] or CYCLES


@pytest.mark.smoke
def test_a_registered_model_with_a_value_head() -> None:
    model, (ids, mask) = thinker(), padded()
    assert isinstance(recursion_of(model), ThinkerRecursion)
    how = How(sigma=0.5, at=tuple(range(CYCLES)), halt=0.9)
    loop = RecursionDecoding(sigma=0.5, trajectories=4, seed=SEED, select="value", halt=how.halt)
    free = run(model, loop, ids, mask)
    ends = int(free.trajectories.sequences[0, 1, 10])
    out = run(model, loop, ids, mask, eos_token_id=ends)
    assert len(set(out.trajectories.lengths.flatten().tolist())) > 1
    for b in range(3):
        values = []
        for i in range(4):
            mine = How(how.sigma, how.at, how.halt, b, i)
            text, cycles = ids[b][mask[b].bool()].tolist(), 0
            for token in out.trajectories.sequences[b, i, 8 : 8 + int(out.trajectories.lengths[b, i])].tolist():
                logits, value, used = thought(model, text, mine)
                assert int(logits.argmax()) == token
                cycles += used
                text.append(token)
            values.append(value)
            assert int(out.trajectories.cycles[b, i]) == cycles
        assert out.trajectories.values[b].tolist() == pytest.approx(values, abs=CLOSE)
        assert int(out.chosen[b]) == int(np.argmax(values))
    assert torch.equal(out.scores, out.trajectories.values)
    assert model.transition is None


def test_an_adapter_that_does_not_call_the_transition(monkeypatch: pytest.MonkeyPatch) -> None:
    @contextmanager
    def nothing(self: Any, model: Any, transition: Transition) -> Iterator[None]:
        yield

    monkeypatch.setattr(ThinkerRecursion, "perturbed", nothing)
    with pytest.raises(UnsupportedModeError, match="went past it"):
        run(thinker(), RecursionDecoding(sigma=0.5, trajectories=2), prompts(2))


def test_the_protocol() -> None:
    assert isinstance(HrmTextRecursion(), LatentRecursion)
    assert isinstance(recursion_of(model_of()), HrmTextRecursion)
    for kind, recursion in ((Thinker, object()), ("Thinker", ThinkerRecursion()), (Thinker, ThinkerRecursion)):
        with pytest.raises(InputError, match="register_recursion"):
            register_recursion(kind, recursion)  # type: ignore[arg-type]


# --- one trajectory may be streamed ----------------------------------------------------------------------------------


class Collector:
    def __init__(self) -> None:
        self.got: list[int] = []
        self.ended = False

    def put(self, value: torch.Tensor) -> None:
        self.got += value.flatten().tolist()

    def end(self) -> None:
        self.ended = True


def test_streaming() -> None:
    streamer = Collector()
    loop = RecursionDecoding(sigma=0.3, trajectories=1, seed=SEED, streamer=streamer)  # type: ignore[arg-type]
    out = run(model_of(), loop, prompts(1))
    assert streamer.got == out.sequences[0].tolist()
    assert streamer.ended
    with pytest.raises(UnsupportedModeError, match="streamer"):
        RecursionDecoding(sigma=0.3, trajectories=2, streamer=streamer)  # type: ignore[arg-type]


# --- wrong use -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sigma": -0.1}, "sigma"),
        ({"sigma": float("nan")}, "sigma"),
        ({"sigma": True}, "sigma"),
        ({"trajectories": 0}, "trajectories"),
        ({"trajectories": []}, "trajectories"),
        ({"trajectories": [1, 1]}, "different whole numbers"),
        ({"trajectories": [-1]}, "trajectories"),
        ({"trajectories": 2.0}, "trajectories"),
        ({"when": "twice"}, "when"),
        ({"when": ()}, "when"),
        ({"when": (-1,)}, "when"),
        ({"when": 1}, "when"),
        ({"select": "best"}, "'logprob', 'vote', 'value'"),
        ({"answer": len}, "select='vote'"),
        ({"halt": 0.0}, "halt"),
        ({"halt": float("inf")}, "halt"),
        ({"seed": 0.5}, "seed"),
        ({"impl": "cuda"}, "impl"),
    ],
)
def test_settings_out_of_range(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        RecursionDecoding(**{"sigma": 0.1} | settings)


@pytest.mark.parametrize(
    ("settings", "call", "message"),
    [
        ({"when": (3,)}, {}, "cycles from 0 to 2"),
        ({"select": "value"}, {}, "no value head"),
        ({"rows": [0]}, {}, "row"),
        ({"rows": [0, -1]}, {}, "row"),
        ({}, {"num_beams": 2}, "greedy decoding or sampling"),
        ({}, {"prompt_lookup_num_tokens": 2}, "greedy decoding or sampling"),
        ({}, {"guidance_scale": 1.5}, "guidance_scale"),
        ({}, {"output_scores": True}, "output_scores"),
        ({}, {"output_hidden_states": True}, "output_hidden_states"),
        ({}, {"compile_config": CompileConfig()}, "compile"),
    ],
)
def test_calls_that_are_refused(settings: dict[str, Any], call: dict[str, Any], message: str) -> None:
    model = model_of()
    with pytest.raises((InputError, UnsupportedModeError), match=message):
        run(model, RecursionDecoding(**{"sigma": 0.1} | settings), prompts(2), **call)
    assert hooks_of(model) == 0


def test_halting_needs_a_third_cycle() -> None:
    with pytest.raises(InputError, match="3 cycles"):
        run(model_of(2), RecursionDecoding(sigma=0.1, halt=0.5), prompts(2))


def test_models_that_do_not_recur() -> None:
    loop = RecursionDecoding(sigma=0.1)
    with pytest.raises(UnsupportedModelError, match="register_recursion"):
        run(shared("llama", 1), loop, prompts(2))
    base = hrm(dtype=torch.float32)
    members = {"expert": shared("llama", 1, VOCAB), "antiexpert": shared("llama", 2, VOCAB)}
    composed = proxytune.wrap(base, **members, alpha=0.5, check_vocabulary=False)
    with pytest.raises(UnsupportedModelError, match="base"):
        run(composed, loop, prompts(2))
    with pytest.raises(UnsupportedModeError, match="decoder-only"):
        run(shared("t5", 1), loop, prompts(2))


def test_a_cache_that_holds_something_is_refused() -> None:
    model, ids = model_of(), prompts(2)
    cache = model(input_ids=ids[:, :4], use_cache=True).past_key_values
    with pytest.raises(UnsupportedModeError, match="past_key_values"):
        run(model, RecursionDecoding(sigma=0.1), ids, past_key_values=cache)
    # An empty one is taken, whatever its size.
    empty = StaticCache(config=model.config, max_cache_len=32)
    loop = RecursionDecoding(sigma=0.3, trajectories=2, seed=SEED)
    out = run(model, loop, ids, past_key_values=empty)
    assert torch.equal(out.sequences, run(model, loop, ids).sequences)


def test_compiled_models_are_refused() -> None:
    loop = RecursionDecoding(sigma=0.1)
    whole, inside, forward = hrm(), hrm(), hrm()
    whole.compile(backend="eager")
    inside.model.H_module.compile(backend="eager")
    forward.forward = torch.compile(forward.forward, backend="eager")
    for model in (whole, inside, forward):
        with pytest.raises(UnsupportedModeError, match="compiled"):
            run(model, loop, prompts(2))
    # torch.compile's wrapper hands over the model as it is, which runs eagerly.
    out = run(torch.compile(model_of(), backend="eager"), RecursionDecoding(sigma=0.3, seed=SEED), prompts(2))
    assert torch.equal(out.sequences, run(model_of(), RecursionDecoding(sigma=0.3, seed=SEED), prompts(2)).sequences)


def test_nothing_is_compiled_on_the_way(monkeypatch: pytest.MonkeyPatch) -> None:
    # On a GPU transformers compiles by itself where the cache is static; here as if this were one.
    model = hrm()
    monkeypatch.setattr(type(model), "_valid_auto_compile_criteria", lambda self, _, config: not config.disable_compile)
    monkeypatch.setattr(type(model), "get_compiled_call", lambda *_: pytest.fail("a compiled forward pass"))
    loop = RecursionDecoding(sigma=0.3, trajectories=2, seed=SEED)
    for mode in ("static", "static-chunked"):
        out = run(model, loop, prompts(2), **MODES[mode])
        assert torch.equal(out.sequences, run(model_of(), loop, prompts(2)).sequences)


class Fails(LogitsProcessor):
    """Fails at the third token, or leaves no token there."""

    def __init__(self, *, mask: bool = False) -> None:
        self.mask = mask

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if input_ids.shape[1] == 10 and not self.mask:
            raise RuntimeError("a processor's own")
        return scores.fill_(-torch.inf) if input_ids.shape[1] == 10 else scores


def test_nothing_stays_on_the_model() -> None:
    model, ids = hrm(), prompts(2)
    loop = RecursionDecoding(sigma=0.3, trajectories=2, seed=SEED)
    for processor, error in ((Fails(), RuntimeError), (Fails(mask=True), NumericalError)):
        with pytest.raises(error):
            run(model, loop, ids, logits_processor=[processor])
        assert hooks_of(model) == 0

    def bad(_: list[int]) -> float:
        raise KeyError("a verifier's own")

    with pytest.raises(KeyError, match="verifier"):
        run(model, RecursionDecoding(sigma=0.3, select=bad), ids)
    first = run(model, loop, ids).sequences
    assert hooks_of(model) == 0
    twin = copy.deepcopy(model)
    assert hooks_of(twin) == 0
    assert torch.equal(run(twin, loop, ids).sequences, first)
    plain = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None}
    assert torch.equal(model.generate(ids, **plain), hrm().generate(ids, **plain))


class Meddles(LogitsProcessor):
    """Runs the model for a row of its own meanwhile."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.model(input_ids=input_ids[:1])
        return scores


def test_another_forward_pass_of_the_model_is_refused() -> None:
    model = hrm()
    with pytest.raises(UnsupportedModeError, match="another thread"):
        run(model, RecursionDecoding(sigma=0.3), prompts(2), logits_processor=[Meddles(model)])
    assert hooks_of(model) == 0


# --- the README's example --------------------------------------------------------------------------------------------

README = (Path(__file__).resolve().parents[3] / "README.md").read_text(encoding="utf-8")


def test_the_readme_s_example() -> None:
    (block,) = [b for b in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if "RecursionDecoding(" in b]
    names: dict[str, Any] = {"proxytune": proxytune, "prompt_ids": prompts(2), "torch": torch}
    exec(block, names)
    out = names["out"]
    assert out.trajectories.sequences.shape[:2] == (2, 8)
    assert out.chosen.shape == (2,)
    assert (out.trajectories.cycles % 2 == 0).all()
    assert names["voted"].chosen.shape == (2,)
