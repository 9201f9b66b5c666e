"""Exact teacher-forced log-probabilities of given texts, under any causal LM, composed or plain.

Texts are read in parts, each of which goes on from the cache of the one before it, and only scored positions get
logits: the members' logits `[B, T, V]` of whole texts never exist. What one part needs does not depend on the texts'
length, but for the members' caches.

Other weights of the members need no other pass: `parts_of` gives each part's logits once, for any number of formulas
(`proxytune.search.tuning`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from proxytune.models.ensemble import Ensemble
from proxytune.models.scored_parts import Part, parts_of_batch
from proxytune.models.scored_texts import Prompts, Texts, batches
from proxytune.validation import Ids, whole

__all__ = ["Scores", "parts_of", "score"]


@dataclass(frozen=True, eq=False)
class Scores:
    """What a model makes of R texts, on the CPU.

    Attributes:
        logprobs: For each text `[n]`, float64, nats: the log-probability of each scored token, given all tokens before
            it. −inf for a token that the model forbids.
        likeliest: For each text `[n]`, bool: whether the token is the one that greedy decoding would have taken.
    """

    logprobs: tuple[torch.Tensor, ...]
    likeliest: tuple[torch.Tensor, ...]

    @property
    def sums(self) -> torch.Tensor:
        """`[R]`, float64, nats: the log-probability of each text's scored tokens together."""
        return torch.stack([x.sum() for x in self.logprobs])

    @property
    def counts(self) -> torch.Tensor:
        """`[R]`, int64: how many tokens of each text were scored."""
        return torch.tensor([len(x) for x in self.logprobs])

    @property
    def greedy(self) -> torch.Tensor:
        """`[R]`, bool: whether greedy decoding would have written all scored tokens (lm-eval's `is_greedy`)."""
        return torch.stack([x.all() for x in self.likeliest])

    @property
    def perplexity(self) -> float:
        """exp(−mean log-probability) over the scored tokens of all texts; inf if one of them is forbidden."""
        return float(torch.exp(-self.sums.sum() / self.counts.sum()))


def score(
    model: Any,
    texts: Sequence[Ids | torch.Tensor],
    *,
    prompts: Prompts | None = None,
    batch_size: int = 8,
    names: Sequence[str] | None = None,
) -> Scores:
    """Score texts under a model, composed or plain: log-probabilities of their tokens, and the perplexity.

    Args:
        model: A `ProxyTunedModel`, or any decoder-only causal LM of transformers; in evaluation mode.
        texts: R texts as token ids. Of a text without a prompt the first token is not scored: nothing predicts it.
            Put the BOS token first where the model was trained with one.
        prompts: R prompts as token ids, one for each text, which are read and not scored; an empty one is none. For a
            model with members that read a prompt of their own: role → R prompts, "base" among them.
        batch_size: How many texts are read at once. It decides memory and speed; results differ in rounding alone.
        names: What errors call the texts [text 0, text 1, …].

    Returns:
        The scores, in the order of the texts.

    Raises:
        InputError: If a text has nothing to score, is too long for a member, or has an id that a member cannot embed;
            if there are not as many prompts as texts, or not for all members that read their own; if the model is in
            training mode.
        NumericalError: If a position has no distribution.
        UnsupportedModelError: If the model is an encoder-decoder, or cannot be a member.

    The log-probabilities are those of lm-evaluation-harness (`loglikelihood` of 0.4.13) for the same ids: no sampling
    setting changes them, and arithmetic on logits is float32.
    """
    found: list[list[torch.Tensor]] = [[] for _ in texts]
    likeliest: list[list[torch.Tensor]] = [[] for _ in texts]
    weighing = Ensemble.of(model).weighing
    for part in parts_of(model, texts, prompts=prompts, batch_size=batch_size, names=names):
        logprobs, top = (x.cpu() for x in part.logprobs(weighing))
        owners = part.texts[part.scored].cpu()
        for text in owners.unique().tolist():  # the tokens of a text come in their order
            found[text].append(logprobs[owners == text])
            likeliest[text].append(top[owners == text])
        del part  # before the next one is made
    return Scores(tuple(torch.cat(x) for x in found), tuple(torch.cat(x) for x in likeliest))


def parts_of(
    model: Any,
    texts: Sequence[Ids | torch.Tensor],
    *,
    prompts: Prompts | None = None,
    batch_size: int = 8,
    names: Sequence[str] | None = None,
    everyone: bool = False,
) -> Iterator[Part]:
    """Read texts once, with arguments as in `score`, and yield the members' logits of their scored positions.

    `everyone` lets members of weight 0 run too, for formulas in which they have another. A part's tensors are not kept:
    drop it before the next one is asked for.
    """
    ensemble = Ensemble.of(model)
    members = ensemble.members
    whole("batch_size", batch_size, "of texts", least=1)
    read = Texts(model, members, texts, prompts, names)
    for batch in batches(read, members, batch_size):
        yield from parts_of_batch(ensemble, members, batch, read, everyone)
