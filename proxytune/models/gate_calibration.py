"""From the share of steps at which a gate is to open to the entropy above which it does, for one composition."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from proxytune.errors import CalibrationWarning, InputError
from proxytune.formulas.base import Formula
from proxytune.formulas.gates import Gate
from proxytune.models.end_tokens import listed_ends
from proxytune.models.members.masks import positions_of
from proxytune.models.model import ProxyTunedModel
from proxytune.ops.entropy import entropy
from proxytune.stats.quantile import share_threshold
from proxytune.validation import proper_share, shown

__all__ = ["base_entropies", "calibrate_gate"]

_LEAST = 10
"""Tokens on either side of the quantile."""


def calibrate_gate(
    model: ProxyTunedModel, encoded: Mapping[str, Any], share: float | None = None, *, rounds: int = 2, **generate: Any
) -> Gate:
    """Find the entropy of the base that a share of the steps is above, and give the model that gate.

    The model continues the prompts, first with the shift everywhere, then under the gate that was found, since what it
    writes depends on the gate; each time the quantile of the base's entropies before the tokens is taken.

    Args:
        model: A composed model; its formula gets the gate, which `save_pretrained` writes into the recipe.
        encoded: `input_ids` and `attention_mask`, `[B, T]`, of prompts of the kind to come, padded at the left.
        share: The share of steps to open at; None for that of the model's gate, `Gate(share=…)`.
        rounds: How often to write texts.
        **generate: For `generate()`, e.g. `max_new_tokens` [128].

    Returns:
        The gate, with its share and entropy.

    Raises:
        InputError: If no share is given, or the texts have fewer than ten tokens on either side of the quantile.

    Warns:
        CalibrationWarning: If ties (often at 0) keep the share more than 2 points away.
    """
    formula: Any = model.formula
    gate = getattr(formula, "gate", None)
    share = gate.share if share is None and gate is not None else share
    if share is None or not isinstance(formula, Formula):
        raise InputError.of(
            "share",
            expected="a share of the steps, or a model whose formula has a Gate(share=…)",
            got=shown(gate, 80) if share is None else f"share={share:g} and the formula {shown(formula, 80)}",
            remedy="Call e.g. calibrate_gate(model, encoded, 0.2).",
        )
    share = proper_share(share)
    if not isinstance(encoded, Mapping) or "input_ids" not in encoded:
        raise InputError.of(
            "encoded",
            expected="input_ids and attention_mask of prompts, padded at the left",
            got=f"a {type(encoded).__name__}, {shown(encoded, 80)}",
            remedy="Pass what tokenizer(prompts, return_tensors='pt', padding=True) returns.",
        )
    found, now = gate, None
    try:
        for _ in range(max(1, rounds)):
            model.formula = replace(formula, gate=now)
            values = base_entropies(model, encoded, **generate)
            needed = _LEAST / min(share, 1 - share)
            if len(values) < needed:
                raise InputError.of(
                    "encoded",
                    expected=f"prompts with at least {needed:.0f} new tokens in all, for a share of {share:g}",
                    got=f"{len(values)}",
                    remedy="Calibrate on more prompts.",
                )
            nats, realised = share_threshold(values, share)
            now = found = Gate(share=share, entropy=max(nats, 0.0))
    finally:
        model.formula = replace(formula, gate=found)
    if abs(realised - share) > 0.02:
        warnings.warn(
            f"the gate opens at {realised:.1%} of the calibration tokens, not {share:.1%}: many have the same entropy, "
            f"so no threshold comes nearer than {nats:.4g} nats. Take another share, or other prompts.",
            CalibrationWarning,
            stacklevel=2,
        )
    assert found is not None
    return found


@torch.no_grad()
def base_entropies(model: ProxyTunedModel, encoded: Mapping[str, Any], **generate: Any) -> torch.Tensor:
    """The entropies of the base's own distribution before the tokens that the composed model writes.

    Args:
        model: A composed model.
        encoded: `input_ids` and `attention_mask`, `[B, T]`, padded at the left.
        **generate: For `generate()`.

    Returns:
        `[N]`, float32, nats: one for each new token, an EOS token included, none after it.
    """
    ids = torch.as_tensor(encoded["input_ids"]).to(model.device)
    mask = torch.as_tensor(encoded.get("attention_mask", torch.ones_like(ids))).to(model.device)
    given = {"max_new_tokens": 128, "do_sample": False, "num_return_sequences": 1} | generate
    generate_with: Any = model.generate
    texts = generate_with(ids, attention_mask=mask, **given, return_dict_in_generate=True).sequences  # [B, T + new]
    times, new = len(texts) // len(ids), texts[:, ids.shape[1] :]
    ends = torch.tensor(listed_ends(given.get("eos_token_id", model.generation_config.eos_token_id)), device=ids.device)
    ended = torch.isin(new, ends).long().cumsum(1) - torch.isin(new, ends).long() > 0  # after the first
    mask = torch.nn.functional.pad(mask.repeat_interleave(times, 0), (0, new.shape[1]), value=1)
    base = model.members[0]
    logits = base.forward(
        texts[:, :-1],
        attention_mask=mask[:, :-1],
        position_ids=positions_of(mask)[:, :-1],
        logits_to_keep=new.shape[1],
    )  # [B, new, V]
    return torch.stack([entropy(row) for row in logits])[~ended]
