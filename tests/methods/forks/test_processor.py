"""Fork sampling on the doors: the same decisions and the same tokens as written out, and wrong use that is told."""

import contextlib
import copy
import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from support.reference import next_logits
from support.tiny import PAD, build, shared, tokenizer
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    pipeline,
)

import proxytune
from proxytune import ProxyTuningLogitsProcessor
from proxytune.errors import InputError, UnsupportedModeError
from proxytune.methods.forks.processor import FLOOR, ForkSamplingLogitsProcessor
from proxytune.methods.forks.threshold import ForkThreshold
from proxytune.ops.entropy import entropy
from proxytune.recipe import ForkCalibration, MemberRef, Recipe

ALPHA = 0.7
H = 2.6  # about half of the tokens of these models are above it
SAMPLED: dict[str, Any] = {"do_sample": True, "top_k": 0, "max_new_tokens": 12, "eos_token_id": None}
SEVERAL = SAMPLED | {"num_return_sequences": 2}
GREEDY: dict[str, Any] = {"do_sample": False, "max_new_tokens": 12, "eos_token_id": None}
IDS = torch.zeros(1, 3, dtype=torch.int64)


def members() -> list[PreTrainedModel]:
    return [shared("llama", 1), shared("gpt2", 2), shared("gpt2", 3)]


def composed() -> proxytune.ProxyTunedModel:
    base, expert, antiexpert = members()
    return proxytune.wrap(base, expert=expert, antiexpert=antiexpert, alpha=ALPHA, check_vocabulary=False)


def steering() -> ProxyTuningLogitsProcessor:
    return ProxyTuningLogitsProcessor(*members()[1:], ALPHA, check_vocabulary=False)


def forks(threshold: Any = H, **settings: Any) -> ForkSamplingLogitsProcessor:
    return ForkSamplingLogitsProcessor(threshold, **{"fork_temperature": 1.2, "exec_temperature": 0.5} | settings)


def ready(processor: ForkSamplingLogitsProcessor) -> LogitsProcessor:
    """For calls by hand: with the settings that it was told."""
    return processor.for_call(GenerationConfig(do_sample=True, **processor._told))


