"""Where a loaded model came from."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from proxytune.models.checkpoints import is_custom_code
from proxytune.models.load_arguments import deciding
from proxytune.models.members.adapter_state import OWN
from proxytune.models.members.packed import packed_as
from proxytune.recipe import MemberRef

__all__ = ["adapters_of", "reference_of"]


def reference_of(source: Any, revision: str | None = None, *, below: bool = False) -> MemberRef | None:
    """A reference to load a member again, folders made absolute.

    None for a model that exists only in memory, or that carries an adapter, which its name does not cover; with `below`
    the model that carries it.
    """
    load: Mapping[str, Any] = {}
    adapter = None
    if isinstance(source, nn.Module):
        config = getattr(source, "config", None)
        if adapters_of(source) and not below:
            return None
        name, revision = getattr(config, "name_or_path", "") or "", getattr(config, "_commit_hash", None)
        load = _load_of(source)
    elif isinstance(source, MemberRef):
        name, revision, load, adapter = source.id, source.revision or revision, source.load, source.adapter
    else:
        name = str(source)
    if not name:
        return None
    folder = Path(name).expanduser()
    if folder.is_dir():
        return MemberRef(str(folder.resolve()), load=load, adapter=adapter)
    return MemberRef(name, revision, load, adapter)


def _load_of(model: Any) -> dict[str, Any]:
    """What `from_pretrained` was given for a model that is loaded already, as far as the model tells."""
    quantizer = getattr(model, "hf_quantizer", None)
    settings: Any = getattr(quantizer, "quantization_config", None)
    load: dict[str, Any] = {"trust_remote_code": is_custom_code(model)}
    if getattr(settings, "gguf_file", None):
        load["gguf_file"] = settings.gguf_file
    elif settings is not None and not getattr(quantizer, "pre_quantized", True):
        load["quantization_config"] = settings
    elif quantizer is None and (packed := packed_as(model)):  # by a library of its own: nothing that JSON can hold
        load["quantization_config"] = packed
    return deciding(load)


def adapters_of(model: nn.Module) -> tuple[str, ...]:
    """The names of the PEFT adapters that a model carries, sorted; empty for a plain model.

    Adapters that `load_adapter` has put onto it, off, count for the PEFT model that it made alone.
    """
    names = sorted(dict(getattr(model, "peft_config", None) or {}))
    own = getattr(model, "active_adapter", None) if hasattr(model, "get_base_model") else None
    return tuple(name for name in names if name == own or not name.startswith(OWN))
