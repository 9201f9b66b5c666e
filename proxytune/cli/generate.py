"""`proxytune generate`: prompts in, JSON lines out; on a terminal the text as it comes."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TextIO

import typer
from rich.text import Text

from proxytune.cli import terminal
from proxytune.cli.inputs import check_names, merged_settings, read_prompts, refuse_empty, split_arguments
from proxytune.cli.options import Alpha, Antiexpert, Base, Chat, Device, Dtype, Expert, PromptFile, RecipePath
from proxytune.errors import InputError, MemberNotFoundError

if TYPE_CHECKING:
    import torch
    from transformers import GenerationConfig, PreTrainedTokenizerBase

    from proxytune.model import ProxyTunedModel
    from proxytune.recipe import MemberRef

__all__ = ["Completion", "generate"]

_DTYPES = ("auto", "float32", "bfloat16", "float16")
_PIPED_BATCH = 8


@dataclass(frozen=True)
class Completion:
    """One line of the output.

    Attributes:
        prompt: The prompt as it was given.
        completion: The generated text, without special tokens.
        tokens: How many tokens were generated, the end-of-text token included.
        finish: `"stop"` at an end-of-text token or stop string, `"length"` at a limit.
    """

    prompt: str
    completion: str
    tokens: int
    finish: Literal["stop", "length"]


def generate(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[PROMPT]... [KEY=VALUE]...",
            help="Prompts, then settings of GenerationConfig, e.g. max_new_tokens=64 do_sample=true temperature=0.7.",
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
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Prompts per batch [1 on a terminal, which streams; 8 otherwise].")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed for do_sample=true.")] = 0,
    out: Annotated[
        Path | None, typer.Option(help="Write the JSON lines to this file, each as soon as it is there.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="JSON lines even on a terminal.")] = False,
    device: Device = None,
    dtype: Dtype = "auto",
    save_recipe: Annotated[
        Path | None, typer.Option(help="Also save the recipe and the tokenizer to this folder.")
    ] = None,
) -> None:
    """Complete prompts with base + alpha * (expert - antiexpert).

    Prompts come from the arguments, from --file, or from stdin. They are raw text unless --chat is given.
    """
    prompts, flags = split_arguments(arguments or [])
    _check_members(base, expert, antiexpert, recipe)
    prompts += read_prompts(file, prompts_given=bool(prompts))
    refuse_empty(prompts)
    terminal.quiet()
    check_names(flags)

    from transformers import set_seed

    on_terminal = terminal.is_terminal(sys.stdout) and not as_json
    size = batch_size or (1 if on_terminal and out is None else _PIPED_BATCH)
    # Opened before the models are: a path that cannot be written should not cost their loading first.
    with open(out, "w", encoding="utf-8") if out is not None else nullcontext() as lines:
        model, tokenizer = _load(base, expert, antiexpert, alpha, recipe, device, dtype)
        if save_recipe is not None:
            model.save_pretrained(save_recipe)
            tokenizer.save_pretrained(save_recipe)
        config = merged_settings(model.generation_config, flags)
        # A streamer takes one sequence that only grows.
        several = any(n not in (None, 1) for n in (config.num_beams, config.num_return_sequences))
        stream = on_terminal and size == 1 and not several
        set_seed(seed)
        for first in range(0, len(prompts), size):
            batch = prompts[first : first + size]
            if stream:
                terminal.output().print(_shown(batch[0], ""), end="", soft_wrap=True)
            for completion in _complete(model, tokenizer, batch, config, chat=chat, stream=stream):
                if lines is not None:
                    _write_line(lines, completion)
                if on_terminal and not stream:
                    terminal.output().print(_shown(completion.prompt, completion.completion), soft_wrap=True)
                elif not on_terminal and lines is None:
                    _write_line(sys.stdout, completion)


def _check_members(base: str | None, expert: str | None, antiexpert: str | None, recipe: Path | None) -> None:
    """Refuse every mixture of members but all three, or a recipe."""
    given = {"--base": base, "--expert": expert, "--antiexpert": antiexpert}
    present = [name for name, value in given.items() if value is not None]
    if recipe is not None and present:
        raise InputError.of(
            "members", expected="a recipe or three models", got=f"--recipe and {', '.join(present)}", remedy="Drop one."
        )
    if recipe is None and len(present) < len(given):
        missing = ", ".join(name for name in given if name not in present)
        raise InputError.of(
            "members",
            expected="--base, --expert and --antiexpert, or --recipe",
            got=f"no {missing}",
            remedy="The shift is expert minus antiexpert, so both are needed; the antiexpert is what the expert was "
            "tuned from.",
        )


def _load(
    base: str | None,
    expert: str | None,
    antiexpert: str | None,
    alpha: float | None,
    recipe: Path | None,
    device: str | None,
    dtype: str,
) -> tuple[ProxyTunedModel, PreTrainedTokenizerBase]:
    """Load the composed model and the base's tokenizer."""
    import torch

    from proxytune.model import ProxyTunedModel
    from proxytune.recipe import MemberRef, Recipe
    from proxytune.wrapping import wrap

    if dtype not in _DTYPES:
        raise InputError.of("--dtype", expected=", ".join(_DTYPES), got=dtype, remedy="Use one of these.")
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    _check_device(device)
    settings: dict[str, Any] = {"dtype": dtype, "device_map": device}
    if recipe is None:
        assert base is not None
        # Refused here already if it is not finite; the models take longer to load than that takes to say.
        model = wrap(base, expert=expert, antiexpert=antiexpert, alpha=1.0 if alpha is None else alpha, **settings)
        return model, _load_tokenizer([MemberRef(base)])
    read = Recipe.load(recipe)
    folder = recipe if recipe.is_dir() else recipe.parent
    model = ProxyTunedModel.from_pretrained(folder, **settings)
    if alpha is not None:
        model.alpha = alpha
    # A tokenizer beside the recipe was put there to be used; otherwise the base's is the one the ids belong to.
    beside = [MemberRef(str(folder))] if (folder / "tokenizer_config.json").exists() else []
    return model, _load_tokenizer([*beside, read.base])


