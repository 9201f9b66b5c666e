"""From the command line's options to a model, a tokenizer and a batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from proxytune.cli import terminal
from proxytune.errors import InputError, UnsupportedModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from proxytune.models.model import ProxyTunedModel
    from proxytune.recipe import EndTokens

__all__ = [
    "DTYPES",
    "check_device",
    "check_end_tokens",
    "check_members",
    "chosen_device",
    "load",
    "load_plain",
    "named",
    "trusted_roles",
]

DTYPES = ("auto", "float32", "bfloat16", "float16")


def check_members(
    base: str | None, expert: str | None, antiexpert: str | None, recipe: Path | None, words: Sequence[str]
) -> None:
    """Refuse anything but all three members, or a recipe; `words` are the prompts, one of which may be meant for it."""
    given = {"--base": base, "--expert": expert, "--antiexpert": antiexpert}
    present = [name for name, value in given.items() if value is not None]
    if recipe is not None and present:
        raise InputError.of(
            "members", expected="a recipe or three models", got=f"--recipe and {', '.join(present)}", remedy="Drop one."
        )
    if recipe is None and len(present) < len(given):
        missing = ", ".join(name for name in given if name not in present)
        meant = next((word for word in words if (Path(word[:255]) / "proxytune_config.json").exists()), None)
        raise InputError.of(
            "members",
            expected="--base, --expert and --antiexpert, or --recipe",
            got=f"no {missing}",
            remedy="The shift is expert minus antiexpert, so both are needed; the antiexpert is what the expert was "
            "tuned from."
            if meant is None
            else f"Pass --recipe {meant}.",
        )
    if recipe is not None and recipe.name == "config.json":
        raise InputError.of(
            "--recipe",
            expected="the folder of a recipe, or the proxytune_config.json in it",
            got=str(recipe),
            remedy=f"Pass --recipe {recipe.parent}."
            if recipe.with_name("proxytune_config.json").exists()
            else "It is that of a plain model.",
        )


def load(
    base: str | None,
    expert: str | None,
    antiexpert: str | None,
    alpha: float | None,
    recipe: Path | None,
    device: str | None,
    dtype: str,
    *,
    chat: bool = False,
    end_tokens: EndTokens | None = None,
    trust: Sequence[str] | None = None,
) -> tuple[ProxyTunedModel, PreTrainedTokenizerBase]:
    """Load the composed model and the base's tokenizer, from three hub ids or folders, or from a recipe.

    `alpha` defaults to the recipe's, else 1; the tokenizer pads on the left. With `chat` it has a chat template: the
    expert's if it has none itself. `trust` has the roles whose own code may run, or "all".

    Raises:
        InputError: If the dtype or the device is invalid, or no chat template fits.
        MemberError: If a member or its tokenizer cannot be opened.
    """
    from proxytune.cli.tokenizers import borrow_template, load_tokenizer
    from proxytune.models.model import ProxyTunedModel
    from proxytune.models.wrap import wrap
    from proxytune.recipe import MemberRef, Recipe
    from proxytune.validation import choice, validate_alpha

    if alpha is not None:
        validate_alpha(alpha)
    choice("--dtype", dtype, DTYPES)
    device = chosen_device(device)
    check_device(device)
    trusted = trusted_roles(trust)
    settings: dict[str, Any] = {"dtype": dtype, "device_map": device, "end_tokens": end_tokens}
    settings["members"] = {role: {"trust_remote_code": True} for role in trusted}
    if recipe is None:
        assert base is not None
        with terminal.Bar("models"):
            model = wrap(base, expert=expert, antiexpert=antiexpert, alpha=1.0 if alpha is None else alpha, **settings)
        _refuse_encoder_decoders(model)
        tokenizer = load_tokenizer([MemberRef(base)], trusted)
        if chat:
            borrow_template(tokenizer, [("expert", MemberRef(str(expert)))], trusted)
        return model, tokenizer
    read = Recipe.load(recipe)
    folder = recipe if recipe.is_dir() else recipe.parent
    with terminal.Bar("models"):
        model = ProxyTunedModel.from_pretrained(recipe, **settings)
    _refuse_encoder_decoders(model)
    if alpha is not None:
        model.alpha = alpha
    # A tokenizer saved beside the recipe comes first, then the base's.
    beside = [MemberRef(str(folder))] if (folder / "tokenizer_config.json").exists() else []
    tokenizer = load_tokenizer([*beside, read.base], trusted)
    if chat:
        tuned = [(role, ref) for role, ref in read.members.items() if role not in ("base", "antiexpert")]
        borrow_template(tokenizer, [("base", read.base)] * len(beside) + tuned, trusted)
    return model, tokenizer


def load_plain(
    base: str, device: str | None, dtype: str, trust: Sequence[str] | None
) -> tuple[Any, PreTrainedTokenizerBase]:
    """Load a model without companions, and its tokenizer; arguments and errors as in `load`."""
    from proxytune.cli.tokenizers import load_tokenizer
    from proxytune.models.loading import open_members
    from proxytune.recipe import MemberRef
    from proxytune.validation import choice

    choice("--dtype", dtype, DTYPES)
    device = chosen_device(device)
    check_device(device)
    trusted = trusted_roles(trust)
    with terminal.Bar("models"):
        own = {"base": {"trust_remote_code": "base" in trusted}}
        models, _, _ = open_members({"base": base}, check_vocabulary=False, members=own, dtype=dtype, device_map=device)
    return models["base"].eval(), load_tokenizer([MemberRef(base)], trusted)


def _refuse_encoder_decoders(model: ProxyTunedModel) -> None:
    """Refuse a composition of encoder-decoders: the commands' loops go on from a prompt, which they do not."""
    if model.config.is_encoder_decoder:
        raise UnsupportedModelError.of(
            "members",
            expected="decoder-only models",
            got=f"encoder-decoders, such as a {type(model.base).__name__}",
            remedy="Compose them in Python, with proxytune.wrap, and call generate() of the result.",
        )


