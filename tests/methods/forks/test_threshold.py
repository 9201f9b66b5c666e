"""Entropies against float64 and closed forms, and thresholds that keep the share of forks that they promise."""

import json
import math
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.tiny import build

from proxytune import ops
from proxytune.errors import CalibrationWarning, DriftWarning, InputError, RecipeError
from proxytune.methods.forks.threshold import ForkThreshold
from proxytune.ops.entropy import branching_factor, entropy, kl_divergence, varentropy
from proxytune.recipe import RECIPE_FILE, ForkCalibration, Recipe, write_fork_threshold
from proxytune.stats.quantile import share_threshold

INF, NAN = torch.inf, torch.nan


# --- measures ------------------------------------------------------------------------------------------------------


def reference(row: torch.Tensor) -> tuple[float, float]:
    """Entropy and varentropy of one row by their definitions, in float64, over the tokens that have a probability."""
    z = row.double()[row > -INF]
    logp = z - z.logsumexp(0)
    p = logp.exp()
    h = float(-(p * logp).sum())
    return h, float((p * (logp + h) ** 2).sum())


def reference_kl(row: torch.Tensor, base: torch.Tensor) -> float:
    logp, logq = row.double().log_softmax(0), base.double().log_softmax(0)
    kept = logp > -INF
    return float((logp.exp()[kept] * (logp - logq)[kept]).sum())


@pytest.mark.smoke
@pytest.mark.parametrize("n", [1, 2, 7, 1000, 150_000])
def test_a_uniform_row_has_the_logarithm_of_its_width(n: int) -> None:
    row = torch.full((n,), 3.5)
    assert float(entropy(row)) == pytest.approx(math.log(n), abs=2e-5)
    assert float(varentropy(row)) == pytest.approx(0.0, abs=1e-6)
    assert float(branching_factor(row)) == pytest.approx(n, rel=2e-5)


def test_two_tokens_in_closed_form() -> None:
    p = torch.linspace(0.01, 0.99, 25, dtype=torch.float64)
    logits = torch.stack([p.log(), (1 - p).log()], -1)
    want = -(p * p.log() + (1 - p) * (1 - p).log())
    torch.testing.assert_close(entropy(logits).double(), want, atol=1e-6, rtol=1e-6)
    want = p * (1 - p) * (p.log() - (1 - p).log()) ** 2
    torch.testing.assert_close(varentropy(logits).double(), want, atol=1e-6, rtol=1e-6)
    q = p.flip(0)
    want = p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()
    got = kl_divergence(logits, torch.stack([q.log(), (1 - q).log()], -1))
    torch.testing.assert_close(got.double(), want, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [0.01, 1.0, 30.0])  # nearly uniform, like a model's, nearly certain
def test_rows_against_float64(dtype: torch.dtype, scale: float) -> None:
    logits = (torch.randn(2, 3, 1500) * scale).to(dtype)
    logits[..., ::7] = -INF
    base = (torch.randn(2, 3, 1500) * scale).to(dtype)
    h, v, kl = entropy(logits), varentropy(logits), kl_divergence(logits, base)
    assert h.dtype == v.dtype == kl.dtype == torch.float32
    assert h.shape == v.shape == kl.shape == (2, 3)
    for i in range(2):
        for j in range(3):
            want_h, want_v = reference(logits[i, j])
            assert float(h[i, j]) == pytest.approx(want_h, rel=2e-6, abs=2e-6)
            assert float(v[i, j]) == pytest.approx(want_v, rel=2e-5, abs=2e-5)
            assert float(kl[i, j]) == pytest.approx(reference_kl(logits[i, j], base[i, j]), rel=1e-5, abs=1e-5)


