"""The page's table of loops: what it says a loop can do works, and what it says it cannot is refused."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from support.recursion import model_of
from support.speculation import composed

import proxytune
from proxytune.errors import ProxytuneError

PAGE = Path(proxytune.__file__).parent / "generation" / "README.md"
LOOPS: dict[str, Any] = {
    "FusedDecoding": proxytune.FusedDecoding(seed=0),
    "SpeculativeDecoding": proxytune.SpeculativeDecoding(seed=0, draft_tokens=2),
    "ForkDecoding": proxytune.ForkDecoding(threshold=1.0, branches=2, seed=0),
    "SiblingDecoding": proxytune.SiblingDecoding(threshold=1.0, siblings=2, seed=0),
    "LatentDecoding": proxytune.LatentDecoding("gumbel", seed=0),
    "RecursionDecoding": proxytune.RecursionDecoding(sigma=0.1, seed=0),
}
SAMPLED = {"do_sample": True}
MODES: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "sampling": SAMPLED,
    "beams": {"num_beams": 2, "do_sample": False},
    "several texts at once": SAMPLED | {"num_return_sequences": 2},
    "`output_scores`": SAMPLED | {"output_scores": True, "return_dict_in_generate": True},
    "static cache": SAMPLED | {"cache_implementation": "static"},
    "`guidance_scale`": SAMPLED | {"guidance_scale": 1.5},
}


def table() -> dict[str, dict[str, str]]:
    """Loop → what → the page's word for it."""
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in re.findall(r"^\|.*\|$", PAGE.read_text(encoding="utf-8").split("## Constraints")[0], re.MULTILINE)
    ]
    head, body = rows[0], rows[2:]
    found: dict[str, dict[str, str]] = {name.strip("`"): {} for name in head[1:]}
    for what, *cells in body:
        for name, cell in zip(found, cells, strict=True):
            for one, word in zip(what.split(" · "), cell.split(" · "), strict=True):
                found[name][one] = word
    return found


def test_the_page_has_every_loop() -> None:
    assert list(table()) == list(LOOPS) == [name for name in proxytune.__all__ if name.endswith("Decoding")]


@pytest.mark.parametrize("what", MODES)
@pytest.mark.parametrize("name", LOOPS)
def test_a_loop_does_what_the_page_says(name: str, what: str) -> None:
    model = model_of() if name == "RecursionDecoding" else composed("llama")
    ids = torch.arange(20, 28)[None]
    word = table()[name][what]
    settings = MODES[what] | {"custom_generate": LOOPS[name], "max_new_tokens": 3, "pad_token_id": 0}
    if word == "yes":
        model.generate(ids, **settings)
    else:
        assert word == "no"
        with pytest.raises(ProxytuneError):
            model.generate(ids, **settings)
