"""What all methods keep to: off is plain decoding, rows can be permuted, seeds repeat, other modes are refused.

A new method is a line in `LOOPS` or `PROCESSORS`. What "off" is differs from one to the next, what it has to give does
not: the tokens of decoding without the method, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from support.recursion import model_of
from support.speculation import composed, members
from support.tiny import PAD, shared
from transformers import LogitsProcessor

import proxytune
from proxytune import (
    ForkDecoding,
    ForkSamplingLogitsProcessor,
    FusedDecoding,
    LatentDecoding,
    LatentLogitsProcessor,
    ProxyTuningLogitsProcessor,
    RecursionDecoding,
    SiblingDecoding,
    SpeculativeDecoding,
    ThinkingBudgetLogitsProcessor,
)
from proxytune.errors import UnsupportedModeError
from proxytune.methods.speculation import PromptLookupDraft

NEW, END = 8, 30
SAMPLE: dict[str, Any] = {"do_sample": True, "top_k": 30}
ORDER = [2, 0, 1]


def prompts() -> tuple[torch.Tensor, torch.Tensor]:
    """Three rows of 10, 6 and 3 tokens below 96, padded at the left."""
    ids = torch.randint(3, 90, (3, 10), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(ids)
    for row, pads in ((1, 4), (2, 7)):
        ids[row, :pads], mask[row, :pads] = PAD, 0
    return ids, mask


def run(model: Any, rows: Sequence[int] = (0, 1, 2), **settings: Any) -> Any:
    """Generate after some of the prompts, with torch's generator in the same state each time."""
    ids, mask = prompts()
    torch.manual_seed(3)
    given = {"max_new_tokens": NEW, "eos_token_id": None, "do_sample": False, "return_dict_in_generate": True}
    return model.generate(ids[list(rows)], attention_mask=mask[list(rows)], **given | settings)


def of_prompts(out: Any) -> list[list[list[int]]]:
    """For each prompt of a batch the texts that it has: several after a tree, else one."""
    texts = [row[10:].tolist() for row in out.sequences]
    owners = out.prompts.tolist() if hasattr(out, "prompts") else list(range(len(texts)))
    return [[text for text, owner in zip(texts, owners, strict=True) if owner == i] for i in range(max(owners) + 1)]


# --- the loops -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Loop:
    """One loop as the contract needs it.

    Attributes:
        on: The loop with an effect, of a seed and of stream ids.
        off: The loop in its neutral setting, likewise.
        models: What it can decode with.
        greedy: Whether it can decode greedily.
        plain: What samples as it does when it is off; None for transformers' own loop.
        refused: Settings of `generate()` that it cannot do.
    """

    on: Callable[..., Any]
    off: Callable[..., Any]
    models: tuple[str, ...] = ("plain", "composed")
    greedy: bool = True
    plain: Callable[..., Any] | None = FusedDecoding
    refused: tuple[dict[str, Any], ...] = field(
        default=({"num_beams": 2}, {"num_beams": 2, "do_sample": True}, {"prompt_lookup_num_tokens": 3})
    )


def latent(kind: str) -> Callable[..., Any]:
    """Latent steps whose tokens are drawn with keyed noise too."""
    return lambda **keys: LatentDecoding(kind, loop=FusedDecoding(**keys), **keys)  # type: ignore[arg-type]


LOOPS: dict[str, Loop] = {
    "FusedDecoding": Loop(on=FusedDecoding, off=FusedDecoding),
    "SpeculativeDecoding": Loop(
        # Lossless: coupled with the fused loop's noise, its tokens are those of plain decoding whatever is drafted.
        on=lambda **keys: SpeculativeDecoding(draft=PromptLookupDraft(shortest=1), draft_tokens=3, **keys),
        off=lambda **keys: SpeculativeDecoding(
            draft=PromptLookupDraft(shortest=1), accept="coupled", draft_tokens=3, **keys
        ),
    ),
    "SpeculativeDecoding, expert": Loop(
        on=lambda **keys: SpeculativeDecoding(draft_tokens=3, **keys),
        off=lambda **keys: SpeculativeDecoding(accept="coupled", draft_tokens=3, **keys),
        models=("composed",),
    ),
    "ForkDecoding": Loop(
        on=lambda **keys: ForkDecoding(threshold=-1.0, branches=3, min_gap=2, **keys),
        off=lambda **keys: ForkDecoding(threshold=-1.0, branches=1, **keys),
    ),
    "SiblingDecoding": Loop(
        on=lambda **keys: SiblingDecoding(threshold=-1.0, siblings=3, repulsion=3.0, **keys),
        off=lambda **keys: SiblingDecoding(siblings=1, repulsion=0.0, **keys),
        greedy=False,
    ),
    "LatentDecoding": Loop(
        on=latent("gumbel"),
        off=latent("onehot"),
        refused=({"prompt_lookup_num_tokens": 3},),
    ),
    "LatentDecoding, transformers' loop": Loop(
        on=latent("gumbel"),
        off=lambda **keys: LatentDecoding("onehot", **keys),
        plain=None,
        refused=({"prompt_lookup_num_tokens": 3},),
    ),
    "RecursionDecoding": Loop(
        on=lambda **keys: RecursionDecoding(sigma=0.3, trajectories=2, **keys),
        off=lambda **keys: RecursionDecoding(sigma=0.0, trajectories=1, **keys),
        models=("recurrent",),
    ),
}


