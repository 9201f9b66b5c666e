"""`proxytune sample`: several continuations of each prompt within a token budget, and a vote over the answers."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from proxytune.cli import terminal
from proxytune.cli.models import check_end_tokens, check_members, chosen_device, load, named
from proxytune.cli.options import (
    METAVAR,
    OUTPUT,
    PROMPTS,
    Alpha,
    Antiexpert,
    Base,
    Chat,
    Device,
    Dtype,
    EndTokensOption,
    Expert,
    Out,
    Overwrite,
    PromptFile,
    RecipePath,
    Resume,
    System,
    Trust,
    Vote,
    given,
)
from proxytune.cli.prompts import Prompt, check_prompts, read_prompts
from proxytune.cli.settings import SETTINGS_PANEL, check_settings, merged_settings, resolved, split_arguments
from proxytune.errors import BudgetError, InputError

if TYPE_CHECKING:
    from transformers import GenerationConfig

    from proxytune.cli.sample_run import Result
    from proxytune.models.model import ProxyTunedModel
    from proxytune.recipe import Recipe

__all__ = ["sample"]

_MAX_NEW_TOKENS = 256
_FAILED = 1
_TEXTS, _VOTE = "Samples", "Vote"
# The keys of a line of the output, besides those of its prompt.
_OWN_KEYS = (
    *("answer", "share", "vote", "shares", "note", "budget", "spent", "prompt_tokens", "planned", "ran", "cut"),
    *("leaves", "error"),
)


def sample(
    context: typer.Context,
    arguments: Annotated[
        list[str] | None,
        typer.Argument(
            metavar=METAVAR,
            help="Prompts, each in quotes; then settings of transformers' GenerationConfig, also those that are no "
            "options below, e.g. renormalize_logits=true.",
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
    system: System = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts per batch.", rich_help_panel=PROMPTS)] = 4,
    forks: Annotated[
        bool,
        typer.Option(
            "--forks/--no-forks",
            help="The branches of a tree that parts at forks, or samples on their own.",
            rich_help_panel=_TEXTS,
        ),
    ] = True,
    branches: Annotated[
        int, typer.Option(min=1, help="Texts per prompt; of a tree, at most so many.", rich_help_panel=_TEXTS)
    ] = 8,
    children: Annotated[int, typer.Option(min=2, help="Most children of a fork.", rich_help_panel=_TEXTS)] = 2,
    min_gap: Annotated[
        int, typer.Option(min=1, help="Least distance between two forks, in tokens.", rich_help_panel=_TEXTS)
    ] = 1,
    where: Annotated[
        Literal["forks", "random", "start"],
        typer.Option(
            help="Where a tree forks: at forks, at random tokens, or at the first token.",
            rich_help_panel=_TEXTS,
        ),
    ] = "forks",
    threshold: Annotated[
        float | None,
        typer.Option(
            help="Entropy above which a token is a fork, in nats (default: the recipe's, from `calibrate --write`).",
            rich_help_panel=_TEXTS,
        ),
    ] = None,
    repulsion: Annotated[
        float,
        typer.Option(
            help="With --no-forks: nats taken off a token at a fork for each sample that chose it.",
            rich_help_panel=_TEXTS,
        ),
    ] = 0.0,
    ngram: Annotated[
        int | None,
        typer.Option(
            min=2, help="With --no-forks: samples repel each other's n-grams at forks too.", rich_help_panel=_TEXTS
        ),
    ] = None,
    budget: Annotated[
        int | None,
        typer.Option(
            min=1, help="Most tokens per prompt, its own included (default: no limit).", rich_help_panel=_TEXTS
        ),
    ] = None,
    vote: Annotated[
        Vote,
        typer.Option(
            help="How texts count: majority, equally; weighted, by weight; confidence, by weight and confidence; "
            "deepconf, so too, but the most confident alone.",
            rich_help_panel=_VOTE,
        ),
    ] = "weighted",
    eta: Annotated[
        float, typer.Option(help="With --vote deepconf: how many of the texts vote, in percent.", rich_help_panel=_VOTE)
    ] = 90.0,
    answer: Annotated[
        str | None,
        typer.Option(
            metavar="REGEX",
            help="How to find the answer in a text: the last match, and of it group 1 (default: what follows "
            '"The answer is", else the last number).',
            rich_help_panel=_VOTE,
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of all draws.", rich_help_panel=SETTINGS_PANEL)] = 0,
    out: Out = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="JSON lines instead of text.", rich_help_panel=OUTPUT)
    ] = False,
    device: Device = None,
    dtype: Dtype = "auto",
    end_tokens: EndTokensOption = None,
    trust: Trust = None,
) -> None:
    """Draw several texts for each prompt, within a budget of tokens, and vote over their answers.

    For example: proxytune sample --recipe FOLDER --chat --no-forks --branches 8 --vote majority "What is 17 + 7?"

    With --no-forks the texts are independent samples. Otherwise they are the branches of a tree: they share their
    beginning and part at forks, the tokens at which the model is undecided (an entropy above --threshold), and weights
    correct for that. A text that was cut off has an answer only if it finished it. If the budget has no room for a
    prompt, that is reported, and the exit code is 1.
    """
    from proxytune.cli.answer_file import check_out, open_answers

    check_out(out, file, resume=resume, overwrite=overwrite)
    words, flags = split_arguments(arguments or [])
    check_members(base, expert, antiexpert, recipe, words)
    from proxytune.cli.encoding import check_chat, check_lengths, own_prompt_views
    from proxytune.cli.sample_run import Result, SampleProgress, SampleRun, extractor

    extract = extractor(answer)
    if not 0 < eta <= 100:
        raise InputError.of("--eta", expected="a percentage in (0, 100]", got=f"{eta:g}", remedy="Pass e.g. 90.")
    if eta < 1:
        terminal.show_note(
            f"--eta {eta:g} is in percent: at most one leaf of a hundred votes. For a share, pass e.g. 90."
        )
    terminal.quiet()
    # First: a prompt that was read as a setting leaves nothing but to wait for stdin.
    flags = check_settings(flags, [parameter.name or "" for parameter in context.command.params])
    check_end_tokens(end_tokens, flags)
    prompts = read_prompts(file, words, settings=(arguments or [])[len(words) :], reserved=_OWN_KEYS)
    chat = check_prompts(prompts, chat=chat, system=system)

    from proxytune.methods.trees.fork_decoding import ForkDecoding
    from proxytune.methods.trees.loop import TreeLoop
    from proxytune.methods.trees.sibling_decoding import SiblingDecoding

    # Errors in these settings show before the models are loaded.
    repels = repulsion != 0 or ngram is not None
    _refuse_without_effect(context, forks=forks, repels=repels, where=where)
    if vote != "deepconf" and given(context, "eta"):
        raise InputError.of(
            "--eta",
            expected="--vote deepconf with it",
            got=f"--vote {vote}",
            remedy="Leave it out, or change the vote.",
        )
    needed = where == "forks" and (forks or repels)
    nats = _threshold(threshold, recipe, alpha, forks=forks) if needed else None
    if threshold is not None and threshold < 0:
        raise InputError.of(
            "--threshold",
            expected="nats, at least 0, as every entropy is",
            got=f"{threshold:g}",
            remedy="With 0, every token that is not certain is a fork.",
        )
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
    said: dict[str, Any] = {"seed": seed, "batch_size": batch_size, "chat": chat, "system": system}
    said["device"] = chosen_device(device)
    said |= {"dtype": dtype, "recipe": named(base, expert, antiexpert, alpha, recipe, end_tokens), "generation": flags}
    said |= {"forks": forks, "branches": branches, "children": children, "min_gap": min_gap, "where": where}
    said |= {"threshold": getattr(nats, "nats", nats), "repulsion": repulsion, "ngram": ngram, "budget": budget}
    said |= {"vote": vote, "eta": eta, "answer": answer}
    if budget is not None:
        said["prompts"] = len(prompts)  # further rounds draw from the noise streams behind those of all prompts
    # Opened first, so that an error shows before the models are loaded.
    asked = [prompt.line for prompt in prompts]
    with open_answers(out, asked, said, resume=resume, overwrite=overwrite) as answers:
        if answers is not None and answers.finished:
            _exit(answers.failed)
        members = (base, expert, antiexpert, alpha, recipe, device, dtype)
        model, tokenizer = load(*members, chat=chat, end_tokens=end_tokens, trust=trust)
        _refuse_unreachable(nats, model.config.vocab_size)
        if chat:
            check_chat(tokenizer, prompts, system)
        # The model's too: generate() takes from there what is None, also where that was asked for.
        config = model.generation_config = _settings(model, flags, forks=forks)
        views = own_prompt_views(model, tokenizer, prompts, chat, system)
        check_lengths(model, tokenizer, prompts, chat, system, views=views, config=config, budget=budget)
        if answers is not None:
            answers.begin(resolved(config), 1)
        done, failed = (0, False) if answers is None else (answers.done, answers.failed)
        most = branches * int(config.max_new_tokens or config.max_length) if budget is None else budget
        with SampleProgress(budget, len(prompts), most) as meter:
            run = SampleRun(
                model, tokenizer, config, loop, len(prompts), extract, vote, eta, meter, chat, system, views
            )
            # A resumed run keeps the batches of an uninterrupted one: in low precision, padding affects rounding.
            for first in range(done // batch_size * batch_size, len(prompts), batch_size):
                batch = prompts[first : first + batch_size]
                results = list(zip(batch, run(batch, first), strict=True))[max(0, done - first) :]  # not yet written
                meter.pause()
                lines = []
                for prompt, result in results:
                    failed |= isinstance(result, BudgetError)
                    lines.append(_line(prompt, result, budget, vote))
                    if isinstance(result, BudgetError):
                        terminal.show_error(str(result))
                    if answers is None and as_json:
                        typer.echo(lines[-1])
                    elif answers is None and isinstance(result, Result):
                        _show(result, budget, vote)
                    if isinstance(result, Result) and result.shortage:
                        terminal.show_note(result.shortage)
                if answers is not None:
                    answers.append(lines)
                meter.go_on()
    _exit(failed)


def _exit(failed: bool) -> None:
    if failed:
        raise typer.Exit(_FAILED)


def _refuse_without_effect(context: typer.Context, *, forks: bool, repels: bool, where: str) -> None:
    """Refuse options given on the command line that would have no effect."""
    unused = {} if forks else {"children": "--forks", "min_gap": "--forks"}
    if not forks and not repels:
        unused |= dict.fromkeys(("where", "threshold"), "--forks, or samples that repel each other")
    for name, needed in unused.items():
        if given(context, name):
            raise InputError.of(
                f"--{name.replace('_', '-')}",
                expected=f"{needed} with it",
                got="--no-forks" if repels else "--no-forks, without --repulsion and --ngram",
                remedy="Leave it out: it would change nothing.",
            )
    for name in {"forks": (), "random": ("threshold",)}.get(where, ("threshold", "children", "min_gap")):
        if given(context, name):
            raise InputError.of(
                f"--{name.replace('_', '-')}",
                expected="--where forks with it" if name == "threshold" else "--where forks or random with it",
                got=f"--where {where}",
                remedy="Leave it out: it would change nothing.",
            )


def _refuse_repulsion(repulsion: float, ngram: int | None) -> None:
    """Refuse repulsion between the branches of a tree."""
    for name, value in (("--repulsion", repulsion or None), ("--ngram", ngram)):
        if value is not None:
            raise InputError.of(
                name,
                expected="--no-forks with it",
                got=f"{value:g}, with --forks",
                remedy="The children of a fork are drawn without replacement: no two of them choose the same token.",
            )


def _threshold(nats: float | None, recipe: Path | None, alpha: float | None, *, forks: bool) -> Any:
    """The given threshold, or the recipe's calibrated one."""
    from proxytune.methods.forks.threshold import ForkThreshold
    from proxytune.recipe import Recipe

    if nats is not None:
        return nats
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
            got=f"{used}" if isinstance(used, str) else f"{used:g}",
            remedy="Calibrate at this α, or pass --threshold.",
        )
    return ForkThreshold.of(read.fork_threshold)


