"""Truncated draws whose candidates lie in awkward places: the same tokens as torch's, and as many kept."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support.interpreter import patch_the_language_once_per_launch

from proxytune import ops

WIDTH, NARROW = 9000, 8000
"""More groups than units of them, and a companion that ends within a group."""


def awkward_rows() -> dict[str, torch.Tensor]:
    """Rows of the base, float32 `[WIDTH]`, by what is awkward about them."""
    random = torch.Generator().manual_seed(3)
    rows = {
        name: torch.randn(WIDTH, generator=random)
        for name in ("clustered", "masked neighbours", "past the companion", "ties", "plateau", "plain")
    }
    rows["clustered"][4000:4060] += 9
    rows["masked neighbours"][100:9000:150] += 9
    rows["masked neighbours"][101:9000:150] = -torch.inf
    rows["past the companion"][NARROW - 30 : NARROW + 30] += 9
    rows["ties"] = rows["ties"].round() + 5 * (torch.arange(WIDTH) % 301 == 0)
    rows["plateau"][2000:2300] = 7.0
    return rows


@pytest.mark.parametrize(
    "settings",
    [
        {"top_k": 50, "top_p": 0.9},
        {"top_k": 5, "top_p": 0.5, "temperature": 0.7},
        {"top_k": 100, "temperature": 3e3},
        {"top_k": 200, "min_p": 1e-3},
        {"top_p": 0.3, "temperature": 0.5},
    ],
    ids=str,
)
def test_the_same_tokens_as_torchs(settings: dict[str, float]) -> None:
    pytest.importorskip("triton")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        patch_the_language_once_per_launch()
    base = torch.stack(list(awkward_rows().values())).to(device)
    companion = (0.1 * base[:, :NARROW]).nan_to_num(neginf=0.0)
    companion[1, 250:NARROW:300] = -torch.inf  # no shift of these tokens
    rows = len(base)
    sampling = ops.SamplingParams.of(rows, device=torch.device(device), **settings)  # type: ignore[arg-type]
    noise = ops.Noise.of(rows, seed=1, position=2, device=torch.device(device))
    want = ("tokens", "kept", "draw_logprobs")
    with np.errstate(all="ignore"):
        found, expected = (
            ops.step([base, companion], (1.0, 0.5), sampling=sampling, noise=noise, draws=3, want=want, impl=impl)
            for impl in ("triton", "torch")
        )
    assert torch.equal(found.kept, expected.kept)
    assert torch.equal(found.tokens, expected.tokens)
    torch.testing.assert_close(found.draw_logprobs, expected.draw_logprobs, atol=2e-5, rtol=1e-5)
