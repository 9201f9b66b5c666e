"""The two forms on a model: `Parallel`, several samples, and `Sequential`, one text that is made to think on.

Both charge the ledger for the prompt once and for every generated token, and reserve the most that a text can need
before drawing it, so the ledger is never exceeded. Draws are keyed by the seed and the prompt's ids, not by the order
of calls. `Parallel` with 8 samples draws those with 4 first; the first is what `Sequential` writes without extensions.
So levels differ less by chance.
"""

from __future__ import annotations

from typing import Any, Literal

from proxytune.budget.ledger import TokenLedger
from proxytune.errors import InputError
from proxytune.methods.thinking.processor import ThinkingBudgetLogitsProcessor
from proxytune.methods.trees.tree import Branch
from proxytune.search.budgeted_sampler import BudgetedSampler, Extract
from proxytune.validation import Ids, TokenIds, whole
from proxytune.voting.vote import Sample

__all__ = ["Parallel", "Sequential"]


class Parallel:
    """Independent samples of one prompt, for a vote; `level` is their number.

    If the ledger has no room for all samples, as many are drawn as can be finished for certain, and at least one, which
    may be cut. Their number then depends on how long the first ones were, which slightly favours answers with short
    texts.
    """

    form: Literal["parallel"] = "parallel"

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        extract: Extract,
        *,
        samples: int,
        max_new_tokens: int,
        batch_size: int = 32,
        seed: int = 0,
        name: str | None = None,
        **generation: Any,
    ) -> None:
        """Check the settings; nothing is drawn.

        Args:
            model: A composed model, or a plain causal LM.
            tokenizer: Its tokenizer.
            extract: From a generated text, without special tokens, to its answer; None for no answer.
            samples: How many, at least 1.
            max_new_tokens: The longest sample, at least 1.
            batch_size: Most samples drawn at once.
            seed: Key of all draws, 64 bits.
            name: None for "parallel-" and the number of samples.
            **generation: Further arguments of `generate()`, e.g. temperature, top_p or stop_strings; the rest keep its
                defaults (top_k=50).

        Raises:
            InputError: If a setting is out of range, or `generation` holds an argument that the policy sets itself.
        """
        self.level = whole("samples", samples, "of samples", least=1)
        self.name = f"parallel-{samples}" if name is None else name
        self._batch_size = whole("batch_size", batch_size, "of samples", least=1)
        self._writer = BudgetedSampler(
            model, tokenizer, extract, max_new_tokens, seed, {"do_sample": True} | generation
        )
        if not self._writer.generation["do_sample"] and samples > 1:
            raise InputError.of(
                "do_sample",
                expected=f"True, with samples={samples}",
                got="False, which makes all of them the same",
                remedy="Leave it out, or take samples=1.",
            )

    def draw(self, task: str | Ids, ledger: TokenLedger) -> list[Branch]:
        """Draw the samples, one branch each, with log-probabilities, entropies and confidences.

        Raises:
            BudgetError: If the ledger has no room for the prompt and one token.
            InputError: If the prompt is empty, or neither a text nor token ids.
        """
        ids, longest = self._writer.pay(task, ledger), self._writer.max_new_tokens
        out: list[Branch] = []
        while len(out) < self.level:
            count, room = min(self.level - len(out), self._batch_size, ledger.left // longest), longest
            if not count:
                if out:
                    break
                count, room = 1, ledger.left
            streams = range(len(out), len(out) + count)
            out += self._writer.write(ids, streams, room, ledger, self.name)
        return out

    def __call__(self, task: str | Ids, ledger: TokenLedger) -> list[Sample]:
        """Draw the samples, and extract their answers.

        Raises:
            BudgetError: If the ledger has no room for one token.
            InputError: If `extract` raises, or the task is no prompt.
        """
        return [self._writer.sample(branch) for branch in self.draw(task, ledger)]


class Sequential:
    """One text whose end of thinking is put off n times (s1, arXiv 2501.19393); the answer is that of the whole text.

    If the text holds several answers, `extract` has to take the last. If the ledger has less room than
    `max_new_tokens`, the text is cut there. `level` is n.
    """

    form: Literal["sequential"] = "sequential"

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        extract: Extract,
        *,
        extra: int,
        end_ids: TokenIds,
        max_new_tokens: int,
        continuation_ids: TokenIds | None = None,
        begin_ids: TokenIds | None = None,
        max_thinking_tokens: int | None = None,
        seed: int = 0,
        name: str | None = None,
        **generation: Any,
    ) -> None:
        """Check the settings; nothing is drawn.

        Args:
            model: A composed model, or a plain causal LM.
            tokenizer: Its tokenizer.
            extract: From the generated text, without special tokens, to its answer; None for no answer.
            extra: How often the end of thinking is put off, at least 0.
            end_ids: What ends thinking; for a model without thinking tags, what ends its text.
            max_new_tokens: The longest text, at least 1.
            continuation_ids: What replaces a suppressed end, e.g. the ids of "Wait"; required if `extra` > 0.
            begin_ids: What begins thinking; None if it begins with the generated text.
            max_thinking_tokens: Length of thinking after which its end is forced; None for no cap.
            seed: Key of all draws, 64 bits.
            name: None for "sequential-" and the number of extensions.
            **generation: Further arguments of `generate()`; greedy, unless do_sample=True is among them.

        Raises:
            InputError: If a setting is out of range, or `generation` holds an argument that the policy sets itself.
        """
        self.level = whole("extra", extra, "of extensions")
        self.name = f"sequential-{extra}" if name is None else name
        self._writer = BudgetedSampler(
            model, tokenizer, extract, max_new_tokens, seed, {"do_sample": False} | generation
        )
        config = generation.get("generation_config")
        ends = None if config is None else config.eos_token_id
        # generate() takes what this configuration leaves out from the model's.
        ends = generation.get("eos_token_id", model.generation_config.eos_token_id if ends is None else ends)
        self._thinking: dict[str, Any] = {
            "end_ids": end_ids,
            "extra": self.level,
            "continuation_ids": continuation_ids,
            "begin_ids": begin_ids,
            "max_thinking_tokens": max_thinking_tokens,
            "eos_token_id": ends,
            "tokenizer": tokenizer,
        }
        ThinkingBudgetLogitsProcessor(prompt_length=0, **self._thinking)

    def draw(self, task: str | Ids, ledger: TokenLedger) -> list[Branch]:
        """Write the text, as one branch; `BudgetError` and `InputError` as in `Parallel.draw`."""
        ids = self._writer.pay(task, ledger)
        # With begin_ids, thinking may have begun in the prompt; its cap counts from there.
        length = None if self._thinking["begin_ids"] is not None else len(ids)
        budget = ThinkingBudgetLogitsProcessor(prompt_length=length, **self._thinking)
        room = min(self._writer.max_new_tokens, ledger.left)
        return self._writer.write(ids, [0], room, ledger, self.name, budget)

    def __call__(self, task: str | Ids, ledger: TokenLedger) -> list[Sample]:
        """Write the text, and extract its answer: one sample.

        Raises:
            BudgetError: If the ledger has no room for one token.
            InputError: If `extract` raises, or the task is no prompt.
        """
        return [self._writer.sample(branch) for branch in self.draw(task, ledger)]