@pytest.mark.smoke
@pytest.mark.parametrize("width", [5, 1024, 2100])  # less than a tile of the fused pass, one, and a rest
def test_they_agree_with_the_fused_step(width: int) -> None:
    base, expert, antiexpert = (3.0 * torch.randn(9, width) for _ in range(3))
    base[:, 1::5] = -INF
    base[3, 2], base[4, 2], base[5] = NAN, INF, -INF
    base[6, 1:] = -INF
    step = ops.step([base, expert, antiexpert], (1.0, 0.7, -0.7), want=("scores", "entropy", "varentropy", "kl"))
    assert step.scores is not None
    for ours, fused in ((entropy, step.entropy), (varentropy, step.varentropy)):
        torch.testing.assert_close(ours(step.scores), fused, atol=2e-5, rtol=2e-5, equal_nan=True)
    torch.testing.assert_close(kl_divergence(step.scores, base), step.kl, atol=3e-5, rtol=3e-5, equal_nan=True)
    assert step.entropy is not None
    assert step.entropy.isnan().tolist() == [False, False, False, True, True, True, False, False, False]


def test_rows_without_a_distribution_are_nan_and_leave_the_others_alone() -> None:
    good = torch.tensor([1.0, 2.0, -INF])
    rows = torch.stack([good, torch.tensor([1.0, NAN, 0.0]), torch.tensor([INF, 0.0, 0.0]), torch.full((3,), -INF)])
    for measure in (entropy, varentropy, branching_factor):
        values = measure(rows)
        assert values.isnan().tolist() == [False, True, True, True]
        assert values[0] == measure(good)
    assert kl_divergence(rows, good.expand(4, 3)).isnan().tolist() == [False, True, True, True]
    assert kl_divergence(good.expand(4, 3), rows).isnan().tolist() == [False, True, True, True]


def test_a_divergence_from_what_is_masked() -> None:
    p, q = torch.tensor([0.0, 0.0, -INF]), torch.tensor([0.0, 0.0, 0.0])
    assert float(kl_divergence(p, q)) == pytest.approx(math.log(1.5), abs=1e-6)
    assert float(kl_divergence(q, p)) == INF
    assert float(kl_divergence(p, p)) == 0.0
    # What has no probability in float32 anyway does not escape.
    assert math.isfinite(float(kl_divergence(torch.tensor([0.0, 0.0, -500.0]), p)))


finite_rows = st.lists(st.floats(-40, 40, width=32), min_size=2, max_size=40)


@given(finite_rows, st.floats(-100, 100, width=32), st.randoms(use_true_random=False))
@settings(max_examples=100, deadline=None)
def test_neither_a_constant_nor_the_order_matters(row: list[float], constant: float, random: Any) -> None:
    order = list(range(len(row)))
    random.shuffle(order)
    z = torch.tensor(row)
    q = z.flip(0)
    # Adding a constant rounds the logits themselves.
    close = {"atol": 2e-3, "rtol": 2e-3}
    for measure in (entropy, varentropy):
        torch.testing.assert_close(measure(z + constant), measure(z), **close)
        torch.testing.assert_close(measure(z[order]), measure(z), atol=2e-5, rtol=2e-5)
    torch.testing.assert_close(kl_divergence(z + constant, q - constant), kl_divergence(z, q), **close)
    torch.testing.assert_close(kl_divergence(z[order], q[order]), kl_divergence(z, q), atol=1e-4, rtol=1e-4)
    assert 0.0 <= float(entropy(z)) <= math.log(len(row)) + 1e-5
    assert float(kl_divergence(z, q)) >= 0.0
    masked = torch.cat([z, torch.full((3,), -INF)])
    torch.testing.assert_close(entropy(masked), entropy(z), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("bad", [torch.zeros(3, dtype=torch.int64), torch.zeros(2, 0), torch.tensor(1.0), [0.0, 1.0]])
def test_what_are_no_logits_is_refused(bad: Any) -> None:
    for measure in (entropy, varentropy, branching_factor, lambda x: kl_divergence(x, x)):
        with pytest.raises(InputError, match=r"logits: expected a floating tensor \[\.\.\., V\]"):
            measure(bad)
    with pytest.raises(InputError, match="two rows of the same width, 4 as the base's; got 3 columns"):
        kl_divergence(torch.zeros(2, 3), torch.zeros(2, 4))


# --- calibrated thresholds -----------------------------------------------------------------------------------------


@given(
    st.lists(st.floats(0, 12, width=32) | st.sampled_from([0.0, 0.5]), min_size=1, max_size=60), st.floats(0.01, 0.99)
)
@settings(max_examples=200, deadline=None)
def test_no_threshold_comes_nearer_to_the_share(values: list[float], share: float) -> None:
    h, realised = share_threshold(values, share)
    above = (torch.tensor(values) > h).float().mean()
    assert float(above) == pytest.approx(realised, abs=1e-6)
    tried = [np.mean(np.array(values) > t) for t in [-1.0, *values]]
    assert abs(realised - share) <= min(abs(t - share) for t in tried) + 1e-12


def test_the_threshold_lies_between_two_values() -> None:
    values = np.arange(1, 101) / 10
    assert share_threshold(values, 0.2) == (pytest.approx(8.05), 0.2)
    # Ties: the nearest of what can be had, and away from the tied value.
    tied = [0.0] * 70 + [1.0] * 30
    assert share_threshold(tied, 0.2) == (0.5, 0.3)
    assert share_threshold([0.0] * 10, 0.2) == (0.0, 0.0)
    assert share_threshold([0.0] * 10, 0.9) == (-1.0, 1.0)
    assert share_threshold([2.0] * 10, 0.9) == (1.0, 1.0)


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.bfloat16], ids=["float32", "float64", "bfloat16"]
)
def test_calibration_takes_tensors_arrays_and_lists(dtype: torch.dtype) -> None:
    values = torch.rand(40, 50).to(dtype)
    threshold = ForkThreshold.calibrated(values)
    assert threshold.nats == ForkThreshold.calibrated(values.double().numpy()).nats
    assert threshold.nats == ForkThreshold.calibrated(values.flatten().tolist()).nats
    assert float(threshold.is_fork(values.float()).float().mean()) == pytest.approx(0.2, abs=0.005)


