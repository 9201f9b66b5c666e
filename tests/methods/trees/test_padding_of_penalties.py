"""A repetition penalty of a padded batch: each branch leaves out the padding of its own prompt."""

from __future__ import annotations

import pytest
import torch
from support.fused import composed, padded, run

from proxytune import ForkDecoding, FusedDecoding


@pytest.mark.smoke
def test_branches_of_a_padded_batch_are_penalised_as_their_prompts_alone() -> None:
    model = composed()
    ids, mask = padded()
    tree = ForkDecoding(seed=0, threshold=4.0, branches=3, min_gap=3)
    settings = {"do_sample": True, "repetition_penalty": 1.5, "return_dict_in_generate": True, "pad_token_id": 0}
    together = run(model, ids, mask, custom_generate=tree, **settings)
    for row in range(len(ids)):
        own = ids[row : row + 1, mask[row].bool()]
        alone = ForkDecoding(seed=0, threshold=4.0, branches=3, min_gap=3, stream_ids=[row])
        (want,) = run(model, own, torch.ones_like(own), custom_generate=alone, **settings).trees
        assert [b.along("tokens") for b in together.trees[row]] == [b.along("tokens") for b in want]
    single = run(model, ids, mask, custom_generate=ForkDecoding(seed=0, threshold=9.0, branches=1), **settings)
    plain = run(model, ids, mask, custom_generate=FusedDecoding(seed=0), **settings)
    assert torch.equal(single.sequences, plain.sequences)
