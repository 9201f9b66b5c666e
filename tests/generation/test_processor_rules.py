"""Processors that belong to the prompts of a batch, in loops whose rows come, go and change places.

The reference is each prompt by itself, with the processor made for it alone.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.tiny import shared
from support.trees import ALPHA, LOW, composed, described, grow, padded
from transformers import SynthIDTextWatermarkingConfig

import proxytune
from proxytune import ForkDecoding, SiblingDecoding
from proxytune.errors import InputError, UnsupportedModeError
from proxytune.generation.prompt_rows import expand_to_rows, owner_of, rows_of_prompts
from proxytune.methods.thinking.processor import ThinkingBudgetLogitsProcessor

LOOPS: dict[str, Any] = {
    "forks": lambda **more: ForkDecoding(threshold=LOW, branches=6, min_gap=2, seed=5, **more),
    "siblings": lambda **more: SiblingDecoding(threshold=LOW, siblings=4, seed=5, **more),
}
BIAS = {(2,): 2.0}  # rows end at different places


@pytest.fixture(params=LOOPS)
def loop(request: pytest.FixtureRequest) -> Any:
    return LOOPS[request.param]


def alone(loop: Any, i: int, **kwargs: Any) -> list[Any]:
    ids, mask = padded()
    row = slice(int((mask[i] == 0).sum()), None)
    out = grow(shared("llama", 1), loop(stream_ids=[i]), ids[i : i + 1, row], mask[i : i + 1, row], **kwargs)
    return described(out.trees[0])


def test_a_constraint_is_asked_for_the_prompt_not_for_the_row(loop: Any) -> None:
    ids, mask = padded()
    ranges = [range(20, 40), range(40, 60), range(60, 80)]
    out = grow(
        shared("llama", 1),
        loop(),
        ids,
        mask,
        prefix_allowed_tokens_fn=lambda number, _: [2, *ranges[number]],
        sequence_bias=BIAS,
    )
    assert len({len(branch) for tree in out.trees for branch in tree}) > 1, "some end before others"
    for i, tree in enumerate(out.trees):
        tokens = {int(token) for branch in tree for token in branch.along("tokens")}
        assert tokens <= {2, *ranges[i]}
        want = alone(loop, i, prefix_allowed_tokens_fn=lambda _, __, i=i: [2, *ranges[i]], sequence_bias=BIAS)
        assert described(tree) == want


def test_budgets_of_thinking_are_those_of_the_prompts(loop: Any) -> None:
    ids, mask = padded()
    caps = [1, 4, None]
    think = ThinkingBudgetLogitsProcessor(30, max_thinking_tokens=caps, prompt_length=ids.shape[1])
    out = grow(shared("llama", 1), loop(), ids, mask, logits_processor=[think], sequence_bias=BIAS)
    for i, tree in enumerate(out.trees):
        length = int(mask[i].sum())
        one = ThinkingBudgetLogitsProcessor(30, max_thinking_tokens=caps[i], prompt_length=length)
        assert described(tree) == alone(loop, i, logits_processor=[one], sequence_bias=BIAS)
        if caps[i] is not None:
            cut = [branch.along("tokens") for branch in tree if len(branch) > caps[i]]
            assert cut, "some think for so long"
            assert all(30 in tokens[: caps[i] + 1] or 2 in tokens[: caps[i] + 1] for tokens in cut)


@pytest.mark.parametrize("door", ["attach", "explicit mask"])
def test_companions_read_each_row_with_the_mask_of_its_prompt(loop: Any, door: str) -> None:
    ids, mask = padded()
    bias = {(2,): 6.0}
    want = grow(composed(), loop(), ids, mask, sequence_bias=bias)
    base, expert, antiexpert = (m.model for m in composed().members)
    given = None if door == "attach" else mask
    processor = proxytune.ProxyTuningLogitsProcessor(
        expert, antiexpert, alpha=ALPHA, check_vocabulary=False, attention_mask=given
    )
    with processor.attach(base):
        got = grow(base, loop(), ids, mask, sequence_bias=bias)
    assert [described(tree) for tree in got.trees] == [described(tree) for tree in want.trees]
    torch.testing.assert_close(got.log_weights, want.log_weights, atol=1e-4, rtol=0)
    assert len({len(branch) for tree in want.trees for branch in tree}) > 1, "some end before others"
    if given is not None:
        with processor.attach(base), pytest.raises(InputError, match="the prompts of the mask that was given"):
            grow(base, loop(), ids.flip(0), mask.flip(0))


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"encoder_repetition_penalty": 1.5}, "encoder_repetition_penalty"),
        ({"encoder_no_repeat_ngram_size": 2}, "encoder_no_repeat_ngram_size"),
        ({"guidance_scale": 1.5}, "guidance_scale"),
        (
            {"watermarking_config": SynthIDTextWatermarkingConfig(keys=[654, 400], ngram_len=3)},
            "watermarking_config",
        ),
    ],
)
def test_what_is_kept_for_each_row_is_refused(loop: Any, settings: dict[str, Any], named: str) -> None:
    ids, mask = padded()
    with pytest.raises(UnsupportedModeError, match=f"{named}: expected none with {type(loop()).__name__}"):
        grow(shared("llama", 1), loop(), ids, mask, **settings)


def test_values_of_prompts_for_rows() -> None:
    values = torch.tensor([10, 20])
    assert expand_to_rows(values, 4).tolist() == [10, 10, 20, 20]
    assert expand_to_rows(values, 3) is None
    assert owner_of(7) == 7
    with rows_of_prompts([1, 0, 1], prompts=2):
        assert expand_to_rows(values, 3).tolist() == [20, 10, 20]
        assert expand_to_rows(values, 4) is None
        assert owner_of(2) == 1
        with rows_of_prompts([3, 1, 2], prompts=4):  # two sequences of each of two prompts
            assert expand_to_rows(values, 3).tolist() == [20, 10, 20]
            assert expand_to_rows(torch.arange(3), 3) is None
        assert owner_of(1) == 0
    assert expand_to_rows(values, 4).tolist() == [10, 10, 20, 20]
