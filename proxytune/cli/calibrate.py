"""`proxytune calibrate`: from which entropy on a token of this model is a fork, measured on its own text."""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from proxytune.cli import terminal
from proxytune.cli.models import DTYPES, check_device, check_members, encode, load, load_tokenizer
from proxytune.cli.options import Alpha, Antiexpert, Chat, Device, Dtype, Expert, PromptFile, RecipePath
from proxytune.cli.prompts import read_prompts, refuse_empty
from proxytune.errors import CalibrationWarning, InputError

if TYPE_CHECKING:
    import numpy as np
    from transformers import PreTrainedTokenizerBase

    Entropies = np.ndarray[Any, np.dtype[np.float64]]

__all__ = ["bootstrap", "calibrate", "forced_entropies", "report", "sampled_entropies"]

_QUANTILES = (0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 0.8, 0.9, 0.95, 0.99)
_PIECE = 256  # tokens of a given text per forward pass: all their logits are in memory at once
_REPEATS = 1000


def calibrate(
    prompts: Annotated[
        list[str] | None, typer.Argument(metavar="[PROMPT]...", help="Prompts to continue.", show_default=False)
    ] = None,
    base: Annotated[str | None, typer.Option(help="The large model: a hub id or a folder; may stand alone.")] = None,
    expert: Expert = None,
    antiexpert: Antiexpert = None,
    alpha: Alpha = None,
    recipe: RecipePath = None,
    file: PromptFile = None,
    texts: Annotated[
        str | None, typer.Option(help="Texts to read instead of writing any, in a file of the same form.")
    ] = None,
    chat: Chat = False,
    share: Annotated[float, typer.Option(help="The share of tokens that are to be forks.")] = 0.2,
    temperature: Annotated[float, typer.Option(help="Temperature of the samples; entropies are at 1.")] = 1.0,
    samples: Annotated[int, typer.Option(min=1, help="Samples per prompt.")] = 1,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens per sample at most.")] = 128,
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts per batch.")] = 8,
    seed: Annotated[int, typer.Option(help="Seed of the samples.")] = 0,
    write: Annotated[bool, typer.Option("--write", help="Write the threshold into the recipe.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
    device: Device = None,
    dtype: Dtype = "auto",
) -> None:
    """Measure the entropies of a model's tokens, and find the threshold above which a given share of them lies.

    The model continues prompts (from the arguments, --file, or stdin), or reads --texts. Entropies are those of the
    combined distribution at temperature 1 over the whole vocabulary, in nats, before any penalty or truncation.
    """
    plain = base is not None and not (expert or antiexpert or recipe)
    if not plain:
        check_members(base, expert, antiexpert, recipe)
    _check_settings(share, temperature, alpha, recipe, plain=plain, write=write)
    given = list(prompts or [])
    if file is not None or texts is None:
        given += read_prompts(file, prompts_given=bool(given))
    read = [] if texts is None else read_prompts(texts, prompts_given=False)
    refuse_empty(given)
    refuse_empty(read)
    terminal.quiet()

    from transformers import set_seed

    from proxytune.calibration import ForkCalibration
    from proxytune.recipe import write_fork_threshold

    if plain:
        model, tokenizer = _load_plain(str(base), device, dtype)
    else:
        model, tokenizer = load(base, expert, antiexpert, alpha, recipe, device, dtype)
    set_seed(seed)
    found: list[Entropies] = []
    with _progress() as bar:
        task = bar.add_task("measuring", total=len(given) + len(read))
        for first in range(0, len(given), batch_size):
            batch = given[first : first + batch_size]
            encoded = encode(tokenizer, batch, chat).to(model.device)
            found += sampled_entropies(model, encoded, temperature, samples=samples, max_new_tokens=max_new_tokens)
            bar.advance(task, len(batch))
        found += forced_entropies(model, tokenizer, read, lambda count: bar.advance(task, count))
    summary = report(found, share)
    calibration = ForkCalibration(
        share=share,
        nats=summary["nats"],
        tokens=summary["tokens"],
        temperature=temperature if given else None,
        alpha=None if plain else float(model.alpha),
    )
    written = str(write_fork_threshold(recipe, calibration)) if write and recipe is not None else None
    if as_json:
        typer.echo(json.dumps({"fork_threshold": asdict(calibration), **summary, "written": written}))
    else:
        _print(summary, share, written)


def _check_settings(
    share: float, temperature: float, alpha: float | None, recipe: Path | None, *, plain: bool, write: bool
) -> None:
    """Refuse what cannot be right before any model is loaded."""
    from proxytune.calibration import finite, proper_share
    from proxytune.recipe import Recipe

    proper_share(share)
    finite("temperature", temperature, positive=True)
    if plain and alpha is not None:
        raise InputError.of(
            "--alpha", expected="an expert and an antiexpert", got="--base alone", remedy="Name them, or drop --alpha."
        )
    if not write:
        return
    if recipe is None:
        raise InputError.of(
            "--write", expected="--recipe, the recipe to write into", got="none", remedy="Save one, or use --json."
        )
    own = Recipe.load(recipe).alpha
    if alpha not in (None, own):
        raise InputError.of(
            "--write",
            expected=f"the recipe's own α, {own:g}: a threshold belongs to its α",
            got=f"--alpha {alpha:g}",
            remedy="Drop --alpha, or change it in the recipe first.",
        )


def _load_plain(base: str, device: str | None, dtype: str) -> tuple[Any, PreTrainedTokenizerBase]:
    """Load a model that nothing steers, and its tokenizer."""
    import torch

    from proxytune.models.loading import open_members
    from proxytune.recipe import MemberRef

    if dtype not in DTYPES:
        raise InputError.of("--dtype", expected=", ".join(DTYPES), got=dtype, remedy="Use one of these.")
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    check_device(device)
    models, _ = open_members({"base": base}, check_vocabulary=False, dtype=dtype, device_map=device)
    return models["base"].eval(), load_tokenizer([MemberRef(base)])


def sampled_entropies(
    model: Any, encoded: Any, temperature: float, *, samples: int = 1, max_new_tokens: int = 128
) -> list[Entropies]:
    """Continue a batch of prompts, and keep the entropies of what was sampled.

    Args:
        model: A composed or a plain model. Of its own generation settings only the special tokens count.
        encoded: `input_ids` and `attention_mask`, `[B, T]` each, padded on the left.
        temperature: Of the samples.
        samples: Per prompt.
        max_new_tokens: Per sample.

    Returns:
        Per sample the entropies of its tokens, the end of the text included, `[n]`, float64, nats; n ≥ 1.
    """
    from transformers import GenerationConfig

    from proxytune.methods.forks.processor import ForkSamplingLogitsProcessor

    own = model.generation_config
    special = {name: getattr(own, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    if special["pad_token_id"] is None:
        ends = special["eos_token_id"]
        special["pad_token_id"] = ends[0] if isinstance(ends, list) else ends
    # At temperature 1 everywhere it changes nothing, and records what it is handed.
    recorder = ForkSamplingLogitsProcessor(
        0.0, exec_temperature=1.0, temperature=temperature, eos_token_id=special["eos_token_id"], record=True
    )
    # generate() fills what its settings leave open from the model's own: penalties there would change the entropies.
    model.generation_config = GenerationConfig(**special)
    try:
        model.generate(
            **encoded,
            do_sample=True,
            temperature=temperature,
            top_k=0,
            num_return_sequences=samples,
            max_new_tokens=max_new_tokens,
            logits_processor=[recorder],
        )
    finally:
        model.generation_config = own
    rows = recorder.record().entropy.double().cpu().numpy()  # [B * samples, n], NaN after the end
    return [row[: int((row == row).sum())] for row in rows]


def forced_entropies(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    advance: Callable[[int], object] = lambda _: None,
) -> list[Entropies]:
    """Read given texts, and keep the entropies of what the model expects before each of their tokens but the first.

    Args:
        model: A composed or a plain model.
        tokenizer: Its tokenizer.
        texts: The texts; those of a single token have nothing to measure.
        advance: Called with 1 after each text.

    Returns:
        Per text `[n]`, float64, nats.
    """
    import torch

    from proxytune.methods.forks.threshold import entropy

    found = []
    for text in texts:
        ids = tokenizer(text, return_tensors="pt")["input_ids"].to(model.device)[:, :-1]  # the last predicts nothing
        past, pieces = None, []
        with torch.no_grad():
            for piece in ids.split(_PIECE, dim=1) if ids.shape[1] else ():
                out = model(piece, past_key_values=past, use_cache=True)
                past = out.past_key_values
                pieces.append(entropy(out.logits[0]).double().cpu())
        if pieces:
            found.append(torch.cat(pieces).numpy())
        advance(1)
    return found


def report(found: Sequence[Entropies], share: float) -> dict[str, Any]:
    """Find the threshold, and how sure it is.

    Args:
        found: Per text the entropies of its tokens, nats.
        share: The share of tokens that are to be forks.

    Returns:
        JSON values: `nats`, the threshold; `interval`, its 95 % interval; `realised_share` of these tokens above it,
        and `share_interval`, what other texts of the kind may give (both null if there is one text only); `tokens`;
        `texts`; `mean`, in nats; `quantiles`, level → nats.

    Raises:
        InputError: If there are no tokens, too few for the quantile, or some have no entropy.

    Warns:
        CalibrationWarning: If the share may well be more than 2 points off, because of ties or for want of text.
    """
    import numpy as np

    from proxytune.methods.forks.threshold import ForkThreshold

    tokens = np.concatenate(found) if found else np.empty(0)
    if not len(tokens):
        raise InputError.of(
            "calibration", expected="some tokens", got="none", remedy="Give prompts, or texts of more than one token."
        )
    nats = ForkThreshold.calibrated(tokens, share).nats
    interval, shares = bootstrap(found, share, nats)
    realised = float((tokens > nats).mean())
    if shares is None or max(realised - shares[0], shares[1] - realised) > 0.02:
        given = "one text only" if shares is None else f"{shares[0]:.1%} to {shares[1]:.1%} of other texts' tokens"
        warnings.warn(
            f"{len(tokens)} tokens in {len(found)} texts do not settle the share to 2 points: {given}. Calibrate on "
            "more prompts.",
            CalibrationWarning,
            stacklevel=2,
        )
    return {
        "nats": nats,
        "interval": interval,
        "realised_share": realised,
        "share_interval": shares,
        "tokens": len(tokens),
        "texts": len(found),
        "mean": float(tokens.mean()),
        "quantiles": {f"{q:g}": float(np.quantile(tokens, q)) for q in _QUANTILES},
    }


def bootstrap(
    found: Sequence[Entropies], share: float, nats: float
) -> tuple[list[float], list[float]] | tuple[None, None]:
    """95 % intervals by drawing whole texts anew: the tokens of one text are alike, and draws of tokens too sure.

    Args:
        found: Per text the entropies of its tokens, nats.
        share: The share of tokens that are to be forks.
        nats: The threshold.

    Returns:
        Of the threshold in nats, and of the share above the one given; None and None if there is one text only.
    """
    import numpy as np

    if len(found) < 2:
        return None, None
    rng = np.random.default_rng(0)
    values = np.concatenate(found)
    order = np.argsort(values, kind="stable")
    values, text = values[order], np.repeat(np.arange(len(found)), [len(f) for f in found])[order]
    above = np.searchsorted(values, nats, side="right")
    thresholds, shares = [], []
    for _ in range(_REPEATS):
        weight = np.bincount(rng.integers(len(found), size=len(found)), minlength=len(found))[text]
        below = weight.cumsum()
        thresholds.append(values[np.searchsorted(below, (1 - share) * below[-1])])
        shares.append(weight[above:].sum() / below[-1])
    return np.quantile(thresholds, [0.025, 0.975]).tolist(), np.quantile(shares, [0.025, 0.975]).tolist()


def _progress() -> Any:
    """A bar on stderr, where a person sees it."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=terminal.errors(), transient=True, disable=not terminal.is_terminal(sys.stderr))


def _print(summary: dict[str, Any], share: float, written: str | None) -> None:
    from rich import box
    from rich.table import Table

    def between(interval: list[float] | None, scale: float, digits: str) -> str:
        return "" if interval is None else " [" + ", ".join(f"{x * scale:{digits}}" for x in interval) + "]"

    table = Table("quantile", "nats", box=box.SIMPLE, pad_edge=False)
    for level, nats in summary["quantiles"].items():
        table.add_row(f"{float(level) * 100:g} %", f"{nats:.4f}")
    console = terminal.output()
    console.print(table)
    lines = [
        f"threshold  {summary['nats']:.4f}{between(summary['interval'], 1, '.4f')} nats",
        f"forks      {summary['realised_share']:.1%}{between(summary['share_interval'], 100, '.1f')} of tokens, "
        f"{share:.1%} wanted",
        f"measured   {summary['tokens']} tokens in {summary['texts']} texts; mean entropy {summary['mean']:.4f} nats",
    ]
    if written is not None:
        lines.append(f"written to {written}")
    for line in lines:
        console.print(line, soft_wrap=True)
