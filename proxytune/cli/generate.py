"""`proxytune generate`: prompts in, JSON lines out; on a terminal, text as it is generated."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.text import Text

from proxytune.cli import terminal
from proxytune.cli.latent_options import Latent, LatentGatesOption, LatentSpan, SamplerOf, Tau, mixture_of, sampler_of
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
    given,
)
from proxytune.cli.prompts import Prompt, check_prompts, read_prompts
from proxytune.cli.settings import SETTINGS_PANEL, check_settings, merged_settings, resolved, split_arguments
from proxytune.cli.view import check_trace
from proxytune.errors import InputError

if TYPE_CHECKING:
    import torch
    from transformers import GenerationConfig, PreTrainedTokenizerBase

    from proxytune.models.model import ProxyTunedModel

__all__ = ["Completion", "generate"]

_PIPED_BATCH = 8
_OWN_KEYS = ("completion", "tokens", "finish")


@dataclass(frozen=True)
class Completion:
    """One line of the output.

    Attributes:
        prompt: Its line is what this line begins with.
        completion: The generated text, without special tokens.
        tokens: Number of generated tokens, end-of-text token included.
        finish: `"stop"` at an end-of-text token or stop string, `"length"` at a limit.
    """

    prompt: Prompt
    completion: str
    tokens: int
    finish: Literal["stop", "length"]


def generate(
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
    batch_size: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Prompts per batch (default: 1 on a terminal, which streams; 8 otherwise).",
            rich_help_panel=PROMPTS,
        ),
    ] = None,
    seed: Annotated[
        int,
        typer.Option(
            min=0,
            max=(1 << 32) - 1,
            help="Seed for do_sample=true, and for --latent.",
            rich_help_panel=SETTINGS_PANEL,
        ),
    ] = 0,
    speculate: Annotated[
        bool,
        typer.Option(
            "--speculate",
            help="Let the expert draft ahead: the same text, faster where the drafts are accepted.",
            rich_help_panel=SETTINGS_PANEL,
        ),
    ] = False,
    latent: Latent = None,
    tau: Tau = None,
    latent_span: LatentSpan = None,
    latent_gates: LatentGatesOption = None,
    out: Out = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="JSON lines even on a terminal.", rich_help_panel=OUTPUT)
    ] = False,
    trace: Annotated[
        Path | None,
        typer.Option(
            help="Record every decision to NAME.npz, for proxytune view.", rich_help_panel=OUTPUT, show_default=False
        ),
    ] = None,
    device: Device = None,
    dtype: Dtype = "auto",
    end_tokens: EndTokensOption = None,
    trust: Trust = None,
    save_recipe: Annotated[
        Path | None,
        typer.Option(help="Also save the recipe and the tokenizer to this folder.", rich_help_panel=OUTPUT),
    ] = None,
) -> None:
    """Complete prompts with base + alpha * (expert - antiexpert).

    For example: proxytune generate --base LARGE --expert TUNED --antiexpert SMALL --chat "Who was Ada Lovelace?"

    Prompts come from the arguments, from --file, or from stdin. They are raw text unless --chat is given. On a terminal
    the text is shown as it is generated; piped, or with --json, it is one JSON line for each completion.
    """
    from proxytune.cli.answer_file import check_out, open_answers
    from proxytune.cli.encoding import check_chat, check_lengths, encode, own_prompt_views

    check_out(out, file, resume=resume, overwrite=overwrite)
    words, flags = split_arguments(arguments or [])
    check_members(base, expert, antiexpert, recipe, words)
    _check_folder(save_recipe)
    terminal.quiet()
    # First: a prompt that was read as a setting leaves nothing but to wait for stdin.
    flags = check_settings(flags, [parameter.name or "" for parameter in context.command.params])
    check_end_tokens(end_tokens, flags)
    prompts = read_prompts(file, words, settings=(arguments or [])[len(words) :], reserved=_OWN_KEYS)
    chat = check_prompts(prompts, chat=chat, system=system)
    mixture = mixture_of(latent, tau, latent_span=latent_span, latent_gates=latent_gates)
    if speculate and mixture is not None:
        raise InputError.of(
            "--speculate",
            expected="no --latent: drafts are tokens",
            got=f"--latent {latent}",
            remedy="Leave one of them out.",
        )

    check_trace(trace)
    if trace is not None and resume:
        raise InputError.of(
            "--trace",
            expected="no --resume: a trace has a whole run",
            got=str(trace),
            remedy="Leave one of them out.",
        )

    on_terminal = terminal.is_terminal(sys.stdout) and not as_json
    size = batch_size or (1 if on_terminal and out is None else _PIPED_BATCH)
    said = {"seed": seed, "batch_size": size, "chat": chat, "device": chosen_device(device), "dtype": dtype}
    said |= {"latent": latent, "tau": tau, "latent_span": latent_span, "latent_gates": latent_gates}
    said |= {
        "speculate": speculate,
        "system": system,
        "recipe": named(base, expert, antiexpert, alpha, recipe, end_tokens),
        "generation": flags,
    }
    # Opened first, so that an error shows before the models are loaded.
    asked = [prompt.line for prompt in prompts]
    with open_answers(out, asked, said, resume=resume, overwrite=overwrite) as answers:
        if answers is not None and answers.finished:
            return
        members = (base, expert, antiexpert, alpha, recipe, device, dtype)
        model, tokenizer = load(*members, chat=chat, end_tokens=end_tokens, trust=trust)
        if chat:
            check_chat(tokenizer, prompts, system)
        if save_recipe is not None:
            model.save_pretrained(save_recipe)
            tokenizer.save_pretrained(save_recipe)
        sampler = sampler_of(mixture, tokenizer, latent_span, latent_gates, seed)
        # The model's too: generate() takes from there what is None, also where that was asked for.
        config = model.generation_config = merged_settings(model.generation_config, flags, model.config.vocab_size)
        views = own_prompt_views(model, tokenizer, prompts, chat, system)
        check_lengths(model, tokenizer, prompts, chat, system, views=views, config=config)
        if given(context, "seed") and not config.do_sample and mixture is None:
            terminal.show_note(f"--seed {seed} changes nothing: without do_sample=true, no token is drawn.")
        if config.prompt_lookup_num_tokens is not None and size > 1 and len(prompts) > 1:
            raise InputError.of(
                "prompt_lookup_num_tokens",
                expected="one prompt per batch: transformers drafts for no more",
                got=f"{min(size, len(prompts))}",
                remedy="Pass --batch-size 1.",
            )
        loop = partial(_loop, config, sampler, seed, speculate)
        per_prompt = config.num_return_sequences or 1
        if answers is not None:
            answers.begin(resolved(config), per_prompt)
        # A streamer takes a single sequence that only grows.
        several = any(n not in (None, 1) for n in (config.num_beams, config.num_return_sequences))
        stream = on_terminal and size == 1 and not several
        done = 0 if answers is None else answers.done
        encoded = partial(encode, tokenizer, chat=chat, system=system, views=views)
        from proxytune.generation.recording import Recording

        recording = None if trace is None else Recording(tokenizer=tokenizer, file=trace)
        complete = partial(_complete, model, tokenizer, config, loop, seed, encoded, recording=recording, stream=stream)
        # Streamed text shows by itself how far it is.
        with nullcontext() if stream else terminal.Bar("prompts") as bar:
            # A resumed run keeps the batches of an uninterrupted one: in low precision, padding affects rounding.
            for first in range(done // (size * per_prompt) * size, len(prompts), size):
                if bar is None:
                    terminal.output().print(_shown(prompts[first].text, ""), end="", soft_wrap=True)
                else:
                    bar.show("completing", first, len(prompts))
                completions = complete(first, prompts[first : first + size])
                if answers is not None:
                    completions = completions[max(0, done - first * per_prompt) :]  # the others are written already
                    answers.append([_line(completion) for completion in completions])
                if bar is None:
                    continue
                bar.pause()
                for completion in completions:
                    if on_terminal:
                        terminal.output().print(_shown(completion.prompt.text, completion.completion), soft_wrap=True)
                    elif answers is None:
                        sys.stdout.write(_line(completion) + "\n")
                        sys.stdout.flush()
                bar.go_on()


def _check_folder(save_recipe: Path | None) -> None:
    """Refuse a folder to save to that is a file, or a model's: its files would be mixed with the recipe's."""
    if save_recipe is None:
        return
    got = None
    if save_recipe.exists() and not save_recipe.is_dir():
        got = "a file"
    elif (save_recipe / "config.json").exists() and not (save_recipe / "proxytune_config.json").exists():
        got = "the folder of a model"
    if got is not None:
        raise InputError.of(
            "--save-recipe",
            expected="a new folder, or that of a recipe",
            got=f"{save_recipe}, {got}",
            remedy="Choose another folder.",
        )


def _complete(
    model: ProxyTunedModel,
    tokenizer: PreTrainedTokenizerBase,
    config: GenerationConfig,
    loop: Callable[[Sequence[int]], Any],
    seed: int,
    encoded: Callable[[Sequence[Prompt]], Any],
    first: int,
    prompts: Sequence[Prompt],
    *,
    recording: Any,
    stream: bool,
) -> list[Completion]:
    """Complete one batch, which starts at prompt number `first`."""
    from transformers import set_seed

    from proxytune.search.keyed_noise import key_of

    # Loops without keyed draws also must not depend on the batches before.
    set_seed(key_of("proxytune generate", "", seed, first) % (1 << 32))
    batch = encoded(prompts).to(model.base.device)
    streamer = _streamer(tokenizer) if stream else None
    each = max(config.num_beams or 1, config.num_return_sequences or 1)
    # The tokenizer is for stop strings.
    result = model.generate(
        **batch,
        generation_config=config,
        tokenizer=tokenizer,
        streamer=streamer,
        custom_generate=loop(range(first * each, (first + len(prompts)) * each)),
        trace=recording,
    )
    sequences: torch.Tensor = getattr(result, "sequences", result)  # [B * n, prompt + new]
    per_prompt = len(sequences) // len(prompts)
    completions: list[Completion] = []
    for index, (row, stopped) in enumerate(_cut(sequences.cpu(), batch["input_ids"].shape[1], config, tokenizer)):
        text = tokenizer.decode(row, skip_special_tokens=True)
        assert isinstance(text, str)
        completions.append(Completion(prompts[index // per_prompt], text, len(row), "stop" if stopped else "length"))
    return completions


def _loop(config: GenerationConfig, sampler: SamplerOf, seed: int, speculate: bool, rows: Sequence[int]) -> Any:
    """The decoding loop for a batch, given its rows' numbers in the whole run; None for transformers' own.

    Plain samples depend on (seed, row, position) only, not on the batches or on where a run was resumed.
    """
    from transformers.generation.configuration_utils import GenerationMode

    from proxytune.generation.fused import FusedDecoding

    latent = sampler(rows)
    if speculate:
        from proxytune.methods.speculation.decoding import SpeculativeDecoding

        # Coupled, so that samples do not depend on draft lengths, which depend on the batch.
        return SpeculativeDecoding(accept="coupled", seed=seed, stream_ids=list(rows))
    if config.get_generation_mode() != GenerationMode.SAMPLE:
        return latent
    fused = FusedDecoding(seed=seed, stream_ids=list(rows))
    return fused if latent is None else replace(latent, loop=fused)


def _listed(value: Any) -> list[Any]:
    """A setting that may be None, one value or several, as a list."""
    return [] if value is None else list(value) if isinstance(value, list | tuple) else [value]


def _shown(prompt: str, completion: str) -> Text:
    return Text(terminal.safe(prompt), style="dim").append(terminal.safe(completion), "not dim")


def _streamer(tokenizer: PreTrainedTokenizerBase) -> Any:
    """A streamer that prints words as they are completed."""
    from transformers import TextStreamer

    class SafeStreamer(TextStreamer):
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            super().on_finalized_text(terminal.safe(text), stream_end)

    return SafeStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)


def _cut(
    sequences: torch.Tensor, start: int, config: GenerationConfig, tokenizer: PreTrainedTokenizerBase
) -> list[tuple[list[int], bool]]:
    """Each row's new ids up to its first end token or stop string, and whether there is one.

    Padding does not tell: a text may have its token too, and for many models it is an end token.
    """
    import torch
    from transformers import StopStringCriteria

    new = sequences[:, start:]
    done = torch.isin(new, torch.tensor(_listed(config.eos_token_id), dtype=new.dtype))  # [B * n, new]
    if stops := _listed(config.stop_strings):
        met = StopStringCriteria(tokenizer, stops)  # as in generate(), also where one begins in the prompt
        for i in range(new.shape[1]):
            done[:, i] |= met(sequences[:, : start + i + 1], None)
    rows = zip(new.tolist(), done.tolist(), strict=True)
    return [(row[: ends.index(True) + 1], True) if any(ends) else (row, False) for row, ends in rows]


def _line(completion: Completion) -> str:
    own = {key: getattr(completion, key) for key in _OWN_KEYS}
    return json.dumps({**completion.prompt.line, **own}, ensure_ascii=False)
