"""How many operators a decode step dispatches beside those of the members' own passes: a bound, not a timing."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from support.tiny import build
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache

import proxytune
from proxytune import FusedDecoding
from proxytune.formulas import ProxyTuning
from proxytune.formulas.gates import Gate
from proxytune.models.members.cache_name import CACHE

PROMPT = torch.arange(3, 9)[None]
SAMPLED = {"do_sample": True, "temperature": 0.9, "top_k": 5, "top_p": 0.9}
GREEDY = {"do_sample": False}


class Count(TorchDispatchMode):
    """Counts operators; views and allocations too, since the host pays for them alike."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen[str(func)] += 1
        return func(*args, **(kwargs or {}))


def per_step(model: Any, rows: int = 1, **settings: Any) -> Counter[str]:
    """Operators of one step of a generation, whatever its start and its end cost."""
    seen = []
    for new in (1, 4, 6):  # the first call takes the fingerprints
        torch.manual_seed(0)
        with Count() as count:
            model.generate(
                PROMPT.expand(rows, -1),
                attention_mask=torch.ones(rows, PROMPT.shape[1], dtype=torch.int64),
                max_new_tokens=new,
                eos_token_id=None,
                pad_token_id=0,
                **settings,
            )
        seen.append(count.seen)
    _, fewer, more = seen
    more.subtract(fewer)
    assert all(n % 2 == 0 for n in more.values())
    return Counter({name: n // 2 for name, n in more.items() if n})


def by_hand(*members: Any) -> Counter[str]:
    """Operators of one pass of each member over one token, told its position, without a mask."""
    total: Counter[str] = Counter()
    for member in members:
        cache = DynamicCache(config=member.config)
        with torch.inference_mode():
            member(input_ids=PROMPT, use_cache=True, **{CACHE: cache})
            position = torch.tensor([[PROMPT.shape[1]]])
            with Count() as count:
                member(input_ids=PROMPT[:, :1], position_ids=position, use_cache=True, **{CACHE: cache})
        total += count.seen
    return total


@pytest.fixture(scope="module")
def members() -> list[Any]:
    return [build("llama", 1), build("qwen3", 2, vocab=250), build("llama", 3, vocab=250)]


@pytest.fixture(scope="module")
def model(members: list[Any]) -> Any:
    return proxytune.wrap(*members, check_vocabulary=False)


# transformers before 5.20 keeps a mask without padding: it is appended to, and looked at once.
KEPT_MASK = 4 if Version(transformers.__version__) < Version("5.20") else 0
# transformers' own loop dispatches half of the composite door's, and `ops.step` half of the fused loop's.
DOORS = {
    "composite, greedy": (None, GREEDY, 40),
    "composite, sampled": (None, SAMPLED, 57),
    "fused, greedy": (FusedDecoding(seed=0), GREEDY, 26),
    "fused, sampled": (FusedDecoding(seed=0), SAMPLED, 39),
}


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("door", DOORS)
def test_a_step_dispatches_little_beside_its_members(model: Any, members: list[Any], door: str, rows: int) -> None:
    loop, settings, most = DOORS[door]
    beside = per_step(model, rows, custom_generate=loop, **settings) - by_hand(*members)
    assert sum(beside.values()) <= most + KEPT_MASK, beside


def test_a_step_at_which_a_gate_is_shut_is_a_step_of_the_base(model: Any, members: list[Any]) -> None:
    before = model.formula
    model.formula = ProxyTuning(gate=Gate(entropy=100.0))
    try:
        beside = per_step(model, custom_generate=FusedDecoding(), **GREEDY) - by_hand(members[0])
    finally:
        model.formula = before
    assert sum(beside.values()) <= 53 + KEPT_MASK, beside
