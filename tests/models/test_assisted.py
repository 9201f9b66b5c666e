"""Assisted decoding on a composed model: what transformers' own generators do not fit."""

from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from support.tiny import PAD, build

import proxytune

ROOM = 16


@pytest.mark.smoke
@pytest.mark.parametrize(
    "settings",
    [
        {},
        pytest.param(
            {"cache_implementation": "static"},
            marks=pytest.mark.skipif(
                Version(transformers.__version__) < Version("5.24"), reason="static caches cannot be cropped"
            ),
        ),
    ],
    ids=["context", "static"],
)
def test_prompt_lookup_does_not_go_past_the_end(settings: dict[str, Any]) -> None:
    small = {"expert": build("llama", 2, 12), "antiexpert": build("llama", 3, 12)}
    base = build("llama", 1, 12, context=24 + ROOM)
    model = proxytune.wrap(base, **small, alpha=0.7, check_vocabulary=False)
    run: dict[str, Any] = {"do_sample": False, "eos_token_id": None, "pad_token_id": PAD, "max_new_tokens": ROOM}
    for seed in range(3):
        ids = torch.randint(3, 12, (1, 12), generator=torch.Generator().manual_seed(seed)).repeat(1, 2)
        want = model.generate(ids, **run)
        assert torch.equal(model.generate(ids, prompt_lookup_num_tokens=6, **settings, **run), want)