def test_ties_that_keep_the_share_away_are_told() -> None:
    with pytest.warns(CalibrationWarning, match=r"30\.0% of the calibration tokens are forks, not 20\.0%"):
        assert ForkThreshold.calibrated([0.0] * 70 + [1.0] * 30).nats == 0.5
    ForkThreshold.calibrated([0.0] * 79 + [1.0] * 21)  # within 2 points: nothing to tell


@pytest.mark.parametrize("share", [0.0, 1.0, -0.1, 1.5, NAN, "0.2", None, True])
def test_a_share_is_between_0_and_1(share: Any) -> None:
    for make in (
        lambda: ForkThreshold.calibrated(np.ones(1000), share),
        lambda: ForkThreshold.streaming(share),
        lambda: share_threshold([1.0], share),
        lambda: ForkCalibration(share=share, nats=1.0, tokens=10),
    ):
        with pytest.raises(InputError, match=r"share: expected a number in \(0, 1\)"):
            make()


def test_what_cannot_be_calibrated_on_is_refused() -> None:
    with pytest.raises(InputError, match=r"at least 50 tokens for a share of 0\.2, ten on either side .* got 49\."):
        ForkThreshold.calibrated(np.ones(49))
    with pytest.raises(InputError, match="at least 1000 tokens"):
        ForkThreshold.calibrated(np.ones(999), 0.99)
    with pytest.raises(InputError, match="entropies: expected some tokens; got none"):
        share_threshold([], 0.2)
    for bad in (NAN, INF, -0.5):
        with pytest.raises(InputError, match="expected finite numbers ≥ 0, in nats; got "):
            ForkThreshold.calibrated([1.0] * 99 + [bad])
    for bad in (NAN, INF, "0.4", None, True, 10**400):
        with pytest.raises(InputError, match="threshold: expected a finite number"):
            ForkThreshold(bad)
    for wrong in ({"window": 0}, {"window": 1.5}, {"inflation": 0.5}, {"margin": -0.1}):
        with pytest.raises(InputError, match="window: expected|inflation: expected|margin: expected"):
            ForkThreshold(0.4, share=0.2, **wrong)
    for warm_up in (0, 1.5, True):
        with pytest.raises(InputError, match="warm_up: expected a whole number"):
            ForkThreshold.streaming(warm_up=warm_up)


