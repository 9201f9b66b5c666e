"""`proxytune see`: what the shift changes in an answer; `view`: the same of a run; `report`: what a policy has lost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from proxytune.cli import terminal
from proxytune.cli.options import (
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
    RecipePath,
    System,
    Trust,
)
from proxytune.errors import InputError

__all__ = ["check_trace", "report", "see", "view"]

ANSWERS = "Answers"

Changed = Annotated[
    int, typer.Option(min=0, help="How many of the most changed positions to list.", rich_help_panel=OUTPUT)
]


def see(
    prompt: Annotated[str, typer.Argument(help="A prompt, in quotes.", show_default=False)],
    base: Base = None,
    expert: Expert = None,
    antiexpert: Antiexpert = None,
    alpha: Alpha = None,
    recipe: RecipePath = None,
    chat: Chat = False,
    system: System = None,
    text: Annotated[
        str | None,
        typer.Option(help="Read this answer instead of writing one.", rich_help_panel=PROMPTS, show_default=False),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Most tokens of the answer.")] = 128,
    changed: Changed = 5,
    trace: Annotated[
        Path | None, typer.Option(help="Also write the trace, NAME.npz.", rich_help_panel=OUTPUT, show_default=False)
    ] = None,
    device: Device = None,
    dtype: Dtype = "auto",
    end_tokens: EndTokensOption = None,
    trust: Trust = None,
) -> None:
    """Show what the shift changes in an answer: its tokens coloured by KL from the base, and what the base wanted.

    For example: proxytune see --base LARGE --expert TUNED --antiexpert SMALL --chat "Who was Ada Lovelace?"

    Without models, the bundled family answers.
    """
    from proxytune.cli.encoding import check_chat, check_lengths, encode
    from proxytune.cli.models import check_members, load
    from proxytune.cli.prompts import Prompt, check_prompts

    terminal.quiet()
    if (base, expert, antiexpert, recipe) == (None, None, None, None):
        base, expert, antiexpert, alpha = _bundled(alpha)
    check_members(base, expert, antiexpert, recipe, [])
    prompts = [Prompt({"prompt": prompt})]
    chat = check_prompts(prompts, chat=chat, system=system)
    check_trace(trace)

    from proxytune.generation.fused import FusedDecoding
    from proxytune.generation.recording import Recording
    from proxytune.view.terminal import look

    model, tokenizer = load(
        base, expert, antiexpert, alpha, recipe, device, dtype, chat=chat, end_tokens=end_tokens, trust=trust
    )
    if chat:
        check_chat(tokenizer, prompts, system)
    recording = Recording(tokenizer=tokenizer, file=trace)
    ids = encode(tokenizer, prompts, chat=chat, system=system).to(model.base.device)
    if text is None:
        config = model.generation_config
        config.update(max_new_tokens=max_new_tokens, do_sample=False, num_beams=1)
        check_lengths(model, tokenizer, prompts, chat, system, config=config)
        model.generate(**ids, custom_generate=FusedDecoding(), tokenizer=tokenizer, trace=recording)
    else:
        words = tokenizer(text, add_special_tokens=False)["input_ids"]
        recording.read(model, [words], prompts=[ids["input_ids"][0].tolist()])
    look(recording.trace, changed=changed, console=terminal.output())


def view(
    file: Annotated[Path, typer.Argument(metavar="RUN.npz", help="A trace.", show_default=False)],
    text: Annotated[int | None, typer.Option(min=0, help="The number of the text (default: all, up to 10).")] = None,
    changed: Changed = 5,
    html: Annotated[
        Path | None,
        typer.Option(
            metavar="PAGE.html",
            help="Write all texts (or the one of --text) as one page for a browser instead.",
            rich_help_panel=OUTPUT,
            show_default=False,
        ),
    ] = None,
) -> None:
    """Show a recorded run: each text, coloured by what the shift changed.

    For example: proxytune generate … --trace run.npz, then proxytune view run.npz --html run.html
    """
    from proxytune.trace import load
    from proxytune.validation import whole
    from proxytune.view.html import write_page
    from proxytune.view.terminal import look
    from proxytune.view.words import check_texts

    trace = load(file)
    check_texts(trace)
    if html is not None:
        if text is not None:
            whole("text", text, "from the trace", most=len(trace) - 1, remedy=f"It has {len(trace)} texts.")
            trace = replace(trace, texts=(trace[text],))
        terminal.show_note(f"{write_page(trace, html)}: {len(trace)} {'text' if len(trace) == 1 else 'texts'}.")
        return
    console = terminal.output()
    most = 10
    numbers = range(min(len(trace), most)) if text is None else [text]
    for number in numbers:
        if len(numbers) > 1:
            console.rule(f"text {number}", style="dim")
        look(trace, text=number, changed=changed, console=console)
    if text is None and len(trace) > most:
        terminal.show_note(f"{len(trace) - most} more texts: show one with --text NUMBER.")


def report(
    files: Annotated[list[Path], typer.Argument(metavar="RUN.npz…", help="Traces.", show_default=False)],
    answer: Annotated[
        str | None,
        typer.Option(
            metavar="REGEX",
            help="How to find the answer in a text: the last match, and of it group 1 (default: the answers in the "
            'traces; with --gold, what follows "The answer is", else the last number).',
            rich_help_panel=ANSWERS,
            show_default=False,
        ),
    ] = None,
    gold: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.jsonl",
            help='JSON lines with a "prompt" and its right "answer"; spaces and capitals make no difference '
            "(default: the grades in the traces).",
            rich_help_panel=ANSWERS,
            show_default=False,
        ),
    ] = None,
    by: Annotated[
        str,
        typer.Option(help='What accuracy is held against: "tokens", or the name of a fact.', rich_help_panel=ANSWERS),
    ] = "tokens",
    checkpoints: Annotated[
        bool, typer.Option("--checkpoints", help="The runs are checkpoints of one training, the earliest first.")
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="REPORT.html",
            help="Write the whole report as one page (default: its first lines, here).",
            rich_help_panel=OUTPUT,
            show_default=False,
        ),
    ] = None,
    md: Annotated[
        Path | None,
        typer.Option(metavar="REPORT.md", help="Write it as Markdown.", rich_help_panel=OUTPUT, show_default=False),
    ] = None,
    plots: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="Draw every plot to a PNG there (extra plot).",
            rich_help_panel=OUTPUT,
            show_default=False,
        ),
    ] = None,
) -> None:
    """Say what recorded policies have lost (diversity, calibration, the use of thinking), how sure that is, what to do.

    For example: proxytune report run.npz --gold answers.jsonl --out report.html

    A diagnosis that the runs cannot give says what is missing. Several runs stand side by side.
    """
    for option, file, ends in (("--out", out, (".html", ".htm")), ("--md", md, (".md",))):
        if file is not None and file.suffix not in ends:
            raise InputError.of(option, expected=f"NAME{ends[0]}", got=str(file), remedy=f"Write {file.stem}{ends[0]}.")

    from proxytune.cli.gold import Grader, read_gold
    from proxytune.cli.sample_run import extractor
    from proxytune.trace import graded, load
    from proxytune.view import report as reports
    from proxytune.view import report_text

    extract = extractor(answer) if answer is not None or gold is not None else None
    right = None if gold is None else read_gold(gold)
    runs = {}
    with terminal.Bar("diagnoses") as bar:
        for name, file in zip(_names_of(files), files, strict=True):
            runs[name] = graded(load(file), extract, None if right is None else Grader(right, name))
        made = reports.report(runs, checkpoints=checkpoints, by=by, progress=bar.show)
    if plots is not None:
        from proxytune.view.figures import write_figures

        terminal.show_note(f"{plots}: {len(write_figures(made, plots))} plots.")
    if out is None and md is None:
        console = terminal.output()
        console.print(report_text.summary(made, width=console.width), soft_wrap=True)
        terminal.show_note("every diagnosis, with plots: --out report.html")
    for file in filter(None, (out, md)):
        terminal.show_note(f"{report_text.write(made, file)}: {len(runs)} run{'s' * (len(runs) > 1)}.")


def _names_of(files: Sequence[Path]) -> list[str]:
    """A name for each run: its file's, or its path where two files have one name.

    Raises:
        InputError: If a file is given twice.
    """
    if len(set(files)) < len(files):
        twice = next(file for file in files if files.count(file) > 1)
        raise InputError.of("runs", expected="each once", got=f"{twice} twice", remedy="Give each trace once.")
    stems = [file.stem for file in files]
    return [
        stem if stems.count(stem) == 1 else str(file.with_suffix("")) for stem, file in zip(stems, files, strict=True)
    ]


def _bundled(alpha: float | None) -> tuple[str, str, str, float]:
    """The bundled family, at its own strength."""
    from proxytune.demo.bundle import bundled, bundled_record

    strength = float(bundled_record()["alpha"]) if alpha is None else alpha
    return bundled("large-base"), bundled("tiny-tuned"), bundled("tiny-base"), strength


def check_trace(trace: Path | None) -> None:
    """Refuse a trace's file that is not NAME.npz, that exists, or whose folder does not."""
    if trace is None:
        return
    if trace.suffix != ".npz":
        raise InputError.of("--trace", expected="NAME.npz", got=str(trace), remedy=f"Write {trace.stem}.npz.")
    if not trace.parent.is_dir():
        raise InputError.of(
            "--trace",
            expected="a file in a folder that exists",
            got=str(trace),
            remedy=f"Make the folder {trace.parent} first.",
        )
    if trace.exists() or trace.with_suffix(".jsonl").exists():
        raise InputError.of(
            "--trace", expected="a new file", got=f"{trace}, or its .jsonl", remedy="Choose another name."
        )
