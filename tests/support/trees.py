"""Models, prompts and checks for the tests of trees."""

from __future__ import annotations

import functools
import warnings
from typing import Any

import pytest
import torch
from support.reference import next_logits
from support.tiny import PAD, build, shared
from transformers import LogitsProcessor
from transformers.generation.streamers import BaseStreamer

import proxytune
from proxytune.errors import BudgetWarning
from proxytune.methods.trees.fork_decoding import ForkDecoding, TreeOutput
from proxytune.methods.trees.tree import ForkTree

ALPHA = 0.7
NEW = 10
LOW, MIDDLE, HIGH = -1.0, 2.5, 99.0
"""Thresholds: every token is a fork, some are, none is."""


def composed(*kinds: str, dtype: torch.dtype | None = None, alpha: float = ALPHA) -> Any:
    kinds = kinds or ("llama", "gpt2", "gpt2")
    vocabs = (256, 250, 250)
    members = [
        shared(kind, i, vocab) if dtype is None else build(kind, i, vocab).to(dtype)
        for i, (kind, vocab) in enumerate(zip(kinds, vocabs, strict=True), 1)
    ]
    base, expert, antiexpert = members
    return proxytune.wrap(base, expert=expert, antiexpert=antiexpert, alpha=alpha, check_vocabulary=False)


def padded() -> tuple[torch.Tensor, torch.Tensor]:
    """Three prompts of 12, 7 and 3 tokens, padded at the left."""
    ids = torch.randint(3, 240, (3, 12), generator=torch.Generator().manual_seed(0))
    mask = torch.ones(3, 12, dtype=torch.long)
    for row, n in ((1, 5), (2, 9)):
        ids[row, :n], mask[row, :n] = PAD, 0
    return ids, mask


def grow(model: Any, loop: ForkDecoding, ids: torch.Tensor, mask: torch.Tensor | None = None, **kwargs: Any) -> Any:
    defaults = {"do_sample": True, "top_k": 0, "max_new_tokens": NEW, "return_dict_in_generate": True}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", BudgetWarning)  # it has tests of its own
        return model.generate(ids, attention_mask=mask, custom_generate=loop, **defaults | kwargs)


def described(tree: ForkTree) -> list[Any]:
    """All that must not depend on the batch around it."""
    return [
        (b.number, None if b.parent is None else b.parent.number, b.start, b.tokens, b.forks, b.finished) for b in tree
    ]


@torch.no_grad()
def reference_logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """Next-token logits `[V]` after one unpadded prefix, without a cache."""
    if hasattr(model, "members"):
        return next_logits([m.model for m in model.members], ALPHA, ids)
    return model(ids[None], use_cache=False).logits[0, -1].float()


def check_branches(model: Any, out: TreeOutput, ids: torch.Tensor, mask: torch.Tensor) -> None:
    row = 0
    for tree, prompt, kept in zip(out.trees, ids, mask.bool(), strict=True):
        for branch in tree:
            tokens = branch.along("tokens")
            assert int(out.prompts[row]) == tree.prompt
            assert out.sequences[row].tolist() == [*prompt.tolist(), *tokens] + [PAD] * (
                out.sequences.shape[1] - len(prompt) - len(tokens)
            )
            text = prompt[kept]
            for token, logprob, entropy, confidence in zip(
                tokens,
                branch.along("logprobs"),
                branch.along("entropies"),
                branch.along("confidences"),
                strict=True,
            ):
                logp = reference_logits(model, text).log_softmax(-1)
                finite = logp[logp > -torch.inf]
                assert logprob == pytest.approx(float(logp[token]), abs=1e-3)
                assert entropy == pytest.approx(float(-(finite.exp() * finite).sum()), abs=1e-3)
                assert confidence == pytest.approx(float(-logp.topk(20).values.mean()), abs=1e-3)
                text = torch.cat([text, torch.tensor([token])])
            row += 1
    assert row == len(out.sequences) == len(out.log_weights)
    assert out.log_weights.isfinite().all()


SMALL = 6


@functools.cache
def small_model() -> Any:
    return build("llama", 5, vocab=SMALL)


START = (3, 4, 5)


class Streamer(BaseStreamer):
    def put(self, value: Any) -> None: ...

    def end(self) -> None: ...


class Break(LogitsProcessor):
    """Spoils one prompt's rows from some length on."""

    def __init__(self, value: float, length: int, token: int) -> None:
        self.value, self.length, self.token = value, length, token

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if input_ids.shape[1] < self.length:
            return scores
        return torch.where((input_ids[:, 11] == self.token)[:, None], self.value, scores)
