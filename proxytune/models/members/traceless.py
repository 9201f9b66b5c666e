"""Which models can run under `torch.inference_mode()` with nobody seeing a difference.

It saves a sixth of the host's time of a small model's pass. But its tensors cannot be saved for backward later on, nor
written to outside of it. So no hook may see them, and no module may keep them: a hook may collect activations to train
on, and frequencies that a model sets itself are buffers that DistributedDataParallel writes to.
"""

from __future__ import annotations

import functools
from collections.abc import Hashable
from typing import cast

from torch import nn
from torch.nn.modules import module as of_torch

from proxytune.models.members.fingerprint import only_looks, sets_frequencies

__all__ = ["is_traceless"]

_KNOWN = ("torch.nn.modules.", "transformers.")
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def is_traceless(model: nn.Module) -> bool:
    """Whether the tensors of a pass leave a model by its outputs and its cache alone.

    So they do if it is made of transformers' and torch's modules, not quantised and not compiled, without hooks.
    """
    if getattr(model, "hf_quantizer", None) is not None or _hooks_of_all():
        return False
    modules: list[nn.Module] = [model]
    for module in modules:  # grows meanwhile
        own = vars(module)
        for name in _HOOKS:
            if own[name] and not all(map(only_looks, own[name].values())):
                return False
        if (
            "forward" in own
            or own.get("_compiled_call_impl") is not None
            or not _is_known(cast(Hashable, type(module)))
        ):
            return False
        if "rope_type" in own and sets_frequencies(own):
            return False
        if own["_modules"]:
            modules += [child for child in own["_modules"].values() if child is not None]
    return True


@functools.cache
def _is_known(kind: Hashable) -> bool:
    """Whether a class of modules is transformers' or torch's, and has no table of positions that grows."""
    return kind.__module__.startswith(_KNOWN) and not hasattr(kind, "make_weights")


def _hooks_of_all() -> bool:
    """Whether there are hooks on all modules of the process."""
    return any(getattr(of_torch, f"_global{name}", None) for name in _HOOKS)