def _settings(model: ProxyTunedModel, flags: dict[str, Any], *, forks: bool) -> GenerationConfig:
    """The generation settings: sampling, unless told otherwise."""
    usual: dict[str, Any] = {"do_sample": True}
    if flags.get("max_new_tokens") is None and flags.get("max_length") is None:
        flags = flags | {"max_new_tokens": _MAX_NEW_TOKENS}
    config = merged_settings(model.generation_config, usual | flags, model.config.vocab_size)
    if config.num_return_sequences not in (None, 1):
        raise InputError.of(
            "num_return_sequences", expected="--branches", got=f"{config.num_return_sequences}", remedy="Use that."
        )
    if not forks and not config.do_sample:
        raise InputError.of(
            "--no-forks", expected="sampling", got="do_sample=false", remedy="Greedy samples are all the same one."
        )
    return config


def _refuse_unreachable(nats: Any, vocabulary: int) -> None:
    """Refuse a threshold that no entropy reaches, such as one in bits."""
    value, most = getattr(nats, "nats", nats), math.log(vocabulary)
    if value is not None and value >= most:
        raise InputError.of(
            "--threshold",
            expected=f"nats below {most:.2f}, the entropy of a uniform distribution over {vocabulary} tokens",
            got=f"{value:g}",
            remedy="No token would be a fork. A bit is 0.693 nats; `proxytune calibrate` finds a threshold.",
        )


def _show(result: Result, budget: int | None, vote: Vote) -> None:
    """Print what was drawn for one prompt."""
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
    console.print(terminal.safe(result.prompt.text), style="dim", soft_wrap=True)
    for line in lines:
        console.print(terminal.safe(line), soft_wrap=True)


def _named(answer: object) -> str:
    return "no answer" if answer is None else str(answer)


def _line(prompt: Prompt, result: Result | BudgetError, budget: int | None, vote: Vote) -> str:
    own = {"error": str(result)} if isinstance(result, BudgetError) else _record(result, budget, vote)
    return json.dumps({**prompt.line, **own}, ensure_ascii=False)


def _record(result: Result, budget: int | None, vote: Vote) -> dict[str, Any]:
    tally = result.tally
    return {
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
