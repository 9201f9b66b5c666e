"""Is a tiny model right by itself? Each way to run it against one pass over the whole text, without cache or padding.

What a model gets wrong here, it gets wrong in transformers without us.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from families.tiny_models import BOS, PAD
from transformers import GenerationConfig, PreTrainedModel

from proxytune.models.members.cache_name import CACHE, argument_of, cache_of

LENGTH, PROMPT, PADDING = 20, 12, 5
TOLERANCE = 1e-3  # of logits whose spread is about 1; right models stay below 1e-4, wrong ones are off by .1 and more


def settled(model: PreTrainedModel) -> PreTrainedModel:
    """A model whose texts end by their length alone, and have no padding token inside, which some do not count."""
    model.generation_config = GenerationConfig(pad_token_id=PAD, bos_token_id=BOS)
    model.register_forward_hook(_without_padding)
    return model


def _without_padding(model: Any, args: Any, output: Any) -> None:
    output.logits[..., PAD] = -30.0


def apart(got: torch.Tensor, want: torch.Tensor) -> float:
    """The largest difference of logits `[…, V]`, in units of their size or spread; NaN counts as 9."""
    size = torch.maximum(want.abs(), want.std(-1, keepdim=True))
    difference = float(((got - want).abs() / size).max())
    return difference if difference == difference else 9.0


class Alone:
    """The passes over one model."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.ids = torch.randint(3, 100, (2, LENGTH), generator=torch.Generator().manual_seed(3))
        self.want = torch.stack([self.run(row[None])[0] for row in self.ids])

    def run(self, ids: torch.Tensor, cache: Any = None, mask: torch.Tensor | None = None, **more: Any) -> torch.Tensor:
        given: dict[str, Any] = {"use_cache": cache is not None or bool(more.get("use_cache")), **more}
        if cache is not None:
            given[argument_of(self.model) or CACHE] = cache
        if mask is not None:
            given["attention_mask"] = mask
        self.out = self.model(ids, **given)
        return self.out.logits.float()

    def several(self) -> float:
        """The prompt, then all that follows in one pass."""
        first = self.run(self.ids[:, :PROMPT], use_cache=True)
        second = self.run(self.ids[:, PROMPT:], cache_of(self.out))
        return apart(torch.cat([first, second], 1), self.want)

    def single(self) -> float:
        """The prompt, then one token at a time."""
        rows = [self.run(self.ids[:, :PROMPT], use_cache=True)]
        cache = cache_of(self.out)
        for i in range(PROMPT, LENGTH):
            rows.append(self.run(self.ids[:, i : i + 1], cache))
        return apart(torch.cat(rows, 1), self.want)

    def short(self) -> float:
        """A prompt of two tokens, then one token at a time."""
        rows = [self.run(self.ids[:, :2], use_cache=True)]
        cache = cache_of(self.out)
        for i in range(2, LENGTH):
            rows.append(self.run(self.ids[:, i : i + 1], cache))
        return apart(torch.cat(rows, 1), self.want)

    def causal(self) -> float:
        """Without what follows."""
        return max(apart(self.run(self.ids[:, :n]), self.want[:, :n]) for n in (3, PROMPT))

    def batched(self) -> float:
        """Both rows in one pass."""
        return apart(self.run(self.ids), self.want)

    def padded(self) -> float:
        """Left-padded, without a cache."""
        ids, mask = self._left()
        return apart(self.run(ids, mask=mask, **self._positions(mask))[1, PADDING:], self.want[1, :PROMPT])

    def padded_cache(self) -> float:
        """Left-padded, then one token at a time, as `generate()` runs it: against each token's own whole text."""
        ids, mask = self._left()
        follow = self.ids[1:, PROMPT:].expand(2, -1)
        rows = [self.run(ids, mask=mask, use_cache=True, **self._positions(mask))]
        cache = cache_of(self.out)
        for i in range(follow.shape[1]):
            mask = torch.cat([mask, mask.new_ones(2, 1)], 1)
            position = {k: v[:, -1:] for k, v in self._positions(mask).items()}
            rows.append(self.run(follow[:, i : i + 1], cache, mask, **position))
        return apart(torch.cat(rows, 1)[1, PADDING:], self.want[1])

    def reordered(self) -> float:
        """Rows of the cache change places, then one token at a time."""
        self.run(self.ids[:, :PROMPT], use_cache=True)
        cache = cache_of(self.out)
        cache.reorder_cache(torch.tensor([1, 0]))
        ids, rows = self.ids.flip(0), []
        for i in range(PROMPT, LENGTH):
            rows.append(self.run(ids[:, i : i + 1], cache))
        return apart(torch.cat(rows, 1), self.want.flip(0)[:, PROMPT:])

    def selected(self) -> float:
        """Rows of the cache are picked by `batch_select_indices`, then one token at a time."""
        self.run(self.ids[:, :PROMPT], use_cache=True)
        cache = cache_of(self.out)
        cache.batch_select_indices(torch.tensor([1]))
        rows = [self.run(self.ids[1:, i : i + 1], cache) for i in range(PROMPT, LENGTH)]
        return apart(torch.cat(rows, 1), self.want[1:, PROMPT:])

    def repeated(self) -> float:
        """Rows of the cache are repeated, then one token at a time."""
        self.run(self.ids[1:, :PROMPT], use_cache=True)
        cache = cache_of(self.out)
        cache.batch_repeat_interleave(2)
        ids = self.ids[1:].expand(2, -1)
        rows = [self.run(ids[:, i : i + 1], cache) for i in range(PROMPT, LENGTH)]
        return apart(torch.cat(rows, 1), self.want[1:, PROMPT:].expand(2, -1, -1))

    def cropped(self) -> float:
        """The cache is cut back by three tokens of a wrong text."""
        ids = self.ids.clone()
        ids[:, PROMPT - 3 : PROMPT] = 101
        self.run(ids[:, :PROMPT], use_cache=True)
        cache = cache_of(self.out)
        cache.crop(-3)
        rows = [self.run(self.ids[:, i : i + 1], cache) for i in range(PROMPT - 3, LENGTH)]
        return apart(torch.cat(rows, 1), self.want[:, PROMPT - 3 :])

    def greedy(self) -> float:
        """`generate()` of a padded batch against the row alone without a cache."""
        return self._generated()

    def static(self) -> float:
        """The same on a static cache."""
        return self._generated(cache_implementation="static")

    def beams(self) -> float:
        """Beams with a cache and without."""
        out = [
            self.model.generate(self.ids[:, :PROMPT], num_beams=3, max_new_tokens=6, do_sample=False, use_cache=use)
            for use in (True, False)
        ]
        return 0.0 if torch.equal(*out) else 9.0

    def _generated(self, **more: Any) -> float:
        ids, mask = self._left()
        show = {"output_logits": True, "return_dict_in_generate": True}
        out = self.model.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False, **show, **more)
        worst = 0.0
        for row, skip in ((0, 0), (1, PADDING)):
            for step, logits in enumerate(out.logits):
                text = out.sequences[row, skip : ids.shape[1] + step]
                worst = max(worst, apart(logits[row], self.run(text[None])[0, -1]))
        return worst

    def _left(self) -> tuple[torch.Tensor, torch.Tensor]:
        ids = torch.zeros(2, PROMPT + PADDING, dtype=torch.long)
        mask = torch.ones_like(ids)
        ids[0] = self.ids[0, : PROMPT + PADDING]
        ids[1, PADDING:], mask[1, :PADDING] = self.ids[1, :PROMPT], 0
        return ids, mask

    def _positions(self, mask: torch.Tensor) -> dict[str, torch.Tensor]:
        takes = "position_ids" in inspect.signature(self.model.forward).parameters
        return {"position_ids": (mask.cumsum(-1) - 1).clamp(min=0)} if takes else {}


CHECKS = (
    *("causal", "batched", "single", "several", "short", "padded", "padded_cache", "greedy"),
    *("reordered", "selected", "repeated", "beams", "cropped", "static"),
)


@torch.no_grad()
def check(model: PreTrainedModel) -> dict[str, str]:
    """What a model gets wrong or cannot do by itself, by the name of the check; nothing for a right one."""
    found: dict[str, str] = {}
    try:
        alone = Alone(settled(model))
    except Exception as error:
        return {"run": _said(error)}
    for name in CHECKS:
        one: Callable[[], float] = getattr(alone, name)
        try:
            off = one()
        except Exception as error:
            found[name] = _said(error)
            continue
        if off > TOLERANCE:
            found[name] = f"off by {off:.2g}"
    return found


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
