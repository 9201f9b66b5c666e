"""`proxytune sample`: several continuations of each prompt under a budget of tokens, and a vote over the answers."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from proxytune.cli import terminal
from proxytune.cli.generate import _check_members, _encode, _load
from proxytune.cli.inputs import check_names, merged_settings, read_prompts, refuse_empty, split_arguments
from proxytune.cli.options import Alpha, Antiexpert, Base, Chat, Device, Dtype, Expert, PromptFile, RecipePath
from proxytune.errors import BudgetError, InputError

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedTokenizerBase

    from proxytune.decoding.forks import ForkDecoding
    from proxytune.decoding.tree import Branch, ForkTree
    from proxytune.recipe import Recipe
    from proxytune.voting import Tally

__all__ = ["Result", "extractor", "sample"]

Vote = Literal["majority", "weighted", "confidence", "deepconf"]

_MAX_NEW_TOKENS = 256
_STATED = re.compile(r"The answer is[:\s]*([^\n]+?)\s*(?=\.(?:\s|$)|\n|$)")
_NUMBER = re.compile(r"(?<![\w.])-?\d+(?:,\d{3})*(?:\.\d+)?")
_FAILED = 1


@dataclass(frozen=True)
class Result:
    """What was drawn for one prompt.

    Attributes:
        prompt: As it was given.
        length: Its tokens.
        branches: The leaves of its tree, or the samples.
        weights: Of each, adding up to 1.
        texts: Of each, without special tokens.
        answers: Of each; None for no answer.
        tally: The vote over them.
        spent: Tokens of the budget: the prompt and all that was generated, shared tokens once.
        drawing: In text.
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


