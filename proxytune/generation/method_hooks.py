"""Replaces a method of one model instance for a while, and puts it back."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any, Self

from proxytune.errors import InputError

__all__ = ["Attachable", "MethodHook", "hooks_on", "target_of"]


class MethodHook:
    """Stands in for a method of one model instance, from its creation until `take`.

    The model's class and its other instances are not touched. Hooks on one method nest: the latest is called first. A
    deep copy of the model has the original method; a pickled model keeps the hook, if the replacement can be pickled.

    Attributes:
        model: The model.
        name: The name of the method.
        replacement: Called in its place: `replacement(original, *args, **kwargs)`.
        original: The method that was there, maybe another hook.
    """

    def __init__(self, model: Any, name: str, replacement: Callable[..., Any]) -> None:
        self.model, self.name, self.replacement = model, name, replacement
        self.original: Callable[..., Any] = getattr(model, name)
        self.__wrapped__ = self.original  # generate() reads the signature
        self._own = name in vars(model)  # else it is the class's, and deleting the hook is enough
        self._taken = False
        setattr(model, name, self)

    @property
    def is_on_top(self) -> bool:
        """Whether a call of the method reaches this hook first."""
        return vars(self.model).get(self.name) is self

    def take(self) -> None:
        """Restore the original. Below a later hook, this one stays in place and only calls through."""
        self._taken = True
        while isinstance(top := vars(self.model).get(self.name), MethodHook) and top._taken:
            delattr(self.model, self.name)
            if top._own:
                setattr(self.model, self.name, top.original)

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
        hook = hook.original


def target_of(model: Any) -> Any:
    """The model whose `generate()` runs: the one inside a compiled module or a PEFT model."""
    inner = getattr(model, "_orig_mod", model)
    return inner.get_base_model() if hasattr(inner, "get_base_model") else inner


class Attachable:
    """A processor that hooks into one model at a time; subclasses define `attach`."""

    _hooks: tuple[MethodHook, ...] = ()

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
