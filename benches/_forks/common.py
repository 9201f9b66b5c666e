"""What the sections of `bench_forks.py` share: models, samples and their costs, intervals over problems."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lab.studies.studies import StudyName, load_study
from numpy.typing import ArrayLike, NDArray
from transformers import LogitsProcessor, PreTrainedTokenizerBase

from proxytune.generation.fused import FusedDecoding
from proxytune.methods.trees.loop import TreeLoop
from proxytune.methods.trees.tree import ForkTree
from proxytune.stats.bootstrap import Interval

ROWS = 512
"""Rows of a batch; results do not depend on it."""


@dataclass(frozen=True)
class Subject:
    """A model under study, in float32, with a tokenizer that pads on the left.

    Attributes:
        name: Its name in the tables.
        seed: Its training seed.
    """

    name: str
    seed: int
    model: Any
    tokenizer: PreTrainedTokenizerBase

    @classmethod
    def study(cls, name: StudyName, seed: int, folder: Path) -> Subject:
        """The model that `train_studies` left in the folder of a seed."""
        return cls(name, seed, *load_study(name, folder / f"seed{seed}"))

    def encode(self, prompts: Sequence[str], width: int | None = None) -> dict[str, torch.Tensor]:
        """Ids and mask, padded on the left to the longest prompt, or to `width`."""
        how = {"padding": True} if width is None else {"padding": "max_length", "max_length": width}
        found = self.tokenizer(list(prompts), return_tensors="pt", **how)
        return {name: found[name] for name in ("input_ids", "attention_mask")}

    def trim(self, ids: torch.Tensor) -> list[int]:
        """Generated ids up to and including the end-of-text token."""
        out: list[int] = ids.tolist()
        eos = self.tokenizer.eos_token_id
        return out[: out.index(eos) + 1] if eos in out else out

    def read(self, ids: Sequence[int]) -> str:
        """The text, without special tokens."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True))


def independent(
    subject: Subject,
    prompts: Sequence[str],
    samples: int,
    *,
    seed: int,
    max_new_tokens: int,
    temperature: float = 1.0,
) -> list[list[list[int]]]:
    """`samples` independent samples of each prompt; nothing is truncated.

    Returns:
        Per prompt, the samples' generated ids with the end-of-text token, without padding. A sample's noise stream is
        its number, whatever the batch.
    """
    out: list[list[list[int]]] = [[] for _ in prompts]
    rows = [(row, prompt) for row, prompt in enumerate(prompts) for _ in range(samples)]
    for first in range(0, len(rows), ROWS):
        some = rows[first : first + ROWS]
        encoded = subject.encode([prompt for _, prompt in some])
        loop = FusedDecoding(seed=seed, stream_ids=list(range(first, first + len(some))))
        with torch.inference_mode():
            sequences = subject.model.generate(
                **encoded,
                do_sample=True,
                temperature=temperature,
                top_k=0,
                max_new_tokens=max_new_tokens,
                custom_generate=loop,
            )
        for (row, _), ids in zip(some, sequences[:, encoded["input_ids"].shape[1] :], strict=True):
            out[row].append(subject.trim(ids))
    return out


def grow(
    subject: Subject,
    prompts: Sequence[str],
    loop: TreeLoop,
    *,
    max_new_tokens: int,
    processors: Sequence[LogitsProcessor] = (),
    width: int | None = None,
) -> list[ForkTree]:
    """A tree per prompt, in one batch, at temperature 1, nothing truncated.

    `width` pads to a fixed number of columns, for processors that count from the end of the prompts.
    """
    with torch.inference_mode():
        out = subject.model.generate(
            **subject.encode(prompts, width),
            do_sample=True,
            temperature=1.0,
            top_k=0,
            max_new_tokens=max_new_tokens,
            logits_processor=list(processors),
            custom_generate=loop,
            return_dict_in_generate=True,
        )
    trees: list[ForkTree] = out.trees
    return trees


def mean_interval(values: ArrayLike, *, level: float = 0.95, draws: int = 10_000, seed: int = 0) -> Interval:
    """A mean over problems, `[P]`, with its percentile bootstrap interval; pass differences for a paired comparison."""
    array = np.asarray(values, np.float64)
    assert array.ndim == 1
    assert np.isfinite(array).all()
    counts = _resampled(len(array), draws, seed)
    low, high = np.quantile(counts @ array / len(array), [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(array.mean()), float(low), float(high))


@lru_cache(maxsize=4)
def _resampled(problems: int, draws: int, seed: int) -> NDArray[np.float64]:
    """How often each problem comes in each resample, `[draws, P]`."""
    counts = np.random.default_rng(seed).multinomial(problems, np.full(problems, 1 / problems), size=draws)
    return counts.astype(np.float64)


def record(found: Interval, digits: int = 4) -> dict[str, float]:
    """An interval as JSON values."""
    return {"value": round(found.value, digits), "low": round(found.low, digits), "high": round(found.high, digits)}
