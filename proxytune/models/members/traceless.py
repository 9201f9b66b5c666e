"""Which models can run under `torch.inference_mode()` with nobody seeing a difference.

It saves a sixth of the host's time of a small model's pass. But its tensors cannot be saved for backward later on, nor
written to outside of it. So no hook may see them, and no module may keep them: a hook may collect activations to train
on, and frequencies that a model sets itself are buffers that DistributedDataParallel writes to.
"""

from __future__ import annotations

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
        if any(not only_looks(hook) for name in _HOOKS if (hooks := own[name]) for hook in hooks.values()):
            return False
        if "forward" in own or own.get("_compiled_call_impl") is not None or sets_frequencies(own):
            return False
        kind = type(module)
        if not kind.__module__.startswith(_KNOWN) or hasattr(kind, "make_weights"):  # a table of positions that grows
            return False
        modules += [child for child in own["_modules"].values() if child is not None]
    return True


def _hooks_of_all() -> bool:
    """Whether there are hooks on all modules of the process."""
    return any(getattr(of_torch, f"_global{name}", None) for name in _HOOKS)
