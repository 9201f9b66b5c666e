"""Keywords that are passed on to `from_pretrained`: which are refused before a weight is read, and what was meant."""

from __future__ import annotations

import difflib
import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from transformers import AutoConfig, GenerationConfig

from proxytune.errors import InputError, ProxytuneError
from proxytune.recipe import LOAD_KEYS, ROLES, MemberRef
from proxytune.validation import shown

__all__ = [
    "HUB_ARGUMENTS",
    "LOAD_ARGUMENTS",
    "Caller",
    "deciding",
    "refuse_dtype",
    "refuse_misspelt",
    "refuse_unknown",
    "unknown_keyword",
]

# Arguments of `from_pretrained` that say where files are; they apply to tokenizers too.
HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "subfolder", "token")

# What `AutoModelForCausalLM.from_pretrained` takes beside the fields of a model's config. `revision` is not here: each
# member has its own.
LOAD_ARGUMENTS = frozenset(
    (
        *HUB_ARGUMENTS,
        *("adapter_kwargs", "adapter_name", "allow_all_kernels", "attn_implementation", "code_revision", "config"),
        *("device_map", "device_mesh", "disable_mmap", "distributed_config", "dtype", "experts_implementation"),
        *("fusion_config", "generation_config", "gguf_file", "ignore_mismatched_sizes", "kernel_config", "key_mapping"),
        *("max_memory", "offload_buffers", "offload_folder", "output_loading_info", "proxies", "quantization_config"),
        *("state_dict", "torch_dtype", "tp_plan", "tp_size", "tqdm_class", "trust_remote_code", "use_kernels"),
        *("use_safetensors", "variant", "weights_only"),
        # Taken without effect.
        *("from_flax", "from_tf", "low_cpu_mem_usage", "mirror", "offload_state_dict"),
    )
)

# These decide which model it is, and cannot be kept in a recipe, like changed fields of the config.
_IN_MEMORY = frozenset(("adapter_kwargs", "adapter_name", "config", "fusion_config", "key_mapping", "state_dict"))

_SHORT_DTYPES = {"bfloat": "bfloat16", "fp64": "float64", "fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}

Caller = Callable[..., Any] | None
"""The function or class that was called, whose parameters a misspelt keyword may mean; None for `from_pretrained`."""


def refuse_misspelt(given: Mapping[str, Any], caller: Caller) -> None:
    """Refuse keywords that are meant for `caller` or for `generate()`, without a look at any model."""
    own, settings = _parameters(caller), _settings()
    for name, value in given.items():
        if name not in LOAD_ARGUMENTS and (_nearest(name, own) or _role_in(name, own) or name in settings):
            raise unknown_keyword(name, value, caller)


def deciding(given: Mapping[str, Any]) -> dict[str, Any]:
    """Those of a member's load arguments that decide which model it is, as JSON where that can be.

    Left out are those that say where it is found and run: dtype, device, attention, cache folder, token, …
    """
    kept = {}
    for name, value in given.items():
        if value is None or name[0] == "_" or name in LOAD_ARGUMENTS - LOAD_KEYS.keys() - _IN_MEMORY:
            continue
        if name in LOAD_ARGUMENTS and not value:  # an empty subfolder, trust_remote_code=False
            continue
        plain = value.to_dict() if name == "quantization_config" and hasattr(value, "to_dict") else value
        try:
            kept[name] = json.loads(json.dumps(plain, allow_nan=False))
        except (TypeError, ValueError):
            kept[name] = value
    return kept


def refuse_unknown(reference: MemberRef, given: Mapping[str, Any], caller: Caller) -> None:
    """Refuse keywords that neither `from_pretrained` nor the member's config knows, before weights are downloaded."""
    if "output_loading_info" in given:
        raise InputError.of(
            "output_loading_info",
            expected="no such argument",
            got=repr(given["output_loading_info"]),
            remedy="Leave it out: members without all their weights are refused by themselves.",
        )
    unknown = {name: value for name, value in given.items() if name not in LOAD_ARGUMENTS and name[0] != "_"}
    if "revision" in unknown:
        raise unknown_keyword("revision", unknown["revision"], caller)
    if not unknown or given.get("trust_remote_code"):  # a model's own code may take keywords of its own
        return
    hub = {name: given[name] for name in HUB_ARGUMENTS if name in given} | {"trust_remote_code": False}
    try:
        _, unused = AutoConfig.from_pretrained(
            reference.id, revision=reference.revision or "main", return_unused_kwargs=True, **hub, **unknown
        )
    except (OSError, ValueError):  # refused by name where the member is loaded
        return
    for name in unknown:
        if name in unused:
            raise unknown_keyword(name, unknown[name], caller)


def unknown_keyword(name: str, value: Any, caller: Caller) -> ProxytuneError:
    """The error about a keyword that nobody knows, with the nearest that somebody does."""
    own, text = _parameters(caller), shown(value)
    # A model's `repr` has a line for each layer.
    said = f"{name}={shown(value, 80)}" if "\n" not in text else f"{name}, a {type(value).__name__}"
    near = _nearest(name, own) or _role_in(name, own)
    if not near and name not in _settings():
        near = _nearest(name, sorted(LOAD_ARGUMENTS - {"torch_dtype"}))
    if name.startswith("load_in_"):
        remedy = f"Pass quantization_config=transformers.BitsAndBytesConfig({said})."
    elif caller is None and name == "alpha":
        remedy = f"Set model.{name} afterwards."
    elif near:
        remedy = f"Did you mean {near[0]}?"
    elif name in _settings():
        remedy = f"It is a setting of generate(): call model.generate(…, {said})."
    else:
        remedy = "It is passed on to from_pretrained, which does not know it: leave it out."
    called = [] if caller is None else [f"{getattr(caller, '__name__', caller)} ({', '.join(own)})"]
    return InputError.of(
        name, expected=f"an argument of {' or '.join([*called, 'from_pretrained'])}", got=said, remedy=remedy
    )


def refuse_dtype(given: Mapping[str, Any]) -> None:
    """Refuse as a dtype what is none, nor the name of one; transformers ends in an AttributeError there."""
    for name in ("dtype", "torch_dtype"):
        word = given.get(name)
        if isinstance(word, torch.dtype | Mapping | None) or word == "auto":
            continue
        if isinstance(word, str) and isinstance(getattr(torch, word, None), torch.dtype):
            continue
        names = sorted(n for n, value in vars(torch).items() if isinstance(value, torch.dtype))
        text = str(word).lower().removeprefix("torch.")
        near = [_SHORT_DTYPES[text]] if text in _SHORT_DTYPES else _nearest(text, names)
        raise InputError.of(
            name,
            expected="'auto', or the name of a dtype of torch, such as 'bfloat16'",
            got=shown(word, 80),
            remedy=f"Did you mean {near[0]!r}?" if near else "Pass one of these.",
        )


def _parameters(caller: Caller) -> list[str]:
    if caller is None:
        return []
    kinds = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    return [name for name, found in inspect.signature(caller).parameters.items() if found.kind not in kinds]


def _settings() -> Mapping[str, Any]:
    settings: dict[str, Any] = GenerationConfig().to_dict()
    return settings


def _role_in(name: str, own: Sequence[str]) -> list[str]:
    """The role that a name of other packages begins with, such as `anti_expert_name_or_path`."""
    return [role for role in ROLES if role in own and name.lower().replace("_", "").startswith(role)]


def _nearest(word: str, names: Sequence[str]) -> list[str]:
    return difflib.get_close_matches(word.lower(), names, n=1, cutoff=0.72)
