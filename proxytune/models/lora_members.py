"""`expert="lora:path"`: a PEFT adapter put onto the very model that is another member, so that one copy serves both.

The adapter is off on the model outside of the member's passes: who holds the model finds it as it was.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn
from transformers.utils import is_peft_available

from proxytune.errors import InputError, MemberError, MemberNotFoundError
from proxytune.models.checkpoints import first_line
from proxytune.models.load_arguments import HUB_ARGUMENTS
from proxytune.models.members.adapter_state import OWN, adapter_layers, why_not_off
from proxytune.models.members.innermost import innermost

__all__ = ["LORA", "below_lora", "load_adapter", "place_of"]

LORA = "lora:"
"""How the place of an adapter begins that goes onto another member."""


def place_of(source: Any) -> str | None:
    """The folder (made absolute) or hub id of `"lora:place"`; None for any other source."""
    if not isinstance(source, str) or not source.startswith(LORA):
        return None
    place = source.removeprefix(LORA)
    return str(Path(place).expanduser().resolve()) if os.path.isdir(os.path.expanduser(place)) else place


def below_lora(role: str, sources: Mapping[str, Any]) -> str:
    """The role whose model the adapter of a role goes onto: the antiexpert, or the base where there is none.

    Raises:
        InputError: If it is the adapter of another role than the expert.
    """
    below = next((r for r in ("antiexpert", "base") if sources.get(r) is not None), "")
    if role != "expert" or not below:
        raise InputError.of(
            f"the {role}",
            expected="a model, a hub id or a folder: 'lora:…' stands for the expert only",
            got=repr(sources[role]),
            remedy="Load the model with PEFT, and pass it and a View of it, e.g. members={'math': peft_model, "
            "'small': View('math', adapter=False)}; a View('math', adapter='other') is another adapter of it.",
        )
    return below


def load_adapter(model: nn.Module, place: str, role: str, **hub: Any) -> nn.Module:
    """Put an adapter onto a model, off, and return the PEFT model around both, whose active adapter it is.

    `place` is a folder, or a hub id with perhaps `@revision`; `hub` are `token`, `cache_dir` and the like.

    Raises:
        MemberError: If PEFT is missing, the model carries other adapters, or the adapter is none of this model.
        MemberNotFoundError: If there is no adapter.
    """
    if not is_peft_available():
        raise MemberError.of(
            f"the {role}",
            expected="PEFT, for an adapter",
            got=f"{place!r}, and no peft in this environment",
            remedy="Run pip install peft, or pass a merged model.",
        )
    import peft

    carried = [*(getattr(model, "peft_config", None) or {})]
    if foreign := [name for name in carried if not name.startswith(OWN)]:
        raise MemberError.of(
            f"the {role}",
            expected="an adapter of a model without others",
            got=f"{place!r} for a {type(model).__name__} that carries {', '.join(foreign)}",
            remedy="Load the adapter into the PeftModel, and pass that and a View of it with adapter=False.",
        )
    at, where = _where(place, hub)
    name = f"{OWN}{1 + max((int(n.removeprefix(OWN)) for n in carried), default=0)}"
    try:
        config = peft.PeftConfig.from_pretrained(at, **where)
    except (OSError, ValueError) as error:
        raise MemberNotFoundError.of(
            f"the {role}",
            expected="a folder or hub id of a PEFT adapter",
            got=repr(place),
            remedy="Name what peft_model.save_pretrained(folder) wrote, 'lora:folder'. "
            f"PEFT says: {first_line(error).rstrip('.')}.",
        ) from error
    if reason := why_not_off(config):
        raise MemberError.of(
            f"the {role}",
            expected="an adapter beside the model's own weights, which can be switched off",
            got=f"{place!r}, {reason}",
            remedy="Pass the adapter's folder without 'lora:', and the antiexpert by its id: they are loaded apart.",
        )
    config.inference_mode = True
    inner = innermost(model)
    kind = peft.PeftModel if getattr(inner.config, "is_encoder_decoder", False) else peft.PeftModelForCausalLM
    carrier = None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the second adapter on one model; of keys, which are told below
            # In the model's dtype, as transformers loads adapters.
            carrier = kind(inner, config, adapter_name=name, autocast_adapter_dtype=False)
            found = carrier.load_adapter(at, name, autocast_adapter_dtype=False, **where)
        strange = [*found.missing_keys, *found.unexpected_keys]
        if strange:
            raise ValueError(f"{len(strange)} weights that are missing or too many, e.g. {strange[0]}")
    except (RuntimeError, ValueError, TypeError, KeyError) as error:
        if carrier is not None:
            carrier.delete_adapter(name) if carried else carrier.unload()
        raise MemberError.of(
            f"the {role}",
            expected="an adapter of the model that it goes onto",
            got=f"{place!r}, made for {config.base_model_name_or_path!r}, and a {type(inner).__name__}",
            remedy=f"Pass the model that it was trained on. PEFT says: {first_line(error)}",
        ) from error
    finally:
        for layer in adapter_layers(inner):
            layer.enable_adapters(False)
    loaded: nn.Module = carrier.eval()
    return loaded


def _where(place: str, hub: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """A folder or hub id, and PEFT's arguments for it."""
    given = {name: value for name, value in hub.items() if name in HUB_ARGUMENTS and name != "subfolder"}
    if os.path.isdir(place) or "@" not in place:
        return place, given
    name, revision = place.rsplit("@", 1)
    return name, {"revision": revision, **given}
