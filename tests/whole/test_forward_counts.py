"""What a generation costs: one token-forward per row, member and step, and the prompt once. Counted from outside.

The counters are hooks on the members' embeddings, so that the product's own `token_forwards` is checked as well.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from support.tiny import build, shared
from transformers import PreTrainedModel

import proxytune
from proxytune import ProxyTuningLogitsProcessor
from proxytune.models.members.cache_name import CACHE

PROMPT, NEW = 12, 10


@contextmanager
def counting(members: dict[str, PreTrainedModel]) -> Iterator[Counter[str]]:
    """Role → ids embedded, rows × tokens."""
    seen: Counter[str] = Counter()

    def hook(role: str) -> Any:
        return lambda module, args, output: seen.update({role: args[0].numel()})

    handles = [m.get_input_embeddings().register_forward_hook(hook(role)) for role, m in members.items()]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


@pytest.fixture(params=["llama", "mistral"])  # full layers, and sliding ones that forget
def members(request: pytest.FixtureRequest) -> dict[str, PreTrainedModel]:
    return {"base": shared(request.param, 1), "expert": shared("qwen3", 2), "antiexpert": shared(request.param, 3)}


# mode → rows per prompt
MODES = {
    "greedy": ({"do_sample": False}, 1),
    "sampling": ({"do_sample": True}, 1),
    "return-3": ({"do_sample": True, "num_return_sequences": 3}, 3),
    "beam-4": ({"do_sample": False, "num_beams": 4}, 4),
    "beam-sampling": ({"do_sample": True, "num_beams": 4}, 4),
    "static": ({"do_sample": False, "cache_implementation": "static"}, 1),
    "chunked": ({"do_sample": False, "prefill_chunk_size": 5}, 1),
}


@pytest.mark.parametrize("padding", [False, True])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.smoke
def test_one_token_forward_per_row_member_and_step(
    members: dict[str, PreTrainedModel], mode: str, padding: bool
) -> None:
    settings, rows = MODES[mode]
    ids, mask = torch.randint(3, 240, (2, PROMPT)), torch.ones(2, PROMPT, dtype=torch.long)
    if padding:
        ids[1, :5], mask[1, :5] = 0, 0
    # No EOS, so that every row runs to the end. The last token is sampled, not forwarded.
    run = {"attention_mask": mask, "max_new_tokens": NEW, "eos_token_id": None, **settings}
    want = 2 * rows * (PROMPT + NEW - 1)

    model = proxytune.wrap(**members, check_vocabulary=False)
    with counting(members) as seen:
        model.generate(ids, **run)
    assert seen == dict.fromkeys(members, want)
    assert model.token_forwards == dict.fromkeys(members, want)

    processor = ProxyTuningLogitsProcessor(members["expert"], members["antiexpert"], check_vocabulary=False)
    with counting(members) as seen, processor.attach(members["base"]):
        members["base"].generate(ids, **run)
    assert seen == dict.fromkeys(members, want)
    assert processor.token_forwards == dict.fromkeys(("expert", "antiexpert"), want)


def test_a_conversation_forwards_only_what_is_new(members: dict[str, PreTrainedModel]) -> None:
    model = proxytune.wrap(**members, check_vocabulary=False)
    processor = ProxyTuningLogitsProcessor(members["expert"], members["antiexpert"], check_vocabulary=False)
    run = {"max_new_tokens": NEW, "eos_token_id": None, "do_sample": False, "return_dict_in_generate": True}
    ids = torch.randint(3, 240, (1, PROMPT))
    # From the start: a hook that is added later might change what the caches hold.
    with counting(members) as seen:
        first = model.generate(ids, **run)
        with processor.attach(members["base"]):
            steered = members["base"].generate(ids, **run)
        assert torch.equal(first.sequences, steered.sequences)
        said = torch.randint(3, 240, (1, 5))
        ids = torch.cat([first.sequences, said], 1)
        # The last token of the first turn was not forwarded then: 1 + 5, and NEW − 1 more.
        want = 1 + 5 + NEW - 1
        seen.clear()
        model.generate(ids, **{CACHE: first.past_key_values}, **run)
        assert seen == dict.fromkeys(members, want)
        seen.clear()
        with processor.attach(members["base"]):
            members["base"].generate(ids, **{CACHE: steered.past_key_values}, **run)
        assert seen == dict.fromkeys(members, want)


def test_assisted_decoding_asks_twice_and_pays_once() -> None:
    # Draft = base: the processor is asked for each position by the draft, and again by the verification.
    base, expert, antiexpert = (build("llama", s) for s in (1, 2, 3))
    draft = build("llama", 1)
    draft.generation_config.num_assistant_tokens = 4
    processor = ProxyTuningLogitsProcessor(expert, antiexpert, check_vocabulary=False)
    ids = torch.randint(3, 240, (1, PROMPT))
    run = {"max_new_tokens": NEW, "eos_token_id": None, "do_sample": False}
    with processor.attach(base), counting({"expert": expert}) as seen:
        base.generate(ids, assistant_model=draft, **run)
    # The draft is steered as the base is, so all is accepted, and no position is forwarded twice. At the very end the
    # last sampled token may have been asked about by a draft.
    assert PROMPT + NEW - 1 <= seen["expert"] <= PROMPT + NEW


def test_no_logits_of_the_prompt_are_kept(members: dict[str, PreTrainedModel]) -> None:
    """A prefill computes one position of the head per member, not [B, T, V]."""
    widths: list[int] = []
    handles = [
        m.lm_head.register_forward_hook(lambda module, args, output: widths.append(output.shape[1]))
        for m in members.values()
    ]
    model = proxytune.wrap(**members, check_vocabulary=False)
    processor = ProxyTuningLogitsProcessor(members["expert"], members["antiexpert"], check_vocabulary=False)
    ids = torch.randint(3, 240, (2, PROMPT))
    model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=3)
    with processor.attach(members["base"]):
        members["base"].generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=3)
    for handle in handles:
        handle.remove()
    assert len(widths) == 2 * 3 * 3
    assert set(widths) == {1}
