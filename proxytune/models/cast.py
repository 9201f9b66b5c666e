"""Who plays which role: members that are one model, prompt and adapter state are one member."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from proxytune.errors import InputError
from proxytune.formulas.view import View
from proxytune.models.members.adapter_state import AdapterState, states_of
from proxytune.models.members.innermost import innermost

__all__ = ["Part", "cast"]


@dataclass(frozen=True, eq=False)
class Part:
    """A distinct member: a model with an adapter state and, perhaps, a prompt of its own.

    Attributes:
        role: The first role that it plays.
        model: The model.
        adapter: The state of its adapters: None as it is, False all off, or a name.
        own_prompt: Whether it reads a prompt of its own.
    """

    role: str
    model: nn.Module
    adapter: AdapterState = None
    own_prompt: bool = False


def cast(
    models: Mapping[str, Any], views: Mapping[str, View], roles: tuple[str, ...]
) -> tuple[list[Part], dict[str, int]]:
    """The distinct members of `roles`, the base first, and role → member.

    `models` is role → model, and `views` role → view of another role.

    Raises:
        InputError: If a role has neither, or views go in a circle.
    """
    states = states_of(models)
    parts: list[Part] = []
    keys: list[tuple[Any, ...]] = []
    index: dict[str, int] = {}
    for role in roles:
        at, adapter, own = _resolved(role, models, views)
        model, adapter = models[at], states[at] if adapter is None else adapter
        key = (id(innermost(model)), adapter, own)
        if key not in keys:
            keys.append(key)
            parts.append(Part(own or role, model, adapter, own is not None))
        index[role] = keys.index(key)
    return parts, index


def _resolved(role: str, models: Mapping[str, Any], views: Mapping[str, View]) -> tuple[str, AdapterState, str | None]:
    """The role whose model a role has, its adapter state, and the role whose prompt it reads (None for the base's)."""
    adapter: AdapterState = None
    own: str | None = None
    at = role
    passed: list[str] = []
    while at not in models:
        if at in passed or at not in views:
            raise InputError.of(
                f"the {role}",
                expected="a model, or a View of a role that has one",
                got=f"views in a circle: {', '.join(passed)}" if at in passed else f"a View of {at!r}, which has none",
                remedy=f"Pass members={{{at!r}: …}}.",
            )
        passed.append(at)
        view = views[at]
        adapter = view.adapter if adapter is None else adapter
        own = at if own is None and view.own_prompt else own
        at = view.of
    return at, adapter, own
