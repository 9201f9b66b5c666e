"""`proxytune sample` for one batch of prompts: trees or samples, their answers, and the vote."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

from proxytune.cli import terminal
from proxytune.cli.encoding import Views, encode
from proxytune.cli.options import Vote
from proxytune.cli.prompts import Prompt
from proxytune.errors import BudgetError, BudgetWarning, InputError

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedTokenizerBase

    from proxytune.methods.trees.loop import TreeLoop
    from proxytune.methods.trees.tree import Branch, ForkTree
    from proxytune.voting.vote import Tally

__all__ = ["Result", "SampleProgress", "SampleRun", "Vote", "extractor"]

_STATED = re.compile(r"The answer is[:\s]*([^\n]+?)\s*(?=\.(?:\s|$)|\n|$)")
_NUMBER = re.compile(r"(?<![\w.])-?\d+(?:,\d{3})*(?:\.\d+)?")


@dataclass(frozen=True)
class Result:
    """What was drawn for one prompt.

    Attributes:
        length: The prompt's tokens.
        branches: The leaves of its tree, or the samples.
        weights: One per branch, adding up to 1.
        texts: One per branch, without special tokens.
        answers: One per branch; None for no answer.
        spent: Tokens of the budget: the prompt and all generated tokens, shared ones counted once.
        drawing: The tree or the samples as text.
        planned: How many texts were asked for, at most.
        counts: How many were planned, ran, and were cut, in words.
        shortage: What to do if the budget had no room for all of them; None if it had.
    """

    prompt: Prompt
    length: int
    branches: list[Branch]
    weights: list[float]
    texts: list[str]
    answers: list[str | None]
    tally: Tally
    spent: int
    drawing: str
    planned: int
    counts: str
    shortage: str | None


class Extract(Protocol):
    """Finds the answer in a text; None for no answer."""

    def __call__(self, text: str, cut: bool = False) -> str | None:
        """Find the answer.

        Args:
            text: The text.
            cut: Whether the text was cut off. Then neither a match at its very end is taken, which may be incomplete,
                nor a bare number, which may be an intermediate result.
        """


def extractor(pattern: str | None) -> Extract:
    """A function that finds the answer in a text, by a regular expression whose last match counts.

    The answer is its first group if it has one, else all of it. For None: what follows "The answer is" up to the end of
    the sentence, else the last number. `InputError` if it is not a regular expression.
    """
    if pattern is None:
        return _usual_answer
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise InputError.of(
            "--answer", expected="a regular expression", got=repr(pattern), remedy=f"Python says: {error}."
        ) from None
    return lambda text, cut=False: _last(compiled, text, cut)


def _usual_answer(text: str, cut: bool = False) -> str | None:
    stated = _last(_STATED, text, cut)
    if stated is not None or cut:
        return stated
    number = _last(_NUMBER, text)
    return None if number is None else number.replace(",", "")


def _last(pattern: re.Pattern[str], text: str, cut: bool = False) -> str | None:
    found = None
    for match in pattern.finditer(text):
        found = match[1] if pattern.groups else match[0]
        if cut and match.end() == len(text):
            return None
    return (found or "").strip() or None


@dataclass(frozen=True)
class SampleRun:
    """What all prompts of a run share.

    Attributes:
        config: The settings of the draws.
        loop: A `ForkDecoding` for a tree per prompt, or a `SiblingDecoding` for samples.
        prompts: Number of prompts in all.
        vote: How leaves count.
        eta: Share of leaves that vote, in percent.
        chat: Whether prompts are written in the chat template, with the system prompt.
        views: How the prompts of members that read their own are made.
    """

    model: Any
    tokenizer: PreTrainedTokenizerBase
    config: GenerationConfig
    loop: TreeLoop
    prompts: int
    extract: Extract
    vote: Vote
    eta: float
    meter: SampleProgress
    chat: bool
    system: str | None
    views: Views

    def __call__(self, prompts: Sequence[Prompt], first: int) -> Iterator[Result | BudgetError]:
        """Draw for a batch; noise streams are keyed by the prompts' numbers in the whole run."""
        budget = self.loop.max_total_tokens
        lengths = encode(self.tokenizer, prompts, self.chat, self.system)["attention_mask"].sum(1).tolist()
        small = [i for i, length in enumerate(lengths) if budget is not None and length >= budget]
        kept = [i for i in range(len(prompts)) if i not in small]
        self.meter.begin(first, len(prompts))
        self.meter.spend(sum(lengths[i] for i in kept))
        found: dict[int, Result] = {}
        trees = self._grow([prompts[i] for i in kept], [first + i for i in kept]) if kept else []
        for i, tree in zip(kept, trees, strict=True):
            found[i] = self._result(prompts[i], lengths[i], tree)
        for i, length in enumerate(lengths):
            if i in found:
                yield found[i]
                continue
            error = BudgetError.of(
                prompts[i].where,
                expected=f"--budget of at least {length + 1}: it has {length} tokens itself",
                got=f"{budget}",
                remedy="Raise the budget or shorten the prompt.",
            )
            assert isinstance(error, BudgetError)
            yield error

    def _grow(self, prompts: Sequence[Prompt], streams: Sequence[int]) -> list[ForkTree]:
        """Trees for some prompts, each from its own noise streams."""
        from proxytune.methods.trees.rounds import grow_in_rounds

        encoded = encode(self.tokenizer, prompts, self.chat, self.system, self.views).to(self.model.device)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", BudgetWarning)  # said of each prompt, see `Result.shortage`
            return grow_in_rounds(
                self.model,
                replace(self.loop, stream_ids=list(streams)),
                **encoded,
                streams=self.prompts,
                generation_config=self.config,
                tokenizer=self.tokenizer,
                stopping_criteria=[self.meter.criterion()],
            )

    def _result(self, prompt: Prompt, length: int, tree: ForkTree) -> Result:
        import numpy as np

        from proxytune.methods.trees.sibling_decoding import SiblingDecoding
        from proxytune.voting.vote import How, Sample, vote

        leaves, weights = list(tree), tree.weights()
        siblings = isinstance(self.loop, SiblingDecoding)
        for leaf in leaves if siblings else ():
            leaf.parent = None  # they share no generated tokens
        texts = [str(self.tokenizer.decode(leaf.along("tokens"), skip_special_tokens=True)) for leaf in leaves]
        answers = [self.extract(t, cut=not leaf.finished) for t, leaf in zip(texts, leaves, strict=True)]
        voters = [
            Sample(a, np.array(leaf.along("confidences")), 1.0 if self.vote == "majority" else w, cut=not leaf.finished)
            for a, leaf, w in zip(answers, leaves, weights, strict=True)
        ]
        how: How = "majority" if self.vote == "weighted" else self.vote
        decode = self.tokenizer.decode
        if not siblings:
            drawing = tree.render(decode)
        else:
            drawing = "\n".join(
                f"{leaf.number}: {len(leaf)} tokens{'' if leaf.finished else ', cut'}, weight {w:.3f}  "
                f"{decode(leaf.tokens)!r}"
                for leaf, w in zip(leaves, weights, strict=True)
            )
        return Result(
            prompt=prompt,
            length=length,
            branches=leaves,
            weights=weights,
            texts=texts,
            answers=answers,
            tally=vote(voters, how, eta=self.eta),
            spent=length + tree.tokens,
            drawing=drawing,
            planned=tree.planned,
            counts=tree.counts,
            shortage=self._shortage(tree) if tree.starved else None,
        )

    def _shortage(self, tree: ForkTree) -> str:
        mean = sum(map(len, tree)) / len(tree)
        return (
            f"{tree.counts}: --budget {self.loop.max_total_tokens} has no room for more of {mean:.0f} tokens, the mean "
            "so far. Raise it, or lower max_new_tokens to what an answer takes."
        )


