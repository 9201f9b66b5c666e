"""Which of a model's PEFT adapters a member runs with: one model, held once, can be several members.

A state is None (as the model is), False (all adapters off) or the name of one adapter. It is set on PEFT's layers for
the time of a pass, by their own two fields and nothing else: PEFT's `disable_adapter()` and `set_adapter()` also change
`requires_grad`, and outside a pass a model stays as its owner left it.
"""

from __future__ import annotations

import functools
import threading
import weakref
from collections.abc import Hashable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal, cast

from torch import nn

from proxytune.errors import InputError, UnsupportedModelError
from proxytune.models.members.innermost import innermost

__all__ = [
    "OWN",
    "AdapterState",
    "Switches",
    "adapter_layers",
    "adapters_set",
    "check_adapter_state",
    "is_adapter_layer",
    "is_switched",
    "running_as",
    "runs_as",
    "states_of",
    "switched",
    "switches_of",
    "why_not_off",
    "with_inside",
]

AdapterState = str | Literal[False] | None
"""None: as the model is; False: all adapters off; a name: that adapter alone."""

_SWITCHED = frozenset(
    ("LORA", "ADALORA", "IA3", "LOHA", "LOKR", "OFT", "BOFT", "VERA", "RANDLORA", "FOURIERFT", "HRA", "MISS", "SHIRA")
)
"""PEFT's kinds of adapters whose layers, switched off, are the model's own."""
_PLAIN_STARTS = frozenset((True, False, "gaussian", "orthogonal", "eva"))
"""Values of LoRA's `init_lora_weights` that leave the model's own weights alone."""
OWN = "proxytune_"
"""How the names of adapters begin that this package has put onto a model. They are off outside of a member's passes."""
_DISABLED, _ACTIVE = "_disable_adapters", "_active_adapter"
_MISSING = object()


@functools.cache
def is_adapter_layer(kind: Hashable) -> bool:
    """Whether a class is one of PEFT's layers or wrappers, which run with some adapters or none."""
    return isinstance(getattr(kind, "disable_adapters", None), property)  # on transformers' models it is a method


def adapter_layers(model: nn.Module) -> list[Any]:
    """PEFT's layers and wrappers in a model, in order; not those inside of another."""
    modules: list[nn.Module] = [innermost(model)]
    found = []
    for module in modules:  # grows meanwhile
        if is_adapter_layer(cast(Hashable, type(module))):
            found.append(module)
        else:
            modules += [child for child in vars(module)["_modules"].values() if child is not None]
    return found


def with_inside(layers: Iterable[nn.Module]) -> list[Any]:
    """Layers and wrappers, and those inside of them."""
    return [one for layer in layers for one in layer.modules() if is_adapter_layer(cast(Hashable, type(one)))]


def states_of(models: Mapping[str, Any]) -> dict[str, AdapterState]:
    """Role → adapter state, from role → model, for models that were given without one.

    A model that is inside of another role's PEFT model runs without adapters; what `load_adapter` has put onto a model
    runs with its adapter; all others run as they are.
    """
    inside = [model.get_base_model() for model in models.values() if hasattr(model, "get_base_model")]
    states: dict[str, AdapterState] = {}
    for role, model in models.items():
        name = getattr(model, "active_adapter", None) if hasattr(model, "get_base_model") else None
        own = name if isinstance(name, str) and name.startswith(OWN) else None
        states[role] = False if any(model is inner for inner in inside) else own
    return states


def runs_as(model: Any, state: AdapterState) -> tuple[str, ...]:
    """The adapters that a model runs with in a state, as it is now."""
    if state is not None:
        return () if state is False else (state,)
    layers = adapter_layers(model)
    return tuple(sorted({name for x in layers if not x.disable_adapters for name in x.active_adapters}))


def _adapters(model: Any) -> dict[str, Any]:
    return dict(getattr(innermost(model), "peft_config", None) or getattr(model, "peft_config", None) or {})


def check_adapter_state(model: nn.Module, state: AdapterState, role: str) -> None:
    """Refuse an adapter state that a model cannot be run in exactly.

    Raises:
        InputError: If the model carries no such adapter, or none at all.
        UnsupportedModelError: If an adapter has changed the model's own weights, so that none of them can be off.
    """
    if state is None:
        return
    carried = _adapters(model)
    if not carried or (state is not False and state not in carried):
        raise InputError.of(
            f"adapter of the {role}",
            expected=f"one of {', '.join(sorted(carried))}; False for none"
            if carried
            else "a model with PEFT adapters",
            got=repr(state) if carried else f"{state!r} for a {type(model).__name__} without any",
            remedy="Load it first, model.load_adapter(…, adapter_name=…), or correct the name."
            if carried
            else "Leave the adapter out.",
        )
    for name, config in carried.items():
        if (reason := why_not_off(config)) is not None:
            raise UnsupportedModelError.of(
                f"the {role} with adapter={state!r}",
                expected="adapters beside the model's own weights, which can be switched off",
                got=f"the adapter {name!r}, {reason}",
                remedy="Load the model twice: once with the adapter, once without.",
            )
    _refuse_merged(adapter_layers(model), role)


