"""Watches one `generate()` of a model for its log: transformers' own loops tell nobody what they decide."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch

from proxytune.generation.call_log import CallLog, ShownTokens, log_now
from proxytune.generation.method_hooks import MethodHook
from proxytune.models.combined_logits import showing
from proxytune.models.ensemble import Ensemble

__all__ = ["Seen", "Watch"]


class Seen:
    """What `generate()` made of its arguments.

    Attributes:
        config: The generation config.
        mask: The mask that it inferred; None if one was given.
    """

    config: Any = None
    mask: torch.Tensor | None = None


class Watch:
    """Hooks into one call of `generate()`, for as long as it runs: what it prepares, its tokens, and its rows.

    Another thread may run the same model meanwhile: it is let through.
    """

    def __init__(self, log: CallLog, loop: Any, look: Callable[[Any], None]) -> None:
        """Watch a call with this loop; `look` is shown the generation config before the first pass, and may refuse."""
        self._log, self._seen, self._look = log, Seen(), look
        self._composed = Ensemble.of(log.model).composed
        # A loop that logs needs no help, but where a processor steers a plain model.
        self._quiet = self._composed and getattr(loop, "logs", False)
        self._hooks: list[MethodHook] = []
        self._handle: Any = None
        self._showing = ExitStack()

    def __enter__(self) -> Seen:
        model, log, seen = self._log.model, self._log, self._seen

        def criteria(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            found = original(*args, **kwargs)
            if log_now() is not log:
                return found
            seen.config = args[0] if args else kwargs["generation_config"]
            self._look(seen.config)
            return found if self._quiet else ShownTokens(found, log)

        def mask(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            found = original(*args, **kwargs)
            if log_now() is log:
                seen.mask = found
            return found

        def prefill(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            if log_now() is not log:
                return original(*args, **kwargs)
            log.prefilling = True
            try:
                return original(*args, **kwargs)
            finally:
                log.prefilling = False

        stand_ins = {
            "_get_stopping_criteria": criteria,
            "_prepare_attention_mask_for_generation": mask,
            "_prefill": prefill,
        }
        self._hooks = [MethodHook(model, name, stand_in) for name, stand_in in stand_ins.items()]
        if self._composed:
            self._showing.enter_context(showing(model, log.watch))
        else:
            self._handle = model.register_forward_hook(self._shown)
        return seen

    def _shown(self, model: Any, args: Any, outputs: Any) -> None:
        logits = getattr(outputs, "logits", None)
        if torch.compiler.is_compiling() or log_now() is not self._log:
            return
        if not isinstance(logits, torch.Tensor) or logits.ndim != 3:
            return
        row = logits[:, -1]
        self._log.watch([row], lambda: ([row], (1.0,)), usable=row.shape[1])

    def __exit__(self, *failure: Any) -> None:
        for hook in reversed(self._hooks):
            hook.take()
        if self._handle is not None:
            self._handle.remove()
        self._showing.close()
