"""The table formula × mode: each cell is run, over tiny random models, and compared with the same without a cache."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import proxytune
from proxytune import ForkDecoding, FusedDecoding, SpeculativeDecoding
from proxytune.errors import ProxytuneError
from proxytune.formulas import FORMULAS, Formula, Gate, ProxyTuning
from proxytune.formulas.registry import made
from proxytune.methods.speculation import PromptLookupDraft
from proxytune.models.own_prompts import PROMPTS, OwnPrompts

__all__ = ["formulas_block", "tried"]

_NEEDS: dict[str, dict[str, Any]] = {"experts": {"experts": {"math": 0.5, "code": 0.3}}}
_ALPHAS = {"classifier-free-guidance": 1.5}
_RUN: dict[str, Any] = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
_RUN |= {"return_dict_in_generate": True}
_SAMPLED = {"do_sample": True, "top_k": 0}


def formulas_block(record: Mapping[str, Any]) -> str:
    """Formula × mode; `=` where the result was that of the slow path."""
    lines = ["| formula | " + " | ".join(record["modes"]) + " |", "|---|" + ":-:|" * len(record["modes"])]
    return "\n".join([*lines, *(f"| {name} | " + " | ".join(row) + " |" for name, row in record["formulas"].items())])


def tried() -> dict[str, Any]:
    """Run the registered formulas, a schedule and a gate in every mode; JSON."""
    cases = {name: made(name, _ALPHAS.get(name, 0.6), _NEEDS.get(name, {})) for name in FORMULAS}
    text = "base + linear(1, 0, 3)*(expert - antiexpert)"
    cases[f"`{text}`"] = Formula.parse(text)
    cases["proxy-tuning with a gate"] = ProxyTuning(alpha=0.6, gate=Gate(entropy=3.0))
    with torch.no_grad():
        return {"modes": list(_MODES), "formulas": {name: _row(formula) for name, formula in cases.items()}}


def _model(seed: int) -> Any:
    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=64, initializer_range=0.5, **sizes)).eval()


def _row(formula: Formula) -> list[str]:
    viewed = formula.views
    named = {role: _model(i) for i, role in enumerate(formula.roles, 1) if role not in viewed}
    usual = {role: named.pop(role) for role in ("expert", "antiexpert") if role in named}
    model = proxytune.wrap(_model(0), **usual, formula=formula, members=named, check_vocabulary=False, self_test=False)
    ids, mask = torch.tensor([[0, 5, 6, 7], [8, 9, 10, 11]]), torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]])
    given: dict[str, Any] = {"input_ids": ids, "attention_mask": mask}
    if viewed:
        given["prompts"] = {role: {"input_ids": ids[:, 2:], "attention_mask": mask[:, 2:]} for role in viewed}

    def run(**settings: Any) -> Any:
        return model.generate(**given, **_RUN | settings)

    def shown(check: Callable[..., bool]) -> str:
        try:
            return "=" if check(model, run) else "≠"
        except ProxytuneError:
            return "refused"

    return [shown(check) for check in _MODES.values()]


def _alike(mode: Mapping[str, Any], slow: Mapping[str, Any]) -> Callable[[Any, Any], bool]:
    return lambda model, run: bool(run(**mode).sequences.equal(run(use_cache=False, **slow).sequences))


def _beams(model: Any, run: Any) -> bool:
    out = run(num_beams=2, length_penalty=0.0, output_scores=True)
    return torch.allclose(out.sequences_scores, _scores(model, out.sequences).sum(1), atol=1e-4)


def _tree(model: Any, run: Any) -> bool:
    trees = run(custom_generate=ForkDecoding(threshold=1.0, branches=2, seed=0), **_SAMPLED).trees
    prompts = {0: [0, 5, 6, 7], 1: [8, 9, 10, 11]}
    for tree in trees:
        for leaf in tree:
            text = torch.tensor([prompts[tree.prompt] + leaf.along("tokens")] * 2)
            wanted = _scores(model, text)[tree.prompt]
            if not torch.allclose(torch.tensor(leaf.along("logprobs")), wanted, atol=1e-4):
                return False
    return True


def _scores(model: Any, sequences: torch.Tensor) -> torch.Tensor:
    """Log-probabilities `[B, new]` of a text that is read at once, without a cache."""
    mask = torch.ones_like(sequences)
    mask[0, 0] = 0
    more: dict[str, Any] = {"prompt_width": 4}
    if roles := [m.role for m in model.members if m.own_prompt]:
        own = torch.tensor([[0, 0, 6, 7], [0, 0, 10, 11]])
        more[PROMPTS] = OwnPrompts(dict.fromkeys(roles, own), dict.fromkeys(roles, (own > 0).long()))
    logits = model(sequences, attention_mask=mask, use_cache=False, **more).logits[:, 3:-1].log_softmax(-1)
    return logits.gather(-1, sequences[:, 4:, None])[..., 0]


_FUSED = {"custom_generate": FusedDecoding(seed=0)}
_MODES: dict[str, Callable[[Any, Any], bool]] = {
    "greedy": _alike({}, {}),
    "beams": _beams,
    "`FusedDecoding`": _alike(_SAMPLED | _FUSED, _SAMPLED | _FUSED),
    "`SpeculativeDecoding`": _alike(
        _SAMPLED | {"custom_generate": SpeculativeDecoding(draft=PromptLookupDraft(), accept="coupled", seed=0)},
        _SAMPLED | _FUSED,
    ),
    "`ForkDecoding`": _tree,
    "static cache": _alike({"cache_implementation": "static"}, {}),
}
