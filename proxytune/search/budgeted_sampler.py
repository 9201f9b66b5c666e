"""Samples of a model after one prompt, charged to a ledger and keyed by seed and prompt; policies are built on it."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from proxytune.budget.ledger import TokenLedger, refuse_no_ledger
from proxytune.errors import BudgetError, InputError
from proxytune.methods.trees.fork_decoding import ForkDecoding
from proxytune.methods.trees.tree import Branch
from proxytune.search.keyed_noise import key_of
from proxytune.validation import Ids, token_ids, whole
from proxytune.voting.vote import Sample

__all__ = ["BudgetedSampler", "Extract"]

Extract = Callable[[str], Hashable | None]
"""From a text to its answer; None for no answer."""

_OWN = (
    "custom_generate",
    "input_ids",
    "attention_mask",
    "max_length",
    "num_return_sequences",
    "num_beams",
    "tokenizer",
)


@dataclass(frozen=True, eq=False)
class BudgetedSampler:
    """A model that generates within a ledger's budget, and the function that extracts answers.

    `seed` (64 bits) keys all draws; `generation` are further arguments of `generate()`.

    Raises:
        InputError: If a setting is out of range, or `generation` holds an argument that this class sets itself.
    """

    model: Any
    tokenizer: Any
    extract: Extract
    max_new_tokens: int
    seed: int
    generation: dict[str, Any]

    def __post_init__(self) -> None:
        whole("max_new_tokens", self.max_new_tokens, least=1)
        own = [name for name in _OWN if name in self.generation]
        if own:
            raise InputError.of(
                "generation",
                expected="settings of the draw, such as temperature",
                got=", ".join(own),
                remedy="Leave out what the policy sets by itself.",
            )
        ForkDecoding(branches=1, where="start", seed=self.seed)

    def pay(self, task: str | Ids, ledger: TokenLedger) -> list[int]:
        """Charge the prompt and return its token ids, provided that at least one token can be generated after it.

        Raises:
            BudgetError: If there is no room for the prompt and one token; nothing is charged then.
            InputError: If the prompt is empty, or neither a text nor token ids; or if there is no ledger.
        """
        refuse_no_ledger(ledger)
        ids = list(
            token_ids(
                "task", self.tokenizer(task)["input_ids"] if isinstance(task, str) else task, "a text or token ids"
            )
        )
        if not ids:
            raise InputError.of("task", expected="a prompt of at least one token", got=repr(task), remedy="Pass one.")
        new = ledger.cost_of_prefix(ids)
        if not ledger.can_afford(new + 1):
            raise BudgetError.of(
                f"a prompt of {len(ids)} tokens, {len(ids) - new} of them already paid for,",
                expected=f"at least {new + 1} left, since one has to be generated",
                got=f"{ledger.left} of max_total_tokens={ledger.max_total_tokens}",
                remedy="Raise max_total_tokens, or shorten the prompt.",
            )
        ledger.charge_prefix(ids)
        return ids

    def write(
        self, ids: list[int], streams: Sequence[int], room: int, ledger: TokenLedger, label: str, *processors: Any
    ) -> list[Branch]:
        """Generate texts after a prompt that is already charged, and charge them.

        Args:
            ids: `[T]`, the prompt.
            streams: Noise stream of each text; the same stream gives the same text.
            room: Most tokens per text, reserved beforehand, so the ledger cannot be exceeded.
            ledger: Is charged.
            label: Name of the charge in the ledger.
            *processors: Logits processors, applied after those in `generation`.

        Raises:
            BudgetError: If less is left than the texts may need.
        """
        with ledger.reserve(len(streams) * room, label=label) as reserved:
            branches = self._branches(ids, streams, room, *processors)
            for branch in branches:
                reserved.spend(len(branch), text=[*ids, *map(int, branch.along("tokens"))])
        return branches

    def _branches(self, ids: list[int], streams: Sequence[int], room: int, *processors: Any) -> list[Branch]:
        """Independent texts after one prompt; the only place that calls the model."""
        prompts = torch.tensor([ids] * len(streams), device=self.model.device)
        settings = dict(self.generation)
        settings["logits_processor"] = [*(settings.get("logits_processor") or ()), *processors]
        if self.tokenizer.pad_token_id is not None:
            settings.setdefault("pad_token_id", self.tokenizer.pad_token_id)
        out = self.model.generate(
            input_ids=prompts,
            attention_mask=torch.ones_like(prompts),
            max_new_tokens=room,
            tokenizer=self.tokenizer,
            custom_generate=ForkDecoding(
                branches=1, where="start", seed=_key(self.seed, ids), stream_ids=list(streams)
            ),
            **settings | {"return_dict_in_generate": True},
        )
        return [tree.branches[0] for tree in out.trees]

    def sample(self, branch: Branch) -> Sample:
        """A text as a sample: its answer, confidences, and whether it was cut; `InputError` if `extract` raises."""
        text = str(self.tokenizer.decode([int(token) for token in branch.along("tokens")], skip_special_tokens=True))
        try:
            answer = self.extract(text)
        except Exception as error:
            raise InputError.of(
                "extract",
                expected="an answer, or None, for every text",
                got=f"{type(error).__name__}: {error} for the text {text[:200]!r}",
                remedy="Return None for texts without an answer.",
            ) from error
        return Sample(answer, np.array(branch.along("confidences")), cut=not branch.finished)


def _key(seed: int, ids: Sequence[int]) -> int:
    """A signed 64-bit seed from a seed and a prompt; prompts that collide would only share their noise."""
    return (key_of("policy", ids, seed) & ((1 << 64) - 1)) - (1 << 63)
