"""Rules that say at which steps the shift applies, from statistics of the base and of the expert."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass
class Step:
    """What a rule may look at before a step: statistics of the base's own row `[B]` each, and the expert's row."""

    number: int
    entropy: torch.Tensor
    top1: torch.Tensor
    margin: torch.Tensor
    varentropy: torch.Tensor
    base: torch.Tensor
    expert: torch.Tensor
    memory: dict[str, Any] = field(default_factory=dict)

    def features(self) -> torch.Tensor:
        """`[B, 4]`, float64, for a rule that is learnt."""
        columns = (self.entropy, self.top1, self.margin.clamp(max=20.0), self.varentropy)
        return torch.stack(columns, -1).double()


Asks = Callable[[Step], torch.Tensor]


@dataclass(frozen=True)
class Rule:
    """A gate: a kind, its setting, whether a row asks `[B]`, and the share of companion passes of a step unasked."""

    kind: str
    at: float
    asks: Asks
    unasked: float = 0.0


def everywhere(step: Step) -> torch.Tensor:
    """At every step."""
    return torch.ones_like(step.entropy, dtype=torch.bool)


def _random(share: float) -> Asks:
    return lambda step: torch.rand(len(step.entropy), generator=step.memory["noise"]) < share


def _held(h: float, steps: int) -> Asks:
    """Open above h, and for so many steps after it."""

    def asks(step: Step) -> torch.Tensor:
        left = step.memory.get("left", torch.zeros_like(step.entropy))
        left = torch.where(step.entropy > h, float(steps) + 1, left)
        step.memory["left"] = left - 1
        return left > 0

    return asks


def _running(share: float) -> Asks:
    """Above the quantile of the entropies of the row's own text so far, this step's among them."""

    def asks(step: Step) -> torch.Tensor:
        seen = step.memory.setdefault("seen", [])
        seen.append(step.entropy)
        return step.entropy >= torch.stack(seen).quantile(1 - share, dim=0)

    return asks


def _relative(factor: float) -> Asks:
    """Above a multiple of the mean entropy of the row's text so far."""

    def asks(step: Step) -> torch.Tensor:
        total = step.memory.get("total", torch.zeros_like(step.entropy)) + step.entropy
        step.memory["total"] = total
        return step.entropy > factor * total / (step.number + 1)

    return asks


def _disagreement(step: Step) -> torch.Tensor:
    """The expert, which ran anyway, has another most probable token than the base."""
    return step.base.argmax(-1) != step.expert.argmax(-1)


def _divergence(h: float) -> Asks:
    """KL(expert ‖ base) above h."""

    def asks(step: Step) -> torch.Tensor:
        p, q = step.expert.log_softmax(-1), step.base.log_softmax(-1)
        return (p.exp() * (p - q)).sum(-1) > h

    return asks


def rules() -> list[Rule]:
    """All rules without training."""
    entropies = (0.01, 0.03, 0.1, 0.2, 0.3, 0.6, 1.0)
    return [
        Rule("always", 0.0, everywhere),
        *(Rule("entropy", h, lambda s, h=h: s.entropy > h) for h in entropies),
        *(Rule("top-1", p, lambda s, p=p: s.top1 < p) for p in (0.999, 0.99, 0.95, 0.9, 0.7, 0.4)),
        *(Rule("first tokens", k, lambda s, k=k: torch.full_like(s.top1, s.number < k).bool()) for k in (2, 6, 12, 20)),
        *(Rule("random", share, _random(share)) for share in (0.1, 0.2, 0.5)),
        *(Rule("entropy, held 1 step", h, _held(h, 1)) for h in (0.1, 0.3, 0.6)),
        *(Rule("entropy, held 3 steps", h, _held(h, 3)) for h in (0.3, 0.6)),
        *(Rule("varentropy", v, lambda s, v=v: s.varentropy > v) for v in (0.1, 0.3, 0.6)),
        *(Rule("margin of logits", m, lambda s, m=m: s.margin < m) for m in (8.0, 6.0, 4.0, 2.0, 1.0)),
        *(Rule("own running quantile", share, _running(share)) for share in (0.1, 0.2, 0.4)),
        *(Rule("above its running mean, times", f, _relative(f)) for f in (0.5, 1.0, 2.0)),
        Rule("expert disagrees", 0.0, _disagreement, unasked=0.5),
        *(Rule("KL of the expert", h, _divergence(h), unasked=0.5) for h in (1.0, 3.0)),
    ]


def real_rules() -> list[Rule]:
    """Fewer, and wider apart: for a real model, which takes a minute for each, and is less sure."""
    return [
        Rule("always", 0.0, everywhere),
        *(Rule("entropy", h, lambda s, h=h: s.entropy > h) for h in (0.1, 0.3, 0.6, 1.0, 2.0)),
        *(Rule("top-1", p, lambda s, p=p: s.top1 < p) for p in (0.95, 0.8, 0.5)),
        Rule("first tokens", 6, lambda s: torch.full_like(s.top1, s.number < 6).bool()),
        Rule("random", 0.5, _random(0.5)),
        Rule("own running quantile", 0.5, _running(0.5)),
        Rule("expert disagrees", 0.0, _disagreement, unasked=0.5),
    ]


def learnt(seen: Sequence[tuple[torch.Tensor, torch.Tensor]], at: Sequence[float] = (0.02,)) -> list[Rule]:
    """Rules by a logistic regression of "the shift changes the token" on statistics of the base, at some thresholds."""
    x, y = torch.cat([a for a, _ in seen]), torch.cat([b for _, b in seen]).double()
    mean, spread = x.mean(0), x.std(0) + 1e-9
    x = torch.cat([(x - mean) / spread, torch.ones(len(x), 1).double()], 1)
    w = torch.zeros(x.shape[1], dtype=torch.float64)
    for _ in range(50):  # Newton's method, with a little shrinkage
        p = (x @ w).sigmoid()
        hessian = x.T @ (x * (p * (1 - p))[:, None]) + 1e-2 * torch.eye(len(w)).double()
        w = w - torch.linalg.solve(hessian, x.T @ (p - y) + 1e-2 * w)
    found = []
    for bound in at:

        def asks(step: Step, bound: float = bound) -> torch.Tensor:
            z = (step.features() - mean) / spread
            return (z @ w[:-1] + w[-1]).sigmoid() > bound

        found.append(Rule("learnt", bound, asks))
    return found