def test_nan_is_no_fork_and_is_not_counted() -> None:
    threshold = ForkThreshold(0.5, share=0.2)
    h = torch.tensor([0.4, 0.6, NAN, 0.5, 0.7])
    assert threshold.is_fork(h).tolist() == [False, True, False, False, True]
    assert math.isnan(threshold.realised_share)
    threshold.observe(h)
    assert (threshold.tokens, threshold.realised_share) == (4, 0.5)
    threshold.observe(h, torch.tensor([True, True, True, True, False]))
    assert (threshold.tokens, threshold.realised_share) == (7, pytest.approx(3 / 7))
    threshold.reset()
    assert threshold.tokens == 0


# --- the share on fresh tokens -------------------------------------------------------------------------------------


@torch.no_grad()
def sampled_entropies(model: Any, temperature: float, seed: int, rows: int = 80, steps: int = 40) -> torch.Tensor:
    """Raw entropies `[rows, steps]` along texts that a model samples at a temperature from random prompts."""
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, model.config.vocab_size, (rows, 4), generator=g)
    past, found = None, []
    new = ids
    for _ in range(steps):
        out = model(new, past_key_values=past, use_cache=True)
        past, logits = out.past_key_values, out.logits[:, -1].float()
        found.append(entropy(logits))
        new = torch.multinomial((logits / temperature).softmax(-1), 1, generator=g)
    return torch.stack(found, 1)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen3"])
@pytest.mark.parametrize("vocab", [32, 1000])  # smaller and larger than a byte vocabulary
@pytest.mark.parametrize("temperature", [0.6, 1.0, 1.5])
def test_the_share_holds_on_fresh_text(kind: str, vocab: int, temperature: float) -> None:
    model = build(kind, seed=7, vocab=vocab)
    with warnings.catch_warnings():
        warnings.simplefilter("error", DriftWarning)
        threshold = ForkThreshold.calibrated(sampled_entropies(model, temperature, seed=1), window=1000)
        fresh = sampled_entropies(model, temperature, seed=2)
        for step in fresh.unbind(1):
            threshold.observe(step)
    assert threshold.tokens == fresh.numel()
    assert threshold.realised_share == pytest.approx(0.2, abs=0.02)


@pytest.mark.parametrize("share", [0.05, 0.2, 0.5])
def test_a_stream_converges_on_the_quantile(share: float) -> None:
    values = torch.from_numpy(np.random.default_rng(0).gamma(0.5, 0.8, (600, 16))).float()
    threshold = ForkThreshold.streaming(share)
    for step in values[:300]:
        threshold.observe(step)
    assert threshold.nats == pytest.approx(float(values[:300].flatten().quantile(1 - share)), rel=0.005)
    above = 0
    for step in values[300:]:
        above += int(threshold.is_fork(step).sum())
        threshold.observe(step)
    assert above / values[300:].numel() == pytest.approx(share, abs=0.02)
    assert threshold.realised_share == pytest.approx(share, abs=0.02)
    assert threshold.tokens == values.numel() - 256  # without the warm-up, 16 steps of 16


def test_a_stream_on_a_model_s_text() -> None:
    model = build("llama", seed=7, vocab=300)
    threshold = ForkThreshold.streaming()
    for step in sampled_entropies(model, 1.0, seed=1, rows=40, steps=100).unbind(1):
        threshold.observe(step)
    assert threshold.realised_share == pytest.approx(0.2, abs=0.02)


def test_a_stream_does_not_depend_on_the_order_of_the_rows() -> None:
    values = torch.rand(50, 8)
    one, other = ForkThreshold.streaming(warm_up=16), ForkThreshold.streaming(warm_up=16)
    for step in values:
        order = torch.randperm(8)
        assert torch.equal(one.is_fork(step)[order], other.is_fork(step[order]))
        one.observe(step)
        other.observe(step[order])
        assert one.nats == other.nats
    assert one.realised_share == other.realised_share


