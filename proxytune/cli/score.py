"""`proxytune score`: log-probabilities and the perplexity of given texts."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any

import typer

from proxytune.cli import terminal
from proxytune.cli.models import check_members, chosen_device, load, load_plain, named
from proxytune.cli.options import (
    OUTPUT,
    PROMPTS,
    Alpha,
    Antiexpert,
    BaseAlone,
    Chat,
    Device,
    Dtype,
    Expert,
    Out,
    Overwrite,
    RecipePath,
    Resume,
    System,
    Trust,
)
from proxytune.cli.prompts import COMPLETION, read_prompts
from proxytune.errors import InputError

__all__ = ["score"]

_BATCH = 8
_OWN_KEYS = ("logprob", "tokens", "perplexity", "greedy", "logprobs", "ids")


def score(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(metavar="TEXT", help="Texts, each in quotes.", show_default=False),
    ] = None,
    base: BaseAlone = None,
    expert: Expert = None,
    antiexpert: Antiexpert = None,
    alpha: Alpha = None,
    recipe: RecipePath = None,
    file: Annotated[
        str | None,
        typer.Option(
            "--file",
            "-f",
            help='Texts, one per line, or .jsonl with "prompt" and "completion", or "messages" that end with the '
            "assistant's turn; - is stdin.",
            rich_help_panel=PROMPTS,
        ),
    ] = None,
    chat: Chat = False,
    system: System = None,
    batch_size: Annotated[
        int, typer.Option(min=1, help="Texts that are read at once.", rich_help_panel=PROMPTS)
    ] = _BATCH,
    out: Out = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
    per_token: Annotated[
        bool,
        typer.Option(
            "--per-token", help="Add each token's log-probability and id to the lines.", rich_help_panel=OUTPUT
        ),
    ] = False,
    summary: Annotated[
        bool,
        typer.Option("--summary", help="Print the perplexity of all texts, and no lines.", rich_help_panel=OUTPUT),
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="JSON lines even on a terminal.", rich_help_panel=OUTPUT)
    ] = False,
    device: Device = None,
    dtype: Dtype = "auto",
    trust: Trust = None,
) -> None:
    """Score texts: the log-probability that the model gives to them, in nats, and their perplexity.

    For example: proxytune score --recipe FOLDER --chat --file answers.jsonl

    Texts come from the arguments, from --file, or from stdin. Of a line with a "prompt" and a "completion" only the
    completion is scored; of a conversation, the assistant's last turn. Of a text alone, all tokens but the first are.
    The output is one JSON line for each text, and the perplexity of all of them on stderr.
    """
    from proxytune.cli.answer_file import check_out, open_answers

    check_out(out, file, resume=resume, overwrite=overwrite)
    words = arguments or []
    plain = base is not None and not (expert or antiexpert or recipe)
    if not plain:
        check_members(base, expert, antiexpert, recipe, words)
    elif alpha is not None:
        raise InputError.of(
            "--alpha",
            expected="an expert and an antiexpert",
            got=f"--alpha {alpha:g} with --base alone",
            remedy="Name them, or drop --alpha.",
        )
    terminal.quiet()

    from proxytune.cli.answered import check_answered, encode_answered, split_answers
    from proxytune.cli.encoding import own_prompt_views

    prompts = read_prompts(file, words, reserved=_OWN_KEYS, answers=(COMPLETION,))
    pairs = split_answers(prompts)
    chat = check_answered(pairs, chat=chat, system=system)
    whose = {"base": base} if plain else named(base, expert, antiexpert, alpha, recipe, None)
    said: dict[str, Any] = {
        "batch_size": batch_size,
        "chat": chat,
        "system": system,
        "device": chosen_device(device),
        "dtype": dtype,
    }
    said |= {"per_token": per_token, "recipe": whose}
    with open_answers(out, [p.line for p in prompts], said, resume=resume, overwrite=overwrite) as answers:
        lines: list[dict[str, Any]] = []
        if answers is None or not answers.finished:
            if plain:
                model, tokenizer = load_plain(str(base), device, dtype, trust)
            else:
                model, tokenizer = load(base, expert, antiexpert, alpha, recipe, device, dtype, chat=chat, trust=trust)

            from proxytune.models import scoring
            from proxytune.models.scored_texts import check_texts

            views = own_prompt_views(model, tokenizer, [prompt for prompt, _ in pairs], chat, system)
            before, texts = encode_answered(tokenizer, pairs, chat=chat, system=system, views=views)
            wheres = [prompt.where for prompt in prompts]
            check_texts(model, texts, prompts=before, names=wheres)
            if answers is not None:
                answers.begin({}, 1)
            done = 0 if answers is None else answers.done
            with terminal.Bar("texts") as bar:
                for first in range(done // batch_size * batch_size, len(prompts), batch_size):
                    bar.show("scoring", first, len(prompts))
                    batch = slice(first, first + batch_size)
                    scores = scoring.score(
                        model,
                        texts[batch],
                        prompts={role: each[batch] for role, each in before.items()},
                        batch_size=batch_size,
                        names=wheres[batch],
                    )
                    found = _lines(prompts[batch], texts[batch], scores, per_token)
                    lines += found
                    if answers is not None:
                        answers.append([json.dumps(line, ensure_ascii=False) for line in found[max(0, done - first) :]])
        if out is not None:
            lines = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    _print(lines, quiet=out is not None or summary, summary=summary, as_json=as_json)


def _lines(prompts: Sequence[Any], texts: Sequence[Any], scores: Any, per_token: bool) -> list[dict[str, Any]]:
    """What is said of each text, as JSON values: null for minus infinity, and for the perplexity there.

    Rounded to what float32 logits can tell.
    """
    lines = []
    for i, prompt in enumerate(prompts):
        total, count = float(scores.sums[i]), int(scores.counts[i])
        own: dict[str, Any] = {"logprob": _finite(round(total, 4)), "tokens": count}
        own |= {"perplexity": _perplexity(total, count), "greedy": bool(scores.greedy[i])}
        if per_token:
            own |= {
                "logprobs": [_finite(round(x, 6)) for x in scores.logprobs[i].tolist()],
                "ids": list(texts[i])[-count:],
            }
        lines.append({**prompt.line, **own})
    return lines


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _perplexity(logprob: float, tokens: int) -> float | None:
    try:
        return _finite(_significant(math.exp(-logprob / tokens)))
    except OverflowError:
        return None


def _significant(value: float) -> float:
    return float(f"{value:.5g}")


def summed(lines: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """What all texts are to the model together, as JSON values."""
    import numpy as np

    from proxytune.stats.bootstrap import ratio_interval

    found = [(math.nan if line["logprob"] is None else line["logprob"], line["tokens"]) for line in lines]
    nats, tokens = (np.array(x, dtype=float) for x in zip(*found, strict=True))
    total = None if np.isnan(nats).any() else round(float(nats.sum()), 4)
    said: dict[str, Any] = {"perplexity": None, "interval": None, "logprob": total}
    said |= {"tokens": int(tokens.sum()), "texts": len(tokens)}
    if total is None:
        return said
    said["perplexity"] = _perplexity(total, said["tokens"])
    if len(tokens) > 1 and said["perplexity"] is not None:
        every = ratio_interval(nats, tokens)  # whole texts are drawn: tokens of one are alike
        said["interval"] = [_significant(math.exp(-bound)) for bound in (every.high, every.low)]
    return said


def _print(lines: Sequence[Mapping[str, Any]], *, quiet: bool, summary: bool, as_json: bool) -> None:
    on_terminal = terminal.is_terminal(sys.stdout) and not as_json
    for line in () if quiet else lines:
        if not on_terminal:
            typer.echo(json.dumps(line, ensure_ascii=False))
            continue
        text = line.get(COMPLETION) or line.get("prompt") or line["messages"][-1]["content"]
        logprob = "-inf" if line["logprob"] is None else f"{line['logprob']:.3f}"
        said = f"{logprob:>10} nats {line['tokens']:>5} tokens  "
        terminal.output().print(said + terminal.safe(repr(text)), soft_wrap=True)
    found = summed(lines)
    if summary and not on_terminal:
        typer.echo(json.dumps(found))
        return
    told = "infinite: a token is forbidden" if found["perplexity"] is None else f"{found['perplexity']:.4g}"
    if found["interval"] is not None:
        told += " [" + ", ".join(f"{x:.4g}" for x in found["interval"]) + "]"
    told = (
        f"perplexity {told} over {found['tokens']} tokens in {found['texts']} text{'' if found['texts'] == 1 else 's'}"
    )
    if on_terminal:
        terminal.output().print(told, soft_wrap=True)
    else:
        terminal.show_note(told)
