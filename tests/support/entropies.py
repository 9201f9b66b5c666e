"""Token entropies along sampled texts."""

from typing import Any

import torch

from proxytune.models.members.cache_name import CACHE
from proxytune.ops.entropy import entropy


@torch.no_grad()
def sampled_entropies(model: Any, temperature: float, seed: int, rows: int = 80, steps: int = 40) -> torch.Tensor:
    """Raw entropies `[rows, steps]` along texts that a model samples at a temperature from random prompts."""
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, model.config.vocab_size, (rows, 4), generator=g)
    past, found = None, []
    new = ids
    for _ in range(steps):
        out = model(new, **{CACHE: past}, use_cache=True)
        past, logits = out.past_key_values, out.logits[:, -1].float()
        found.append(entropy(logits))
        new = torch.multinomial((logits / temperature).softmax(-1), 1, generator=g)
    return torch.stack(found, 1)
