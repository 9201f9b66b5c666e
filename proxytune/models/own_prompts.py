"""Prompts of a member's own: what `generate(prompts={role: …})` is given, and what such a member reads in each pass.

All prompts are padded on the left to one width, so all members' caches have the same length, and whatever crops,
reorders or moves a cache needs to know nothing of them. The generated ids are appended to all.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationMixin
from transformers.cache_utils import Cache

from proxytune.errors import InputError
from proxytune.formulas.prompt_view import PromptView
from proxytune.models.members.cache_name import cache_of
from proxytune.models.members.forward import Text
from proxytune.models.members.masks import positions_of
from proxytune.models.members.member import Member
from proxytune.models.members.text_checks import check_ids
from proxytune.models.members.text_layer import text_layer_of
from proxytune.models.padding import mask_of_padding, refuse_ambiguous_padding
from proxytune.validation import shown

__all__ = [
    "PROMPTS",
    "PROMPT_WIDTH",
    "OwnPrompts",
    "generate_with_prompts",
    "ids_and_mask",
    "joined_prompts",
    "picked_prompts",
    "prompt_views",
    "roles_with_prompts",
    "texts_of_pass",
]

PROMPTS = "own_prompts"
"""The keyword under which `generate()` passes them on to `forward`."""

_PROMPT_WIDTH = "_proxytune_prompt_width"
PROMPT_WIDTH = "prompt_width"
"""The keyword under which `generate()` tells `forward` how many columns are the prompt."""


@dataclass(frozen=True, eq=False)
class OwnPrompts:
    """The prompts of members that read their own.

    Attributes:
        ids: Role → `[B, W]`, int64, padded on the left; W is the width of the base's prompt.
        masks: Role → `[B, W]`, int64.
        added: Columns of padding that they added to the base's prompt.
    """

    ids: Mapping[str, torch.Tensor]
    masks: Mapping[str, torch.Tensor]
    added: int = 0

    @property
    def width(self) -> int:
        """W, the number of columns of all prompts."""
        return next(iter(self.ids.values())).shape[1]

    def repeated(self, times: int) -> OwnPrompts:
        """Each row `times` times."""
        return OwnPrompts(
            {role: x.repeat_interleave(times, 0) for role, x in self.ids.items()},
            {role: x.repeat_interleave(times, 0) for role, x in self.masks.items()},
            self.added,
        )


def roles_with_prompts(members: Sequence[Member]) -> list[str]:
    """The members that read a prompt of their own."""
    return [m.role for m in members if m.own_prompt]


def prompt_views(model: Any) -> dict[str, PromptView]:
    """How the prompts of members that read their own are made, by role; empty for a model without such members.

    Raises:
        InputError: If such a member has no `PromptView`.
    """
    found: dict[str, PromptView] = {}
    for role in roles_with_prompts(getattr(model, "members", [])):
        view = model.views[role]
        while not view.own_prompt:  # a view of a member that does
            view = model.views[view.of]
        if not isinstance(view.prompt, PromptView):
            raise InputError.of(
                f"the {role}",
                expected="a PromptView, which says how its own prompt is made of the base's",
                got=repr(view),
                remedy=f"Compose it so: members={{{role!r}: View({view.of!r}, prompt=PromptView(…))}}, with e.g. "
                "without=('<context>', '</context>') or text='…'; or call generate(…, prompts={…}).",
            )
        found[role] = view.prompt
    return found


def joined_prompts(rows: Sequence[Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Prompts of one row each, `[1, T]` with their masks, as one batch that is padded on the left."""
    width = max(row["input_ids"].shape[1] for row in rows)
    return {name: torch.cat([_to_width(row[name], width) for row in rows]) for name in ("input_ids", "attention_mask")}


def picked_prompts(prompts: Mapping[str, Mapping[str, torch.Tensor]] | None, rows: Sequence[int]) -> dict[str, Any]:
    """Members' own prompts of some of the rows, as an argument of `generate()`; nothing if there are none."""
    if prompts is None:
        return {}
    return {"prompts": {role: {k: x[list(rows)] for k, x in given.items()} for role, given in prompts.items()}}


def prompt_width_of(cache: Cache | None, past: Any, told: int | None) -> int | None:
    """How many columns are the prompt: what `generate()` told, else those of the first pass over a cache."""
    if told is None and cache is not None and isinstance(past, int) and past:
        return getattr(cache, _PROMPT_WIDTH, None)
    return told


