"""Formulas with all their members, tiny: what the contract runs, and what shows formula × mode."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from support.tiny import PAD, shared

import proxytune
from proxytune.formulas import FORMULAS, Formula, Linear, View
from proxytune.formulas.registry import made
from proxytune.models.own_prompts import PROMPTS, OwnPrompts

SEEDS = {role: i for i, role in enumerate(("base", "expert", "antiexpert", "math", "code", "amateur", "aligned"), 1)}
OWN = ("negative", "no_context")
"""The roles that read a prompt of their own."""


@dataclass(frozen=True)
class Case:
    """A formula as a recipe writes it.

    Attributes:
        name: Its name, or the sum.
        alphas: Strengths that it takes; the contract's runs take the first.
        settings: What it needs besides.
    """

    name: str
    alphas: tuple[Any, ...] = (0.6, -2.0, 0.0, 1.0, 3.0)
    settings: Mapping[str, Any] = field(default_factory=dict)

    def made(self, alpha: Any = None) -> Formula:
        """The formula, at its first strength or another."""
        return made(self.name, self.alphas[0] if alpha is None else alpha, self.settings)


# What a registered formula needs besides its strength; one that needs nothing has no line here.
_NEEDS: dict[str, dict[str, Any]] = {
    "experts": {"settings": {"experts": {"math": 0.5, "code": 0.3}}},
    "dexperts": {"alphas": (1.5, -2.0, 0.0, 1.0, 3.0)},
    "classifier-free-guidance": {"alphas": (1.8, -2.0, 0.0, 1.0, 3.0)},
    "nudging": {"alphas": (0.4, 0.0, 0.8, 1.0)},
}
CASES = {name: Case(name, **_NEEDS.get(name, {})) for name in FORMULAS} | {
    "written": Case("base + 0.5*(math - antiexpert) - 0.3*(log_p(code) - log_p(no_context))"),
    "scheduled": Case("base + linear(1, 0, 4)*(expert - antiexpert)"),
    "gated": Case("proxy-tuning", settings={"gate": {"entropy": 3.2}}),
    "unmasked": Case("contrastive", settings={"share": None}),
    "experts alone": Case("experts", settings={"experts": {"math": 0.5, "code": -0.3}, "antiexpert": None}),
    "masked": Case("2*base - antiexpert", settings={"plausible": {"of": "expert", "share": 0.02}}),
}


def model_of(role: str, kind: str = "llama") -> Any:
    """The shared tiny model of a role; tests must not change it."""
    return shared(kind, SEEDS.get(role, 9))


def composed(formula: Formula, *, sources: Mapping[str, Any] | None = None, **settings: Any) -> Any:
    """A formula over tiny models, or over `sources` (role → folder)."""
    own = {r: (sources or {}).get(r) or model_of(r) for r in ("base", *formula.roles) if r not in OWN}
    base, usual = own.pop("base"), {role: own.pop(role) for role in ("expert", "antiexpert") if role in own}
    named: dict[str, Any] = dict(own)
    if isinstance(formula, Linear):
        named |= {role: View(prompt=True) for role in formula.roles if role in OWN}
    return proxytune.wrap(
        base, **usual, formula=formula, members=named, check_vocabulary=False, end_tokens="base", **settings
    )


def ragged(lengths: tuple[int, ...], seed: int) -> dict[str, torch.Tensor]:
    """Random prompts `[B, T]`, padded on the left, and their mask."""
    width = max(lengths)
    ids = torch.randint(3, 250, (len(lengths), width), generator=torch.Generator().manual_seed(seed))
    mask = (torch.arange(width)[None] >= width - torch.tensor(lengths)[:, None]).long()
    return {"input_ids": ids.masked_fill(mask == 0, PAD), "attention_mask": mask}


def batch_of(formula: Formula) -> dict[str, Any]:
    """Three ragged prompts, and those of the members that read their own, one of which is longer than the base's."""
    own = [role for role in formula.roles if role in OWN]
    prompts = {role: ragged((3, 5, 9), 5 + i) for i, role in enumerate(own)}
    return {**ragged((5, 7, 4), 1), **({"prompts": prompts} if own else {})}


def picked(batch: Mapping[str, Any], rows: list[int]) -> dict[str, Any]:
    """Rows of a batch, in another order or fewer."""
    return {k: picked(v, rows) if isinstance(v, Mapping) else v[rows] for k, v in batch.items()}


RUN: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": PAD, "eos_token_id": None}


def generated(model: Any, batch: Mapping[str, Any], **settings: Any) -> Any:
    """What `generate()` returns, with scores; the plain base takes the batch too."""
    batch = {k: v for k, v in batch.items() if k != "prompts" or hasattr(model, "formula")}
    shown = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
    return model.generate(**batch, **shown | RUN | settings)


def rescored(model: Any, batch: Mapping[str, Any], sequences: torch.Tensor) -> torch.Tensor:
    """Teacher-forced log-probabilities `[B, new]` of the generated tokens, in one pass without a cache."""
    start, new = batch["input_ids"].shape[1], sequences.shape[1] - batch["input_ids"].shape[1]
    own = {role: dict(given) for role, given in batch.get("prompts", {}).items()}
    width = max([start, *(x["input_ids"].shape[1] for x in own.values())])
    mask = torch.cat([batch["attention_mask"], torch.ones(len(sequences), new, dtype=torch.long)], 1)

    def wide(x: torch.Tensor, length: int) -> torch.Tensor:
        return torch.nn.functional.pad(x, (length - x.shape[1], 0))

    given: dict[str, Any] = {"prompt_width": width}
    if own:
        ids = {role: wide(x["input_ids"], width) for role, x in own.items()}
        given[PROMPTS] = OwnPrompts(ids, {role: wide(x["attention_mask"], width) for role, x in own.items()})
    with torch.no_grad():
        logits = model(wide(sequences, width + new), attention_mask=wide(mask, width + new), use_cache=False, **given)
    lines = logits.logits[:, width - 1 : -1].log_softmax(-1)
    return lines.gather(-1, sequences[:, start:, None])[..., 0]
