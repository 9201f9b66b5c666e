"""Replaces a method of one model instance for a while, and puts it back."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any, Self

from proxytune.errors import InputError
from proxytune.models.generation_mixin import refuse_continuous_batching
from proxytune.models.members.innermost import innermost
from proxytune.validation import shown

__all__ = ["Attachable", "MethodHook", "batching_refused", "hooks_on", "target_of"]


_CHANGING = threading.Lock()  # two threads may call the same model


class MethodHook:
    """Stands in for a method of one model instance, from its creation until `take`.

    The model's class and its other instances are not touched. Hooks on one method nest: the latest is called first. A
    deep copy of the model has the original method; a pickled model keeps the hook, if the replacement can be pickled.

    Attributes:
        model: The model.
        name: The name of the method.
        replacement: Called in its place: `replacement(original, *args, **kwargs)`.
    """

    def __init__(self, model: Any, name: str, replacement: Callable[..., Any]) -> None:
        self.model, self.name, self.replacement = model, name, replacement
        # What stood on the instance; None where the class's method did. That one is looked up anew, since a bound
        # method would be unpickled by its name, under which the hook stands.
        with _CHANGING:
            self._below: Callable[..., Any] | None = vars(model).get(name)
            if self._below is None:
                getattr(type(model), name)  # AttributeError before anything is hooked
            self._taken = False
            setattr(model, name, self)

    @property
    def original(self) -> Callable[..., Any]:
        """The method that was there, maybe another hook."""
        if self._below is not None:
            return self._below
        kind = type(self.model)
        method: Callable[..., Any] = getattr(kind, self.name).__get__(self.model, kind)
        return method

    @property
    def __wrapped__(self) -> Callable[..., Any]:
        return self.original  # generate() reads the signature

    @property
    def is_on_top(self) -> bool:
        """Whether a call of the method reaches this hook first."""
        return vars(self.model).get(self.name) is self

    def take(self) -> None:
        """Restore the original. Below a later hook, this one stays in place and only calls through."""
        self._taken = True
        with _CHANGING:
            while isinstance(top := vars(self.model).get(self.name), MethodHook) and top._taken:
                delattr(self.model, self.name)
                if top._below is not None:
                    setattr(self.model, self.name, top._below)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the replacement; after `take`, the original."""
        return self.original(*args, **kwargs) if self._taken else self.replacement(self.original, *args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return copy.deepcopy(self.original, memo)


def hooks_on(model: Any, name: str) -> Iterator[MethodHook]:
    """The hooks on a method of a model that were not taken, the latest first."""
    hook = vars(model).get(name)
    while isinstance(hook, MethodHook):
        if not hook._taken:
            yield hook
        hook = hook._below


def target_of(model: Any) -> Any:
    """The model whose `generate()` runs: the one inside a compiled module or a PEFT model.

    Raises:
        InputError: If it is no model that generates.
    """
    inner = innermost(model)
    if not callable(getattr(inner, "generate", None)):
        raise InputError.of(
            "attach",
            expected="a model with generate()",
            got=shown(model, 80),
            remedy="Pass the model itself, not its name; that of a pipeline is pipeline.model.",
        )
    return inner


class Attachable:
    """A processor that hooks into one model at a time; subclasses define `attach`. A deep copy is detached."""

    _hooks: tuple[MethodHook, ...] = ()

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        made = type(self).__new__(type(self))
        memo[id(self)] = made
        vars(made).update({k: () if k == "_hooks" else copy.deepcopy(v, memo) for k, v in vars(self).items()})
        return made

    def _refuse_attached(self) -> None:
        if self._hooks:
            raise InputError.of(
                "attach",
                expected="a detached processor",
                got=f"one that is attached to a {type(self._hooks[0].model).__name__}",
                remedy="Call detach() first.",
            )

    def detach(self) -> None:
        """Undo `attach`; without effect if the processor is not attached."""
        for hook in reversed(self._hooks):
            hook.take()
        self._hooks = ()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.detach()


def batching_refused(target: Any) -> tuple[MethodHook, ...]:
    """A hook that refuses continuous batching; none for a composed model, which refuses it by itself."""
    name = "init_continuous_batching"
    return (MethodHook(target, name, refuse_continuous_batching),) if hasattr(target, name) else ()
