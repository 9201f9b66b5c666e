"""The exact distribution of a model's answers to a route: every path is scored, nothing is sampled."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from lab.studies.routes import SIGNS, Route
from proxytune.demo.instructions import prompt_of

__all__ = ["RouteLaw", "route_law"]


@dataclass(frozen=True, eq=False)
class RouteLaw:
    """The distribution of a model's answers to one route with P paths.

    Attributes:
        route: The route.
        paths: `[P]`, float64: probability that the model writes a path's text and ends.
        ids: Per path, the token ids of its text and the end-of-text token.
        entropies: Per path, `[len(ids)]` float64, nats: entropy of each token's distribution at temperature 1.
        forks: Per path, `[len(ids)]` bool: whether the token is a sign.
    """

    route: Route
    paths: NDArray[np.float64]
    ids: list[tuple[int, ...]]
    entropies: list[NDArray[np.float64]]
    forks: list[NDArray[np.bool_]]

    def answers(self) -> dict[int | None, float]:
        """Answer → probability, adding up to 1; None collects every text that is not a path."""
        law: dict[int | None, float] = {}
        for path, probability in zip(self.route.paths, self.paths, strict=True):
            law[path.answer] = law.get(path.answer, 0.0) + float(probability)
        law[None] = 1.0 - sum(law.values())
        return law

    def taught(self) -> float:
        """Total variation distance to the distribution of the training text, over paths and the rest."""
        apart = sum(abs(float(p) - path.taught) for p, path in zip(self.paths, self.route.paths, strict=True))
        return 0.5 * (apart + 1.0 - float(self.paths.sum()))

    def read(self, ids: Sequence[int]) -> int | None:
        """The answer in generated ids (end-of-text token included, no padding); None if they are not a path's tokens.

        Compared by tokens, since the same text in other tokens is not counted in `paths`.
        """
        try:
            return self.route.paths[self.ids.index(tuple(ids))].answer
        except ValueError:
            return None


@torch.inference_mode()
def route_law(model: Any, tokenizer: PreTrainedTokenizerBase, route: Route, *, temperature: float = 1.0) -> RouteLaw:
    """Score every path of a route, for draws at a temperature."""
    eos = tokenizer.eos_token_id
    assert isinstance(eos, int)
    prompt: list[int] = tokenizer.encode(prompt_of(route.question), add_special_tokens=False)
    answers = [(*tokenizer.encode(path.text, add_special_tokens=False), eos) for path in route.paths]
    width = len(prompt) + max(map(len, answers))
    rows = torch.full((len(answers), width), eos)
    for row, answer in enumerate(answers):  # padded on the right, where a causal model cannot see it
        rows[row, : len(prompt) + len(answer)] = torch.tensor([*prompt, *answer])
    logits = model(rows.to(model.device), use_cache=False).logits[:, len(prompt) - 1 : -1].cpu().double()  # [P, T, V]
    drawn = (logits / temperature).log_softmax(-1).gather(2, rows[:, len(prompt) :, None])[..., 0]  # [P, T]
    logprobs = logits.log_softmax(-1)
    entropies = -(logprobs.exp() * logprobs).sum(-1)  # [P, T]
    signs = set(tokenizer.convert_tokens_to_ids(list(SIGNS)))
    return RouteLaw(
        route=route,
        paths=np.exp([float(drawn[row, : len(answer)].sum()) for row, answer in enumerate(answers)]),
        ids=answers,
        entropies=[entropies[row, : len(answer)].numpy() for row, answer in enumerate(answers)],
        forks=[np.array([token in signs for token in answer]) for answer in answers],
    )
