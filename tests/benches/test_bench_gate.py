"""The bench of gates: rules ask where they say, and settings are chosen on validation problems."""

import bench_gate as bench
import torch
from _gate import rules as gate

from proxytune.ops.entropy import entropy, varentropy


def step(number: int, base: torch.Tensor, expert: torch.Tensor, memory: dict) -> gate.Step:
    top = base.topk(2, -1).values
    return gate.Step(
        number, entropy(base), base.softmax(-1).amax(-1), top[:, 0] - top[:, 1], varentropy(base), base, expert, memory
    )


def test_rules_ask_where_they_say() -> None:
    sure, unsure = torch.tensor([9.0, 0.0, 0.0]), torch.tensor([0.2, 0.0, 0.1])
    rows, other = torch.stack([sure, unsure]), torch.stack([sure, -unsure])
    rules = {(rule.kind, rule.at): rule for rule in gate.rules()}

    def asks(kind: str, at: float, number: int = 0, memory: dict | None = None) -> list[bool]:
        memory = {"noise": torch.Generator().manual_seed(0)} if memory is None else memory
        return rules[kind, at].asks(step(number, rows, other, memory)).tolist()

    for kind, at in (("entropy", 0.6), ("top-1", 0.9), ("margin of logits", 2.0), ("expert disagrees", 0.0)):
        assert asks(kind, at) == [False, True], kind
    assert asks("first tokens", 6, 5) == [True, True]
    assert asks("first tokens", 6, 6) == [False, False]
    held: dict = {}
    assert asks("entropy, held 1 step", 0.6, 0, held) == [False, True]
    rows = rows.flip(0)
    assert asks("entropy, held 1 step", 0.6, 1, held) == [True, True]
    rows = torch.stack([sure, sure])
    assert asks("entropy, held 1 step", 0.6, 2, held) == [True, False]
    features = step(0, other, other, {}).features().repeat(20, 1)
    (first, *_) = gate.learnt([(features, torch.tensor([False, True]).repeat(20))])
    assert first.asks(step(0, other, other, {})).tolist() == [False, True]


def test_a_setting_is_chosen_on_validation() -> None:
    def one(kind: str, at: float, share: float, right: int) -> dict:
        return {"kind": kind, "at": at, "validation": {"share": share, "right": {"chain": right, "qa": right}}}

    found = [
        one("always", 0, 1.0, 50),
        one("entropy", 0.1, 0.3, 50),
        one("entropy", 0.3, 0.2, 49),
        one("entropy", 0.6, 0.1, 40),
        one("random", 0.5, 0.5, 20),
    ]
    assert bench.chosen(found, 60) == {"always": 0, "entropy": 0.3, "random": None}