def test_a_stream_s_warm_up() -> None:
    values = torch.linspace(0.1, 2.0, 32)
    silent, given = ForkThreshold.streaming(warm_up=64), ForkThreshold.streaming(warm_up=64, initial=1.0)
    assert silent.nats == INF
    assert given.nats == 1.0
    for _ in range(2):
        assert not silent.is_fork(values).any()
        assert given.is_fork(values).sum() == (values > 1.0).sum()
        silent.observe(values)
        given.observe(values)
        assert silent.tokens == 0
    assert silent.nats == given.nats == pytest.approx(float(values.quantile(0.8)), rel=0.03)
    silent.observe(values, torch.zeros(32, dtype=torch.bool))
    assert silent.tokens == 0
    silent.observe(values)
    assert silent.tokens == 32
    silent.reset()
    assert silent.nats == INF


def test_a_stream_with_ties() -> None:
    """Most tokens certain, and the rest at one entropy: the threshold lies between, not on one of the two."""
    threshold = ForkThreshold.streaming(warm_up=10)
    threshold.observe(torch.tensor([0.0] * 80 + [math.log(2)] * 20))
    assert 1e-4 < threshold.nats < 0.5
    threshold.observe(torch.tensor([NAN] * 50 + [0.0] * 4 + [math.log(2)]))
    assert threshold.tokens == 5
    assert threshold.realised_share == 0.2


# --- drift ---------------------------------------------------------------------------------------------------------


def test_the_band_is_the_documented_one() -> None:
    band = ForkThreshold(0.4, share=0.2).band
    assert band is not None
    half = 0.02 + 4 * math.sqrt(4.0 * 0.2 * 0.8 / 4096)
    assert band == (pytest.approx(0.2 - half), pytest.approx(0.2 + half))
    assert half == pytest.approx(0.07, abs=0.001)
    assert ForkThreshold(0.4).band is None
    assert ForkThreshold(0.4, share=0.01).band == (0.0, pytest.approx(0.0424, abs=1e-3))


def watched(model: Any, threshold: ForkThreshold, temperature: float) -> None:
    for step in sampled_entropies(model, temperature, seed=3, rows=120, steps=70).unbind(1):
        threshold.observe(step)


@pytest.mark.parametrize("changed", [False, True])
def test_a_drift_is_told_once_and_only_if_something_changed(changed: bool) -> None:
    model = build("llama", seed=7, vocab=64)
    threshold = ForkThreshold.calibrated(sampled_entropies(model, 1.0, seed=1, rows=120))
    if changed:
        # The model's own temperature, which another α or another checkpoint changes as well.
        model.lm_head.weight.data.mul_(0.8)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        watched(model, threshold, 1.0)
        watched(model, threshold, 1.0)
    assert [w.category for w in told] == ([DriftWarning] if changed else [])
    if changed:
        assert "of the last 4200 tokens" in str(told[0].message)
        assert "20.0% were to be (band 13.0% to 27.0%)" in str(told[0].message)
        threshold.reset()
        with pytest.warns(DriftWarning, match="Calibrate again"):
            watched(model, threshold, 1.0)


@pytest.mark.parametrize("temperature", [0.05, 1.0])
def test_sampling_at_another_temperature_is_a_drift_too(temperature: float) -> None:
    """Raw entropies, but of other texts: near greedy decoding runs into loops, where little is open."""
    model = build("gpt2", seed=7, vocab=1000)
    threshold = ForkThreshold.calibrated(sampled_entropies(model, 1.0, seed=1, rows=120))
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        watched(model, threshold, temperature)
    assert bool(told) == (temperature != 1.0), threshold.realised_share