def sample(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[PROMPT]... [KEY=VALUE]...",
            help="Prompts, then settings of GenerationConfig, e.g. max_new_tokens=64 temperature=0.7.",
            show_default=False,
        ),
    ] = None,
    base: Base = None,
    expert: Expert = None,
    antiexpert: Antiexpert = None,
    alpha: Alpha = None,
    recipe: RecipePath = None,
    file: PromptFile = None,
    chat: Chat = False,
    forks: Annotated[
        bool, typer.Option("--forks/--no-forks", help="A tree that parts at forks, or independent samples.")
    ] = True,
    branches: Annotated[int, typer.Option(min=1, help="The most leaves of a tree, or samples.")] = 8,
    children: Annotated[int, typer.Option(min=2, help="The most children of a fork.")] = 2,
    min_gap: Annotated[int, typer.Option(min=1, help="The least distance between two forks, in tokens.")] = 1,
    where: Annotated[Literal["forks", "random", "start"], typer.Option(help="Where a tree forks.")] = "forks",
    threshold: Annotated[
        float | None, typer.Option(help="Entropy of a fork, in nats [the recipe's, see calibrate].")
    ] = None,
    budget: Annotated[
        int | None, typer.Option(min=1, help="Tokens per prompt at most, its own included [no limit].")
    ] = None,
    vote: Annotated[
        Vote, typer.Option(help="Leaves count alike, by their weights, or by weight and confidence.")
    ] = "weighted",
    eta: Annotated[float, typer.Option(help="deepconf: the share of leaves that vote, in percent.")] = 90.0,
    answer: Annotated[
        str | None,
        typer.Option(
            metavar="REGEX", help='The answer: last match, group 1 ["The answer is …", else the last number].'
        ),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts per batch.")] = 4,
    seed: Annotated[int, typer.Option(help="Seed of all draws.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="JSON lines instead of drawings.")] = False,
    device: Device = None,
    dtype: Dtype = "auto",
) -> None:
    """Draw several continuations of each prompt under a budget of tokens, and vote over their answers.

    With forks, branches share what they have in common, and part where the entropy is above the threshold; their
    weights make up for that. A prompt that the budget has no room for is reported, and the exit code is 1 then.
    """
    prompts, flags = split_arguments(arguments or [])
    _check_members(base, expert, antiexpert, recipe)
    extract = extractor(answer)
    if not 0 < eta <= 100:
        raise InputError.of("--eta", expected="a percentage in (0, 100]", got=f"{eta:g}", remedy="Pass e.g. 90.")
    prompts += read_prompts(file, prompts_given=bool(prompts))
    refuse_empty(prompts)
    terminal.quiet()
    check_names(flags)

    from proxytune.decoding.forks import ForkDecoding

    nats = _threshold(threshold, recipe, alpha) if forks and where == "forks" else None
    settings: dict[str, Any] = {"seed": seed, "max_total_tokens": budget}
    if forks:
        settings |= {"branches": branches, "children": children, "min_gap": min_gap, "where": where, "threshold": nats}
    else:
        settings |= {"branches": 1, "where": "start"}  # a tree of one branch is a sample, with its records
    ForkDecoding(**settings)  # refused here if something is out of its range, before the models are loaded
    model, tokenizer = _load(base, expert, antiexpert, alpha, recipe, device, dtype)
    config = _settings(model.generation_config, flags, forks=forks)

    failed = False
    with _Meter(budget, len(prompts)) as meter:
        run = _Run(model, tokenizer, config, settings, None if forks else branches, extract, vote, eta, meter)
        for first in range(0, len(prompts), batch_size):
            batch = prompts[first : first + batch_size]
            for prompt, result in zip(batch, run(batch, first, chat), strict=True):
                failed |= isinstance(result, BudgetError)
                meter.pause()
                _show(prompt, result, budget, vote, as_json=as_json)
                meter.go_on()
    if failed:
        raise typer.Exit(_FAILED)


def extractor(pattern: str | None) -> Callable[[str], str | None]:
    """What finds the answer in a text.

    Args:
        pattern: A regular expression, of which the last match counts: its first group if it has one, else all of it.
            None for what follows "The answer is" up to the end of the sentence, else the last number.

    Returns:
        A function from a text to its answer; None where there is none.

    Raises:
        InputError: If it is no regular expression.
    """
    if pattern is None:
        return _usual_answer
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise InputError.of(
            "--answer", expected="a regular expression", got=repr(pattern), remedy=f"Python says: {error}."
        ) from None
    return lambda text: _last(compiled, text)


def _usual_answer(text: str) -> str | None:
    stated = _last(_STATED, text)
    if stated is not None:
        return stated
    number = _last(_NUMBER, text)
    return None if number is None else number.replace(",", "")


def _last(pattern: re.Pattern[str], text: str) -> str | None:
    found = None
    for match in pattern.finditer(text):
        found = match[1] if pattern.groups else match[0]
    return (found or "").strip() or None


def _threshold(given: float | None, recipe: Path | None, alpha: float | None) -> Any:
    """The threshold of the call, or what the recipe was calibrated to."""
    from proxytune.entropy import ForkThreshold
    from proxytune.recipe import Recipe

    if given is not None:
        return given
    read: Recipe | None = None if recipe is None else Recipe.load(recipe)
    if read is None or read.fork_threshold is None:
        raise InputError.of(
            "--threshold",
            expected="an entropy in nats, or a recipe that was calibrated",
            got="neither",
            remedy="Find one with `proxytune calibrate`, which --write puts into the recipe; or pass --no-forks.",
        )
    used = read.alpha if alpha is None else alpha
    if read.fork_threshold.alpha not in (None, used):
        raise InputError.of(
            "--alpha",
            expected=f"{read.fork_threshold.alpha:g}, at which the recipe's threshold was calibrated",
            got=f"{used:g}",
            remedy="Calibrate at this α, or pass --threshold.",
        )
    return ForkThreshold.of(read.fork_threshold)


def _settings(defaults: GenerationConfig, flags: dict[str, Any], *, forks: bool) -> GenerationConfig:
    """The settings of the draws: sampling, unless told otherwise."""
    usual: dict[str, Any] = {"do_sample": True}
    if not {"max_new_tokens", "max_length"} & flags.keys():
        usual["max_new_tokens"] = _MAX_NEW_TOKENS
    config = merged_settings(defaults, usual | flags)
    if config.num_return_sequences not in (None, 1):
        raise InputError.of(
            "num_return_sequences", expected="--branches", got=f"{config.num_return_sequences}", remedy="Use that."
        )
    if not forks and not config.do_sample:
        raise InputError.of(
            "--no-forks", expected="sampling", got="do_sample=false", remedy="Greedy samples are all the same one."
        )
    return config


@dataclass(frozen=True)
class _Run:
    """All that the prompts have in common."""

    model: Any
    tokenizer: PreTrainedTokenizerBase
    config: GenerationConfig
    settings: dict[str, Any]
    samples: int | None
    extract: Callable[[str], str | None]
    vote: Vote
    eta: float
    meter: _Meter

    def __call__(self, prompts: Sequence[str], first: int, chat: bool) -> Iterator[Result | BudgetError]:
        """Draw for a batch; the streams of the seed go by the prompts' numbers in the whole call."""
        budget = self.settings["max_total_tokens"]
        encoded = _encode(self.tokenizer, prompts, chat)
        lengths = encoded["attention_mask"].sum(1).tolist()
        small = [i for i, length in enumerate(lengths) if budget is not None and length >= budget]
        kept = [i for i in range(len(prompts)) if i not in small]
        self.meter.spend(sum(lengths[i] for i in kept))
        found: dict[int, Result] = {}
        if self.samples is None:
            trees = self._grow(encoded, kept, [first + i for i in kept], budget) if kept else []
            for i, tree in zip(kept, trees, strict=True):
                found[i] = self._result(prompts[i], lengths[i], list(tree), tree.weights(), tree)
        else:
            for i in kept:
                leaves = self._samples(encoded, i, first + i, lengths[i], budget)
                found[i] = self._result(prompts[i], lengths[i], leaves, [1 / len(leaves)] * len(leaves), None)
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

    def _grow(
        self, encoded: Any, rows: Sequence[int], streams: Sequence[int], budget: int | None, **more: Any
    ) -> list[ForkTree]:
        """Trees for rows of the batch, some of them perhaps several times."""
        import torch

        from proxytune.decoding.forks import ForkDecoding

        loop: ForkDecoding = ForkDecoding(**self.settings | {"rows": list(streams), "max_total_tokens": budget})
        chosen = torch.tensor(list(rows))
        batch = {name: encoded[name][chosen].to(self.model.device) for name in ("input_ids", "attention_mask")}
        out = self.model.generate(
            **batch,
            generation_config=self.config,
            tokenizer=self.tokenizer,
            custom_generate=loop,
            stopping_criteria=[self.meter.criterion()],
            return_dict_in_generate=True,
            **more,
        )
        trees: list[ForkTree] = out.trees
        return trees

    def _samples(self, encoded: Any, row: int, number: int, length: int, budget: int | None) -> list[Branch]:
        """Independent samples of one prompt, which is paid for once; as many as can be finished, at least one."""
        assert self.samples is not None
        from proxytune.budget import TokenLedger

        longest = self.config.max_new_tokens or max(1, int(self.config.max_length) - int(encoded["input_ids"].shape[1]))
        ledger = None if budget is None else TokenLedger(budget)
        if ledger is not None:
            ledger.charge(length, label="prompt")
        leaves: list[Branch] = []
        while len(leaves) < self.samples:
            count = self.samples - len(leaves)
            more: dict[str, Any] = {}
            if ledger is not None:
                count = min(count, ledger.left // longest)
                if count == 0:
                    if leaves or ledger.left == 0:
                        break
                    count, more = 1, {"max_new_tokens": ledger.left}
            streams = [number * self.samples + len(leaves) + i for i in range(count)]
            drawn = [tree.branches[0] for tree in self._grow(encoded, [row] * count, streams, None, **more)]
            for branch in drawn:
                if ledger is not None:
                    ledger.charge(len(branch))
                branch.number = len(leaves)
                leaves.append(branch)
        return leaves

    def _result(
        self, prompt: str, length: int, leaves: list[Branch], weights: list[float], tree: ForkTree | None
    ) -> Result:
        import numpy as np

        from proxytune.voting import How, Sample, vote

        texts = [str(self.tokenizer.decode(leaf.along("tokens"), skip_special_tokens=True)) for leaf in leaves]
        answers = [self.extract(text) for text in texts]
        voters = [
            Sample(a, np.array(leaf.along("confidences")), 1.0 if self.vote == "majority" else w)
            for a, leaf, w in zip(answers, leaves, weights, strict=True)
        ]
        how: How = "majority" if self.vote == "weighted" else self.vote
        decode = self.tokenizer.decode
        generated = sum(len(leaf.tokens) for leaf in leaves)  # of a tree, each leaf's own
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


class _Meter:
    """A bar on stderr, where a person sees it: the tokens that are left, or spent where there is no budget."""

    def __init__(self, budget: int | None, prompts: int) -> None:
        from rich.progress import BarColumn, Progress, TextColumn

        self._whole = None if budget is None else budget * prompts
        self._spent = 0
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            console=terminal.errors(),
            transient=True,
            disable=not terminal.is_terminal(sys.stderr),
        )
        self._task = self._bar.add_task(self._said(), total=self._whole)

    def _said(self) -> str:
        return f"{self._spent} tokens" if self._whole is None else f"{self._whole - self._spent} tokens left"

    def spend(self, tokens: int) -> None:
        """Count tokens."""
        self._spent += tokens
        self._bar.update(self._task, completed=self._spent, description=self._said())

    def criterion(self) -> Any:
        """A stopping criterion that never stops, and counts the rows of each step."""
        import torch
        from transformers import StoppingCriteria

        meter = self

        class Counting(StoppingCriteria):
            def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
                meter.spend(input_ids.shape[0])
                return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)

        return Counting()

    def pause(self) -> None:
        """Take the bar away, so that something can be printed."""
        if not self._bar.disable:
            self._bar.stop()

    def go_on(self) -> None:
        """Show the bar."""
        self._bar.start()

    def __enter__(self) -> _Meter:
        self.go_on()
        return self

    def __exit__(self, *_: object) -> None:
        self.pause()


def _show(prompt: str, result: Result | BudgetError, budget: int | None, vote: Vote, *, as_json: bool) -> None:
    if isinstance(result, BudgetError):
        terminal.show_error(str(result))
        if as_json:
            typer.echo(json.dumps({"prompt": prompt, "error": str(result)}, ensure_ascii=False))
        return
    if as_json:
        typer.echo(json.dumps(_record(result, budget, vote), ensure_ascii=False))
        return
    tally = result.tally
    of = "" if budget is None else f" of {budget}"
    shares = ", ".join(f"{_named(a)} {share:.3f} ({tally.counts[a]})" for a, share in tally.shares.items())
    lines = [
        *result.drawing.splitlines(),
        f"answer  {_named(tally.winner)}",
        f"shares  {shares} by {vote}",
        f"tokens  {result.spent}{of} ({result.length} of the prompt)",
    ]
    if tally.note:
        lines.append(f"note    {tally.note}")
    console = terminal.output()
    console.print(terminal.safe(prompt), style="dim", soft_wrap=True)
    for line in lines:
        console.print(terminal.safe(line), soft_wrap=True)


def _named(answer: object) -> str:
    return "no answer" if answer is None else str(answer)


def _record(result: Result, budget: int | None, vote: Vote) -> dict[str, Any]:
    tally = result.tally
    return {
        "prompt": result.prompt,
        "answer": tally.winner,
        "share": tally.share,
        "vote": vote,
        # A list, since a JSON object has no key for "no answer", which is null here.
        "shares": [{"answer": a, "share": share, "leaves": tally.counts[a]} for a, share in tally.shares.items()],
        "note": tally.note,
        "budget": budget,
        "spent": result.spent,
        "prompt_tokens": result.length,
        "leaves": [
            {
                "text": text,
                "answer": answer,
                "weight": weight,
                "parent": None if leaf.parent is None else leaf.parent.number,
                "start": leaf.start,
                "entropy": leaf.entropies[0] if leaf.parent is not None else None,
                "tokens": len(leaf),
                "finished": leaf.finished,
            }
            for leaf, text, answer, weight in zip(
                result.branches, result.texts, result.answers, result.weights, strict=True
            )
        ],
    }
