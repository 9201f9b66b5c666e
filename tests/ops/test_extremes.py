"""What an adversary found: large logits, finite masks, keys of the wrong form, weights that round to nothing."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from support.decisions import Run

from proxytune.errors import InputError
from proxytune.ops import draw_logprobs, step, verify
from proxytune.ops.noise import Noise
from proxytune.ops.sampling_params import SamplingParams


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_finite_mask_in_two_members_leaves_the_divergence_finite(run: Run, device: str, dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(0)
    base, expert, antiexpert = (torch.randn(2, 1500, generator=g).to(dtype) for _ in range(3))
    base[:, 7] = expert[:, 7] = torch.finfo(dtype).min
    kl = run([x.to(device) for x in (base, expert, antiexpert)], (1.0, 0.5, -0.5), want=("kl",)).kl
    assert kl is not None
    b, e, a = (x.double() for x in (base, expert, antiexpert))
    z = b + 0.5 * (e - a)
    p, q = z.log_softmax(1), b.log_softmax(1)
    real = p.exp() > 0
    want = torch.where(real, p.exp() * (p - q), 0.0).sum(1)
    torch.testing.assert_close(kl.double().cpu(), want, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_finite_mask_is_as_little_a_likely_token_as_minus_infinity(run: Run, device: str, dtype: torch.dtype) -> None:
    x = torch.randn(3, 25, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    for count in (2, 8, 24):  # 23, 17 and one unmasked
        finite, infinite = (
            run([x.index_fill(1, torch.arange(count, device=device), mask)], want=("confidence",)).confidence
            for mask in (torch.finfo(dtype).min, -torch.inf)
        )
        assert finite is not None
        assert infinite is not None
        assert torch.isfinite(finite).all()
        torch.testing.assert_close(finite, infinite, atol=1e-6, rtol=0)


@pytest.mark.parametrize("offset", [0.0, 1e3, 6e4, 1e6])
def test_large_logits_lose_no_digits(run: Run, device: str, offset: float) -> None:
    g = torch.Generator().manual_seed(1)
    base, other = torch.randn(3, 2100, generator=g) * 3 + offset, torch.randn(3, 2100, generator=g)
    want = ("entropy", "varentropy", "confidence", "kl", "logprobs")
    out = run([base.to(device), other.to(device)], (1.0, 1.0), want=want)
    b = base.double()
    z = (base + other).double()  # the combined logits as rounded; what is asked is what becomes of them
    p, q = z.log_softmax(1), b.log_softmax(1)
    exact = {
        "entropy": -(p.exp() * p).sum(1),
        "varentropy": (p.exp() * p**2).sum(1) - (p.exp() * p).sum(1) ** 2,
        "confidence": -p.topk(20).values.mean(1),
        "kl": (p.exp() * (p - q)).sum(1),
        "logprobs": p.amax(1, keepdim=True),
    }
    for name, value in exact.items():
        torch.testing.assert_close(getattr(out, name).double().cpu(), value, atol=3e-5, rtol=2e-5)


@pytest.mark.parametrize("name", ["seed", "row", "position", "branch"])
@pytest.mark.parametrize("wrong", ["shape", "dtype"])
def test_keys_of_another_form_are_refused(name: str, wrong: str) -> None:
    noise = Noise.of(3)
    value = torch.zeros(1, dtype=torch.int64) if wrong == "shape" else torch.zeros(3, dtype=torch.int32)
    with pytest.raises(InputError, match=r"noise: expected keys and settings for 3 rows on cpu, these as torch\.int64"):
        step([torch.zeros(3, 9)], sampling=SamplingParams.of(3), noise=replace(noise, **{name: value}))


@pytest.mark.parametrize("name", ["top_k", "top_p", "log_min_p"])
def test_settings_of_another_form_are_refused(name: str) -> None:
    sampling = SamplingParams.of(3, top_k=2)
    wrong = replace(sampling, **{name: getattr(sampling, name)[:1]})
    with pytest.raises(InputError, match="sampling: expected keys and settings for 3 rows"):
        step([torch.zeros(3, 9)], sampling=wrong, noise=Noise.of(3))


def test_positions_are_taken_by_their_lower_32_bits(run: Run, device: str) -> None:
    rows = torch.randn(4, 1100, generator=torch.Generator().manual_seed(2)).to(device)
    sampling, noise = SamplingParams.of(4, device=device), Noise.of(4, seed=3, device=device)
    here, beyond = (
        run([rows], sampling=sampling, noise=noise.at(noise.position + 5 + far)).tokens for far in (0, 1 << 32)
    )
    assert here is not None
    assert beyond is not None
    assert here.tolist() == beyond.tolist()


def test_a_weight_that_rounds_to_nothing_is_none(run: Run, device: str) -> None:
    base, silent = torch.zeros(1, 4, device=device), torch.full((1, 4), -torch.inf, device=device)
    heard = torch.arange(4.0, device=device)[None]
    out = run([base, silent, heard], (1.0, 1e-50, 1.0), want=("scores",)).scores
    assert out is not None
    assert out.tolist() == [[0.0, 1.0, 2.0, 3.0]]


@pytest.mark.parametrize("default", ["bfloat16", "meta"])
def test_the_process_may_have_other_defaults(default: str) -> None:
    # So many rows that they are read in blocks, and single logits are looked up again.
    g, rows, weights = torch.Generator().manual_seed(0), 300, (1.0, 0.7, -0.7)
    members = [torch.randn(rows, 1100, generator=g) for _ in range(3)]
    sampling, noise = SamplingParams.of(rows, top_k=torch.tensor([5, 0] * (rows // 2))), Noise.of(rows, seed=1)
    ids = torch.arange(rows)
    texts = {"sampling": sampling.pick(ids[: rows // 2]), "noise": noise.pick(ids[: rows // 2])}

    def found() -> list[torch.Tensor]:
        drawn = step(members, weights, sampling=sampling, noise=noise, want=("tokens", "draw_logprobs"), impl="torch")
        verified = verify(members, weights, drafted=ids[: rows // 2, None], **texts, impl="torch")
        shares = draw_logprobs(members, weights, sampling=sampling, ids=ids[:, None])
        return [drawn.tokens, drawn.draw_logprobs, verified.tokens, *shares]

    want, before = found(), torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16 if default == "bfloat16" else before)
    try:
        with torch.device("meta") if default == "meta" else nullcontext():
            got = found()
    finally:
        torch.set_default_dtype(before)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
