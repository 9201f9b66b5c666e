"""Every formula in every mode of `generate()` against a slow reference: float64, without a cache, row by row.

The reference takes each row's own text without padding, forwards every member over the whole of it, and writes each
paper's equation down once more.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from support.tiny import PAD, shared

import proxytune
from proxytune import FusedDecoding, SpeculativeDecoding
from proxytune.formulas import (
    ClassifierFreeGuidance,
    ContextAware,
    ContrastiveDecoding,
    DeRa,
    DExperts,
    EmulatedFineTuning,
    Experts,
    Formula,
    Gate,
    Linear,
    Nudging,
    Plausibility,
    ProxyTuning,
    Schedule,
    View,
)

Rows = Mapping[str, torch.Tensor]
NEW = 5
MODELS = {role: i for i, role in enumerate(("base", "expert", "antiexpert", "math", "code", "amateur", "aligned"), 1)}


def log_p(z: torch.Tensor) -> torch.Tensor:
    return z.log_softmax(-1)


def entropy(z: torch.Tensor) -> float:
    p = z.softmax(-1)
    return float(-(p * p.log()).sum())


def nucleus(z: torch.Tensor, p: float) -> torch.Tensor:
    order = z.argsort(descending=True)
    before = z.softmax(-1)[order].cumsum(0) - z.softmax(-1)[order]
    kept = torch.zeros_like(z, dtype=torch.bool)
    kept[order[before < p]] = True
    return kept


def plausible(z: torch.Tensor, share: float) -> torch.Tensor:
    return log_p(z) >= log_p(z).max() + math.log(share)


def shifted(z: Rows, alpha: float) -> torch.Tensor:
    return z["base"] + alpha * (z["expert"] - z["antiexpert"])


# Name → formula, and what one row's logits become after `t` generated tokens.
CASES: dict[str, tuple[Formula, Callable[[Rows, int], torch.Tensor]]] = {
    "proxy-tuning": (ProxyTuning(alpha=0.7), lambda z, t: shifted(z, 0.7)),
    "dexperts": (
        DExperts(alpha=1.5, top_p=0.8),
        lambda z, t: shifted(z, 1.5).masked_fill(~nucleus(z["base"], 0.8), -math.inf),
    ),
    "contrastive": (
        ContrastiveDecoding(beta=0.6, share=0.2),
        lambda z, t: (1.6 * z["base"] - 0.6 * z["amateur"]).masked_fill(~plausible(z["base"], 0.2), -math.inf),
    ),
    "context-aware": (ContextAware(alpha=0.5), lambda z, t: 1.5 * z["base"] - 0.5 * z["no_context"]),
    "classifier-free-guidance": (
        ClassifierFreeGuidance(gamma=1.8),
        lambda z, t: 1.8 * log_p(z["base"]) - 0.8 * log_p(z["negative"]),
    ),
    "emulated-fine-tuning": (
        EmulatedFineTuning(alpha=1.0),
        lambda z, t: log_p(z["base"]) + log_p(z["expert"]) - log_p(z["antiexpert"]),
    ),
    "dera": (DeRa(lam=1.4), lambda z, t: -0.4 * z["base"] + 1.4 * z["aligned"]),
    "experts": (
        Experts(experts={"math": 0.5, "code": 0.3}),
        lambda z, t: z["base"] + 0.5 * z["math"] + 0.3 * z["code"] - 0.8 * z["antiexpert"],
    ),
    "nudging": (
        Nudging(gamma=0.5),
        lambda z, t: z["expert" if False else "nudging"] if z["base"].softmax(-1).max() < 0.5 else z["base"],
    ),
    "written": (
        Formula.parse(
            "base + 0.4*(log_p(expert) - log_p(antiexpert)) - 0.3*(no_context - math)",
            plausible=Plausibility(of="expert", share=0.01),
        ),
        lambda z, t: (
            z["base"] + 0.4 * (log_p(z["expert"]) - log_p(z["antiexpert"])) - 0.3 * (z["no_context"] - z["math"])
        ).masked_fill(~plausible(z["expert"], 0.01), -math.inf),
    ),
    "scheduled": (
        ProxyTuning(alpha=Schedule.linear(1.5, 0.0, 4)),
        lambda z, t: shifted(z, 1.5 * (1 - min(t / 4, 1))),
    ),
    "gated": (
        ProxyTuning(alpha=0.9, gate=Gate(entropy=3.2)),
        lambda z, t: shifted(z, 0.9) if entropy(z["base"]) > 3.2 else z["base"],
    ),
}
OWN = {"no_context", "negative"}

MODES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "no cache": {"use_cache": False},
    "chunks": {"prefill_chunk_size": 4},
    "beams": {"num_beams": 3, "early_stopping": True},
    "fused": {"custom_generate": FusedDecoding()},
    "lookup": {"custom_generate": SpeculativeDecoding(draft=proxytune.methods.speculation.PromptLookupDraft())},
    "expert drafts": {"custom_generate": SpeculativeDecoding(draft_tokens=2)},
}


def composed(formula: Formula) -> Any:
    own = {role: shared("llama", MODELS.get(role, 9)) for role in formula.roles if role not in OWN}
    usual = {role: own.pop(role) for role in ("expert", "antiexpert") if role in own}
    named: dict[str, Any] = dict(own)
    if isinstance(formula, Linear):
        named |= {role: View(prompt=True) for role in formula.roles if role in OWN}
    return proxytune.wrap(
        shared("llama", 1), **usual, formula=formula, members=named, check_vocabulary=False, end_tokens="base"
    )


def ragged(lengths: tuple[int, ...], seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    width = max(lengths)
    ids = torch.randint(3, 250, (len(lengths), width), generator=torch.Generator().manual_seed(seed))
    mask = (torch.arange(width)[None] >= width - torch.tensor(lengths)[:, None]).long()
    return ids.masked_fill(mask == 0, PAD), mask


def reference_rows(formula: Formula, text: list[int], own: Mapping[str, list[int]], prompt: int) -> Rows:
    rows = {}
    for role in ("base", *formula.roles):
        read = [*own[role], *text[prompt:]] if role in OWN else text
        model = shared("llama", 1) if role in OWN else shared("llama", MODELS.get(role, 9))
        with torch.no_grad():
            rows[role] = doubled(model)(torch.tensor([read]), use_cache=False).logits[0, -1]
    return rows


_doubles: dict[int, Any] = {}


def doubled(model: Any) -> Any:
    if id(model) not in _doubles:
        copy = type(model)(model.config)
        copy.load_state_dict(model.state_dict())
        _doubles[id(model)] = copy.double().eval()
    return _doubles[id(model)]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", CASES)
def test_equals_the_reference(name: str, mode: str) -> None:
    formula, equation = CASES[name]
    if mode == "expert drafts" and "expert" not in formula.roles:
        pytest.skip("no expert to draft")
    model = composed(formula)
    lengths = (7, 10, 4)
    ids, mask = ragged(lengths, 1)
    own, given = {}, {}
    for i, role in enumerate(sorted(OWN & {*formula.roles})):
        theirs = (3, 5, 12) if i == 0 else (4, 4, 4)  # one of them longer than the base's
        own_ids, own_mask = ragged(theirs, 5 + i)
        own[role] = [[int(t) for t, m in zip(r, k, strict=True) if m] for r, k in zip(own_ids, own_mask, strict=True)]
        given[role] = {"input_ids": own_ids, "attention_mask": own_mask}
    settings = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": PAD, "eos_token_id": None} | MODES[mode]
    out = model.generate(
        input_ids=ids,
        attention_mask=mask,
        return_dict_in_generate=True,
        output_logits="beams" not in mode,
        output_scores="beams" in mode,
        **({"prompts": given} if given else {}),
        **settings,
    )
    assert out.sequences[:, : ids.shape[1]].equal(ids)
    for row, length in enumerate(lengths):
        text = out.sequences[row].tolist()
        start = ids.shape[1] - length
        total = 0.0
        for step in range(NEW):
            prefix = text[start : ids.shape[1] + step]
            z = reference_rows(formula, prefix, {role: texts[row] for role, texts in own.items()}, length)
            wanted = equation(z, step)
            token = text[ids.shape[1] + step]
            if "beams" in mode:
                total += float(log_p(wanted)[token])
                continue
            got = out.logits[step][row].double()
            assert got.isneginf().equal(wanted.isneginf())
            torch.testing.assert_close(got, wanted, atol=3e-4, rtol=1e-4)
            assert token == int(got.argmax())
        if "beams" in mode:
            assert float(out.sequences_scores[row]) * NEW == pytest.approx(total, abs=1e-3)
