"""`adapter_names=`: an adapter of its own for each row, where the base is a PEFT model (PEFT's mixed batches).

The base runs each row with the adapter of that name; the companions run as without it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from proxytune.errors import InputError, UnsupportedModeError
from proxytune.models.members.innermost import innermost
from proxytune.models.members.member import Member
from proxytune.validation import shown

__all__ = ["adapters_of_rows", "checked_names", "names_on", "refuse_leftover"]

_NAME = "adapter_names"
_WITHOUT = "__base__"  # PEFT's name for no adapter


def checked_names(names: Any, members: Sequence[Member], rows: int) -> list[str]:
    """The adapters of `rows` rows, as a list.

    Raises:
        InputError: If the base is no PEFT model, has no such adapter, or there is not one name per row.
        UnsupportedModeError: If adapters of that kind cannot be mixed, or a compiled base or another member, which is
            the same model, would not follow.
    """
    base = members[0].model
    adapters = getattr(base, "peft_config", None)
    if not isinstance(adapters, dict) or not hasattr(base, "get_base_model"):
        raise InputError.of(
            _NAME,
            expected="a base that is a PEFT model, whose adapters the names are",
            got=f"{shown(names, 80)} for a {type(base).__name__}",
            remedy="Leave it out, or compose the model with the PeftModel as its base; companions take no names.",
        )
    known = [*sorted(adapters), _WITHOUT]
    listed = isinstance(names, list | tuple)
    strange = [name for name in names if name not in known] if listed else []
    if not listed or len(names) != rows or strange:
        which = f"{', '.join(map(repr, strange))} in " if strange else ""
        raise InputError.of(
            _NAME,
            expected=f"one name per row, {rows} in all, of {', '.join(known)}",
            got=which + shown(names, 80) + (f", {len(names)} in all" if listed else ""),
            remedy="Load the adapter first, base.load_adapter(…, adapter_name=…), or correct the list.",
        )
    kind = type(getattr(base, "base_model", None))
    if not hasattr(kind, "_enable_peft_forward_hooks"):  # PEFT would run all rows with the active adapter
        raise UnsupportedModeError.of(
            _NAME,
            expected="adapters of a kind that PEFT can mix in a batch, such as LoRA",
            got=f"a {kind.__name__}",
            remedy="Use one adapter per call: base.set_adapter(name).",
        )
    if members[0].step is not None:
        raise UnsupportedModeError.of(
            _NAME,
            expected="a base that runs uncompiled: hooks say which row has which adapter",
            got="compile_members for the base",
            remedy='Call compile_members(roles=["expert", "antiexpert"]).',
        )
    ours = [member for member in members if innermost(member.model) is innermost(base)]
    if same := [role for member in ours for role in member.roles if role != "base"]:
        raise UnsupportedModeError.of(
            _NAME,
            expected="a base that is no companion too",
            got=f"one model as the base and the {same[0]}",
            remedy=f"Load the {same[0]} a second time.",
        )
    return list(names)


@contextmanager
def adapters_of_rows(base: Any, names: list[str] | None) -> Iterator[None]:
    """Run a PEFT model's rows with an adapter each, by checked names; with the active one if they are None."""
    if names is None:
        yield
        return
    hooks = base._enable_peft_forward_hooks(adapter_names=names)
    hooks.__enter__()
    try:
        yield
    finally:  # PEFT would leave its hooks on the layers after an error
        hooks.__exit__(None, None, None)


def names_on(model: nn.Module) -> list[tuple[nn.Module, int]]:
    """The hooks, by module and number, with which PEFT runs each row of a plain model by a name or aLoRA's offset."""
    if not getattr(model, "peft_config", None):
        return []
    return [
        (module, number)
        for module in model.modules()
        for number, hook in module._forward_pre_hooks.items()
        if {_NAME, "alora_offsets"} & set(getattr(hook, "keywords", ()))
    ]


def refuse_leftover(base: nn.Module) -> None:
    """Raise UnsupportedModeError if PEFT runs the base's rows with an adapter each for another call."""
    if names_on(base):
        raise UnsupportedModeError.of(
            "the base",
            expected="a PEFT model that runs all rows with its active adapter",
            got="one with hooks of a call with adapter_names, which is still running or ended in an error",
            remedy="Wait for that call. After an error PEFT leaves the hooks on for good: load the base again.",
        )
