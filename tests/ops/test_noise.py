"""The noise is Philox, word for word, and its variates are Gumbel's: finite, exact, and unrelated between keys."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import oracle
from support.decisions import Run, random_keys

from proxytune.ops.noise import LATENT, SLOTS, TILES, TOKENS, Noise, slotted
from proxytune.ops.philox import gumbel, normal, philox
from proxytune.ops.sampling_params import SamplingParams

# The known answers of Random123 1.14 (`kat_vectors`, philox4x32 with 10 rounds): counter, key, result.
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]
EDGES = [0, 1, 255, 256, 2**16 - 1, 2**24 - 1, 2**24, 2**24 + 255, 2**31, 2**32 - 256, 2**32 - 2, 2**32 - 1]

word = st.integers(0, 2**32 - 1)


def _signed(key: tuple[int, int]) -> int:
    seed = key[1] << 32 | key[0]
    return seed - 2**64 if seed >= 2**63 else seed


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN, ids=["zero", "ones", "pi"])
def test_known_answers(counter: tuple[int, ...], key: tuple[int, int], expected: tuple[int, ...], device: str) -> None:
    assert tuple(int(x) for x in oracle.philox(_signed(key), *counter)) == expected
    words = philox(torch.tensor(_signed(key), device=device), *(torch.tensor(c, device=device) for c in counter))
    assert tuple(int(x) for x in words) == expected


@given(st.integers(-(2**63), 2**63 - 1), word, word, word, word)
@settings(max_examples=300, deadline=None)
def test_every_word_is_the_oracle_s(seed: int, c0: int, c1: int, c2: int, c3: int) -> None:
    ours = philox(torch.tensor(seed), *(torch.tensor(c) for c in (c0, c1, c2, c3)))
    assert [int(x) for x in ours] == [int(x) for x in oracle.philox(seed, c0, c1, c2, c3)]


@pytest.mark.parametrize("count", [0, 1 << 14, (1 << 15) + 7])
def test_many_words_are_those_of_fewer(count: int) -> None:
    """NumPy computes them in blocks."""
    seed, c1 = torch.tensor([[-5], [1 << 40]]), torch.tensor([[3], [(1 << 32) - 1]])
    index = torch.arange(count)[None]
    words = philox(seed, index, c1, c1 - 3, c1 - 2)
    for piece in (*range(0, count, 5000), max(0, count - 9)):
        some = slice(piece, min(piece + 9, count))
        for all_of, own in zip(words, philox(seed, index[:, some], c1, c1 - 3, c1 - 2), strict=True):
            assert torch.equal(all_of[:, some], own)
    assert [word.shape for word in words] == [(2, count)] * 4


def test_a_key_s_variates_are_those_of_its_counter(device: str) -> None:
    keys = random_keys(np.random.default_rng(0), 64)
    noise = Noise.of(64, device=device, **keys)
    truth = oracle.Keys(**{k: x.numpy() for k, x in keys.items()})
    index = torch.randint(2**31, (64, 100))
    for stream in (TOKENS, TILES):
        expected = np.stack([truth.gumbel(b, index[b].numpy(), stream) for b in range(64)])
        got = noise.gumbel(index.to(device), stream).cpu().numpy()
        assert (abs(got - expected) <= oracle.blur(expected)).all()


@pytest.mark.parametrize("extreme", [False, True])
def test_an_implementation_s_noise_through_the_contract(run: Run, slow_one: bool, extreme: bool, device: str) -> None:
    """In a flat row of which all tokens are drawn, key − log-probability is the variate itself, token by token."""
    rows, width = 4, 24 if slow_one else 1500
    keys = random_keys(np.random.default_rng(1), rows)
    if extreme:  # the ends of every range; as unsigned 32-bit words, and as a counter's last word, they are the largest
        keys = {
            "seed": torch.tensor([-(2**63), 2**63 - 1, -1, 2**32]),
            "row": torch.tensor([2**32 - 1, 2**31, 2**31 - 1, 0]),
            "position": torch.tensor([2**31, 2**32 - 1, 0, 2**31 - 1]),
            "branch": torch.tensor([2**30 - 1, 2**29, 0, 2**29 - 1]),
        }
    truth = oracle.Keys(**{k: x.numpy() for k, x in keys.items()})
    got = run(
        [torch.zeros(rows, width, device=device)],
        sampling=SamplingParams.of(rows, min_p=0.5, device=device),  # truncation that keeps all: the noise is per token
        noise=Noise.of(rows, device=device, **keys),
        draws=width,
        want=("tokens", "keys", "draw_logprobs"),
    )
    assert got.tokens is not None
    assert got.keys is not None
    assert got.draw_logprobs is not None
    np.testing.assert_allclose(got.draw_logprobs.cpu(), -math.log(width), atol=32 * oracle.UNIT)
    for b in range(rows):
        ids = got.tokens[b].cpu().numpy()
        assert sorted(ids) == list(range(width))
        expected = truth.gumbel(b, ids, TOKENS)
        # The variate, the sum with log V ≈ 7, and log V itself. A wrong bit of the word would show: the variates of
        # two words r and r' differ by about |r − r'| / 2³², and Philox leaves no bit where it was.
        off = abs((got.keys[b] - got.draw_logprobs[b]).cpu().numpy() - expected)
        assert (off <= oracle.blur(expected) + 64 * oracle.UNIT).all()


# --- the variates ----------------------------------------------------------------------------------------------------


def test_extreme_words_give_finite_variates(device: str) -> None:
    words = torch.tensor(EDGES, device=device)
    g = gumbel(words).cpu().double()
    assert g.isfinite().all()
    expected = torch.from_numpy(oracle.gumbel(np.array(EDGES, np.uint64)))
    assert (g - expected).abs().le(torch.from_numpy(oracle.blur(expected.numpy()))).all()
    assert g[0] == pytest.approx(math.log(2.0**33), abs=1e-5)  # u = 2⁻³³
    assert g[-1] == pytest.approx(-math.log(33 * math.log(2)), abs=1e-6)  # 1 − u = 2⁻³³
    assert g.max() < 22.9
    assert g.min() > -3.2


def _many(words: int) -> torch.Tensor:
    index = torch.arange(words // 16)
    seeds = torch.arange(16)[:, None] * 0x9E3779B97F4A7C1 - 2**62
    return philox(seeds, index, *(torch.tensor(c) for c in (3, 5, 4)))[0].flatten()


def test_variates_are_within_rounding_of_float64() -> None:
    words = torch.cat([_many(1 << 20), torch.arange(4096), 2**32 - 1 - torch.arange(4096)])
    # And all around the word where the series gives way to the logarithm.
    words = torch.cat([words, 2**26 + torch.arange(-2000, 2000)])
    expected = oracle.gumbel(words.numpy().astype(np.uint64))
    assert (abs(gumbel(words).numpy() - expected) <= oracle.blur(expected)).all()


def test_variates_never_fall_with_the_rank_of_their_word() -> None:
    words = _many(1 << 20).sort().values
    g = gumbel(words)
    # Float32's logarithm is not monotone to the last bit, and around u = 1/64 two formulas meet.
    assert (g[1:] - g[:-1]).max() <= 5e-6


def test_moments_and_tails() -> None:
    n = 1 << 21
    g = gumbel(_many(n)).double()
    variance = math.pi**2 / 6
    assert float(g.mean()) == pytest.approx(0.5772156649, abs=4 * math.sqrt(variance / n))
    # The kurtosis of Gumbel is 5.4: the variance of the variance is (5.4 − 1) σ⁴ / n.
    assert float(g.var()) == pytest.approx(variance, abs=4 * variance * math.sqrt(4.4 / n))
    for x in (-2.5, -2.0, -1.0, 0.0, 1.0, 3.0, 6.0, 9.0, 11.0):
        share = math.exp(-math.exp(-x))
        expected, sigma = n * share, math.sqrt(n * share * (1 - share))
        assert abs(int((g < x).sum()) - expected) <= 4 * sigma, x


def test_a_control_the_tails_notice_31_bits_and_a_naive_logarithm() -> None:
    """What would fail above: uniforms of 24 bits, for which −log(−log u) is coarse or infinite in the upper tail."""
    words = torch.arange(1 << 12)
    u = (words.float() + 0.5) * 2.0**-32
    naive = -torch.log(-torch.log(1.0 - u))
    expected = oracle.gumbel(words.numpy().astype(np.uint64))
    assert not (abs(naive.numpy() - expected) <= oracle.blur(expected)).all()


# --- no relation between keys ----------------------------------------------------------------------------------------

N = 1 << 17


@pytest.mark.parametrize("part", ["seed", "seed high", "row", "position", "branch", "stream", "index"])
def test_neighbours_in_any_part_of_the_key_have_nothing_in_common(part: str) -> None:
    base = {"seed": 7, "index": 0, "position": 11, "row": 2, "last": 4 * 3}
    other = dict(base)
    steps = {"seed high": ("seed", 1 << 32), "branch": ("last", 4), "stream": ("last", 1), "index": ("index", N)}
    name, step = steps.get(part, (part, 1))
    other[name] += step

    def words(key: dict[str, int]) -> torch.Tensor:
        index = torch.arange(N) + key["index"]
        return philox(
            *(torch.tensor(key["seed"]), index, *(torch.tensor(key[k]) for k in ("position", "row", "last")))
        )[0]

    a, b = words(base), words(other)
    assert int((a == b).sum()) <= 3  # N / 2³² of them by chance
    x, y = a.double() / 2**32 - 0.5, b.double() / 2**32 - 0.5
    correlation = float((x * y).mean() * 12)
    assert abs(correlation) <= 4 / math.sqrt(N)
    # All pairs of top nibbles are equally frequent: χ² with 255 degrees of freedom, four of its σ.
    table = torch.bincount((a >> 28) * 16 + (b >> 28), minlength=256).double()
    chi = float(((table - N / 256) ** 2 / (N / 256)).sum())
    assert abs(chi - 255) <= 4 * math.sqrt(2 * 255)
    # And every bit differs half of the time.
    for bit in range(32):
        flips = int((((a ^ b) >> bit) & 1).sum())
        assert abs(flips - N / 2) <= 4.5 * math.sqrt(N / 4), bit


def test_a_control_shifted_words_are_seen_as_related() -> None:
    index = torch.arange(N)
    zero = torch.tensor(0)
    a = philox(zero, index, zero, zero, zero)[0]
    x = a.double() / 2**32 - 0.5
    y = (a ^ 0xFFFF).double() / 2**32 - 0.5
    assert abs(float((x * y).mean() * 12)) > 4 / math.sqrt(N)


def test_at_moves_the_position_alone() -> None:
    noise = Noise.of(3, seed=5, position=2, branch=1)
    moved = noise.at(torch.tensor([3, 4, 5]))
    again = Noise.of(3, seed=5, position=torch.tensor([3, 4, 5]), branch=1)
    index = torch.arange(40)[None]
    assert torch.equal(moved.gumbel(index, TOKENS), again.gumbel(index, TOKENS))
    assert not torch.equal(moved.gumbel(index, TOKENS), noise.gumbel(index, TOKENS))
    assert noise.position.tolist() == [2, 2, 2]


def test_normal_variates_are_normal_and_unrelated_between_slots_rows_and_positions() -> None:
    noise, count = Noise.of(3, seed=11, position=4), 60_000
    index = torch.arange(count)[None]
    drawn = torch.cat(
        [
            noise.normal(slotted(0, index), LATENT),
            noise.normal(slotted(SLOTS - 1, index), LATENT),
            noise.at(noise.position + 1).normal(slotted(0, index), LATENT),
        ]
    )  # [9, count]
    assert drawn.isfinite().all()
    for row in drawn.double():
        ordered = row.sort().values
        expected = torch.distributions.Normal(0.0, 1.0).cdf(ordered)
        distance = (expected - (torch.arange(count) + 0.5) / count).abs().max()
        assert distance * math.sqrt(count) < 1.95  # Kolmogorov–Smirnov at about 0.001
    related = torch.corrcoef(drawn) - torch.eye(9)
    assert related.abs().max() < 4.5 / math.sqrt(count)


def test_normal_variates_are_finite_at_the_edges_of_a_word() -> None:
    words = torch.tensor(EDGES)
    drawn = normal(words[:, None], words[None])
    assert drawn.isfinite().all()
    assert 6.7 < float(drawn.abs().max()) < 6.8
    assert slotted(SLOTS - 1, torch.tensor(2**27 - 1)) == 2**32 - 1