def test_noise_of_alike_tokens_is_no_drift() -> None:
    """Runs of four equal tokens, for which the default makes room: no false alarm in two hundred windows."""
    rng = np.random.default_rng(0)
    threshold = ForkThreshold(0.8, share=0.2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(200):
            threshold.observe(torch.from_numpy(np.repeat(rng.random(1024), 4)))
    assert threshold.tokens == 200 * 4096


def test_tokens_that_do_not_count_do_not_fill_a_window() -> None:
    threshold = ForkThreshold(0.5, share=0.2, window=100)
    some = torch.arange(100) < 30
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            threshold.observe(torch.ones(100), some)
    with pytest.warns(DriftWarning, match=r"100\.0% of the last 120 tokens"):
        threshold.observe(torch.ones(100), some)
    assert threshold.tokens == 120


# --- in the recipe -------------------------------------------------------------------------------------------------

CALIBRATION = ForkCalibration(share=0.2, nats=0.41, tokens=1234, temperature=1.0, measure="raw", alpha=0.5)
PLAIN: dict[str, Any] = {
    "format_version": 1,
    "base": {"id": "base", "revision": None},
    "expert": {"id": "org/small-tuned", "revision": "v2"},
    "antiexpert": {"id": "org/small", "revision": None},
    "formula": "proxy-tuning",
    "alpha": 0.5,
}
WRITTEN = {"share": 0.2, "nats": 0.41, "tokens": 1234, "temperature": 1.0, "measure": "raw", "alpha": 0.5}


def test_a_recipe_holds_it_and_older_ones_are_read() -> None:
    assert Recipe.from_json(PLAIN).fork_threshold is None
    assert "fork_threshold" not in Recipe.from_json(PLAIN).to_json()
    assert Recipe.from_json(PLAIN | {"fork_threshold": None}).fork_threshold is None
    recipe = Recipe.from_json(PLAIN | {"fork_threshold": WRITTEN})
    assert recipe.fork_threshold == CALIBRATION
    assert recipe.to_json() == PLAIN | {"fork_threshold": WRITTEN}
    assert Recipe.from_json(json.loads(recipe.dumps())) == recipe
    assert hash(recipe) != hash(Recipe.from_json(PLAIN))
    few = Recipe.from_json(PLAIN | {"fork_threshold": {"share": 0.2, "nats": 0.41, "tokens": 1234}})
    assert few.fork_threshold == ForkCalibration(share=0.2, nats=0.41, tokens=1234)
    threshold = ForkThreshold.of(CALIBRATION)
    assert (threshold.nats, threshold.share, threshold.measure, threshold.alpha) == (0.41, 0.2, "raw", 0.5)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (0.41, "recipe key 'fork_threshold': expected an object with share, nats and tokens; got float"),
        ({"share": 0.2}, "; got no nats, tokens. Run proxytune calibrate"),
        (WRITTEN | {"bits": 1}, "recipe key 'fork_threshold': expected only the keys share, nats, tokens, .* 'bits'"),
        (WRITTEN | {"share": 20}, r"recipe key 'fork_threshold': share: expected a number in \(0, 1\); got 20"),
        (WRITTEN | {"nats": "0.4"}, "nats: expected a finite number; got '0.4'"),
        (WRITTEN | {"nats": NAN}, "nats: expected a finite number; got nan"),
        (WRITTEN | {"tokens": 0}, "tokens: expected a whole number of tokens, at least 1"),
        (WRITTEN | {"tokens": 2.5}, "tokens: expected a whole number of tokens, at least 1"),
        (WRITTEN | {"temperature": 0}, "temperature: expected a finite number > 0; got 0"),
        (WRITTEN | {"measure": ["raw"]}, "measure: expected 'raw', 'scaled' or 'truncated'"),
        (WRITTEN | {"alpha": True}, "alpha: expected a finite number; got True"),
    ],
)
def test_what_is_wrong_in_a_recipe_is_refused_by_name(value: Any, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        Recipe.from_json(PLAIN | {"fork_threshold": value})


def test_it_is_written_into_a_recipe_that_is_otherwise_left_alone(tmp_path: Path) -> None:
    # A relative folder must stay one, or the recipe could not be moved any more.
    (tmp_path / "base").mkdir()
    file = tmp_path / RECIPE_FILE
    file.write_text(json.dumps(PLAIN))
    for where in (tmp_path, file):
        assert write_fork_threshold(where, CALIBRATION) == file
        assert json.loads(file.read_text()) == PLAIN | {"fork_threshold": WRITTEN}
    assert Recipe.load(tmp_path).fork_threshold == CALIBRATION
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base", RECIPE_FILE]

    file.write_text(json.dumps(PLAIN | {"alpha": "high"}))
    before = file.read_text()
    with pytest.raises(RecipeError, match="alpha"):
        write_fork_threshold(tmp_path, CALIBRATION)
    assert file.read_text() == before
    with pytest.raises(RecipeError, match="got no file at"):
        write_fork_threshold(tmp_path / "nowhere", CALIBRATION)
