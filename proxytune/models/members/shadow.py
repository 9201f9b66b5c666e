"""A shadow of a model: its modules anew over the same weights. A pass through it leaves no trace in the model."""

from __future__ import annotations

import functools
from collections import OrderedDict
from types import MethodType
from typing import Any

from torch import nn

__all__ = ["shadow_of"]

_HOOKS = (
    *("_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called"),
    *("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs"),
)
_SMALL = 1 << 16  # elements of a buffer that is worth a copy


def shadow_of(model: nn.Module) -> Any:
    """The same modules and parameters in evaluation mode, without hooks or compiled code; small buffers are copied.

    Other threads may run the model meanwhile. What accelerate put in place of a forward works on the shadow.
    """
    twins: dict[nn.Module, Any] = {module: object.__new__(type(module)) for module in model.modules()}
    for module, twin in twins.items():
        state = dict(vars(module))
        state |= {name: _of_twin(value, module, twin) for name, value in state.items() if callable(value)}
        state |= {name: OrderedDict() for name in _HOOKS}
        state["_modules"] = {name: None if child is None else twins[child] for name, child in module._modules.items()}
        state["_parameters"] = dict(module._parameters)
        buffers = module._buffers.items()
        state["_buffers"] = {n: x if x is None or x.numel() > _SMALL else x.clone() for n, x in buffers}
        vars(twin).update(state, training=False, _compiled_call_impl=None)
    return twins[model]


def _of_twin(value: Any, module: nn.Module, twin: Any) -> Any:
    """A callable attribute of a module, for its twin: bound to the twin if it was to the module, and not compiled."""
    value = getattr(value, "_torchdynamo_orig_callable", value)
    if isinstance(value, MethodType) and value.__self__ is module:
        return MethodType(value.__func__, twin)
    if isinstance(value, functools.partial) and value.args[:1] == (module,):
        return functools.partial(value.func, twin, *value.args[1:], **value.keywords)
    return value
