"""What must hold of proxy-tuning whatever the models: α = 0, expert = antiexpert, base = antiexpert."""

import copy
from typing import Any

import pytest
import torch
from support.tiny import build, shared
from transformers import PreTrainedModel

import proxytune
from proxytune import ProxyTuningLogitsProcessor
from proxytune.errors import SteeringWarning

FAMILIES = ["llama", "qwen3", "gpt2", "mistral", "gemma3"]
MODES: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "top_k": 0},
    "beam-4": {"do_sample": False, "num_beams": 4},
}
SHOW = {"output_logits": True, "output_scores": True, "return_dict_in_generate": True}


def generate(model: PreTrainedModel, **kwargs: Any) -> Any:
    ids = torch.randint(3, 240, (2, 12), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    ids[1, :4], mask[1, :4] = 0, 0
    torch.manual_seed(11)
    return model.generate(ids, attention_mask=mask, max_new_tokens=12, **SHOW, **kwargs)


def assert_same(ours: Any, theirs: Any) -> None:
    assert torch.equal(ours.sequences, theirs.sequences)
    for a, b in zip(ours.scores, theirs.scores, strict=True):
        assert torch.isfinite(a).any()
        assert torch.equal(a, b)  # bit for bit


def other(family: str) -> str:
    return FAMILIES[(FAMILIES.index(family) + 1) % len(FAMILIES)]


@pytest.mark.smoke
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", FAMILIES)
def test_alpha_0_is_the_base_bit_for_bit(family: str, mode: str) -> None:
    base, expert, antiexpert = shared(family, 1), shared(other(family), 2), shared(other(family), 3)
    model = proxytune.wrap(base, expert=expert, antiexpert=antiexpert, alpha=0.0, check_vocabulary=False)
    alone = generate(base, **MODES[mode])
    assert_same(generate(model, **MODES[mode]), alone)
    processor = ProxyTuningLogitsProcessor(expert, antiexpert, 0.0, check_vocabulary=False)
    with processor.attach(base):
        steered = generate(base, **MODES[mode])
    # In beam search the processor renormalises what is normalised already: equal tokens, scores to rounding.
    assert torch.equal(steered.sequences, alone.sequences)
    for a, b in zip(steered.scores, alone.scores, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-6)
        if mode != "beam-4":
            assert torch.equal(a, b)


@pytest.mark.parametrize("alpha", [1.0, -3.0, 0.3])
@pytest.mark.parametrize("family", FAMILIES)
def test_expert_equal_to_antiexpert_is_the_base_bit_for_bit(family: str, alpha: float) -> None:
    base, small = shared(family, 1), shared(other(family), 2)
    with pytest.warns(SteeringWarning, match="expert and antiexpert have equal weights"):
        model = proxytune.wrap(base, expert=small, antiexpert=copy.deepcopy(small), alpha=alpha, check_vocabulary=False)
    for mode in MODES.values():
        assert_same(generate(model, **mode), generate(base, **mode))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", FAMILIES)
def test_base_equal_to_antiexpert_is_the_expert(family: str, mode: str) -> None:
    base, expert = shared(family, 1), shared(other(family), 2)
    model = proxytune.wrap(base, expert=expert, antiexpert=base, alpha=1.0, check_vocabulary=False)
    ours, theirs = generate(model, **MODES[mode]), generate(expert, **MODES[mode])
    assert torch.equal(ours.sequences, theirs.sequences)
    for a, b in zip(ours.logits, theirs.logits, strict=True):
        # b + (e − b): one rounding of the difference, one of the sum.
        torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-5)


def test_alpha_can_be_changed_between_calls() -> None:
    base, expert, antiexpert = shared("llama", 1), shared("gpt2", 2), shared("gpt2", 3)
    model = proxytune.wrap(base, expert=expert, antiexpert=antiexpert, alpha=0.0, check_vocabulary=False)
    still = generate(model, do_sample=False).sequences
    model.alpha = 2.0
    moved = generate(model, do_sample=False).sequences
    fresh = proxytune.wrap(base, expert=expert, antiexpert=antiexpert, alpha=2.0, check_vocabulary=False)
    assert not torch.equal(still, moved)
    assert torch.equal(moved, generate(fresh, do_sample=False).sequences)


def test_half_precision_members_are_combined_in_float32() -> None:
    """With bf16 members the composition must lie as near the float64 combination of their logits as float32 allows."""
    members = [build(f, s).to(torch.bfloat16) for f, s in (("llama", 1), ("gpt2", 2), ("gpt2", 3))]
    model = proxytune.wrap(members[0], expert=members[1], antiexpert=members[2], alpha=0.7, check_vocabulary=False)
    ids = torch.randint(3, 240, (2, 9))
    with torch.no_grad():
        base, expert, antiexpert = (m(ids).logits.double() for m in members)
        got = model(ids).logits
    want = base + 0.7 * (expert - antiexpert)
    assert got.dtype == torch.float32
    error = (got.double() - want).abs().max()
    rounded = (want.bfloat16().double() - want).abs().max()
    assert error <= 1e-5
    assert error < rounded / 100, "a bfloat16 combination would have been off this much"