def note_prompt_width(cache: Cache, past: Any, new: int, told: int | None) -> None:
    """Write on a cache how many of its columns are the prompt: what `generate()` told, else those read first."""
    if told is not None or (isinstance(past, int) and not past):
        setattr(cache, _PROMPT_WIDTH, new if told is None else told)


def texts_of_pass(
    members: Sequence[Member],
    prompts: OwnPrompts | None,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None,
    past: int,
    cache: Cache | None,
    positions: torch.Tensor | None = None,
) -> dict[str, Text]:
    """What each member with a prompt of its own reads in a pass over the columns from `past` on.

    Args:
        members: The members.
        prompts: Their prompts; None if the cache holds them.
        input_ids: `[B, N]`, the base's new ids.
        attention_mask: `[B, past + N]`; the base's.
        past: Columns in the cache.
        cache: The composite cache, whose text layer gets the new columns; None without a cache.
        positions: `[B, N]`, int64, to be kept there as well, after the texts.

    Raises:
        InputError: If prompts are missing, or for another number of rows.
    """
    roles = roles_with_prompts(members)
    layer = text_layer_of(cache)
    rows, new = input_ids.shape
    stop = past + new
    inside = 0 if prompts is None else max(0, min(prompts.width, stop) - past)  # columns of the prompts in this pass
    if roles and (past == 0 or inside) and (prompts is None or set(prompts.ids) != set(roles)):
        raise _missing(roles, prompts)
    ids, masks = [input_ids], [_new_mask(attention_mask, input_ids)]
    for role in roles:
        own, mask = input_ids, torch.ones_like(input_ids)
        if inside:
            assert prompts is not None
            if len(prompts.ids[role]) != rows:
                raise _other_rows(role, len(prompts.ids[role]), rows)
            here = slice(past, past + inside)
            own = torch.cat([prompts.ids[role][:, here].to(own.device), own[:, inside:]], 1)
            mask = torch.cat([prompts.masks[role][:, here].to(own.device), mask[:, inside:]], 1)
        ids.append(own)
        masks.append(mask)
    before = None if layer is None else layer.masks
    if layer is not None:
        kept = [] if positions is None else [positions]
        layer.append([*ids, *kept], [*masks, *masks[: len(kept)]])
    texts = {}
    for i, role in enumerate(roles, 1):
        mask = masks[i] if before is None else torch.cat([before[i].to(masks[i].device), masks[i]], 1)
        texts[role] = Text(ids[i], mask, positions_of(mask)[:, -new:])
    return texts


def _new_mask(mask: torch.Tensor | None, input_ids: torch.Tensor) -> torch.Tensor:
    return torch.ones_like(input_ids) if mask is None else mask[:, -input_ids.shape[1] :].long().to(input_ids.device)


