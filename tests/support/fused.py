"""Models, prompts and processors for the tests of the fused loop."""

from typing import Any

import torch
from support.tiny import PAD, build, shared
from transformers import LogitsProcessor, StoppingCriteria
from transformers.generation.streamers import BaseStreamer

import proxytune

ALPHA = 0.7
NEW = 12
USABLE = 250


def composed(*, vocab: int = USABLE, alpha: float = ALPHA, dtype: torch.dtype | None = None) -> Any:
    """A base of 256 ids with two GPT-2 companions of another width."""
    if dtype is None:
        members = [shared("llama", 1), shared("gpt2", 2, vocab), shared("gpt2", 3, vocab)]
    else:
        members = [build(k, s, v).to(dtype) for k, s, v in (("llama", 1, 256), ("gpt2", 2, vocab), ("gpt2", 3, vocab))]
    base, expert, antiexpert = members
    return proxytune.wrap(base, expert=expert, antiexpert=antiexpert, alpha=alpha, check_vocabulary=False)


def prompts(rows: int = 3, length: int = 12, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 240, (rows, length), generator=torch.Generator().manual_seed(seed))


def padded() -> tuple[torch.Tensor, torch.Tensor]:
    """Three rows of 12, 7 and 3 tokens, padded at the left."""
    ids, mask = prompts(3), torch.ones(3, 12, dtype=torch.long)
    for row, n in ((1, 5), (2, 9)):
        ids[row, :n], mask[row, :n] = PAD, 0
    return ids, mask


def run(model: Any, ids: torch.Tensor, mask: torch.Tensor | None = None, **kwargs: Any) -> Any:
    torch.manual_seed(7)
    return model.generate(ids, attention_mask=mask, **{"max_new_tokens": NEW} | kwargs)


class Discourage(LogitsProcessor):
    """A processor of the user's own, which depends on the text: no token twice as likely as it was the last time."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return scores.scatter_add(1, input_ids[:, -1:], torch.full_like(scores[:, :1], -3.0))


class FirstRowOnly(StoppingCriteria):
    """Row 0 is finished at once, without an EOS; the others never are."""

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return torch.arange(input_ids.shape[0]) == 0


class Collector(BaseStreamer):
    """Keeps what is streamed."""

    def __init__(self) -> None:
        self.got: list[list[int]] = []
        self.ended = 0

    def put(self, value: torch.Tensor) -> None:
        self.got.append(value.flatten().tolist())

    def end(self) -> None:
        self.ended += 1


SAMPLE: dict[str, Any] = {"do_sample": True, "temperature": 0.9, "top_k": 40, "top_p": 0.95, "eos_token_id": None}
