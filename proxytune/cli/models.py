"""From the command line's options to a model, a tokenizer and a batch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from proxytune.cli import terminal
from proxytune.errors import InputError, MemberNotFoundError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from proxytune.models.model import ProxyTunedModel
    from proxytune.recipe import MemberRef

__all__ = ["DTYPES", "check_device", "check_members", "chosen_device", "encode", "load", "load_tokenizer", "named"]

DTYPES = ("auto", "float32", "bfloat16", "float16")


def check_members(base: str | None, expert: str | None, antiexpert: str | None, recipe: Path | None) -> None:
    """Refuse anything but all three members, or a recipe."""
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


def load(
    base: str | None,
    expert: str | None,
    antiexpert: str | None,
    alpha: float | None,
    recipe: Path | None,
    device: str | None,
    dtype: str,
) -> tuple[ProxyTunedModel, PreTrainedTokenizerBase]:
    """Load the composed model and the base's tokenizer, from three hub ids or folders, or from a recipe.

    `alpha` defaults to the recipe's, else 1; the tokenizer pads on the left.

    Raises:
        InputError: If the dtype or the device is invalid.
        MemberError: If a member or its tokenizer cannot be opened.
    """
    from proxytune.models.model import ProxyTunedModel
    from proxytune.models.wrap import wrap
    from proxytune.recipe import MemberRef, Recipe
    from proxytune.validation import choice

    choice("--dtype", dtype, DTYPES)
    device = chosen_device(device)
    check_device(device)
    settings: dict[str, Any] = {"dtype": dtype, "device_map": device}
    if recipe is None:
        assert base is not None
        # An alpha that is not finite is refused before the models are loaded.
        with terminal.Bar("models"):
            model = wrap(base, expert=expert, antiexpert=antiexpert, alpha=1.0 if alpha is None else alpha, **settings)
        return model, load_tokenizer([MemberRef(base)])
    read = Recipe.load(recipe)
    folder = recipe if recipe.is_dir() else recipe.parent
    with terminal.Bar("models"):
        model = ProxyTunedModel.from_pretrained(folder, **settings)
    if alpha is not None:
        model.alpha = alpha
    # A tokenizer saved beside the recipe comes first, then the base's.
    beside = [MemberRef(str(folder))] if (folder / "tokenizer_config.json").exists() else []
    return model, load_tokenizer([*beside, read.base])


def named(
    base: str | None, expert: str | None, antiexpert: str | None, alpha: float | None, recipe: Path | None
) -> dict[str, Any]:
    """The adapter that the options name (members, formula and α as in a recipe), without opening a model."""
    from proxytune.formulas.proxy_tuning import ProxyTuning
    from proxytune.recipe import Recipe

    if recipe is not None:
        found = Recipe.load(recipe).to_json()
        for name in ("format_version", "fork_threshold"):  # no answer depends on these
            found.pop(name, None)
    else:
        members = {"base": base, "expert": expert, "antiexpert": antiexpert}
        found = {role: {"id": name, "revision": None} for role, name in members.items()}
        found |= {"formula": ProxyTuning.name, "alpha": 1.0}
    return found if alpha is None else found | {"alpha": alpha}


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
    choice("--device", device, there, remedy="Use one that is there.")


def load_tokenizer(references: Sequence[MemberRef]) -> PreTrainedTokenizerBase:
    """Load a tokenizer that pads on the left, from the first reference; `MemberNotFoundError` if there is none."""
    from proxytune.models.loading import find_tokenizer

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


def encode(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], chat: bool) -> Any:
    """Tokenize a batch, padded on the left; with `chat`, each prompt as a user turn of the chat template."""
    if chat:
        if tokenizer.chat_template is None:
            raise InputError.of(
                "--chat",
                expected="a tokenizer with a chat template",
                got=f"a {type(tokenizer).__name__} without one",
                remedy="Leave --chat away.",
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
