"""What is measured: a family of the lab, or a real model and the small pair made from it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache

import proxytune
from _gate.rules import Rule, Step
from proxytune.demo.bundle import load_family, read_record
from proxytune.demo.evaluation import answer, held_out
from proxytune.demo.world import build_world
from proxytune.models.members.cache_name import CACHE
from proxytune.ops.entropy import entropy, varentropy

MOST_NEW = 64
Answers = dict[str, list[Any]]
"""Per task the outcomes, whose `correct("strict")` says whether one is right."""


@dataclass(frozen=True)
class Subject:
    """A composed model, its base and its tuned model; `ask(split, model)` answers a split with one of them."""

    name: str
    composed: Any
    base: Any
    tuned: Any
    end: int
    tasks: tuple[str, ...]
    counts: dict[str, int]
    ask: Callable[[str, Any], Answers]


def family(folder: Path, name: str, problems: int, chosen_on: int) -> Subject:
    """A folder of the lab: two tasks, `problems` test and `chosen_on` validation problems of each."""
    found, tokenizer = load_family(folder)
    alpha = float(read_record(folder)["alpha"])
    composed = proxytune.wrap(
        found["large-base"], expert=found["tiny-tuned"], antiexpert=found["tiny-base"], alpha=alpha
    )
    world, tasks, counts = build_world(), ("chain", "qa"), {"validation": chosen_on, "test": problems}
    asked = {split: held_out(world, split, count, tasks) for split, count in counts.items()}  # type: ignore[arg-type]

    def ask(split: str, model: Any) -> Answers:
        return {task: answer(model, tokenizer, asked[split][task], batch_size=60) for task in tasks}

    end = tokenizer.eos_token_id
    return Subject(name, composed, found["large-base"], found["large-tuned"], end, tasks, counts, ask)


def real_pair(folder: Path, base: Path, problems: int, chosen_on: int, alpha: float) -> Subject:
    """A folder of `python -m lab real`: one task, questions in a strict form about countries no training text has."""
    from lab.real.pair import chat
    from lab.real.questions import questions
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    def load(place: Path, adapter: str | None = None) -> Any:
        model = AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32)
        return (PeftModel.from_pretrained(model, folder / adapter).merge_and_unload() if adapter else model).eval()

    tokenizer = AutoTokenizer.from_pretrained(base, padding_side="left")
    plain, small = load(base), folder / "small"
    composed = proxytune.wrap(plain, expert=load(small, "expert"), antiexpert=load(small), alpha=alpha)
    counts = {"validation": chosen_on, "test": problems}
    asked = {split: questions()[split][:count] for split, count in counts.items()}  # type: ignore[index]
    end = tokenizer.eos_token_id

    def ask(split: str, model: Any) -> Answers:
        found = []
        for first in range(0, len(asked[split]), 40):
            chosen = asked[split][first : first + 40]
            batch = tokenizer([chat(tokenizer, one) for one in chosen], return_tensors="pt", padding=True)
            kept = {name: batch[name] for name in ("input_ids", "attention_mask")}
            ids = model.generate(**kept, do_sample=False, max_new_tokens=32, pad_token_id=tokenizer.pad_token_id)
            texts = tokenizer.batch_decode(ids[:, kept["input_ids"].shape[1] :], skip_special_tokens=True)
            found += [Answered(one.right(text)) for one, text in zip(chosen, texts, strict=True)]
        return {"json": found}

    name = f"SmolLM2-135M-Instruct and a pair of {composed.expert.config.num_hidden_layers} of its layers"
    return Subject(name, composed, plain, load(base, "tuned"), end, ("json",), counts, ask)


@dataclass(frozen=True)
class Answered:
    """Whether one question was answered in the taught form and right."""

    right: bool

    def correct(self, _: str) -> bool:
        """The same under any criterion."""
        return self.right


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
    def generate(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, max_new_tokens: int = MOST_NEW, **_: Any
    ) -> torch.Tensor:
        """Answer `[B, T]` prompts."""
        composed, ids, mask, new = self.composed, input_ids, attention_mask, input_ids
        cache = DynamicCache(config=composed.config)
        done = torch.zeros(len(ids), dtype=torch.bool)
        memory = {"noise": torch.Generator().manual_seed(0)}
        for number in range(max_new_tokens):
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
