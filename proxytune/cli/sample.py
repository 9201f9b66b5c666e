"""`proxytune sample`: several continuations of each prompt within a token budget, and a vote over the answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from proxytune.cli import terminal
from proxytune.cli.models import check_members, load
from proxytune.cli.options import Alpha, Antiexpert, Base, Chat, Device, Dtype, Expert, PromptFile, RecipePath
from proxytune.cli.prompts import check_names, merged_settings, read_prompts, refuse_empty, split_arguments
from proxytune.cli.sample_run import Result, SampleProgress, SampleRun, Vote, extractor
from proxytune.errors import BudgetError, InputError

if TYPE_CHECKING:
    from transformers import GenerationConfig

    from proxytune.recipe import Recipe

__all__ = ["sample"]


_MAX_NEW_TOKENS = 256
_FAILED = 1


def sample(
    context: typer.Context,
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
        bool, typer.Option("--forks/--no-forks", help="A tree that branches at forks, or independent samples.")
    ] = True,
    branches: Annotated[int, typer.Option(min=1, help="Most leaves of a tree, or number of samples.")] = 8,
    children: Annotated[int, typer.Option(min=2, help="Most children of a fork.")] = 2,
    min_gap: Annotated[int, typer.Option(min=1, help="Least distance between two forks, in tokens.")] = 1,
    where: Annotated[Literal["forks", "random", "start"], typer.Option(help="Where a tree forks.")] = "forks",
    threshold: Annotated[
        float | None, typer.Option(help="Entropy of a fork, in nats (default: the recipe's, see calibrate).")
    ] = None,
    repulsion: Annotated[
        float, typer.Option(help="With --no-forks: nats taken off a token at a fork for each sample that chose it.")
    ] = 0.0,
    ngram: Annotated[
        int | None, typer.Option(min=2, help="With --no-forks: samples repel each other's n-grams at forks too.")
    ] = None,
    budget: Annotated[
        int | None, typer.Option(min=1, help="Most tokens per prompt, its own included (default: no limit).")
    ] = None,
    vote: Annotated[
        Vote, typer.Option(help="How leaves count: equally, by weight, or by weight and confidence.")
    ] = "weighted",
    eta: Annotated[float, typer.Option(help="deepconf: share of leaves that vote, in percent.")] = 90.0,
    answer: Annotated[
        str | None,
        typer.Option(
            metavar="REGEX", help='The answer: last match, group 1 (default: "The answer is …", else the last number).'
        ),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts per batch.")] = 4,
    seed: Annotated[int, typer.Option(help="Seed of all draws.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="JSON lines instead of text.")] = False,
    device: Device = None,
    dtype: Dtype = "auto",
) -> None:
    """Draw several continuations of each prompt within a token budget, and vote over their answers.

    With forks, branches share a prefix and part where the entropy is above the threshold; their weights correct for
    that. Without, the prompt is read once for all samples. These are independent, or repel each other where the entropy
    is above the threshold, which their weights correct for too. A text that was cut off has an answer only if it
    finished it. If the budget has no room for a prompt, that is reported, and the exit code is 1.
    """
    prompts, flags = split_arguments(arguments or [])
    check_members(base, expert, antiexpert, recipe)
    extract = extractor(answer)
    if not 0 < eta <= 100:
        raise InputError.of("--eta", expected="a percentage in (0, 100]", got=f"{eta:g}", remedy="Pass e.g. 90.")
    terminal.quiet()
    check_names(flags)  # first: a prompt that was read as a setting leaves nothing but to wait for stdin
    settings = (arguments or [])[len(prompts) :]
    prompts += read_prompts(file, prompts_given=bool(prompts), settings=settings)
    refuse_empty(prompts)

    from proxytune.methods.trees.fork_decoding import ForkDecoding
    from proxytune.methods.trees.loop import TreeLoop
    from proxytune.methods.trees.sibling_decoding import SiblingDecoding

    # Errors in these settings show before the models are loaded.
    repels = repulsion != 0 or ngram is not None
    _refuse_without_effect(context, forks=forks, repels=repels)
    needed = where == "forks" and (forks or repels)
    nats = _threshold(threshold, recipe, alpha, forks=forks) if needed else None
    loop: TreeLoop
    if forks:
        _refuse_repulsion(repulsion, ngram)
        loop = ForkDecoding(
            threshold=nats,
            branches=branches,
            children=children,
            min_gap=min_gap,
            where=where,
            max_total_tokens=budget,
            seed=seed,
        )
    else:
        loop = SiblingDecoding(
            threshold=nats,
            siblings=branches,
            repulsion=repulsion,
            ngram=ngram,
            where=where if repels else "forks",
            max_total_tokens=budget,
            seed=seed,
        )
    model, tokenizer = load(base, expert, antiexpert, alpha, recipe, device, dtype, chat=chat)
    config = _settings(model.generation_config, flags, forks=forks)

    failed = False
    most = branches * int(config.max_new_tokens or config.max_length) if budget is None else budget
    with SampleProgress(budget, len(prompts), most) as meter:
        run = SampleRun(model, tokenizer, config, loop, len(prompts), extract, vote, eta, meter)
        for first in range(0, len(prompts), batch_size):
            batch = prompts[first : first + batch_size]
            for prompt, result in zip(batch, run(batch, first, chat), strict=True):
                failed |= isinstance(result, BudgetError)
                meter.pause()
                _show(prompt, result, budget, vote, as_json=as_json)
                if not isinstance(result, BudgetError) and result.shortage:
                    terminal.show_note(result.shortage)
                meter.go_on()
    if failed:
        raise typer.Exit(_FAILED)


def _refuse_without_effect(context: typer.Context, *, forks: bool, repels: bool) -> None:
    """Refuse options given on the command line that would have no effect."""
    unused = {} if forks else {"children": "--forks", "min_gap": "--forks"}
    if not forks and not repels:
        unused["where"] = "--forks, or samples that repel each other"
    for name, needed in unused.items():
        source = context.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            raise InputError.of(
                f"--{name.replace('_', '-')}",
                expected=f"{needed} with it",
                got="--no-forks" if repels else "--no-forks, without --repulsion and --ngram",
                remedy="Leave it out: it would change nothing.",
            )


def _refuse_repulsion(repulsion: float, ngram: int | None) -> None:
    """Refuse repulsion between the branches of a tree."""
    for name, given in (("--repulsion", repulsion or None), ("--ngram", ngram)):
        if given is not None:
            raise InputError.of(
                name,
                expected="--no-forks with it",
                got=f"{given:g}, with --forks",
                remedy="The children of a fork are drawn without replacement: no two of them choose the same token.",
            )


def _threshold(given: float | None, recipe: Path | None, alpha: float | None, *, forks: bool) -> Any:
    """The given threshold, or the recipe's calibrated one."""
    from proxytune.methods.forks.threshold import ForkThreshold
    from proxytune.recipe import Recipe

    if given is not None:
        return given
    read: Recipe | None = None if recipe is None else Recipe.load(recipe)
    if read is None or read.fork_threshold is None:
        raise InputError.of(
            "--threshold",
            expected="an entropy in nats, or a recipe that was calibrated",
            got="no recipe" if read is None else f"{recipe}, which was not calibrated",
            remedy="Find one with `proxytune calibrate`, which --write puts into the recipe; or pass "
            + ("--no-forks." if forks else "--repulsion 0 without --ngram."),
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
    """The generation settings: sampling, unless told otherwise."""
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
        f"texts   {result.counts}",
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
        # A list, since null (no answer) cannot be the key of a JSON object.
        "shares": [{"answer": a, "share": share, "leaves": tally.counts[a]} for a, share in tally.shares.items()],
        "note": "; ".join(note for note in (tally.note, result.shortage) if note),
        "budget": budget,
        "spent": result.spent,
        "prompt_tokens": result.length,
        "planned": result.planned,
        "ran": len(result.branches),
        "cut": sum(not leaf.finished for leaf in result.branches),
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