class SampleProgress:
    """A bar on a terminal's stderr: prompts done, and tokens left, or tokens spent if there is no budget."""

    def __init__(self, budget: int | None, prompts: int, most: int) -> None:
        """Prepare the bar; `most` tokens are the most that a prompt can take."""
        self._whole = None if budget is None else budget * prompts
        self._prompts, self._most = prompts, most
        self._spent = 0
        self._first, self._size, self._before = 0, 1, 0  # the batch, and what was spent before it
        self._bar = terminal.Bar("prompts", left="at most")

    def begin(self, first: int, size: int) -> None:
        """Begin a batch of `size` prompts, which starts at prompt number `first`."""
        self._first, self._size, self._before = first, size, self._spent
        self.spend(0)

    def _said(self) -> str:
        return f"{self._spent} tokens" if self._whole is None else f"{self._whole - self._spent} tokens left"

    def spend(self, tokens: int) -> None:
        """Count tokens."""
        self._spent += tokens
        # The batch is done when its texts are, whatever they took: until then, less than the whole of it.
        part = min(0.99, (self._spent - self._before) / (self._size * self._most))
        self._bar.show(self._said(), self._first, self._prompts, underway=part * self._size)

    def criterion(self) -> Any:
        """A stopping criterion that never stops, and counts one token per row and step."""
        import torch
        from transformers import StoppingCriteria

        meter = self

        class Counting(StoppingCriteria):
            def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
                meter.spend(input_ids.shape[0])
                return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)

        return Counting()

    def pause(self) -> None:
        """Hide the bar, so that something can be printed."""
        self._bar.pause()

    def go_on(self) -> None:
        """Show the bar."""
        self._bar.go_on()

    def __enter__(self) -> SampleProgress:
        self.go_on()
        return self

    def __exit__(self, *_: object) -> None:
        self.pause()
