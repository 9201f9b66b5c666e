"""What a model answers to a route, exactly: every path is scored, nothing is sampled."""

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
    """The law of a model's answers to one route.

    Attributes:
        route: The route.
        paths: `[P]`, float64: the probability that the model writes a path's text and ends.
        ids: Of each path, the token ids of its text and the end-of-text token.
        entropies: Of each path, `[len(ids)]` float64, nats: of the distributions that its tokens are drawn from, at
            temperature 1.
        forks: Of each path, `[len(ids)]` bool: whether the token is a sign.
    """

    route: Route
    paths: NDArray[np.float64]
    ids: list[tuple[int, ...]]
    entropies: list[NDArray[np.float64]]
    forks: list[NDArray[np.bool_]]

    def answers(self) -> dict[int | None, float]:
        """Answer → probability; None → that of every text that is no path.

        Returns:
            The law; it adds up to 1.
        """
        law: dict[int | None, float] = {}
        for path, probability in zip(self.route.paths, self.paths, strict=True):
            law[path.answer] = law.get(path.answer, 0.0) + float(probability)
        law[None] = 1.0 - sum(law.values())
        return law

    def taught(self) -> float:
        """How far it is from the law of the training text.

        Returns:
            The total variation distance over paths and the rest.
        """
        apart = sum(abs(float(p) - path.taught) for p, path in zip(self.paths, self.route.paths, strict=True))
        return 0.5 * (apart + 1.0 - float(self.paths.sum()))

    def read(self, ids: Sequence[int]) -> int | None:
        """The answer of what was generated.

        Args:
            ids: The generated tokens with the end-of-text token, without padding.

        Returns:
            Where the path ends; None if they are not the tokens of a path. By tokens, since a text may be written with
            other tokens too, which the law does not count.
        """
        try:
            return self.route.paths[self.ids.index(tuple(ids))].answer
        except ValueError:
            return None


@torch.inference_mode()
def route_law(model: Any, tokenizer: PreTrainedTokenizerBase, route: Route, *, temperature: float = 1.0) -> RouteLaw:
    """Score every path of a route.

    Args:
        model: A causal LM.
        tokenizer: Its tokenizer.
        route: The route.
        temperature: That of the draws.

    Returns:
        The law.
    """
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
