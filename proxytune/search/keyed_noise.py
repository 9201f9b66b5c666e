"""Keyed noise for NumPy, without torch: a function of purpose, prompt and numbers, not of a generator's state."""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray

from proxytune.validation import Ids, token_ids, whole

__all__ = ["PromptKey", "key_of", "keyed_uniforms", "prompt_key", "round_key"]

PromptKey = str | tuple[int, ...]


def prompt_key(prompt: str | Ids) -> PromptKey:
    """A prompt as a dictionary key: the text itself, or its token ids as a tuple of Python ints; else `InputError`."""
    return prompt if isinstance(prompt, str) else token_ids("prompt", prompt, "a text or token ids")


def key_of(purpose: str, prompt: str | Ids, *numbers: int) -> int:
    """A hash in [0, 2¹²⁸) of a purpose, a prompt and numbers, e.g. seed and round; `InputError` as `prompt_key`."""
    said = repr((purpose, *map(int, numbers), prompt_key(prompt)))
    return int.from_bytes(hashlib.blake2b(said.encode("utf-8", "surrogatepass"), digest_size=16).digest(), "little")


def round_key(purpose: str, prompt: str | Ids, round: int, seed: int) -> int:
    """`key_of` a decision in a round; `InputError` unless `round` is whole and at least 0, and `seed` whole."""
    seed = whole("seed", seed, "", least=None, remedy="Pass e.g. seed=0.")
    return key_of(purpose, prompt, seed, whole("round", round, "that counts the rounds"))


def keyed_uniforms(key: int, count: int) -> NDArray[np.float64]:
    """`[count]` float64 in (0, 1), both ends excluded, a function of the key; a larger `count` keeps the first."""
    # NumPy keeps raw words stable between versions, but not its distributions.
    words = np.random.Philox(key=key).random_raw(count)
    return ((words >> np.uint64(12)).astype(np.float64) + 0.5) / 2.0**52