def padded() -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(3, 240, (3, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    ids[1, :4], mask[1, :4] = PAD, 0
    ids[2, :1], mask[2, :1] = PAD, 0
    return ids, mask


def row_of(entropies: Sequence[float], width: int = 8) -> torch.Tensor:
    """Rows `[n, width]` of given entropies: one token against equal others, found by bisection."""
    rows = []
    for wanted in entropies:
        low, high = 0.0, 60.0
        for _ in range(60):
            middle = (low + high) / 2
            row = torch.zeros(width, dtype=torch.float64)
            row[0] = middle
            low, high = (middle, high) if float(entropy(row)) > wanted else (low, middle)
        rows.append(row.float())
    return torch.stack(rows)


# --- the temperature -----------------------------------------------------------------------------------------------


@pytest.mark.smoke
def test_two_temperatures_by_hand() -> None:
    scores = torch.randn(40, 30) * torch.linspace(0.1, 6, 40)[:, None]
    scores[:, ::4] = -torch.inf
    threshold = 1.5
    got = ready(ForkSamplingLogitsProcessor(threshold))(torch.zeros(40, 3, dtype=torch.int64), scores)
    h = torch.distributions.Categorical(logits=scores[:, scores[0] > -torch.inf].double()).entropy()
    t = torch.where(h > threshold, 1.0, 0.6)
    assert 0.2 < (t == 1.0).float().mean() < 0.8
    torch.testing.assert_close(got.softmax(-1), (scores.double() / t[:, None]).softmax(-1).float())
    assert torch.equal(got[t == 1.0], scores[t == 1.0])  # at 1 nothing is touched
    assert torch.equal(got == -torch.inf, scores == -torch.inf)


def test_at_1_everywhere_it_is_the_identity() -> None:
    scores = torch.randn(5, 30)
    for form in ("two", "dynamic"):
        one = ready(ForkSamplingLogitsProcessor(1.0, fork_temperature=1.0, exec_temperature=1.0, form=form))
        assert torch.equal(one(IDS.expand(5, 3), scores), scores)


def temperature_of(processor: ForkSamplingLogitsProcessor, scores: torch.Tensor) -> torch.Tensor:
    """What the scores were divided by, read off the distance of two tokens."""
    out = ready(processor)(IDS.expand(len(scores), 3), scores)
    return (scores[:, 0] - scores[:, 1]) / (out[:, 0] - out[:, 1])


@pytest.mark.parametrize("exponent", [0.5, 1.0, 2.0])
def test_the_dynamic_form(exponent: float) -> None:
    wanted = torch.tensor([0.1, 0.7, 1.5, 2.0])
    scores = torch.cat([row_of(wanted.tolist()), torch.full((4, 5), -torch.inf)], 1)  # 8 tokens survive
    one = ForkSamplingLogitsProcessor(
        None, form="dynamic", exec_temperature=0.3, fork_temperature=1.3, exponent=exponent
    )
    want = 0.3 + 1.0 * (wanted / torch.tensor(8.0).log()) ** exponent
    torch.testing.assert_close(temperature_of(one, scores), want, atol=1e-4, rtol=1e-4)
    # One token left, and all equal: the ends.
    single, flat = torch.full((1, 8), -torch.inf), torch.zeros(1, 8)
    single[0, 2] = 4.0
    assert torch.equal(ready(one)(IDS, single), single - 4.0 * (single > 0))
    assert torch.isfinite(ready(one)(IDS, flat)).all()


def test_the_edt_form() -> None:
    wanted = torch.tensor([0.05, 0.1, 0.7, 2.0])
    one = ForkSamplingLogitsProcessor(None, form="edt", fork_temperature=0.9, theta=0.1)
    want = 0.9 * 0.8 ** (0.1 / wanted)
    torch.testing.assert_close(temperature_of(one, row_of(wanted.tolist())), want, atol=1e-4, rtol=1e-4)
    assert want[1] == pytest.approx(0.72)
    # H → 0: the floor, and the argmax stays.
    sure = torch.tensor([[60.0, 0.0, 0.0], [5.0, -torch.inf, -torch.inf]])
    out = ready(one)(IDS.expand(2, 3), sure)
    assert out.argmax(-1).tolist() == [0, 0]
    assert not out.isnan().any()
    assert float(out[0, 0] - out[0, 1]) == pytest.approx(60 / FLOOR, rel=1e-4)


def test_rows_without_a_distribution_stay_so_and_leave_the_others_alone() -> None:
    scores = torch.randn(4, 9)
    scores[1, 3], scores[2, 4], scores[3] = torch.nan, torch.inf, -torch.inf
    for form in ("two", "dynamic", "edt"):
        threshold = ForkThreshold(0.5)
        out = ready(forks(threshold, form=form))(IDS.expand(4, 3), scores)
        assert torch.isfinite(out[0]).all()
        assert torch.equal(out[1].isnan(), scores[1].isnan())
        assert out[2, 4] == torch.inf
        assert (out[3] == -torch.inf).all()
        assert threshold.tokens == 1


def test_the_largest_stays_the_largest_to_the_last_bit() -> None:
    """Neighbouring floats, the larger one last: a plain division makes some of them equal, and the first wins."""
    a = torch.rand(4000) * 8 + 8
    rows = torch.stack([a, torch.nextafter(a, torch.tensor(torch.inf))], 1)
    cold = 0.7
    assert (rows / cold).argmax(-1).eq(0).any()
    out = ready(ForkSamplingLogitsProcessor(100.0, exec_temperature=cold))(IDS.expand(4000, 3), rows)
    assert (out.argmax(-1) == 1).all()


def excess(counts: torch.Tensor, law: torch.Tensor) -> float:
    """How many standard deviations too large χ² is, by Wilson and Hilferty's approximation; rare cells are pooled."""
    n = float(counts.sum())
    big = law * n >= 5
    observed = torch.cat([counts[big], counts[~big].sum()[None]])
    expected = torch.cat([law[big], law[~big].sum()[None]]).clamp(min=1e-12) * n
    statistic, degrees = float(((observed - expected) ** 2 / expected).sum()), max(1, len(observed) - 1)
    return ((statistic / degrees) ** (1 / 3) - 1 + 2 / (9 * degrees)) / (2 / (9 * degrees)) ** 0.5


def test_the_law_on_a_tiny_vocabulary() -> None:
    """χ²: tokens at forks follow p^(1/T_fork), the others p^(1/T_exec), renormalised."""
    model = build("llama", 1, vocab=8)
    prompts = torch.randint(3, 8, (12, 3))
    logits = torch.stack([model(p[None]).logits[0, -1].detach().double() for p in prompts])
    h = entropy(logits)
    threshold = float(h.sort().values[6:8].mean())  # some on either side
    hot, cold, n = 1.6, 0.4, 3000
    told = 0
    for prompt, z, fork in zip(prompts, logits, (h > threshold).tolist(), strict=True):
        one = ForkSamplingLogitsProcessor(threshold, fork_temperature=hot, exec_temperature=cold)
        run = SAMPLED | {"max_new_tokens": 1, "num_return_sequences": n}
        with one.attach(model):
            drawn = model.generate(prompt[None], **run)[:, -1]
        law = (z.log_softmax(-1) / (hot if fork else cold)).softmax(-1)
        other = (z.log_softmax(-1) / (cold if fork else hot)).softmax(-1)
        counts = torch.bincount(drawn, minlength=8).double()

        assert excess(counts, law) < 3.7
        told += excess(counts, other) > 6.0
    assert told >= 10, "the test can tell the two laws apart"


# --- the doors -----------------------------------------------------------------------------------------------------


class Written(LogitsProcessor):
    """The same in one line each, on whatever it is handed."""

    def __init__(self) -> None:
        self.forks: list[torch.Tensor] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        logp = scores.double().log_softmax(-1)
        fork = -(logp.exp() * logp.clamp(min=-1e9)).sum(-1) > H
        self.forks.append(fork)
        return scores / torch.where(fork, 1.2, 0.5)[:, None]


@pytest.mark.smoke
@pytest.mark.parametrize("mode", [SAMPLED, GREEDY, SEVERAL], ids=["sample", "greedy", "several"])
def test_all_doors_decide_alike_and_give_the_same_tokens(mode: dict[str, Any]) -> None:
    ids, mask = padded()
    base = members()[0]
    found = {}
    for door in ("written", "composed", "steered", "attached", "passed and attached"):
        torch.manual_seed(5)
        one: Any = Written() if door == "written" else forks(record=True)
        run = {"attention_mask": mask, **mode}
        if door in ("written", "composed"):
            text = composed().generate(ids, logits_processor=[one], **run)
        elif door == "steered":
            with steering().attach(base):
                text = base.generate(ids, logits_processor=[one], **run)
        elif door == "attached":
            with one.attach(base):
                text = base.generate(ids, logits_processor=[steering()], **run)
        else:
            with one.attach(base):
                text = base.generate(ids, logits_processor=[steering(), one], **run)
        found[door] = (text, torch.stack(one.forks, 1) if door == "written" else one.record().fork)
    want, decisions = found["written"]
    assert 0.1 < decisions.float().mean() < 0.9
    for door, (text, fork) in found.items():
        assert torch.equal(text, want), door
        assert torch.equal(fork, decisions), door
    if mode is GREEDY:
        assert torch.equal(want, composed().generate(ids, attention_mask=mask, **mode))


def test_the_entropy_is_that_of_the_combined_row() -> None:
    ids, mask = padded()
    one = forks(record=True)
    text = composed().generate(ids, attention_mask=mask, logits_processor=[one], **SAMPLED)
    record = one.record()
    assert record.entropy.shape == record.fork.shape == record.temperature.shape == (3, 12)
    assert record.entropy.dtype == torch.float32
    for b in range(3):
        whole = text[b][int((1 - mask[b]).sum()) :]
        for t in range(12):
            logits = next_logits(members(), ALPHA, whole[: len(whole) - 12 + t])
            h = float(torch.distributions.Categorical(logits=logits.double()).entropy())
            assert float(record.entropy[b, t]) == pytest.approx(h, abs=2e-4)
            assert bool(record.fork[b, t]) == (h > H)
            assert float(record.temperature[b, t]) == pytest.approx(1.2 if h > H else 0.5)


def test_a_padded_batch_decides_as_its_rows_alone() -> None:
    ids, mask = padded()
    model = composed()
    for form in ("two", "dynamic", "edt"):
        one = forks(form=form, record=True)
        text = model.generate(ids, attention_mask=mask, logits_processor=[one], **GREEDY)
        together = one.record()
        for b in range(3):
            start = int((1 - mask[b]).sum())
            alone = model.generate(ids[b : b + 1, start:], logits_processor=[one], **GREEDY)
            assert torch.equal(alone[0], text[b, start:])
            record = one.record()
            assert torch.equal(record.fork[0], together.fork[b])
            torch.testing.assert_close(record.entropy[0], together.entropy[b], atol=2e-4, rtol=2e-4)
            torch.testing.assert_close(record.temperature[0], together.temperature[b], atol=2e-3, rtol=2e-3)


def test_the_fused_loop_decides_alike() -> None:
    """There it runs before the fused step, which does the warpers by itself."""
    ids, mask = padded()
    model, one, other = composed(), forks(record=True), forks(record=True)
    run = {"attention_mask": mask, **GREEDY}
    want = model.generate(ids, logits_processor=[one], **run)
    got = model.generate(ids, logits_processor=[other], custom_generate=proxytune.FusedDecoding(seed=0), **run)
    assert torch.equal(got, want)
    assert torch.equal(other.record().fork, one.record().fork)
    torch.testing.assert_close(other.record().entropy, one.record().entropy, atol=2e-4, rtol=2e-4)


def test_rows_that_have_ended_are_not_counted() -> None:
    model, prompts = shared("llama", 1), torch.randint(3, 240, (4, 5))
    plain = model.generate(prompts, **GREEDY)[:, 5:]
    end = int(plain[1, 3])
    threshold = ForkThreshold(H)
    one = forks(threshold, eos_token_id=end, record=True)
    with one.attach(model):
        text = model.generate(prompts, **GREEDY | {"eos_token_id": end})[:, 5:]
    record = one.record()
    ended = (text == end).long().cumsum(1) - (text == end).long() > 0  # after the first one
    assert ended.any()
    assert not ended.all()
    assert torch.equal(record.entropy.isnan(), ended)
    assert torch.equal(record.temperature.isnan(), ended)
    assert not (record.fork & ended).any()
    assert threshold.tokens == int((~ended).sum())
    assert threshold.realised_share == pytest.approx(float(record.fork[~ended].float().mean()))


def test_scaled_and_truncated_entropies() -> None:
    scores = torch.randn(6, 40) * 3
    ids = IDS.expand(6, 3)
    told = {"temperature": 0.7, "top_k": 8, "top_p": 0.9, "min_p": 0.02}
    scaled = forks(measure="scaled", temperature=0.7, record=True)
    truncated = forks(measure="truncated", record=True, **told)
    ready(scaled)(ids, scores)
    ready(truncated)(ids, scores)
    torch.testing.assert_close(scaled.record().entropy[:, 0], entropy(scores / 0.7))
    # What generate() itself keeps of such a row.
    config = GenerationConfig(do_sample=True, **told)
    kept = shared("llama", 1)._get_logits_processor(config, 3)(ids, scores)
    torch.testing.assert_close(truncated.record().entropy[:, 0], entropy(kept))
    assert (truncated.record().entropy < scaled.record().entropy).all()
    # And told so, generate() may have these settings.
    prompt, run = torch.randint(3, 240, (2, 5)), {**SAMPLED, **told}
    with forks(measure="truncated", **told).attach(shared("llama", 1)):
        assert shared("llama", 1).generate(prompt, **run).shape[1] == 17


# --- thresholds ----------------------------------------------------------------------------------------------------


def recipe(**calibration: Any) -> Recipe:
    found = ForkCalibration(share=0.2, nats=0.41, tokens=1000, **calibration) if calibration is not None else None
    return Recipe(
        base=MemberRef("a"), expert=MemberRef("b"), antiexpert=MemberRef("c"), alpha=0.5, fork_threshold=found
    )


def test_thresholds_of_every_kind() -> None:
    own = ForkThreshold(0.3)
    assert forks(own).threshold is own
    for given in (recipe(), recipe(alpha=0.5), recipe().fork_threshold):
        threshold = forks(given).threshold
        assert threshold is not None
        assert (threshold.nats, threshold.share) == (0.41, 0.2)
    assert forks(None, form="edt").threshold is None
    with pytest.raises(
        InputError, match="threshold: expected a finite number of nats; got None. `proxytune calibrate`"
    ):
        forks(None)
    with pytest.raises(
        InputError, match=r"recipe: expected a fork_threshold calibrated at its α, 0\.5; got fork_threshold=None"
    ):
        forks(replace(recipe(), fork_threshold=None))
    with pytest.raises(InputError, match=r"got a fork_threshold calibrated at α = 1\.0\. Run proxytune calibrate"):
        forks(recipe(alpha=1.0))
    with pytest.raises(InputError, match="measure: expected 'scaled', for which the threshold .* got 'raw'"):
        forks(recipe(measure="scaled"))


def test_a_streaming_threshold_over_several_generations() -> None:
    model = shared("llama", 1)
    threshold = ForkThreshold.streaming(warm_up=200)
    one = forks(threshold, record=True)
    run = SAMPLED | {"max_new_tokens": 20}
    for seed in range(6):
        ids = torch.randint(3, 240, (20, 5), generator=torch.Generator().manual_seed(seed))
        with one.attach(model):
            model.generate(ids, **run)
        assert one.record().entropy.shape == (20, 20)
    assert threshold.tokens == 6 * 400 - 200
    assert threshold.realised_share == pytest.approx(0.2, abs=0.03)


def test_the_share_holds_for_the_bundled_family() -> None:
    """Calibrated while sampling plainly, checked while fork sampling, on prompts of other problems."""
    from transformers import AutoTokenizer

    from proxytune.demo.bundle import bundled
    from proxytune.demo.evaluation import held_out
    from proxytune.demo.instructions import prompt_of
    from proxytune.demo.world import build_world

    model = proxytune.wrap(
        bundled("large-base"), expert=bundled("tiny-tuned"), antiexpert=bundled("tiny-base"), alpha=0.5,
        dtype=torch.float32,
    )  # fmt: skip
    text = AutoTokenizer.from_pretrained(bundled("large-base"), padding_side="left")
    asked = [prompt_of(p.question) for split in held_out(build_world(), "validation", 40).values() for p in split]
    end = model.generation_config.eos_token_id

    def run(prompts: list[str], one: ForkSamplingLogitsProcessor) -> torch.Tensor:
        batch = text(prompts, return_tensors="pt", padding=True, return_token_type_ids=False)
        model.generate(**batch, do_sample=True, top_k=0, max_new_tokens=40, logits_processor=[one])
        found = one.record().entropy
        return found[~found.isnan()]

    plain = ForkSamplingLogitsProcessor(0.0, exec_temperature=1.0, eos_token_id=end, record=True)
    threshold = ForkThreshold.calibrated(run(asked[::2], plain), window=500)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(asked[1::2], ForkSamplingLogitsProcessor(threshold, eos_token_id=end, record=True))
    assert threshold.tokens > 1200
    assert threshold.realised_share == pytest.approx(0.2, abs=0.02)


# --- records -------------------------------------------------------------------------------------------------------


def test_a_record_is_of_the_last_generation() -> None:
    model, one = shared("llama", 1), forks(record=True)
    with pytest.raises(InputError, match="record: expected a generation with record=True; got no generation yet"):
        one.record()
    with pytest.raises(InputError, match="got record=False"):
        forks().record()
    ids = torch.randint(3, 240, (2, 5))
    for prompt, new in ((ids, 12), (ids, 7), (ids[:1], 3), (torch.randint(3, 240, (2, 9)), 4)):
        with one.attach(model):
            model.generate(prompt, **SAMPLED | {"max_new_tokens": new})
        assert one.record().entropy.shape == (len(prompt), new)
    one.reset()
    with pytest.raises(InputError, match="no generation yet"):
        one.record()


def test_two_generations_that_look_like_one() -> None:
    model, one = build("llama", 1), forks(record=True)
    one.attach(model)
    run = SAMPLED | {"max_new_tokens": 3}
    text = model.generate(torch.randint(3, 240, (2, 5)), **run)
    model.generate(torch.randint(3, 240, text.shape), **run)
    with pytest.raises(InputError, match=r"record: expected one generation; got two .* Call reset\(\)"):
        one.record()
    # The same text going on is one text.
    one.reset()
    text = model.generate(torch.randint(3, 240, (2, 5)), **run)
    model.generate(text, **run)
    assert one.record().entropy.shape == (2, 6)


def test_assisted_decoding() -> None:
    base, draft = build("llama", 1), build("llama", 4)
    draft.generation_config.num_assistant_tokens = 3
    ids = torch.randint(3, 240, (1, 7))
    threshold = ForkThreshold(H)
    one = forks(threshold, record=True)
    one.attach(base)
    want = base.generate(ids, **GREEDY)
    record = one.record()
    one.reset()
    threshold.reset()
    got = base.generate(ids, assistant_model=draft, **GREEDY)
    one.detach()
    assert torch.equal(got, want)
    # The record is the verifying model's; of the draft's positions only the end may be left over.
    torch.testing.assert_close(one.record().entropy[:, :12], record.entropy, atol=1e-4, rtol=1e-4)
    assert threshold.tokens < 12
    streaming = forks(ForkThreshold.streaming()).attach(base)
    with streaming, pytest.raises(UnsupportedModeError, match="streaming threshold: expected a generation that visits"):
        base.generate(ids, assistant_model=draft, **GREEDY)


def test_nothing_waits_for_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step may not look at values: that would be a wait on a GPU. Below a window, a stream's step does not either."""
    one = ready(forks(ForkThreshold.streaming(), eos_token_id=[1, 2], record=True))
    ids, scores = torch.randint(3, 240, (4, 5)), torch.randn(4, 50)
    one(ids, scores)

    def waited(*_: Any) -> Any:
        raise AssertionError("a value was looked at")

    for name in ("item", "tolist", "__bool__", "__float__", "__int__", "cpu", "numpy"):
        monkeypatch.setattr(torch.Tensor, name, waited)
    monkeypatch.setattr(torch, "equal", waited)
    for _ in range(3):
        ids = torch.cat([ids, ids[:, :1]], 1)
        one(ids, scores)


# --- wrong use -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [{"num_beams": 3}, {"num_beams": 2, "do_sample": True}])
@pytest.mark.parametrize("door", ["plain", "composed", "steered", "after steering"])
def test_beams_are_refused(mode: dict[str, Any], door: str) -> None:
    base, ids = members()[0], torch.randint(3, 240, (2, 5))
    one = forks()
    run = {"max_new_tokens": 3, **mode}
    with contextlib.ExitStack() as attached:
        if door == "steered":
            attached.enter_context(steering().attach(base))
        elif door != "composed":
            attached.enter_context(one.attach(base))
        before: list[LogitsProcessor] = [steering()] if door == "after steering" else []
        model = composed() if door == "composed" else base
        with pytest.raises(UnsupportedModeError, match="beam search: expected greedy decoding or sampling; got "):
            model.generate(ids, logits_processor=[*before, one], **run)
        if door not in ("composed", "steered"):
            with pytest.raises(UnsupportedModeError, match="beam search: expected greedy decoding or sampling; got "):
                model.generate(ids, logits_processor=before, **run)


@pytest.mark.parametrize("mode", [SAMPLED, GREEDY, SAMPLED | {"temperature": 0.6}, GREEDY | {"num_beams": 3}])
def test_a_plain_model_that_it_is_not_attached_to_is_refused(mode: dict[str, Any]) -> None:
    base, ids = members()[0], torch.randint(3, 240, (2, 5))
    match = r"expected to be attached to the model.* Call processor\.attach\(model\) before .*for_call"
    for before in ([], [steering()]):
        with pytest.raises(UnsupportedModeError, match=match):
            base.generate(ids, logits_processor=[*before, forks()], **mode)
    # Nor does it take one call's settings for another's.
    one = forks()
    composed().generate(ids, logits_processor=[one], **GREEDY)
    with one.attach(build("llama", 1)) as attached:
        attached._hooks[0].model.generate(ids, **GREEDY)
        with pytest.raises(UnsupportedModeError, match=match):
            base.generate(ids, logits_processor=[one], **mode)
    with pytest.raises(UnsupportedModeError, match=match):
        base.generate(ids, logits_processor=[one], **mode)
    with pytest.raises(UnsupportedModeError, match=match):
        one(ids, torch.randn(2, 9))


def test_generate_s_own_temperature_multiplies_and_is_told() -> None:
    model, ids = build("llama", 1), torch.randint(3, 240, (2, 5))
    with (
        forks().attach(model),
        pytest.raises(InputError, match=r"\)'s temperature: expected 1\.0, as passed .*; got 0\.6"),
    ):
        model.generate(ids, temperature=0.6, **SAMPLED)
    torch.manual_seed(1)
    with forks(temperature=0.6).attach(model):
        told = model.generate(ids, temperature=0.6, **SAMPLED)
    torch.manual_seed(1)
    with forks(fork_temperature=1.2 * 0.6, exec_temperature=0.5 * 0.6).attach(model):
        assert torch.equal(told, model.generate(ids, **SAMPLED))
    # Settings that a model ships are found as well as those of the call.
    model.generation_config = GenerationConfig(do_sample=True, temperature=0.6, pad_token_id=PAD)
    with forks().attach(model), pytest.raises(InputError, match=r"generate\(\)'s temperature"):
        model.generate(ids, max_new_tokens=3)


def test_truncation_is_told_where_it_is_measured() -> None:
    model, ids = shared("llama", 1), torch.randint(3, 240, (2, 5))
    run = SAMPLED | {"top_k": 50, "top_p": 0.9}
    one = forks(measure="truncated", top_p=0.9)
    match = r"generate\(\)'s top_k: expected 0, as passed to the processor; got 50"
    with one.attach(model), pytest.raises(InputError, match=match):
        model.generate(ids, **run)
    with forks().attach(model):
        model.generate(ids, **run)  # raw: no matter


def test_the_order_of_processors_matters() -> None:
    base, ids = members()[0], torch.randint(3, 240, (2, 5))
    one = forks()
    with one.attach(base):
        with pytest.raises(InputError, match="expected the ForkSampling.* after the ProxyTuning"):
            base.generate(ids, logits_processor=[one, steering()], **SAMPLED)
        for several in ([forks()], [one, forks()]):
            with pytest.raises(InputError, match="expected one ForkSamplingLogitsProcessor; got 2, whose"):
                base.generate(ids, logits_processor=several, **SAMPLED)
    with steering().attach(base):
        for model in (base, composed()):
            with pytest.raises(InputError, match="expected one ForkSamplingLogitsProcessor; got 2, whose"):
                model.generate(ids, logits_processor=[forks(), forks()], **SAMPLED)


def test_attaching_twice_is_refused_and_detaching_leaves_no_trace() -> None:
    base, ids = build("llama", 1), torch.randint(3, 240, (2, 5))
    alone, before = base.generate(ids, **GREEDY), set(vars(base))
    one = forks(record=True)
    with one.attach(base):
        with pytest.raises(InputError, match="attach: expected a detached processor; got one that is attached to a Ll"):
            one.attach(shared("llama", 2))
        with pytest.raises(InputError, match="attach: expected one ForkSamplingLogitsProcessor; got 2, whose"):
            forks().attach(base)
        with pytest.raises(UnsupportedModeError, match="continuous batching"):
            base.generate_batch([[5, 6, 7]])
        assert torch.equal(base.generate(ids, **GREEDY), alone)
        assert one.record().entropy.shape == (2, 12)
        assert torch.equal(copy.deepcopy(base).generate(ids, **SAMPLED | {"top_k": 1, "temperature": 0.6}), alone)
    one.detach()  # without effect
    assert set(vars(base)) == before
    assert torch.equal(base.generate(ids, **GREEDY), alone)


@pytest.mark.parametrize("first", ["steering", "forks"])
def test_attached_together_with_steering_in_either_order(first: str) -> None:
    ids, mask = padded()
    base, one, steer = build("llama", 1), forks(record=True), steering()
    run = {"attention_mask": mask, **SAMPLED}
    torch.manual_seed(5)
    want = composed().generate(ids, logits_processor=[forks()], **run)
    for processor in (steer, one) if first == "steering" else (one, steer):
        processor.attach(base)
    torch.manual_seed(5)
    assert torch.equal(base.generate(ids, **run), want)
    # The one below goes first: what is on top stays, and works.
    (steer if first == "steering" else one).detach()
    torch.manual_seed(5)
    rest = base.generate(ids, **run)
    (one if first == "steering" else steer).detach()
    assert "_get_logits_processor" not in vars(base)
    with one.attach(base) if first == "steering" else steer.attach(base):
        torch.manual_seed(5)
        assert torch.equal(base.generate(ids, **run), rest)
    assert not torch.equal(rest, want)


def test_a_model_that_drafts_for_another_goes_without() -> None:
    base, draft = shared("llama", 1), build("llama", 4)
    ids, one = torch.randint(3, 240, (1, 7)), forks(record=True)
    with one.attach(draft):
        got = base.generate(ids, assistant_model=draft, **GREEDY)
    assert torch.equal(got, base.generate(ids, **GREEDY))
    with pytest.raises(InputError, match="no generation yet"):
        one.record()


def test_check_settings_says_the_same_of_settings() -> None:
    one = forks()
    one.check_settings(GenerationConfig(do_sample=True, top_k=50, eos_token_id=[7, 8]))
    one.check_settings(GenerationConfig(do_sample=False, temperature=0.6))  # greedy decoding ignores it
    ready(one)(torch.tensor([[3, 4, 7]]), torch.randn(1, 9))
    one.reset()
    with pytest.raises(UnsupportedModeError, match="num_beams=4"):
        one.check_settings(GenerationConfig(num_beams=4))
    with pytest.raises(InputError, match="temperature"):
        one.check_settings(GenerationConfig(do_sample=True, temperature=0.6))
    with pytest.raises(InputError, match="generate\\(\\)'s top_k: expected 5, .* got 50"):
        forks(measure="truncated", top_k=5).check_settings(GenerationConfig(do_sample=True, top_k=50))


def test_a_list_of_one_s_own_is_looked_at_too() -> None:
    ids, scores = torch.randint(3, 240, (2, 5)), torch.randn(2, 9)
    config = GenerationConfig(do_sample=True, top_k=0)
    one, warper = forks(), TopKLogitsWarper(3)
    with pytest.raises(UnsupportedModeError, match="for_call"):
        LogitsProcessorList([one, warper])(ids, scores)
    LogitsProcessorList([one.for_call(config, [one, warper]), warper])(ids, scores)
    with pytest.raises(InputError, match="temperature"):
        one.for_call(config, [one, TemperatureLogitsWarper(0.5)])
    with pytest.raises(UnsupportedModeError, match="for_call"):
        LogitsProcessorList([one, TemperatureLogitsWarper(0.5)])(ids, scores)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"fork_temperature": 0.0}, "fork_temperature: expected a finite number > 0; got 0.0"),
        ({"exec_temperature": -1}, "exec_temperature: expected a finite number > 0; got -1"),
        ({"exec_temperature": float("nan")}, "exec_temperature: expected a finite number > 0; got nan"),
        ({"theta": 0}, "theta: expected a finite number > 0"),
        ({"exponent": "1"}, "exponent: expected a finite number > 0"),
        ({"measure": "cooked"}, "measure: expected 'raw', 'scaled' or 'truncated'; got 'cooked'"),
        ({"form": "three"}, "form: expected 'two', 'dynamic' or 'edt'; got 'three'"),
        ({"measure": "truncated"}, "measure: expected 'truncated' and at least one of top_k, top_p and min_p"),
        ({"top_k": 5}, "got measure='raw' and top_k"),
        ({"temperature": -1.0}, "sampling settings: expected values that generate"),
        ({"measure": "truncated", "top_p": 2.0}, "sampling settings: expected values that generate"),
    ],
)
def test_settings_that_cannot_be_right(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message.replace("(", r"\(").replace(".", r"\.")):
        forks(**settings)


def test_in_a_pipeline_which_has_a_temperature_of_its_own() -> None:
    model = build("llama", 1, vocab=259)
    one = forks(record=True).attach(model)
    ask = pipeline("text-generation", model, tokenizer=tokenizer())
    with pytest.raises(InputError, match=r"generate\(\)'s temperature: expected 1\.0, .* got 0\.7"):
        ask("abc", **SAMPLED)
    ask("abc", temperature=1.0, **SAMPLED)
    assert one.record().entropy.shape == (1, 12)