def trusted_roles(trust: Sequence[str] | None) -> tuple[str, ...]:
    """The roles that `--trust` names, each once."""
    from proxytune.recipe import ROLES
    from proxytune.validation import choice

    for role in trust or ():
        choice("--trust", role, (*ROLES, "all"))
    return ROLES if "all" in (trust or ()) else tuple(role for role in ROLES if role in (trust or ()))


def check_end_tokens(end_tokens: str | None, flags: Mapping[str, Any]) -> None:
    """Refuse `--end-tokens` beside the setting that overrides it."""
    if end_tokens is not None and "eos_token_id" in flags:
        raise InputError.of(
            "--end-tokens",
            expected="no eos_token_id, which says where texts stop",
            got=f"--end-tokens {end_tokens} and eos_token_id={flags['eos_token_id']!r}",
            remedy="Leave one of them out.",
        )


def named(
    base: str | None,
    expert: str | None,
    antiexpert: str | None,
    alpha: float | None,
    recipe: Path | None,
    end_tokens: str | None,
) -> dict[str, Any]:
    """The adapter that the options name (members, formula, α, … as in a recipe), without opening a model."""
    from proxytune.formulas.proxy_tuning import ProxyTuning
    from proxytune.recipe import Recipe

    if recipe is not None:
        found = Recipe.load(recipe).to_json()
        for name in ("format_version", "fork_threshold", "evidence"):  # no answer depends on these
            found.pop(name, None)
    else:
        members = {"base": base, "expert": expert, "antiexpert": antiexpert}
        found = {role: {"id": name, "revision": None} for role, name in members.items()}
        found |= {"formula": ProxyTuning.name, "alpha": 1.0}
    return found | {k: v for k, v in (("alpha", alpha), ("end_tokens", end_tokens)) if v is not None}


def chosen_device(device: str | None) -> str:
    """The device asked for; else cuda if there is one, else cpu."""
    import torch

    return device or ("cuda" if torch.cuda.is_available() else "cpu")


def check_device(device: str) -> None:
    """Refuse a missing device, which while loading would look like a fault of the model."""
    import torch

    from proxytune.validation import choice

    there = ["auto", "cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    if torch.cuda.is_available():
        there.insert(0, "cuda")
    if torch.backends.mps.is_available():
        there.append("mps")
    without = device.startswith("cuda") and not (torch.version.cuda or torch.version.hip)
    built = "This torch was built without CUDA: install another, or use" if without else "Use"
    choice("--device", device, there, remedy=f"{built} one that is there.")
