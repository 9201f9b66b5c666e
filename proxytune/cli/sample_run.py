"""`proxytune sample` for one batch of prompts: trees or samples, their answers, and the vote."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, Protocol

from proxytune.cli import terminal
from proxytune.cli.models import encode
from proxytune.errors import BudgetError, InputError

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedTokenizerBase

    from proxytune.methods.trees.loop import TreeLoop
    from proxytune.methods.trees.sibling_decoding import SiblingDecoding
    from proxytune.methods.trees.tree import Branch, ForkTree
    from proxytune.voting.vote import Tally

__all__ = ["Result", "SampleProgress", "SampleRun", "Vote", "extractor"]

Vote = Literal["majority", "weighted", "confidence", "deepconf"]

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
    """

    prompt: str
    length: int
    branches: list[Branch]
    weights: list[float]
    texts: list[str]
    answers: list[str | None]
    tally: Tally
    spent: int
    drawing: str


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

    def __call__(self, prompts: Sequence[str], first: int, chat: bool) -> Iterator[Result | BudgetError]:
        """Draw for a batch; noise streams are keyed by the prompts' numbers in the whole run."""
        from proxytune.methods.trees.sibling_decoding import SiblingDecoding

        budget = self.loop.max_total_tokens
        encoded = encode(self.tokenizer, prompts, chat)
        lengths = encoded["attention_mask"].sum(1).tolist()
        small = [i for i, length in enumerate(lengths) if budget is not None and length >= budget]
        kept = [i for i in range(len(prompts)) if i not in small]
        self.meter.begin(first, len(prompts))
        self.meter.spend(sum(lengths[i] for i in kept))
        found: dict[int, Result] = {}
        trees = self._grow(self.loop, encoded, kept, [first + i for i in kept]) if kept else []
        for i, tree in zip(kept, trees, strict=True):
            if isinstance(self.loop, SiblingDecoding):
                leaves, weights = self._samples(self.loop, tree, encoded, i, first + i, lengths[i])
                found[i] = self._result(prompts[i], lengths[i], leaves, weights, None)
            else:
                found[i] = self._result(prompts[i], lengths[i], list(tree), tree.weights(), tree)
        for i, length in enumerate(lengths):
            if i in found:
                yield found[i]
                continue
            error = BudgetError.of(
                f"prompt {first + i + 1}",
                expected=f"--budget of at least {length + 1}: it has {length} tokens itself",
                got=f"{budget}",
                remedy="Raise the budget or shorten the prompt.",
            )
            assert isinstance(error, BudgetError)
            yield error

    def _grow(self, loop: TreeLoop, encoded: Any, rows: Sequence[int], streams: Sequence[int]) -> list[ForkTree]:
        """Trees for rows of the batch, each from its own noise stream."""
        import torch

        chosen = torch.tensor(list(rows))
        batch = {name: encoded[name][chosen].to(self.model.device) for name in ("input_ids", "attention_mask")}
        out = self.model.generate(
            **batch,
            generation_config=self.config,
            tokenizer=self.tokenizer,
            custom_generate=replace(loop, stream_ids=list(streams)),
            stopping_criteria=[self.meter.criterion()],
            return_dict_in_generate=True,
        )
        trees: list[ForkTree] = out.trees
        return trees

    def _samples(
        self, loop: SiblingDecoding, tree: ForkTree, encoded: Any, row: int, number: int, length: int
    ) -> tuple[list[Branch], list[float]]:
        """Samples of one prompt, with weights that add up to 1.

        The first round has as many samples as can be finished at full length. What they leave of the budget goes to
        further rounds; each reads the prompt again, and its samples repel only each other. How many samples there are
        then depends on how long the first ones were, which slightly favours answers with short texts, unless the budget
        has room for all.
        """
        from proxytune.stats.importance import normalised

        longest = self.config.max_new_tokens or max(1, int(self.config.max_length) - int(encoded["input_ids"].shape[1]))
        budget, rounds, spent = loop.max_total_tokens, [tree], tree.tokens
        while True:
            missing = loop.siblings - sum(map(len, rounds))
            if budget is None or missing == 0 or budget - length - spent < longest:
                break
            more = replace(loop, siblings=missing, max_total_tokens=budget - spent)
            rounds += self._grow(more, encoded, [row], [number + len(rounds) * self.prompts])
            spent += rounds[-1].tokens
        leaves: list[Branch] = []
        log_weights = []
        for drawn in rounds:
            for leaf in drawn:
                log_weights.append(leaf.log_weight + math.log(len(drawn)))
                # Samples share no generated tokens; they are numbered through all rounds.
                leaf.number, leaf.parent = len(leaves), None
                leaves.append(leaf)
        return leaves, normalised(log_weights)

    def _result(
        self, prompt: str, length: int, leaves: list[Branch], weights: list[float], tree: ForkTree | None
    ) -> Result:
        import numpy as np

        from proxytune.voting.vote import How, Sample, vote

        texts = [str(self.tokenizer.decode(leaf.along("tokens"), skip_special_tokens=True)) for leaf in leaves]
        answers = [self.extract(t, cut=not leaf.finished) for t, leaf in zip(texts, leaves, strict=True)]
        voters = [
            Sample(a, np.array(leaf.along("confidences")), 1.0 if self.vote == "majority" else w, cut=not leaf.finished)
            for a, leaf, w in zip(answers, leaves, weights, strict=True)
        ]
        how: How = "majority" if self.vote == "weighted" else self.vote
        decode = self.tokenizer.decode
        generated = sum(len(leaf.tokens) for leaf in leaves)  # in a tree, each leaf's own tokens
        if tree is not None:
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
            spent=length + generated,
            drawing=drawing,
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
