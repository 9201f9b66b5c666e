"""What the tests of speculation share: models that agree often and seldom, drafts, and the slow way to the same texts.

`slow` knows no cache, no batch, no mask and no rounds: one row and one token at a time, members without a cache, noise
from the oracle of `ops.step`, transformers' own warpers in float64.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from support.oracle import TOKENS, gumbel, philox
from support.reference import next_logits
from support.tiny import PAD, build
from transformers import (
    LogitsProcessorList,
    PreTrainedModel,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

import proxytune
from proxytune.methods.speculation import BigramDraft, ModelDraft, PromptLookupDraft

ALPHA = 0.7
SEED = 5
FAMILIES = ("llama", "gpt2", "mistral", "gemma3", "qwen3")
SAMPLE: dict[str, Any] = {"do_sample": True, "temperature": 0.8, "top_k": 40, "top_p": 0.95}
WARPERS = (TemperatureLogitsWarper(0.8), TopKLogitsWarper(40), TopPLogitsWarper(0.95))


@functools.cache
def near(kind: str, seed: int, noise: float, *, context: int = 512) -> PreTrainedModel:
    """The base of its family with every weight changed a little: what it says is often the same."""
    model = build(kind, 1, context=context)
    if kind == "gemma3":  # a head of its own: tied to the embedding it repeats the last token for ever
        torch.manual_seed(1)
        model.lm_head.weight = torch.nn.Parameter(0.3 * torch.randn(model.lm_head.weight.shape))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(noise * p.std() * torch.randn(p.shape, generator=generator))
    return model


@functools.cache
def members(kind: str) -> tuple[PreTrainedModel, ...]:
    return near(kind, 0, 0.0), near(kind, 2, 0.1), near(kind, 3, 0.1)


@functools.cache
def composed(kind: str, alpha: float = ALPHA) -> Any:
    """A base and two companions that know the same, more or less."""
    base, expert, antiexpert = members(kind)
    return proxytune.wrap(base, expert=expert, antiexpert=antiexpert, alpha=alpha, check_vocabulary=False)


@functools.cache
def draft(name: str, kind: str) -> Any:
    match name:
        case "expert":
            return "expert"
        case "good":
            return ModelDraft(near(kind, 4, 0.1))
        case "bad":  # and wider, of another family
            return ModelDraft(build("gpt2" if kind == "llama" else "llama", 9, 262))
        case "short":  # the vocabulary of which most of the text is not in
            return ModelDraft(build("llama", 8, 60))
        case "lookup":
            return PromptLookupDraft(longest=3, shortest=1)
        case "bigrams":
            return BigramDraft.of(near(kind, 0, 0.0))
    raise ValueError(name)


def prompts(rows: int = 4, length: int = 12, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of 12, 9, 3 and 10 tokens, padded at the left; and their mask."""
    ids = torch.randint(3, 240, (rows, length), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    for row in range(rows):
        pads = (0, 3, 9, 2)[row % 4]
        ids[row, :pads], mask[row, :pads] = PAD, 0
    return ids, mask


def slow_row(
    logits: Callable[[torch.Tensor], torch.Tensor],
    text: torch.Tensor,
    new: int,
    *,
    row: int = 0,
    branch: int = 0,
    warpers: Sequence[Any] | None = None,
    ends: Sequence[int] = (),
) -> torch.Tensor:
    """The tokens after one unpadded text; greedy without warpers, else drawn with the oracle's noise."""
    begun = len(text)
    for _ in range(new):
        z = logits(text)
        if warpers is None:
            token = int(z.argmax())
        else:
            z = LogitsProcessorList(warpers)(text[None], z[None].double())[0]
            # Below 1024 columns there is one tile, and its noise is the same for all.
            noise = gumbel(philox(SEED, np.arange(len(z)), len(text), row, branch * 4 + TOKENS)[0])
            token = int((z + torch.from_numpy(noise)).argmax())
        text = torch.cat([text, torch.tensor([token])])
        if token in ends:
            break
    return text[begun:]


def slow(
    logits: Callable[[torch.Tensor], torch.Tensor], ids: torch.Tensor, mask: torch.Tensor, new: int, **kwargs: Any
) -> torch.Tensor:
    """`[B, T + new]`: the batch of it, filled up with padding, as wide as its longest row."""
    rows = [slow_row(logits, x[m.bool()], new, row=i, **kwargs) for i, (x, m) in enumerate(zip(ids, mask, strict=True))]
    return torch.cat([ids, torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=PAD)], 1)


def steered(kind: str, alpha: float = ALPHA) -> Callable[[torch.Tensor], torch.Tensor]:
    return functools.partial(next_logits, list(members(kind)), alpha)


def alone(model: PreTrainedModel) -> Callable[[torch.Tensor], torch.Tensor]:
    def logits(text: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return model(text[None], use_cache=False).logits[0, -1].float()

    return logits


def p_value(counts: torch.Tensor, p: torch.Tensor) -> float:
    """Of χ²; cells that expect fewer than 5 are pooled; 0 if a text was drawn that is impossible."""
    counts, p = counts.flatten().double(), p.flatten()
    if counts[p == 0].any():
        return 0.0
    expected = p * counts.sum()
    rare = expected < 5
    seen = torch.cat([counts[~rare], counts[rare].sum()[None]])
    want = torch.cat([expected[~rare], expected[rare].sum()[None]])
    seen, want = seen[want > 0], want[want > 0]
    statistic = ((seen - want) ** 2 / want).sum()
    return float(torch.special.gammaincc(torch.tensor((len(want) - 1) / 2).double(), statistic / 2))
