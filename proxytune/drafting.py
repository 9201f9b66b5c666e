"""Assisted decoding on a composed model: drafts whose head is narrower or wider than the base's.

A draft only proposes; what is accepted is decided by the combined logits. So a draft of another width needs nothing but
rows of the same width, ids that it can embed, and no proposals that some member cannot embed.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import GenerationConfig, LogitsProcessor
from transformers.generation.candidate_generator import CandidateGenerator

from proxytune.errors import UnsupportedModeError
from proxytune.member import embedding_rows

__all__ = ["FittedDraft", "TailMask", "refuse_self_speculation"]

# Settings of generate() that draft with layers, heads or embeddings of the one model it takes itself to be running.
_SELF_SPECULATION = {"assistant_early_exit": (None,), "use_mtp": (None, False), "speculation_type": (None,)}


class TailMask(LogitsProcessor):
    """Gives −inf to the ids past a width.

    The composed logits have −inf there anyway. This is for the drafts of assisted decoding, to which `generate()` hands
    the same processors, and for what comes out of `(−inf) − (−inf)` in classifier-free guidance.
    """

    supports_continuous_batching = False

    def __init__(self, width: int) -> None:
        """Set the width.

        Args:
            width: The number of ids that stay.
        """
        self.width = width

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Mask the tail.

        Args:
            input_ids: `[B, T]`; not looked at.
            scores: `[B, V]`.

        Returns:
            `[B, V]`, a new tensor if there is a tail.
        """
        if scores.shape[-1] <= self.width:
            return scores
        masked = scores.clone()
        masked[:, self.width :] = -torch.inf
        return masked


class FittedDraft(CandidateGenerator):
    """A candidate generator whose rows are brought to the base's width: the draft gives what it lacks −inf."""

    def __init__(self, inner: CandidateGenerator, width: int) -> None:
        """Wrap a candidate generator.

        Args:
            inner: The generator of transformers. `TailMask` keeps its proposals within every member's reach.
            width: The base's width V.
        """
        self.inner = inner
        self.width = width

    def __getattr__(self, name: str) -> Any:
        # The assisted loop reads and tunes settings on the generator it was given.
        return getattr(self.inner, name)

    def get_candidates(self, input_ids: torch.Tensor, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Draft a continuation.

        Args:
            input_ids: `[1, T]`.
            **kwargs: As in transformers.

        Returns:
            The prefix with the candidates, `[1, T + K]`, and their logits, `[1, K, V]`.
        """
        # Text that the draft has no embedding for reaches it as another token: its proposals get worse, nothing else.
        known = input_ids.clamp(max=embedding_rows(self.inner.assistant_model) - 1)
        candidates, logits = self.inner.get_candidates(known, **kwargs)
        candidates = torch.cat([input_ids, candidates[:, input_ids.shape[1] :].to(input_ids.device)], 1)
        if logits is not None:
            missing = self.width - logits.shape[-1]
            logits = torch.nn.functional.pad(logits, (0, missing), value=-torch.inf)  # a negative number crops
        return candidates, logits

    def update_candidate_strategy(self, input_ids: torch.Tensor, scores: torch.Tensor, num_matches: int) -> None:
        """Tell the draft how many candidates were accepted.

        Args:
            input_ids: `[1, T]`.
            scores: `[1, K, V]`.
            num_matches: The number.
        """
        self.inner.update_candidate_strategy(input_ids, scores, num_matches)


def refuse_self_speculation(generation_config: GenerationConfig) -> None:
    """Refuse the modes in which a model drafts with parts of itself: steered, there is no such one model.

    Args:
        generation_config: The settings of the call.

    Raises:
        UnsupportedModeError: If one of these modes is on.
    """
    for name, off in _SELF_SPECULATION.items():
        if (value := getattr(generation_config, name, None)) not in off:
            raise UnsupportedModeError.of(
                name,
                expected="a draft of its own, or none",
                got=f"{name}={value!r}, which drafts with a part of one model",
                remedy="Pass assistant_model= or prompt_lookup_num_tokens=.",
            )
