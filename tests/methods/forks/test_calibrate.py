"""Entropies of sampled and of given texts against forward passes by hand; the threshold that follows, its intervals."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from support.tiny import VOCABULARY, shared, tokenizer

import proxytune
from proxytune.errors import CalibrationWarning
from proxytune.methods.forks.calibrate import bootstrap, forced_entropies, report, sampled_entropies
from proxytune.methods.forks.threshold import ForkThreshold
from proxytune.ops.entropy import entropy

PROMPTS = ["Question: Start with 3", "Question: Who", "x", "Answer: 3 + 4"]
TEXTS = ["Start with 3, add 4, take away 2.", "Question: Who is there?\nAnswer: nobody", "x"]


def composed() -> Any:
    base, expert, antiexpert = (shared("llama", seed, VOCABULARY) for seed in (1, 2, 3))
    return proxytune.wrap(base, expert=expert, antiexpert=antiexpert, alpha=0.5, check_vocabulary=False)


@pytest.fixture(params=["composed", "plain"])
def model(request: pytest.FixtureRequest) -> Any:
    return composed() if request.param == "composed" else shared("llama", 1, VOCABULARY)


def test_given_texts_against_each_prefix(model: Any) -> None:
    read: list[int] = []
    found = forced_entropies(model, tokenizer(), TEXTS, read.append)
    assert read == [1, 1, 1]
    by_hand = []
    for text in TEXTS[:2]:  # the last is a single token: nothing to measure
        ids = tokenizer()(text, return_tensors="pt")["input_ids"]
        logits = [model(ids[:, :end]).logits[0, -1].detach().double() for end in range(1, ids.shape[1])]
        by_hand.append([float(torch.distributions.Categorical(logits=row).entropy()) for row in logits])
    assert [len(one) for one in found] == [len(one) for one in by_hand]
    np.testing.assert_allclose(np.concatenate(found), np.concatenate(by_hand), atol=1e-4)
    with pytest.warns(CalibrationWarning, match="do not settle the share to 2 points"):
        summary = report(found, 0.4)
    tokens = np.concatenate(by_hand)
    assert (summary["tokens"], summary["texts"]) == (len(tokens), 2)
    assert summary["mean"] == pytest.approx(tokens.mean(), abs=1e-4)
    assert summary["nats"] == pytest.approx(ForkThreshold.calibrated(tokens, 0.4).nats, abs=1e-3)


def test_a_long_text_is_read_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    model = composed()

    def measured() -> dict[str, Any]:
        with pytest.warns(CalibrationWarning, match="one text only"):
            return report(forced_entropies(model, tokenizer(), [" ".join(TEXTS[:1] * 6)]), 0.2)

    whole = measured()
    monkeypatch.setattr("proxytune.methods.forks.calibrate._PIECE", 7)
    pieces = measured()
    assert pieces["tokens"] == whole["tokens"] > 50
    assert pieces["nats"] == pytest.approx(whole["nats"], abs=1e-4)


def test_samples_against_a_forward_pass(model: Any) -> None:
    """The same seed gives the same samples; their entropies are those of a forward pass over them."""
    batch = tokenizer()(PROMPTS, return_tensors="pt", padding=True, return_token_type_ids=False)
    torch.manual_seed(3)
    found = sampled_entropies(model, batch, 1.3, samples=4, max_new_tokens=30)
    torch.manual_seed(3)
    start = batch["input_ids"].shape[1]
    text = model.generate(**batch, do_sample=True, temperature=1.3, top_k=0, max_new_tokens=30, num_return_sequences=4)
    mask = torch.cat([batch["attention_mask"].repeat_interleave(4, 0), torch.ones_like(text[:, start:])], 1)
    h = entropy(model(text, attention_mask=mask).logits[:, start - 1 : -1].detach())
    end = text[:, start:] == model.generation_config.eos_token_id
    kept = end.long().cumsum(1) - end.long() == 0
    assert len(found) == 16
    for one, row, of_row in zip(found, h, kept, strict=True):
        np.testing.assert_allclose(one, row[of_row].numpy(), atol=1e-3)


def test_the_model_s_own_penalties_are_left_aside_and_come_back(model: Any) -> None:
    batch = tokenizer()(PROMPTS, return_tensors="pt", padding=True, return_token_type_ids=False)

    def sampled() -> list[Any]:
        torch.manual_seed(3)
        return sampled_entropies(model, batch, 1.0, max_new_tokens=8)

    plain, before = sampled(), model.generation_config
    model.generation_config = own = copy.deepcopy(before)
    own.update(repetition_penalty=3.0, temperature=0.3, top_k=2)
    try:
        for one, other in zip(sampled(), plain, strict=True):
            np.testing.assert_array_equal(one, other)
        assert model.generation_config is own
    finally:
        model.generation_config = before


def test_the_intervals_cover_what_other_texts_give() -> None:
    """Texts of alike tokens: resampling tokens would be too sure, resampling texts is not."""
    rng = np.random.default_rng(0)
    truth = float(np.quantile(rng.gamma(2.0, 1.0, 200_000) * 1.0, 0.8))
    covered = 0
    for _ in range(40):
        texts = [np.repeat(rng.gamma(2.0, 1.0, 5), 10) for _ in range(60)]  # runs of ten equal tokens
        nats = ForkThreshold.calibrated(np.concatenate(texts)).nats
        interval, shares = bootstrap(texts, 0.2, nats)
        assert shares[0] < 0.2 < shares[1]
        covered += interval[0] <= truth <= interval[1]
    assert covered >= 34  # 38 expected
    assert bootstrap(texts[:1], 0.2, 1.0) == (None, None)
