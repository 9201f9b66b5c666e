"""What is drawn follows the law, drawn with the torch implementation: the others draw the same tokens.

Each row of a batch is the same distribution at another position. Seeds are fixed; a statistic may be four of its σ off,
which one in 16,000 such tests would be by chance. χ² is of bins with at least ten expected draws, and its normal
approximation by Wilson and Hilferty. After each test comes what it must notice.

Untruncated draws look at 1024 columns each, so that 10⁵ of them take a minute: the fast tests make fewer, and the ones
marked slow do not.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from support.draws import counts_of, law, sigmas

from proxytune import ops
from proxytune.ops import StepOutput
from proxytune.ops.noise import Noise
from proxytune.ops.sampling_params import SamplingParams

CHUNK = 128  # rows at once: the words of their noise stay in the cache


def draw(
    z: torch.Tensor,
    n: int,
    *,
    draws: int = 1,
    seed: int = 0,
    by: str = "position",
    want: tuple[str, ...] = ("tokens",),
    **s: Any,
) -> StepOutput:
    """`n` independent decisions on the same row; the noise differs in the position, the row or the branch."""
    parts = []
    for start in range(0, n, CHUNK):
        rows = min(CHUNK, n - start)
        index = torch.arange(start, start + rows)
        keys: dict[str, Any] = {"row": torch.zeros(rows, dtype=torch.int64), by: index}
        noise = Noise.of(rows, seed=seed, **keys)
        parts.append(
            ops.step(
                [z.expand(rows, -1)],
                sampling=SamplingParams.of(rows, **s),
                noise=noise,
                draws=draws,
                want=want,
                impl="torch",
            )
        )
    return StepOutput(**{name: torch.cat([getattr(p, name) for p in parts]) for name in want})


def uneven(width: int = 3300) -> torch.Tensor:
    """Tiles of very different mass, one of them masked, each with a few tokens that stand out."""
    z = torch.randn(width, generator=torch.Generator().manual_seed(1)) * 0.5
    z[[4, 1100, 1400, 2047, width - 1]] += torch.tensor([6.5, 6.0, 5.0, 5.0, 6.5])
    z[1024:2048] += 1.0
    z[2048:3072] = -torch.inf
    z[torch.arange(0, 1024, 3)] = -torch.inf
    return z


# --- one draw ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [5000, pytest.param(100_000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("temperature", [1.0, 0.6, 2.5])
def test_plain_draws_over_tiles_of_uneven_mass(n: int, temperature: float) -> None:
    z = uneven()
    counts = counts_of(draw(z, n, temperature=temperature).tokens, len(z))  # type: ignore[arg-type]
    p = law(z, temperature)
    assert abs(sigmas(counts, p)) < 4
    # By tile, where the two levels would first disagree.
    tiles = np.array([part.sum() for part in np.split(p, [1024, 2048, 3072])])
    of_tiles = np.array([part.sum() for part in np.split(counts, [1024, 2048, 3072])])
    assert abs(sigmas(of_tiles, tiles)) < 4
    # Controls: another temperature, and a tile that is half as heavy again, would have been seen.
    assert sigmas(counts, law(z, temperature * 1.25)) > 5
    heavier = tiles * [1.5, 1, 1, 1]
    assert sigmas(of_tiles, heavier / heavier.sum()) > 5


@pytest.mark.parametrize("by", ["row", "branch"])
def test_rows_and_branches_are_as_independent_as_positions(by: str) -> None:
    z = torch.tensor([0.0, 1.0, 2.0, -1.0, 0.5] * 3)
    tokens = draw(z, 50_000, by=by, top_k=15).tokens
    assert tokens is not None
    assert abs(sigmas(counts_of(tokens, 15), law(z))) < 4
    # Neighbouring keys: all pairs of tokens.
    pairs = tokens[:-1:2, 0] * 15 + tokens[1::2, 0]
    p = np.outer(law(z), law(z)).ravel()
    assert abs(sigmas(counts_of(pairs, 225), p)) < 4


@pytest.mark.parametrize(
    ("settings", "count"),
    [
        ({"top_k": 7}, 7), ({"top_p": 0.8}, None), ({"min_p": 0.1}, None), ({"top_k": 30, "temperature": 1.7}, 30),
        ({"top_k": 20, "top_p": 0.9, "min_p": 0.02, "temperature": 0.7}, None),
    ],
)  # fmt: skip
def test_truncated_draws(settings: dict[str, float], count: int | None) -> None:
    z = torch.randn(250, generator=torch.Generator().manual_seed(2)) * 1.5
    n = 10_000
    t = settings.get("temperature", 1.0)
    got = draw(z, n, want=("tokens", "kept"), **settings)
    assert got.kept is not None
    kept = torch.zeros(250, dtype=torch.bool)
    kept[z.argsort(descending=True)[: int(got.kept[0])]] = True
    assert count is None or int(kept.sum()) == count
    counts = counts_of(got.tokens, 250)  # type: ignore[arg-type]
    assert abs(sigmas(counts, law(z, t, kept))) < 4
    # Controls: a kept set that is a token short, and one that is not renormalised by p, would have been seen.
    fewer = kept.clone()
    fewer[z.argsort(descending=True)[int(kept.sum()) - 1]] = False
    with pytest.raises(AssertionError, match="probability 0"):
        sigmas(counts, law(z, t, fewer))
    assert sigmas(counts, law(z, t * 1.2, kept)) > 6


def test_a_fork_is_drawn_at_its_own_temperature() -> None:
    z = torch.linspace(-2, 2, 12)
    for threshold, t in ((0.5, 2.0), (5.0, 0.5)):
        s = {"temperature": 0.5, "fork_threshold": threshold, "fork_temperature": 2.0, "top_k": 12}
        counts = counts_of(draw(z, 20_000, **s).tokens, 12)  # type: ignore[arg-type]
        assert abs(sigmas(counts, law(z, t))) < 4
        assert sigmas(counts, law(z, 2.5 - t)) > 6


# --- without replacement ----------------------------------------------------------------------------------------------


def plackett_luce(p: np.ndarray[Any, Any], n: int) -> dict[tuple[int, ...], float]:
    """Exact probabilities of ordered draws without replacement."""
    out = {}
    for ids in itertools.permutations(range(len(p)), n):
        left, value = 1.0, 1.0
        for i in ids:
            value *= p[i] / left
            left -= p[i]
        out[ids] = value
    assert abs(sum(out.values()) - 1) < 1e-9
    return out


# Nine tokens, in one tile, or spread over three so that both levels of the draw are needed.
NINE = torch.tensor([1.5, 1.0, 0.5, 0.0, -0.5, -1.0, 2.0, 0.2, -2.0])
ONE_TILE = torch.arange(9)
THREE_TILES = torch.tensor([0, 7, 1023, 1024, 1500, 2047, 2048, 2049, 2099])


def place(z: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
    out = torch.full((int(at.max()) + 1,), -torch.inf)
    out[at] = z
    return out


@pytest.mark.parametrize("n_draws", [2, 3])
@pytest.mark.parametrize("how", ["truncated", "one tile", "three tiles"])
def test_draws_without_replacement_are_plackett_luce(how: str, n_draws: int) -> None:
    at = THREE_TILES if how == "three tiles" else ONE_TILE
    n = {"truncated": 50_000, "one tile": 6000, "three tiles": 3000}[how]
    settings = {"top_k": 9} if how == "truncated" else {}
    tokens = draw(place(NINE, at), n, draws=n_draws, **settings).tokens
    assert tokens is not None
    index = torch.searchsorted(at, tokens)
    assert torch.equal(at[index], tokens)
    code = (index * 9 ** torch.arange(n_draws)).sum(1)
    counts = counts_of(code, 9**n_draws)

    def table(p: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        out = np.zeros(9**n_draws)
        for ids, value in plackett_luce(p, n_draws).items():
            out[sum(i * 9**j for j, i in enumerate(ids))] = value
        return out

    p = law(NINE)
    assert abs(sigmas(counts, table(p))) < 4
    # Controls: the second drawn in proportion to something flatter; and draws with replacement have pairs of equals.
    assert sigmas(counts, table(law(NINE, 1.2))) > 6
    with pytest.raises(AssertionError, match="probability 0"):
        sigmas(counts + np.outer(p, p).ravel().repeat(9 ** (n_draws - 2)), table(p))


def test_what_has_no_mass_in_float32_is_drawn_by_its_law_all_the_same() -> None:
    """One token holds everything: the second draw is from e⁻¹⁰⁰⁰ against 2e⁻¹⁰⁰⁰."""
    z = torch.tensor([0.0, -1000.0, -1000.0 + math.log(2), -1001.0])
    for at, settings, n in ((ONE_TILE[:4], {"top_k": 4}, 20_000), (THREE_TILES[::2][:4].contiguous(), {}, 2000)):
        tokens = draw(place(z, at), n, draws=2, **settings).tokens
        assert tokens is not None
        assert (tokens[:, 0] == at[0]).all()
        counts = counts_of(torch.searchsorted(at, tokens[:, 1].contiguous()), 4)[1:]
        # 1000 in float32 is good to 3e-5, which is far below what these draws can see.
        assert abs(sigmas(counts, law(z[1:]))) < 4


# --- the weights of draws without replacement -------------------------------------------------------------------------


def kool(z: torch.Tensor, f: torch.Tensor, k: int, n: int, at: torch.Tensor, **settings: Any) -> torch.Tensor:
    """Σ w_i f_i of k draws, with κ the (k+1)-th key: one estimate of E[f] per decision."""
    got = draw(place(z, at), n, draws=k + 1, want=("tokens", "keys", "draw_logprobs"), **settings)
    assert got.keys is not None
    assert got.draw_logprobs is not None
    assert got.tokens is not None
    kappa = got.keys[:, k:].double()
    logp = got.draw_logprobs[:, :k].double()
    weights = logp.exp() / -torch.expm1(-torch.exp(logp - kappa))
    return (weights * f[torch.searchsorted(at, got.tokens[:, :k].contiguous())]).sum(1)


@pytest.mark.parametrize("k", [1, 2, 4])
@pytest.mark.parametrize("how", ["truncated", "three tiles"])
def test_kool_s_weights_are_unbiased(how: str, k: int) -> None:
    f = torch.tensor([0.0, 3.0, -1.0, 2.0, 5.0, -4.0, 1.0, 0.5, 7.0]).double()
    exact = float((torch.from_numpy(law(NINE)) * f).sum())
    if how == "truncated":
        estimates = kool(NINE, f, k, 30_000, ONE_TILE, top_k=9)
    else:
        estimates = kool(NINE, f, k, 1500, THREE_TILES)
    off = float(estimates.mean()) - exact
    assert abs(off) <= 4 * float(estimates.std()) / math.sqrt(len(estimates))
    ones = kool(NINE, torch.ones(9).double(), k, 4000, ONE_TILE, top_k=9)
    assert abs(float(ones.mean()) - 1) <= 4 * float(ones.std()) / math.sqrt(len(ones))


def test_a_control_equal_votes_are_biased() -> None:
    f = torch.tensor([0.0, 3.0, -1.0, 2.0, 5.0, -4.0, 1.0, 0.5, 7.0]).double()
    tokens = draw(NINE, 20_000, draws=4, top_k=9).tokens
    assert tokens is not None
    votes = f[tokens].mean(1)
    off = float(votes.mean()) - float((torch.from_numpy(law(NINE)) * f).sum())
    assert abs(off) > 10 * float(votes.std()) / math.sqrt(len(votes))


@pytest.mark.parametrize("settings", [{}, {"top_k": 9}])
def test_the_largest_key_is_gumbel(settings: dict[str, Any]) -> None:
    """Of normalised log-probabilities, it is a standard one, and independent of which token it is."""
    n = 20_000 if settings else 3000
    got = draw(place(NINE, ONE_TILE if settings else THREE_TILES), n, want=("tokens", "keys"), **settings)
    assert got.keys is not None
    assert got.tokens is not None
    u = torch.exp(-torch.exp(-got.keys[:, 0].double()))
    # Kolmogorov and Smirnov: √n D is above 2.2 once in 16,000 times.
    d = (u.sort().values - (torch.arange(n) + 0.5) / n).abs().max()
    assert float(d) * math.sqrt(n) < 2.2
    top = got.tokens[:, 0] == got.tokens[:, 0].mode().values
    difference = float(u[top].mean() - u[~top].mean())
    assert abs(difference) <= 4 * math.sqrt((1 / int(top.sum()) + 1 / int((~top).sum())) / 12)
    off = torch.exp(-torch.exp(-(got.keys[:, 0].double() + 0.25)))  # the control: keys a quarter too large
    assert float((off.sort().values - (torch.arange(n) + 0.5) / n).abs().max()) * math.sqrt(n) > 2.2


@pytest.mark.parametrize("settings", [{}, {"top_p": 0.9}])
def test_the_first_of_several_draws_is_the_single_one(settings: dict[str, Any]) -> None:
    z = uneven()
    several, one = (draw(z, 500, draws=n, want=("tokens", "keys"), **settings) for n in (4, 1))
    assert torch.equal(several.tokens[:, :1], one.tokens)  # type: ignore[index, arg-type]
    assert torch.equal(several.keys[:, :1], one.keys)  # type: ignore[index, arg-type]


# --- coupled draws ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["truncated", "one tile", "three tiles"])
def test_the_same_noise_couples_similar_rows(how: str) -> None:
    """A base and a slightly shifted row agree about as often as any coupling allows, and far more than independent."""
    at = THREE_TILES if how == "three tiles" else ONE_TILE
    settings = {"top_k": 9} if how == "truncated" else {}
    n = 8000 if settings else 1500
    shifted = NINE + 0.1 * torch.tensor([1.0, -1, 1, -1, 1, -1, 0, 1, -1])
    a = draw(place(NINE, at), n, **settings).tokens
    b = draw(place(shifted, at), n, **settings).tokens
    other = draw(place(shifted, at), n, seed=1, **settings).tokens
    again = draw(place(NINE, at), n, **settings).tokens
    assert torch.equal(a, again)  # type: ignore[arg-type]
    p, q = law(NINE), law(shifted)
    agree, chance = (float((a == x).float().mean()) for x in (b, other))
    spread = 4 * 0.5 / math.sqrt(n)
    assert abs(chance - float((p * q).sum())) <= spread  # the control: other noise, no coupling
    total_variation = float(abs(p - q).sum() / 2)
    # Gumbel's coupling disagrees with a probability of at most 2 TV / (1 + TV) (Daliri et al. 2025, arXiv 2408.07978),
    # where all noise is per token. By tile and then by token, it is so at each of the two levels.
    levels = 2 if how == "three tiles" else 1
    assert agree >= 1 - levels * 2 * total_variation / (1 + total_variation) - spread
    assert agree > chance + 0.3


def test_a_constant_added_to_the_logits_changes_no_draw() -> None:
    z = uneven()
    a, b = (draw(x, 300).tokens for x in (z, z + 2.0))
    assert float((a == b).float().mean()) > 0.995  # type: ignore[union-attr]
