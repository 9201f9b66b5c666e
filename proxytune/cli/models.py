"""From the command line's options to a model, a tokenizer and a batch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from proxytune.cli import terminal
from proxytune.cli.prompts import Prompt
from proxytune.errors import InputError, MemberError, MemberNotFoundError, UnsupportedModelError

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedTokenizerBase

    from proxytune.formulas.prompt_view import PromptView
    from proxytune.models.model import ProxyTunedModel
    from proxytune.recipe import EndTokens, MemberRef

__all__ = [
    "DTYPES",
    "check_chat",
    "check_device",
    "check_end_tokens",
    "check_lengths",
    "check_members",
    "chosen_device",
    "encode",
    "load",
    "load_plain",
    "load_tokenizer",
    "named",
    "own_prompt_views",
    "trusted_roles",
    "written",
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
            _borrow_template(tokenizer, [("expert", MemberRef(str(expert)))], trusted)
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
        _borrow_template(tokenizer, [("base", read.base)] * len(beside) + tuned, trusted)
    return model, tokenizer


def load_plain(
    base: str, device: str | None, dtype: str, trust: Sequence[str] | None
) -> tuple[Any, PreTrainedTokenizerBase]:
    """Load a model without companions, and its tokenizer; arguments and errors as in `load`."""
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


def _borrow_template(
    tokenizer: PreTrainedTokenizerBase, lenders: Sequence[tuple[str, MemberRef]], trusted: Sequence[str]
) -> None:
    """Give a tokenizer without a chat template that of the first member that has one."""
    from proxytune.models.loading import find_tokenizer

    if tokenizer.chat_template is not None:
        return
    for role, reference in lenders:
        lender = find_tokenizer(reference, trust_remote_code=role in trusted)
        if lender is None or lender.chat_template is None:
            continue
        template = str(lender.get_chat_template())
        # The template means its own special tokens, also where those of the base have other roles.
        names = {name: str(token) for name, token in lender.special_tokens_map.items() if name in template}
        _refuse_missing_tokens(tokenizer, lender, role)
        tokenizer.chat_template = (
            "".join(f"{{%- set {name} = {token!r} -%}}" for name, token in names.items()) + template
        )
        terminal.show_note(f"--chat: the base's tokenizer has no chat template; the {role}'s is used.")
        return


def _refuse_missing_tokens(tokenizer: PreTrainedTokenizerBase, lender: PreTrainedTokenizerBase, role: str) -> None:
    """Refuse a template that writes special tokens which the other tokenizer would take apart."""
    rendered = rendered_chat(lender, [{"role": "user", "content": "x"}])
    missing = [
        token
        for token, number in sorted(lender.get_added_vocab().items())
        if token in rendered and tokenizer(token, add_special_tokens=False)["input_ids"] != [number]
    ]
    if missing:
        raise InputError.of(
            "--chat",
            expected=f"a base whose tokenizer has the special tokens of the {role}'s chat template",
            got=f"one without {', '.join(missing)}",
            remedy="Use a base of the same family, add these tokens to its tokenizer, or write the prompts in a form "
            "that both know and leave --chat away.",
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


def load_tokenizer(references: Sequence[MemberRef], trusted: Sequence[str] = ()) -> PreTrainedTokenizerBase:
    """Load a tokenizer that pads on the left, from the first reference; `MemberError` if there is none to be had.

    It may run code of its own if the base is `trusted`.
    """
    from proxytune.models.checkpoints import tokenizer_code
    from proxytune.models.loading import find_tokenizer

    reference = references[0]
    tokenizer: PreTrainedTokenizerBase | None = find_tokenizer(reference, trust_remote_code="base" in trusted)
    if tokenizer is None:
        if "base" not in trusted and (code := tokenizer_code(reference)):
            raise MemberError.of(
                "the base's tokenizer",
                expected="a tokenizer whose class is transformers' own",
                got=f"{reference.id!r}, which would run {code} of its own",
                remedy="Read that file first. If you trust it, pass --trust base.",
            )
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


def check_chat(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt], system: str | None) -> None:
    """Refuse prompts that the chat template cannot write, or of which it leaves out a system or user turn or a call.

    Raises:
        InputError: If there is no template, it fails, or what it writes has not all of these turns in it.
    """
    from jinja2 import TemplateError

    if tokenizer.chat_template is None:
        raise InputError.of(
            "--chat",
            expected="a tokenizer with a chat template",
            got=f"a {type(tokenizer).__name__} without one",
            remedy="No member has one. Save that which the expert was tuned with beside the expert (set "
            "tokenizer.chat_template, then tokenizer.save_pretrained(folder)), or write the prompts in its form "
            "and leave --chat away.",
        )
    for prompt in prompts:
        turns = prompt.turns(system)
        roles = ", ".join(turn["role"] for turn in turns)
        try:
            written = rendered_chat(tokenizer, turns)
        except (TemplateError, TypeError, ValueError) as error:
            raise InputError.of(
                prompt.where,
                expected="turns that the chat template takes",
                got=roles,
                remedy=f"It says: {str(error).rstrip('.')}. Change the turns, or use another template.",
            ) from error
        for turn in turns:
            said = [turn["content"]] if turn["role"] in ("system", "user") else []
            said += [call["function"]["name"] for call in turn.get("tool_calls") or ()]
            if missing := next((text for text in said if text.strip() not in written), None):
                raise InputError.of(
                    prompt.where,
                    expected="a chat template that writes all turns",
                    got=f"one that leaves out or changes that of the {turn['role']}, {missing[:60]!r}",
                    remedy="Put the text into a turn that it writes, or use another template.",
                )


Views = Mapping[str, "PromptView | None"]
"""How the prompts of members that read their own are made, by role; None if each line has to say."""


def own_prompt_views(
    model: Any, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt], chat: bool, system: str | None = None
) -> Views:
    """How the prompts of members that read their own are made; empty if all members read the base's.

    Raises:
        InputError: If that cannot be told of some prompt, or a line has a prompt for another member.
    """
    from proxytune.models.own_prompts import prompt_views, roles_with_prompts

    roles = roles_with_prompts(getattr(model, "members", []))
    for prompt in prompts:
        if strange := sorted(prompt.own.keys() - {*roles}):
            raise InputError.of(
                f'{prompt.where}, "prompts"',
                expected=f"prompts of members that read their own: {', '.join(roles) or 'none does'}",
                got=f"one of {strange[0]}",
                remedy="Correct the role, or remove it.",
            )
    said = bool(prompts) and all(prompt.own.keys() == {*roles} for prompt in prompts)
    try:
        views: Views = dict.fromkeys(roles) if said else prompt_views(model)
    except InputError as error:
        raise InputError.of(
            f"the {roles[0]} of {model.name_or_path}",
            expected="a prompt view, which says how its own prompt is made of the base's",
            got='"prompt": true, or none at all',
            remedy=f'Write e.g. "members": {{"{roles[0]}": {{"of": "base", "prompt": {{"drop": ["system"]}}}}}}, or '
            f'give each line its "prompts": {{"{roles[0]}": "…"}}.',
        ) from error
    for prompt in prompts:
        for role, view in views.items():
            written(tokenizer, prompt, chat, system, role, view)  # it may refuse
    return views


def written(
    tokenizer: PreTrainedTokenizerBase,
    prompt: Prompt,
    chat: bool,
    system: str | None = None,
    role: str = "base",
    view: PromptView | None = None,
) -> str:
    """A prompt as the text that a member reads: the base, or one that reads its own, by its view or by the line.

    Raises:
        InputError: If the view cannot be applied.
    """
    template = None if view is None else view.template
    if role in prompt.own:
        prompt, system, view = prompt.own[role], None, None
    try:
        if chat:
            turns = prompt.turns(system)
            return rendered_chat(tokenizer, turns if view is None else view.of_messages(turns), template)
        return prompt.text if view is None else view.of_text(prompt.text)
    except InputError as error:
        raise InputError(f"{prompt.where}, for the {role}: {error}") from None


def encode(
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    chat: bool,
    system: str | None = None,
    views: Views | None = None,
) -> Any:
    """Tokenize a batch, padded on the left; with `chat`, each prompt as the turns of the chat template.

    For members that read prompts of their own it has `prompts` as well, as `generate()` takes them.
    """
    batch = _ids(tokenizer, prompts, chat, system, return_tensors="pt", padding=True)
    batch.pop("token_type_ids", None)
    if views:
        batch["prompts"] = {
            role: _ids(tokenizer, prompts, chat, system, role, view, return_tensors="pt", padding=True)
            for role, view in views.items()
        }
    return batch


def _ids(
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    chat: bool,
    system: str | None,
    role: str = "base",
    view: PromptView | None = None,
    **options: Any,
) -> Any:
    texts = [written(tokenizer, prompt, chat, system, role, view) for prompt in prompts]
    # The template has written the special tokens already.
    return tokenizer(texts, add_special_tokens=not chat, **options)


def check_lengths(
    model: ProxyTunedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    chat: bool,
    system: str | None = None,
    *,
    views: Views | None = None,
    config: GenerationConfig | None = None,
    budget: int | None = None,
) -> None:
    """Refuse prompts without room for an answer, one of which would stop a run in the middle.

    Those that leave less room than `config` asks for are noted; those that take all of a `budget` are let through.

    Raises:
        InputError: If a prompt is longer than a member's context, or not shorter than the `max_length` of `config`.
    """
    context: int | None = getattr(model.config, "max_position_embeddings", None)
    new, longest = (None, None) if config is None else (config.max_new_tokens, config.max_length)
    limits = [] if context is None else [(context, f"at most {context} tokens, the members' context")]
    if new is None and longest is not None:
        limits.append((longest - 1, f"fewer than {longest} tokens, max_length, which counts the prompt too"))
    if not (limits and prompts):
        return
    room, expected = min(limits)
    whose = [("base", None), *(views or {}).items()]
    ids = [_ids(tokenizer, prompts, chat, system, role, view)["input_ids"] for role, view in whose]
    lengths = [(max(map(len, each)), prompt.where) for *each, prompt in zip(*ids, prompts, strict=True)]
    lengths = [(length, where) for length, where in lengths if budget is None or length < budget]
    if long := [(length, where) for length, where in lengths if length > room]:
        raise InputError.of(
            long[0][1],
            expected=expected,
            got=f"{long[0][0]}" + (f"; also too long: {_listed([where for _, where in long[1:]])}" if long[1:] else ""),
            remedy="Shorten or remove what is too long.",
        )
    if context is None or new is None:
        return
    if tight := [where for length, where in lengths if length + min(new, (budget or math.inf) - length) - 1 > context]:
        terminal.show_note(
            f"{_listed(tight)}: fewer than max_new_tokens={new} tokens are left of the members' context of {context}, "
            "and a text that does not end before would stop the run."
        )


def _listed(places: Sequence[str], most: int = 3) -> str:
    more = len(places) - most
    return "; ".join(places[:most]) + (f" and {more} more" if more > 0 else "")


def rendered_chat(
    tokenizer: PreTrainedTokenizerBase, turns: Sequence[dict[str, Any]], template: str | None = None
) -> str:
    """A conversation as a chat template writes it (the tokenizer's, unless given), up to where the answer begins."""
    more = {} if template is None else {"chat_template": template}
    return str(tokenizer.apply_chat_template(list(turns), tokenize=False, add_generation_prompt=True, **more))