def opened(kind: str) -> Any:
    return {"plain": lambda: shared("llama", 1), "composed": lambda: composed("llama"), "recurrent": model_of}[kind]()


CASES = [(name, kind) for name, loop in LOOPS.items() for kind in loop.models]


@pytest.mark.smoke
@pytest.mark.parametrize("settings", [{}, SAMPLE], ids=["greedy", "sampling"])
@pytest.mark.parametrize(("name", "kind"), CASES)
def test_a_loop_that_is_off_is_plain_decoding(name: str, kind: str, settings: dict[str, Any]) -> None:
    loop, model = LOOPS[name], opened(kind)
    if not settings and not loop.greedy:
        with pytest.raises(UnsupportedModeError, match=name):
            run(model, custom_generate=loop.off(seed=5))
        return
    own = settings and loop.plain is not None
    want = run(model, **settings, **({"custom_generate": loop.plain(seed=5)} if own else {}))  # type: ignore[misc]
    got = run(model, custom_generate=loop.off(seed=5), **settings)
    assert torch.equal(got.sequences, want.sequences)


@pytest.mark.parametrize("settings", [{}, SAMPLE], ids=["greedy", "sampling"])
@pytest.mark.parametrize(("name", "kind"), CASES)
def test_rows_of_a_loop_can_be_permuted(name: str, kind: str, settings: dict[str, Any]) -> None:
    loop, model = LOOPS[name], opened(kind)
    settings = settings if settings or loop.greedy else SAMPLE
    together = of_prompts(run(model, custom_generate=loop.on(seed=5), **settings))
    permuted = of_prompts(run(model, ORDER, custom_generate=loop.on(seed=5, stream_ids=ORDER), **settings))
    assert permuted == [together[row] for row in ORDER]


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_a_seed_of_a_loop_repeats_and_another_differs(name: str, kind: str) -> None:
    model = opened(kind)
    one, same, other = (
        of_prompts(run(model, custom_generate=LOOPS[name].on(seed=seed), **SAMPLE)) for seed in (5, 5, 6)
    )
    assert one == same
    assert all(a != b for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_a_loop_refuses_by_its_name_what_it_cannot_do(name: str, kind: str) -> None:
    loop, method = LOOPS[name], name.split(",")[0]
    for settings in loop.refused:
        with pytest.raises(UnsupportedModeError, match=f"{method}: expected greedy decoding.*; got settings for"):
            run(opened(kind), custom_generate=loop.on(seed=5), **settings)
    with pytest.raises(UnsupportedModeError, match=f"{method}: expected a decoder-only model; got T5For"):
        run(shared("t5", 1), custom_generate=loop.on(seed=5))


# --- the processors --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Processor:
    """One processor as the contract needs it.

    Attributes:
        on: The processor with an effect, for the rows in an order.
        off: The processor in its neutral setting.
        attached: Whether it is attached to the model, and not handed to `generate()`.
        refused: Settings of `generate()` that it cannot do, and what the error says.
    """

    on: Callable[[Sequence[int]], LogitsProcessor]
    off: Callable[[], LogitsProcessor]
    attached: bool = False
    refused: tuple[tuple[dict[str, Any], str], ...] = ()


def steering(alpha: float) -> ProxyTuningLogitsProcessor:
    _, expert, antiexpert = members("llama")
    return ProxyTuningLogitsProcessor(expert, antiexpert, alpha=alpha, check_vocabulary=False)


def thinking(rows: Sequence[int]) -> ThinkingBudgetLogitsProcessor:
    caps = [1, 3, None]
    return ThinkingBudgetLogitsProcessor(END, max_thinking_tokens=[caps[row] for row in rows], prompt_length=10)


PROCESSORS: dict[str, Processor] = {
    "ProxyTuningLogitsProcessor": Processor(on=lambda _: steering(1.0), off=lambda: steering(0.0), attached=True),
    "ForkSamplingLogitsProcessor": Processor(
        on=lambda _: ForkSamplingLogitsProcessor(1.0, fork_temperature=2.0, exec_temperature=0.3),
        off=lambda: ForkSamplingLogitsProcessor(1.0, fork_temperature=1.0, exec_temperature=1.0),
        attached=True,
        refused=(({"num_beams": 2}, "expected greedy decoding or sampling; got num_beams=2"),),
    ),
    "LatentLogitsProcessor": Processor(
        on=lambda rows: LatentLogitsProcessor("gumbel", seed=5, stream_ids=rows),
        off=lambda: LatentLogitsProcessor("onehot", seed=5),
        attached=True,
        refused=(({"prompt_lookup_num_tokens": 3}, "LatentLogitsProcessor: expected greedy decoding, sampling or"),),
    ),
    "ThinkingBudgetLogitsProcessor": Processor(
        on=thinking, off=lambda: ThinkingBudgetLogitsProcessor(END, prompt_length=10)
    ),
}


def run_with(name: str, processor: LogitsProcessor, rows: Sequence[int] = (0, 1, 2), **settings: Any) -> Any:
    model = shared("llama", 1)
    with processor.attach(model) if PROCESSORS[name].attached else nullcontext():  # type: ignore[attr-defined]
        given = {} if PROCESSORS[name].attached else {"logits_processor": [processor]}
        return run(model, rows, **given, **settings)


@pytest.mark.smoke
@pytest.mark.parametrize("settings", [{}, SAMPLE], ids=["greedy", "sampling"])
@pytest.mark.parametrize("name", PROCESSORS)
def test_a_processor_that_is_off_is_plain_decoding(name: str, settings: dict[str, Any]) -> None:
    want = run(shared("llama", 1), output_scores=True, **settings)
    got = run_with(name, PROCESSORS[name].off(), output_scores=True, **settings)
    assert torch.equal(got.sequences, want.sequences)
    assert torch.equal(torch.stack(got.scores), torch.stack(want.scores))


@pytest.mark.parametrize("name", PROCESSORS)
def test_rows_of_a_processor_can_be_permuted(name: str) -> None:
    processor = PROCESSORS[name]
    plain = of_prompts(run(shared("llama", 1), custom_generate=FusedDecoding(seed=5), **SAMPLE))
    together, permuted = (
        of_prompts(
            run_with(name, processor.on(rows), rows, custom_generate=FusedDecoding(seed=5, stream_ids=rows), **SAMPLE)
        )
        for rows in ([0, 1, 2], ORDER)
    )
    assert permuted == [together[row] for row in ORDER]
    assert together != plain, "it has an effect"


@pytest.mark.parametrize("seed", [np.int64(5), torch.tensor(5)])
def test_a_seed_may_be_a_number_of_any_library(seed: Any) -> None:
    one, same = (
        of_prompts(run(shared("llama", 1), custom_generate=FusedDecoding(seed=s), **SAMPLE)) for s in (5, seed)
    )
    assert one == same


def test_a_seed_of_latent_steps_repeats_and_another_differs() -> None:
    one, same, other = (
        of_prompts(run_with("LatentLogitsProcessor", LatentLogitsProcessor("gumbel", seed=seed))) for seed in (5, 5, 6)
    )
    assert one == same != other


@pytest.mark.parametrize("name", [name for name, processor in PROCESSORS.items() if processor.refused])
def test_a_processor_refuses_what_it_cannot_do(name: str) -> None:
    for settings, message in PROCESSORS[name].refused:
        with pytest.raises(UnsupportedModeError, match=message):
            run_with(name, PROCESSORS[name].on([0, 1, 2]), **settings)


def test_every_public_method_is_held_to_the_contract() -> None:
    named = {name.split(",")[0] for name in LOOPS} | set(PROCESSORS)
    assert named == {name for name in proxytune.__all__ if name.endswith(("Decoding", "LogitsProcessor"))}