def why_not_off(config: Any) -> str | None:
    """Why the model below an adapter, by its PEFT config, is not what it was without it; None if it is."""
    kind = str(getattr(config.peft_type, "value", config.peft_type))
    if kind not in _SWITCHED:
        return f"a {kind}, which is not known to leave nothing behind"
    if (bias := getattr(config, "bias", None)) not in (None, "none"):
        return f"with bias={bias!r}, which trains biases of the model itself"
    if getattr(config, "layer_replication", None):
        return "with layer_replication, which adds layers to the model itself"
    start = getattr(config, "init_lora_weights", True)
    if kind == "LORA" and not (isinstance(start, bool) or start in _PLAIN_STARTS):
        return f"with init_lora_weights={start!r}, which takes a part out of the model's own weights"
    return None


def _refuse_merged(layers: Iterable[Any], role: str) -> None:
    for layer in layers:
        if layer.merged_adapters:  # switched off, PEFT would take it out of the weights for good
            raise UnsupportedModelError.of(
                f"the {role}",
                expected="a PEFT model whose adapters are not merged into its weights",
                got=f"one with {', '.join(map(repr, layer.merged_adapters))} merged",
                remedy="Call unmerge_adapter() first.",
            )


class Switches:
    """PEFT's layers in one model, and whose turn it is to switch them.

    Attributes:
        turn: Held while a state is set: threads that run one model in several states take turns.
        layers: The outermost layers and wrappers.
        all: Those inside of them, too.
        forwards: For `lora_pair`: the layers' own dictionaries, and what stands in for `forward`, by members' states.
        rows: For `lora_pair`: the rows of the pass that runs; None if none does.
    """

    def __init__(self) -> None:
        self.turn = threading.RLock()
        self.layers: list[Any] = []
        self.all: list[Any] = []
        self.forwards: dict[tuple[AdapterState, ...], list[tuple[dict[str, Any], Any]]] = {}
        self.rows: Any = None
        self._key: Any = None

    def look(self, model: Any, *, fresh: bool) -> None:
        """Find the layers again, if `fresh`, or if adapters came, went or were switched."""
        if fresh or self._seen(model) != self._key:
            self.layers, self.forwards = adapter_layers(model), {}
            self._key = self._seen(model)
            self.all = with_inside(self.layers)
            _refuse_merged(self.all, "model")

    def _seen(self, model: Any) -> tuple[Any, ...]:
        """What shows at a glance that something has changed: PEFT switches all layers alike."""
        adapters = getattr(model, "peft_config", None) or {}
        first = self.layers[0] if self.layers else None
        state = None if first is None else (first.disable_adapters, *first.active_adapters, *first.merged_adapters)
        return id(adapters), *adapters, state


_SWITCHES: weakref.WeakKeyDictionary[nn.Module, Switches] = weakref.WeakKeyDictionary()


def switches_of(model: nn.Module) -> Switches:
    """The switches of a model, made at the first call; who runs the model as it is waits for its turn from then on."""
    return _SWITCHES.setdefault(innermost(model), Switches())


def switched(model: nn.Module, state: AdapterState) -> bool:
    """Whether the model's adapters are switched for passes, be it for another member that is the same model."""
    return state is not None or is_switched(innermost(model))


def is_switched(inner: nn.Module) -> bool:
    """Whether some member switches the adapters of an innermost model."""
    return inner in _SWITCHES


@contextmanager
def running_as(model: nn.Module, state: AdapterState, *, fresh: bool = True) -> Iterator[None]:
    """Run a model in an adapter state.

    `fresh` looks for the layers anew, as before a prompt; else that is done only if the adapters have other names.
    """
    if not switched(model, state):
        yield
        return
    inner = innermost(model)
    switches = switches_of(inner)
    with switches.turn:
        if state is not None:
            switches.look(inner, fresh=fresh)
        with adapters_set(switches.all, state):
            yield


@contextmanager
def adapters_set(layers: Iterable[Any], state: AdapterState) -> Iterator[None]:
    """Set an adapter state on PEFT's layers; afterwards they have what they had."""
    before: list[tuple[dict[str, Any], str, Any]] = []
    try:
        for layer in () if state is None else layers:
            own = vars(layer)
            before.append((own, _DISABLED, own.get(_DISABLED, _MISSING)))
            own[_DISABLED] = state is False
            if state is not False:
                before.append((own, _ACTIVE, own.get(_ACTIVE, _MISSING)))
                own[_ACTIVE] = [state] if state in layer._get_available_adapters() else []
        yield
    finally:
        for own, field, value in before:
            if value is _MISSING:
                own.pop(field, None)
            else:
                own[field] = value
