"""The methods that the throughput bench compares; their preparation is not timed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from transformers import CompileConfig, GenerationConfig, StoppingCriteriaList

from proxytune.formulas.gates import Gate
from proxytune.generation.fused import FusedDecoding
from proxytune.methods.speculation.decoding import SpeculativeDecoding
from proxytune.methods.steering.processor import ProxyTuningLogitsProcessor
from proxytune.models.gate_calibration import base_entropies
from proxytune.stats.quantile import share_threshold
from proxytune.throughput.counters import FirstToken
from proxytune.throughput.naive_loop import naive_generate
from proxytune.throughput.subjects import Subject

__all__ = [
    "BASE",
    "COMPOSITE",
    "EXPERT",
    "FUSED",
    "GATED",
    "GRAPHS",
    "NAIVE",
    "OVERLAP",
    "PROCESSOR",
    "RATES",
    "TRIO",
    "TUNED",
    "Method",
    "Ran",
    "Run",
    "generated",
    "methods_for",
]

BASE, TUNED, EXPERT = "base alone", "tuned alone", "expert alone"
NAIVE, PROCESSOR = "naive loop", "processor door"
COMPOSITE, FUSED = "composite door", "fused loop"
OVERLAP, GRAPHS, SPECULATION = "fused, overlap", "fused, graphs", "speculation"
GATED, SHARE = "fused, gated", 0.2
"""The loop under a gate, and the share of steps at which it is planted to open in random models."""
RATES = (0.0, 0.5, 0.7, 0.9)
"""Acceptances planted in random models."""
TRIO = ("base", "expert", "antiexpert")
Kind = Literal["alone", "steered", "speculation"]


@dataclass(frozen=True)
class Ran:
    """The result of a run: `[B, T + new]` ids; in speculation also rounds, and the accepted share of tested tokens."""

    sequences: torch.Tensor
    rounds: int | None = None
    acceptance: float | None = None


Run = Callable[[torch.Tensor, GenerationConfig, FirstToken], Ran]
"""From `[B, T]` ids to the result; the criterion is called for each token."""


@dataclass(frozen=True)
class Method:
    """A way to generate.

    Attributes:
        kind: A model alone, token-by-token steering, or speculation.
        roles: The models that it runs.
        prepare: Makes the function to time.
        missing: Why it cannot run on a subject; None if it can.
        rate: The planted acceptance; None for the models' own, and for methods without a draft.
        unsure: The share of tokens at which the base is planted to be unsure.
        hooked: Whether its passes can be counted by hooks; in a compiled pass they would be compiled too.
    """

    name: str
    kind: Kind
    roles: tuple[str, ...]
    prepare: Callable[[Subject], Run]
    missing: Callable[[Subject], str | None] = lambda _: None
    rate: float | None = None
    unsure: float = 0.0
    hooked: bool = True


def methods_for(subject: Subject, rates: Sequence[float] = RATES, *, graphs: bool = False) -> list[Method]:
    """All methods, in the order of the table.

    `rates` are planted in random models; a trained family keeps its own. `graphs` allows compiling the members, which
    takes minutes.
    """
    drafts: list[float | None] = [None] if subject.trained else [*rates]
    return [
        *(Method(name, "alone", (role,), _alone(role)) for name, role in ((BASE, "base"), (TUNED, "tuned"))),
        Method(EXPERT, "alone", ("expert",), _alone("expert")),
        Method(NAIVE, "steered", TRIO, _naive),
        Method(PROCESSOR, "steered", TRIO, _processor),
        Method(COMPOSITE, "steered", TRIO, _steered(lambda: None, overlap=False)),
        Method(FUSED, "steered", TRIO, _steered(lambda: FusedDecoding(seed=0), overlap=False)),
        Method(OVERLAP, "steered", TRIO, _steered(lambda: FusedDecoding(seed=0), overlap=True), _no_gpu),
        Method(
            GATED if subject.trained else f"{GATED}, {SHARE:g} planted",
            "steered",
            TRIO,
            _gated,
            rate=None if subject.trained else 1.0,
            unsure=0.0 if subject.trained else SHARE,
        ),
        Method(
            GRAPHS,
            "steered",
            TRIO,
            _compiled,
            lambda of: _no_gpu(of) or (None if graphs else "compiling takes minutes, see --long"),
            hooked=False,
        ),
        *(
            Method(
                SPECULATION if rate is None else f"{SPECULATION}, {rate:g} planted",
                "speculation",
                TRIO,
                _steered(lambda: SpeculativeDecoding(seed=0), overlap=None),
                rate=rate,
            )
            for rate in drafts
        ),
    ]


def generated(
    model: Any, loop: Any, ids: torch.Tensor, config: GenerationConfig, told: FirstToken, *, returns: bool = True
) -> Any:
    """Call `generate()` as all methods do, on ids `[B, T]` without padding; `told` is called for each token.

    `returns` says whether it returns all, the cache included, or ids alone.
    """
    config.return_dict_in_generate = returns
    return model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        generation_config=config,
        stopping_criteria=StoppingCriteriaList([told]),
        custom_generate=loop,
    )


def _alone(role: str) -> Callable[[Subject], Run]:
    def prepare(subject: Subject) -> Run:
        return _generate(subject.models[role], None)

    return prepare


def _naive(subject: Subject) -> Run:
    def run(ids: torch.Tensor, config: GenerationConfig, told: FirstToken) -> Ran:
        models = [subject.models[role] for role in TRIO]
        return Ran(naive_generate(models, subject.alpha, ids, config, told.seen))

    return run


def _processor(subject: Subject) -> Run:
    # A new one each time, or its companions would find the prompt in their caches.
    companions = {role: subject.models[role] for role in TRIO[1:]}
    processor = ProxyTuningLogitsProcessor(**companions, alpha=subject.alpha, check_vocabulary=False)
    processor.overlap = False
    generate = _generate(subject.models["base"], None)

    def run(ids: torch.Tensor, config: GenerationConfig, told: FirstToken) -> Ran:
        with processor.attach(subject.models["base"]):
            return generate(ids, config, told)

    return run


def _steered(loop: Callable[[], Any], *, overlap: bool | None) -> Callable[[Subject], Run]:
    def prepare(subject: Subject) -> Run:
        generate = _generate(subject.steered, loop())

        def run(ids: torch.Tensor, config: GenerationConfig, told: FirstToken) -> Ran:
            model = subject.steered
            if overlap is None:
                return generate(ids, config, told)
            before, model.overlap = model.overlap, overlap
            try:
                return generate(ids, config, told)
            finally:
                model.overlap = before

        return run

    return prepare


def _gated(subject: Subject) -> Run:
    gate = _gate_of(subject)
    run = _steered(lambda: FusedDecoding(seed=0), overlap=False)(subject)

    def gated(ids: torch.Tensor, config: GenerationConfig, told: FirstToken) -> Ran:
        model = subject.steered
        before = model.formula
        model.formula = replace(before, gate=gate)
        try:
            return run(ids, config, told)
        finally:
            model.formula = before

    return gated


def _gate_of(subject: Subject) -> Gate:
    """The gate of a trained family, or one that opens at the planted share; found once."""
    if subject.gate is None and subject.trained:
        subject.gate = Gate(entropy=0.1)
    elif subject.gate is None:
        text = {"input_ids": subject.text[-8:][None].to(subject.device)}
        entropies = base_entropies(subject.steered, text, max_new_tokens=4 if subject.dry else 80, pad_token_id=0)
        subject.gate = Gate(share=SHARE, entropy=max(0.0, share_threshold(entropies, SHARE)[0]))
    return subject.gate


def _compiled(subject: Subject) -> Run:
    # Compiled once; it only affects static caches, which no other method uses.
    model: Any = subject.steered
    if not subject.compiled:
        model.compile_members(CompileConfig(backend="eager", mode=None) if subject.dry else None)
        subject.compiled = True

    def run(ids: torch.Tensor, config: GenerationConfig, told: FirstToken) -> Ran:
        config.cache_implementation = "static"
        # A cache that is returned is not used again, and graphs are recorded anew over another one.
        return Ran(generated(model, FusedDecoding(seed=0), ids, config, told, returns=False))

    return run


def _generate(model: Any, loop: Any) -> Run:
    def run(ids: torch.Tensor, config: GenerationConfig, told: FirstToken) -> Ran:
        out = generated(model, loop, ids, config, told)
        if isinstance(loop, SpeculativeDecoding):
            return Ran(out.sequences, out.rounds, out.acceptance)
        return Ran(out.sequences)

    return run


def _no_gpu(subject: Subject) -> str | None:
    return None if subject.dry or subject.device.type == "cuda" else "no CUDA device"