def _check_device(device: str) -> None:
    """Refuse a device that is not there: found while loading, it would look like a fault of the model."""
    import torch

    there = ["auto", "cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    if torch.cuda.is_available():
        there.insert(0, "cuda")
    if torch.backends.mps.is_available():
        there.append("mps")
    if device not in there:
        raise InputError.of("--device", expected=", ".join(there), got=device, remedy="Use one that is there.")


def _load_tokenizer(references: Sequence[MemberRef]) -> PreTrainedTokenizerBase:
    from proxytune.opening import find_tokenizer

    reference = references[0]
    tokenizer: PreTrainedTokenizerBase | None = find_tokenizer(reference)
    if tokenizer is None:
        raise MemberNotFoundError.of(
            "the base's tokenizer",
            expected="tokenizer files beside the base",
            got=f"none that opens at {reference.id!r}",
            remedy="Save it there with tokenizer.save_pretrained(folder).",
        )
    tokenizer.padding_side = "left"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _complete(
    model: ProxyTunedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    config: GenerationConfig,
    *,
    chat: bool,
    stream: bool,
) -> Iterator[Completion]:
    """Complete one batch."""
    batch = _encode(tokenizer, prompts, chat).to(model.base.device)
    streamer = _streamer(tokenizer) if stream else None
    # Stop strings need a tokenizer.
    result = model.generate(**batch, generation_config=config, tokenizer=tokenizer, streamer=streamer)
    sequences: torch.Tensor = getattr(result, "sequences", result)  # [B * n, prompt + new]
    new_ids = sequences[:, batch["input_ids"].shape[1] :].cpu()
    per_prompt = len(new_ids) // len(prompts)
    ends = set(_listed(config.eos_token_id))
    stops = _listed(config.stop_strings)
    for index, row in enumerate(new_ids.tolist()):
        row, ended = _until_end(row, ends, tokenizer.pad_token_id)
        text = tokenizer.decode(row, skip_special_tokens=True)
        assert isinstance(text, str)
        stopped = ended or any(stop in text for stop in stops)
        yield Completion(prompts[index // per_prompt], text, len(row), "stop" if stopped else "length")


def _listed(value: Any) -> list[Any]:
    """A setting that may be nothing, one value or several, as a list."""
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


def _encode(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], chat: bool) -> Any:
    """Tokenize a batch, padded on the left."""
    if chat:
        if tokenizer.chat_template is None:
            raise InputError.of(
                "--chat", expected="a tokenizer with a chat template", got="one without", remedy="Leave --chat away."
            )
        # The template has written the special tokens already.
        rendered = [
            tokenizer.apply_chat_template([{"role": "user", "content": p}], tokenize=False, add_generation_prompt=True)
            for p in prompts
        ]
        batch = tokenizer(rendered, return_tensors="pt", padding=True, add_special_tokens=False)
    else:
        batch = tokenizer(list(prompts), return_tensors="pt", padding=True)
    batch.pop("token_type_ids", None)
    return batch


def _until_end(row: list[int], ends: set[int], pad: int | None) -> tuple[list[int], bool]:
    """Cut a row after its first end-of-text token; padding at its end means that it had stopped as well."""
    for position, token in enumerate(row):
        if token in ends:
            return row[: position + 1], True
    length = len(row)
    while length and row[length - 1] == pad:
        length -= 1
    return row[:length], length < len(row)


def _write_line(stream: TextIO, completion: Completion) -> None:
    stream.write(json.dumps(asdict(completion), ensure_ascii=False) + "\n")
    stream.flush()
