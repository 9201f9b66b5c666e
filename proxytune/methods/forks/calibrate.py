"""Measure a model's token entropies, and derive its fork threshold with intervals."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from proxytune.errors import CalibrationWarning, InputError

if TYPE_CHECKING:
    import numpy as np
    from transformers import PreTrainedTokenizerBase

    Entropies = np.ndarray[Any, np.dtype[np.float64]]

__all__ = ["bootstrap", "forced_entropies", "report", "sampled_entropies"]


_QUANTILES = (0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 0.8, 0.9, 0.95, 0.99)
_PIECE = 256  # tokens of a given text per forward pass: all their logits are in memory at once
_REPEATS = 1000


def sampled_entropies(
    model: Any, encoded: Any, temperature: float, *, samples: int = 1, max_new_tokens: int = 128
) -> list[Entropies]:
    """Sample continuations of a batch, and return the entropies of their tokens.

    `encoded` has `input_ids` and `attention_mask`, `[B, T]`, padded at the left. Of the model's own generation settings
    only the special tokens count. Per sample `[n]`, float64, nats; n ≥ 1, an EOS token included.
    """
    from transformers import GenerationConfig

    from proxytune.methods.forks.processor import ForkSamplingLogitsProcessor

    own = model.generation_config
    special = {name: getattr(own, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    if special["pad_token_id"] is None:
        ends = special["eos_token_id"]
        special["pad_token_id"] = ends[0] if isinstance(ends, list) else ends
    # At temperature 1 everywhere it changes nothing, and records the entropies.
    recorder = ForkSamplingLogitsProcessor(
        0.0, exec_temperature=1.0, temperature=temperature, eos_token_id=special["eos_token_id"], record=True
    )
    # generate() takes unset settings from the model's own: penalties there would change the entropies.
    model.generation_config = GenerationConfig(**special)
    try:
        with recorder.attach(model):
            model.generate(
                **encoded,
                do_sample=True,
                temperature=temperature,
                top_k=0,
                num_return_sequences=samples,
                max_new_tokens=max_new_tokens,
            )
    finally:
        model.generation_config = own
    rows = recorder.record().entropy.double().cpu().numpy()  # [B * samples, n], NaN after the end
    return [row[: int((row == row).sum())] for row in rows]


def forced_entropies(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    advance: Callable[[int], object] = lambda _: None,
) -> list[Entropies]:
    """Read given texts, and return the entropies of the model's distributions before each token but the first.

    `advance(1)` is called after each text. Texts of a single token give no entropies. Per text `[n]`, float64, nats.
    """
    import torch

    from proxytune.models.members.cache_name import CACHE, cache_of
    from proxytune.ops.entropy import entropy

    found = []
    for text in texts:
        ids = tokenizer(text, return_tensors="pt")["input_ids"].to(model.device)[:, :-1]  # the last predicts nothing
        past, pieces = None, []
        with torch.no_grad():
            for piece in ids.split(_PIECE, dim=1) if ids.shape[1] else ():
                out = model(piece, **{CACHE: past}, use_cache=True)
                past = cache_of(out)
                pieces.append(entropy(out.logits[0]).double().cpu())
        if pieces:
            found.append(torch.cat(pieces).numpy())
        advance(1)
    return found


def report(found: Sequence[Entropies], share: float) -> dict[str, Any]:
    """Derive the threshold above which `share` of the tokens lie, and its uncertainty; `found` has one array per text.

    Returns:
        JSON values: `nats`, the threshold; `interval`, its 95 % interval; `realised_share` of these tokens above it,
            and
        `share_interval`, what to expect of other texts of the kind (both intervals null for one text only); `tokens`;
        `texts`; `mean`, in nats; `quantiles`, level → nats.

    Raises:
        InputError: If there are no tokens, too few for the quantile, or some have no entropy.

    Warns:
        CalibrationWarning: If the share may be more than 2 points off, because of ties or too little text.
    """
    import numpy as np

    from proxytune.methods.forks.threshold import ForkThreshold

    tokens = np.concatenate(found) if found else np.empty(0)
    if not len(tokens):
        raise InputError.of(
            "calibration",
            expected="some tokens",
            got="0 tokens",
            remedy="Give prompts, or texts of more than one token.",
        )
    nats = ForkThreshold.calibrated(tokens, share).nats
    interval, shares = bootstrap(found, share, nats)
    realised = float((tokens > nats).mean())
    if shares is None or max(realised - shares[0], shares[1] - realised) > 0.02:
        given = "one text only" if shares is None else f"{shares[0]:.1%} to {shares[1]:.1%} of other texts' tokens"
        warnings.warn(
            f"{len(tokens)} tokens in {len(found)} texts do not settle the share to 2 points: {given}. Calibrate on "
            "more prompts.",
            CalibrationWarning,
            stacklevel=2,
        )
    return {
        "nats": nats,
        "interval": interval,
        "realised_share": realised,
        "share_interval": shares,
        "tokens": len(tokens),
        "texts": len(found),
        "mean": float(tokens.mean()),
        "quantiles": {f"{q:g}": float(np.quantile(tokens, q)) for q in _QUANTILES},
    }


def bootstrap(
    found: Sequence[Entropies], share: float, nats: float
) -> tuple[list[float], list[float]] | tuple[None, None]:
    """95 % intervals of the threshold, in nats, and of the share above `nats`; None and None for one text only.

    Whole texts are resampled: tokens of one text are alike, so resampling tokens would give too narrow intervals.
    """
    import numpy as np

    if len(found) < 2:
        return None, None
    rng = np.random.default_rng(0)
    values = np.concatenate(found)
    order = np.argsort(values, kind="stable")
    values, text = values[order], np.repeat(np.arange(len(found)), [len(f) for f in found])[order]
    above = np.searchsorted(values, nats, side="right")
    thresholds, shares = [], []
    for _ in range(_REPEATS):
        weight = np.bincount(rng.integers(len(found), size=len(found)), minlength=len(found))[text]
        below = weight.cumsum()
        thresholds.append(values[np.searchsorted(below, (1 - share) * below[-1])])
        shares.append(weight[above:].sum() / below[-1])
    return np.quantile(thresholds, [0.025, 0.975]).tolist(), np.quantile(shares, [0.025, 0.975]).tolist()