def generate_with_prompts(
    generate: Callable[..., Any], model: Any, prompts: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Call `generate` of a composed model with members' own prompts, `prompts` as the caller gave them.

    If one is longer than the base's prompt, that is padded on the left for the call, and the padding taken off what is
    returned.

    Raises:
        InputError: If prompts are missing, not wanted, no ids, or for another number of rows.
    """
    roles = roles_with_prompts(model.members)
    if not roles and prompts is None:
        return generate(*args, **kwargs)
    if prompts is not None and not isinstance(prompts, Mapping):
        raise _missing(roles, prompts)
    if prompts is not None and set(prompts) - set(roles):
        raise _not_wanted(roles, prompts)
    kwargs = _named(args, kwargs)
    base = kwargs.get("input_ids")
    layer = text_layer_of(cache_of(kwargs))
    held = None if layer is None or layer.ids is None else layer
    idle = {model.members[i].role for i in model.weighing.idle}
    if held is None and not {*roles} - idle <= set(prompts or {}):
        raise _missing(roles, prompts)
    if held is not None and prompts:
        raise InputError.of(
            "prompts",
            expected="none beside a filled cache, which holds what each member has read",
            got=f"prompts for {', '.join(map(str, prompts))}",
            remedy="Leave them out, since new tokens are appended to the texts of all members; or leave out the cache.",
        )
    if kwargs.get("inputs") is not None:  # beside the ids, which transformers refuses
        return generate(**kwargs)
    if base is None:
        raise InputError.of(
            "input_ids", expected="the base's prompt beside prompts=", got="None", remedy="Pass input_ids=."
        )
    if not isinstance(base, torch.Tensor) or base.ndim != 2:
        return generate(**kwargs)  # which refuses it
    found = {role: ids_and_mask(given, f"prompts[{role!r}]", model) for role, given in (prompts or {}).items()}
    for role, (ids, _) in found.items():
        if len(ids) not in (1, len(base)):
            raise _other_rows(role, len(ids), len(base))
        (member,) = [m for m in model.members if m.role == role]
        check_ids(ids, [member], name=f"prompts[{role!r}]")
    if held is None:  # of weight 0: what it reads does not matter
        mask = kwargs.get("attention_mask")
        found |= {r: (base, torch.ones_like(base) if mask is None else mask.long()) for r in roles if r not in found}
        longest = max((mask.sum(1).max().item() for _, mask in found.values()), default=0)
        added = max(0, int(longest) - base.shape[1])
    else:
        added = held.added
    width = base.shape[1] + added
    if added:
        given = kwargs.get("attention_mask")
        mask = _mask_of(base, model) if given is None else given
        pad = model.generation_config.pad_token_id
        kwargs["input_ids"] = torch.nn.functional.pad(base, (added, 0), value=0 if pad is None else int(pad))
        kwargs["attention_mask"] = torch.nn.functional.pad(mask, (added, 0), value=0)
        if (positions := kwargs.get("position_ids")) is not None:
            kwargs["position_ids"] = torch.nn.functional.pad(positions, (added, 0), value=0)
        _lengthen(kwargs, model, added)
    if found:
        kwargs[PROMPTS] = OwnPrompts(
            {role: _to_width(ids, width).expand(len(base), -1) for role, (ids, _) in found.items()},
            {role: _to_width(mask, width).expand(len(base), -1) for role, (_, mask) in found.items()},
            added,
        )
    if added and kwargs.get("streamer") is not None:
        kwargs["streamer"] = _WithoutPadding(kwargs["streamer"], added)
    out = generate(**kwargs)
    return _without_padding(out, added, cache_of(kwargs)) if added else out


def _named(args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """All arguments of `generate()` by name, the base's prompt as `input_ids`."""
    names = [name for name in inspect.signature(GenerationMixin.generate).parameters if name not in ("self", "kwargs")]
    if twice := [name for name, _ in zip(names, args, strict=False) if name in kwargs]:
        raise TypeError(f"generate() got multiple values for argument {twice[0]!r}")
    kwargs = dict(zip(names, args, strict=False)) | kwargs
    if kwargs.get("input_ids") is None and kwargs.get("inputs") is not None:
        kwargs["input_ids"] = kwargs.pop("inputs")
    return kwargs


def _lengthen(kwargs: dict[str, Any], model: Any, added: int) -> None:
    """Let lengths that count the prompt count the padding as well."""
    config = kwargs.get("generation_config")
    for name in ("max_length", "min_length"):
        given = kwargs.get(name, getattr(config, name, None) or getattr(model.generation_config, name, None))
        new = kwargs.get("max_new_tokens", getattr(config, "max_new_tokens", None))
        if given and not (name == "max_length" and new is not None):
            kwargs[name] = int(given) + added


def ids_and_mask(given: Any, name: str, model: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and mask `[B, W]` of a prompt that is a tensor, a list of ids, or what a tokenizer returns."""
    mask: Any = None
    if isinstance(given, Mapping):
        given, mask = given.get("input_ids"), given.get("attention_mask")
    if isinstance(given, list) and given and all(isinstance(i, int) for i in given):
        given = torch.tensor([given])
    if not isinstance(given, torch.Tensor) or given.ndim != 2 or given.dtype not in _IDS or not given.numel():
        shape = f"shape {list(given.shape)}, {given.dtype}" if isinstance(given, torch.Tensor) else shown(given, 80)
        raise InputError.of(
            name,
            expected="token ids [B, T], at least one",
            got=shape,
            remedy='Pass what tokenizer(prompts, return_tensors="pt", padding=True) returns.',
        )
    pad = model.generation_config.pad_token_id
    if mask is None and pad is not None and bool(given[:, -1].eq(int(pad)).any()):
        raise InputError.of(
            name,
            expected="a mask, since a prompt ends like padding",
            got=f"None; row {int(given[:, -1].eq(int(pad)).int().argmax())} ends with token {pad}",
            remedy='Pass all that tokenizer(prompts, return_tensors="pt", padding=True) returns.',
        )
    mask = _mask_of(given, model) if mask is None else torch.as_tensor(mask)
    if mask.shape != given.shape or not bool(((mask == 0) | (mask == 1)).all()):
        raise InputError.of(
            f"attention_mask of {name}",
            expected=f"1 for tokens and 0 for padding, in the shape of its ids, {list(given.shape)}",
            got=f"{list(mask.shape)}" if mask.shape != given.shape else f"values from {mask.min()} to {mask.max()}",
            remedy="Pass the tokenizer's mask.",
        )
    if bool(mask.eq(0).all(1).any()):
        raise InputError.of(
            name,
            expected="at least one token in each row",
            got=f"row {int(mask.eq(0).all(1).int().argmax())}, all of which is padding",
            remedy="Give it at least the token that begins a text.",
        )
    # Right padding would stand between the prompt and the generated tokens.
    ids, mask = given.long(), mask.long()
    order = mask.ne(0).int().argsort(dim=1, stable=True)  # the padding first
    return ids.gather(1, order), mask.gather(1, order)


_IDS = (torch.int64, torch.int32, torch.int16, torch.uint8, torch.int8)


def _mask_of(ids: torch.Tensor, model: Any) -> torch.Tensor:
    pad, ends = model.generation_config.pad_token_id, model.generation_config.eos_token_id
    ends = [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
    refuse_ambiguous_padding(ids, ends, remedy="Pass the tokenizer's attention_mask.")
    return torch.ones_like(ids) if pad is None or pad in ends else mask_of_padding(ids, int(pad))


def _to_width(x: torch.Tensor, width: int) -> torch.Tensor:
    return torch.nn.functional.pad(x, (width - x.shape[1], 0))  # negative padding drops columns of padding


class _WithoutPadding:
    """A streamer that is given the prompt without the padding of a call."""

    def __init__(self, streamer: Any, added: int) -> None:
        self.inner, self.added, self.begun = streamer, added, False

    def put(self, value: torch.Tensor) -> None:
        """Pass tokens on, the prompt's first."""
        self.inner.put(value if self.begun else value[..., self.added :])
        self.begun = True

    def end(self) -> None:
        """End the stream."""
        self.inner.end()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)


def _without_padding(out: Any, added: int, given: Cache | None) -> Any:
    tensor = isinstance(out, torch.Tensor)
    for cache in (given, None if tensor else cache_of(out)):
        if (layer := text_layer_of(cache)) is not None:
            layer.added = added
    if tensor:
        return out[:, added:]
    out.sequences = out.sequences[:, added:]
    return out


def _missing(roles: Sequence[str], prompts: Any) -> InputError:
    prompts = getattr(prompts, "ids", prompts)
    given = shown(sorted(map(str, prompts)), 80) if isinstance(prompts, Mapping) else _kind(prompts)
    error = InputError.of(
        "prompts",
        expected=f"a prompt for each member that reads its own: {', '.join(roles)}",
        got=given,
        remedy=f"Call generate(…, prompts={{{(roles or ['role'])[0]!r}: tokenizer(text, return_tensors='pt')}}); in a "
        "pipeline, declare a PromptView, and pass pipeline_class=proxytune.generation.PromptViewPipeline.",
    )
    assert isinstance(error, InputError)
    return error


def _kind(value: Any) -> str:
    return "None" if value is None else f"a {type(value).__name__}"


def _not_wanted(roles: Sequence[str], prompts: Mapping[str, Any]) -> InputError:
    strange = sorted(map(str, set(prompts) - set(roles)))
    error = InputError.of(
        "prompts",
        expected=f"prompts for {', '.join(roles)}" if roles else "none: all members read the base's prompt",
        got=f"prompts for {', '.join(strange)}",
        remedy=f"The base's prompt is input_ids; the names are {', '.join(roles)}."
        if roles
        else "Compose a member with a prompt of its own: members={role: View('base', prompt=True)}.",
    )
    assert isinstance(error, InputError)
    return error


def _other_rows(role: str, got: int, rows: int) -> InputError:
    error = InputError.of(
        f"prompts[{role!r}]",
        expected=f"one prompt for each of the base's {rows}, or one for all",
        got=f"{got}",
        remedy="Pass as many.",
    )
    assert isinstance(error, InputError)
    return error
