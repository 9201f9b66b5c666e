"""`--latent`, `--tau`, `--latent-span` and `--latent-gates`: latent steps from the command line."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Annotated, Any

import typer

from proxytune.cli.settings import parse_value
from proxytune.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from proxytune.methods.latent.decoding import LatentDecoding
    from proxytune.methods.latent.mixture import LatentMixture

__all__ = ["Latent", "LatentGatesOption", "LatentSpan", "SamplerOf", "Tau", "mixture_of", "sampler_of"]

_PANEL = "Latent steps"
Latent = Annotated[
    str | None,
    typer.Option(
        metavar="KIND[:KEY=VALUE,…]",
        help="Feed back a mixture of embeddings instead of each token: onehot, mean, moi, gumbel, dirichlet, "
        "multiplex or gaussian; with settings e.g. dirichlet:alpha=2,candidates=20.",
        show_default=False,
        rich_help_panel=_PANEL,
    ),
]
Tau = Annotated[
    float | None,
    typer.Option(help="Temperature of --latent gumbel (default: 0.25).", show_default=False, rich_help_panel=_PANEL),
]
LatentSpan = Annotated[
    str | None,
    typer.Option(
        metavar="BEGIN…END",
        help='Only between these two tokens, e.g. "<think>…</think>" (default: everywhere).',
        show_default=False,
        rich_help_panel=_PANEL,
    ),
]
LatentGatesOption = Annotated[
    str | None,
    typer.Option(
        metavar="KEY=VALUE,…",
        help="Further gates on latent steps, e.g. min_entropy=0.3,max_run=64,cold_steps=128; dwell=2/8 for blocks of "
        "at least 2 latent and 8 discrete steps, dwell=4 for 4 of both.",
        show_default=False,
        rich_help_panel=_PANEL,
    ),
]
SamplerOf = Callable[[Sequence[int]], "LatentDecoding | None"]
"""From the row numbers of a batch in the whole run to its loop; None for transformers' own."""


def mixture_of(latent: str | None, tau: float | None, **others: str | None) -> LatentMixture | None:
    """The mixture that was asked for; needs no model, so errors show before one is loaded. `others` need `--latent`.

    Raises:
        InputError: If the kind or a setting is unknown, out of range or given twice, or settings come without a kind.
    """
    if latent is None:
        given = [name for name, value in {"tau": tau, **others}.items() if value is not None]
        if given:
            raise InputError.of(
                "--latent",
                expected="a kind, beside its settings",
                got="none, with " + ", ".join(f"--{name.replace('_', '-')}" for name in given),
                remedy="Pass e.g. --latent gumbel.",
            )
        return None
    from proxytune.methods.latent.mixture import LatentMixture

    kind, _, rest = latent.partition(":")
    settings = _settings("--latent", rest, [f.name for f in fields(LatentMixture) if f.name != "kind"])
    if tau is not None:
        if "tau" in settings:
            raise InputError.of(
                "--latent",
                expected="each setting once",
                got=f"tau={settings['tau']} in {latent!r}, and --tau {tau}",
                remedy="Remove one of them.",
            )
        settings["tau"] = tau
    return LatentMixture(kind=kind, **settings)  # type: ignore[arg-type]


def sampler_of(
    mixture: LatentMixture | None, tokenizer: PreTrainedTokenizerBase, span: str | None, gates: str | None, seed: int
) -> SamplerOf:
    """A function from the row numbers of a batch in the whole run to its loop: batches do not affect the weights.

    Raises:
        InputError: If the span is not made of two tokens, or a gate is unknown or out of range.
    """
    if mixture is None:
        return lambda rows: None
    from proxytune.methods.latent.decoding import LatentDecoding
    from proxytune.methods.latent.gates import LatentGates, span_ids

    chosen = mixture
    known = [f.name for f in fields(LatentGates) if f.name not in ("begin_ids", "end_ids", "discrete_ids")]
    settings = _settings("--latent-gates", gates or "", known)
    dwell = settings.get("dwell")
    if isinstance(dwell, str) and "/" in dwell:  # a comma ends the setting
        settings["dwell"] = tuple(parse_value(part.strip()) for part in dwell.split("/"))
    if span is not None:
        settings["begin_ids"], settings["end_ids"] = span_ids(
            tokenizer, span, what="--latent-span", otherwise="leave the option out, for latent steps everywhere"
        )
    where = LatentGates.for_tokenizer(tokenizer, **settings)
    return lambda rows: LatentDecoding(chosen, where, seed=seed, stream_ids=list(rows))


def _settings(option: str, text: str, known: Sequence[str]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for part in filter(None, text.split(",")):
        name, equals, value = part.partition("=")
        name = name.strip()
        if name not in known or not equals or name in found:
            raise InputError.of(
                option,
                expected=f"KEY=VALUE, each once, of {', '.join(known)}",
                got=repr(part),
                remedy="Separate several with commas.",
            )
        found[name] = parse_value(value.strip())
    return found
