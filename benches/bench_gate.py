"""Measure how many steps need the companions: the gap closed by a shift that applies where a gate is open.

::

    python benches/bench_gate.py --write                        the bundled family, and keep it
    python benches/bench_gate.py --write --family A B           also families that `python -m lab train --out A` made
    python benches/bench_gate.py --markdown                     the table, from the JSON

Writes benches/results/gate.json. Everything is greedy at the family's α. All members run at every step here, and a rule
says from what it may look at whether the step is shifted: the tokens are those of a gate, whoever runs. A threshold is
chosen on validation problems, as the one that asks least among those that lose at most two problems in a hundred
against the shift everywhere, over both tasks; test problems are answered once with every rule. A share is that of the
steps of unfinished rows.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch
from transformers import DynamicCache

import proxytune
from proxytune.demo.bundle import bundled_family, load_family, read_record
from proxytune.demo.evaluation import Outcome, Row, answer, gap_closed, held_out
from proxytune.demo.world import build_world
from proxytune.models.members.cache_name import CACHE
from proxytune.ops.entropy import entropy, varentropy

RESULTS = Path(__file__).resolve().parent / "results" / "gate.json"
TASKS = ("chain", "qa")
MOST_NEW = 64
LOSS = 0.02
"""What a chosen threshold may lose on validation problems, as a share of all of them."""


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


def _everywhere(step: Step) -> torch.Tensor:
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
        Rule("always", 0.0, _everywhere),
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


@dataclass
class Gated:
    """A model for `demo.evaluation.answer`: greedy, all members at every step, shifted where a rule asks."""

    composed: Any
    end: int
    rule: Rule
    steps: int = 0
    asked: int = 0
    seen: list[tuple[torch.Tensor, torch.Tensor]] | None = None

    @torch.no_grad()
    def generate(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, **_: Any) -> torch.Tensor:
        """Answer `[B, T]` prompts."""
        composed, ids, mask, new = self.composed, input_ids, attention_mask, input_ids
        cache = DynamicCache(config=composed.config)
        done = torch.zeros(len(ids), dtype=torch.bool)
        memory = {"noise": torch.Generator().manual_seed(0)}
        for number in range(MOST_NEW):
            out = composed(
                input_ids=new, attention_mask=mask, **{CACHE: cache}, return_member_logits=True, logits_to_keep=1
            )
            zb, ze, za = (z[:, -1].float() for z in out.member_logits)
            top = zb.topk(2, -1).values
            step = Step(
                number, entropy(zb), zb.softmax(-1).amax(-1), top[:, 0] - top[:, 1], varentropy(zb), zb, ze, memory
            )
            asks, shifted = self.rule.asks(step), zb + composed.alpha * (ze - za)
            token = torch.where(asks[:, None], shifted, zb).argmax(-1).masked_fill(done, self.end)
            self.steps += int((~done).sum())
            self.asked += int((asks & ~done).sum())
            if self.seen is not None:
                matters = shifted.argmax(-1) != zb.argmax(-1)
                self.seen.append((step.features()[~done], matters[~done]))
            done |= token == self.end
            new = token[:, None]
            ids, mask = torch.cat([ids, new], 1), torch.cat([mask, torch.ones_like(new)], 1)
            if done.all():
                break
        return ids

    @property
    def share(self) -> float:
        """The share of companion passes, of two per step."""
        asked = self.asked / max(self.steps, 1)
        return asked + self.rule.unasked * (1 - asked)


def learnt(seen: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> list[Rule]:
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
    for at in (0.02, 0.05, 0.1, 0.2, 0.5):

        def asks(step: Step, at: float = at) -> torch.Tensor:
            z = (step.features() - mean) / spread
            return (z @ w[:-1] + w[-1]).sigmoid() > at

        found.append(Rule("learnt", at, asks))
    return found


def measure(folder: Path, name: str, problems: int, chosen_on: int) -> dict[str, Any]:
    """One family: every rule on validation and test problems, and the chosen ones."""
    found, tokenizer = load_family(folder)
    alpha = float(read_record(folder)["alpha"])
    composed = proxytune.wrap(
        found["large-base"], expert=found["tiny-tuned"], antiexpert=found["tiny-base"], alpha=alpha
    )
    world = build_world()
    asked = {
        "validation": held_out(world, "validation", chosen_on, TASKS),
        "test": held_out(world, "test", problems, TASKS),
    }

    def row(split: str, model: Any) -> dict[str, list[Outcome]]:
        return {task: answer(model, tokenizer, asked[split][task], batch_size=60) for task in TASKS}

    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    everywhere = Gated(composed, tokenizer.eos_token_id, Rule("always", 0.0, _everywhere), seen=seen)
    row("validation", everywhere)
    ends = {split: {which: row(split, found[which]) for which in ("large-base", "large-tuned")} for split in asked}
    out: dict[str, Any] = {"name": name, "alpha": alpha, "problems": problems, "chosen_on": chosen_on, "rules": []}
    for rule in [*rules(), *learnt(seen)]:
        record: dict[str, Any] = {"kind": rule.kind, "at": rule.at}
        for split in asked:
            gated = Gated(composed, tokenizer.eos_token_id, rule)
            outcomes = row(split, gated)
            base, tuned = (Row(which, ends[split][which]) for which in ("large-base", "large-tuned"))
            gaps = {task: gap_closed(base, Row("proxy", outcomes), tuned, task, "strict") for task in TASKS}
            record[split] = {
                "share": round(gated.share, 4),
                "right": {task: sum(o.correct("strict") for o in outcomes[task]) for task in TASKS},
                "gap": {t: [round(float(x), 4) for x in (g.closed, g.low, g.high)] for t, g in gaps.items()},
            }
        out["rules"].append(record)
        print(
            f"{name}: {rule.kind} {rule.at:g}: {record['test']['share']:.2f}, {record['test']['gap']}", file=sys.stderr
        )
    out["chosen"] = chosen(out["rules"], chosen_on)
    return out


def chosen(found: Sequence[dict[str, Any]], problems: int) -> dict[str, float | None]:
    """For each kind the setting that asks least on validation problems and loses at most `LOSS`; None if none."""
    right = [sum(one["validation"]["right"].values()) for one in found]
    least = right[0] - LOSS * problems * len(TASKS)
    kinds: dict[str, float | None] = {}
    for kind in dict.fromkeys(one["kind"] for one in found):
        able = [
            (one["validation"]["share"], one["at"])
            for one, n in zip(found, right, strict=True)
            if one["kind"] == kind and n >= least
        ]
        kinds[kind] = min(able)[1] if able else None
    return kinds


def gate_table(record: dict[str, Any]) -> str:
    """The chosen settings of each family, on test problems."""
    blocks = []
    for family in record["families"]:
        lines = [
            "| the shift applies where | setting | companion passes, % | gap closed: chain | QA |",
            "|---|--:|--:|---|---|",
        ]
        for one in family["rules"]:
            picked = family["chosen"][one["kind"]]
            if one["at"] == picked or picked is None:
                kept = "" if picked is not None else ", lost on validation"
                lines.append(
                    f"| {one['kind']}{kept} | {one['at']:g} | {100 * one['test']['share']:.0f} | "
                    + " | ".join(_interval(one["test"]["gap"][task]) for task in TASKS)
                    + " |"
                )
        blocks.append(
            f"**{family['name']}**, α = {family['alpha']:g}, greedy, {family['problems']} test problems a task; the "
            f"setting of each kind was chosen on {family['chosen_on']} validation problems a task:\n\n"
            + "\n".join(lines)
        )
    return "\n\n".join(blocks)


def _interval(gap: Sequence[float]) -> str:
    if np.isnan(gap[0]):
        return "no gap"
    return f"{100 * gap[0]:.0f} [{100 * gap[1]:.0f}, {100 * gap[2]:.0f}]"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="keep the results")
    parser.add_argument("--family", type=Path, nargs="*", default=[], help="folders of further families")
    parser.add_argument("--problems", type=int, default=120, help="test problems a task [120]")
    parser.add_argument("--chosen-on", type=int, default=60, help="validation problems a task [60]")
    parser.add_argument("--markdown", action="store_true", help="print the kept table, measure nothing")
    wanted = parser.parse_args(arguments)
    if wanted.markdown:
        print(gate_table(json.loads(RESULTS.read_text(encoding="utf-8"))))
        return
    torch.set_num_threads(1)
    began, families = time.perf_counter(), []
    for folder in (bundled_family(), *wanted.family):
        name = "the bundled family" if folder == bundled_family() else folder.name
        families.append(measure(folder, name, wanted.problems, wanted.chosen_on))
        record = {
            "command": "python benches/bench_gate.py --write",
            "torch": torch.__version__,
            "seconds": round(time.perf_counter() - began),
            "families": families,
        }
        if wanted.write:
            RESULTS.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(gate_table(record))


if __name__ == "__main__":
    main()
