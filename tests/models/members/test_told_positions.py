"""Positions that a member cannot be told are refused, not dropped."""

from typing import Any

import pytest
import torch
from transformers import BloomConfig, BloomForCausalLM, RobertaConfig, RobertaForCausalLM

import proxytune
from proxytune.errors import InputError

IDS = torch.arange(40, 46)[None]
SHIFTED = torch.arange(3, 9)[None]
PACKED = torch.tensor([[0, 1, 2, 0, 1, 2]])


def of_roberta(seed: int) -> Any:
    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = RobertaConfig(**sizes, vocab_size=128, initializer_range=0.3, is_decoder=True)
    return RobertaForCausalLM(config)


def of_bloom(seed: int) -> Any:
    torch.manual_seed(seed)
    return BloomForCausalLM(BloomConfig(vocab_size=128, hidden_size=32, n_layer=2, n_head=4))


@pytest.mark.parametrize("make", [of_roberta, of_bloom])
def test_other_positions_are_refused_and_those_of_the_mask_are_not(make: Any) -> None:
    members = {role: make(seed) for seed, role in enumerate(("base", "expert", "antiexpert"))}
    model = proxytune.wrap(**members, check_vocabulary=False)
    doors = [lambda at: model(IDS, position_ids=at, use_cache=False), lambda at: model(IDS, position_ids=at)]
    for positions in (SHIFTED, PACKED):
        for door in doors:
            with pytest.raises(InputError, match=r"position_ids for the base: expected none, or 0, 1.*got \[\[\d, "):
                door(positions)
    want = model(IDS).logits
    for mask in (None, torch.ones_like(IDS)):
        assert torch.equal(model(IDS, attention_mask=mask, position_ids=torch.arange(6)[None]).logits, want)
    first = model(IDS[:, :3])
    rest = model(IDS[:, 3:], past_key_values=first.past_key_values, position_ids=torch.arange(3, 6)[None])
    torch.testing.assert_close(rest.logits, want[:, 3:])
    with pytest.raises(InputError, match="position_ids for the base"):
        model(IDS[:, 3:], past_key_values=model(IDS[:, :3]).past_key_values, position_ids=torch.arange(3)[None])
    right = torch.tensor([[1, 1, 1, 1, 0, 0]])  # padding may have any position
    at = torch.tensor([[0, 1, 2, 3, 9, 9]])
    model(IDS, attention_mask=right, position_ids=at)
