"""Texts read in parts: the members’ logits of scored positions, each once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from transformers.cache_utils import DynamicCache

from proxytune import ops
from proxytune.errors import NumericalError
from proxytune.models.ensemble import Ensemble
from proxytune.models.members.cache_name import CACHE
from proxytune.models.members.composite_cache import empty_cache
from proxytune.models.members.long_rope import is_beyond
from proxytune.models.members.masks import positions_of
from proxytune.models.members.member import Member
from proxytune.models.own_prompts import PROMPTS, OwnPrompts
from proxytune.models.scored_texts import Texts
from proxytune.models.weighing import Weighing
from proxytune.ops.checks import DTYPES
from proxytune.ops.combination import Combination, Weights

__all__ = ["PART", "PART_BYTES", "Part", "parts_of_batch"]

PART = 1024
"""Rows × positions that a pass reads at most: enough to keep a GPU busy."""


PART_BYTES = 1 << 28
"""What the members' logits of a pass may take, in bytes; one position of each row is always scored."""


@dataclass(frozen=True, eq=False)
class Part:
    """The members' logits where some tokens of a batch are predicted; N positions of one or more texts.

    Attributes:
        members: Raw logits `[N, V_i]` of each member, the base first, on one device; None for one that did not run.
        usable: How many of the base's columns can be drawn.
        targets: `[N]`, int64: the token that stands there.
        texts: `[N]`, int64: the number of its text.
        steps: `[N]`, int64: which scored token of its text it is, from 0.
        scored: `[N]`, bool: False where a shorter text has a token that is not scored, or padding; `steps` is 0 there.
        names: What errors call the texts.
    """

    members: list[torch.Tensor | None]
    usable: int
    targets: torch.Tensor
    texts: torch.Tensor
    steps: torch.Tensor
    scored: torch.Tensor
    names: Sequence[str]

    def logprobs(self, weighing: Weighing | None, temperature: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
        """Score the targets under a formula over the members.

        Args:
            weighing: What the formula makes of the members' rows; None for a plain model.
            temperature: What the combined logits are divided by, above 0.

        Returns:
            `[n]`, float64, nats, of the n scored positions; and `[n]`, bool, whether the target is the likeliest token.

        Raises:
            NumericalError: If a scored position has no distribution: NaN or +inf, or −inf for every token.
        """
        rows, weights = _weighed(weighing, self.members, self.steps)
        if temperature != 1.0:
            weights = _divided(weights, temperature)
        found = ops.step([rows[0][:, : self.usable], *rows[1:]], weights, want=("lse", "argmax"))
        assert found.lse is not None
        assert found.argmax is not None
        lse = found.lse[self.scored]
        if not bool(lse.isfinite().all()):
            worst = int((~lse.isfinite()).int().argmax())
            text, step = int(self.texts[self.scored][worst]), int(self.steps[self.scored][worst])
            raise NumericalError.of(
                f"{self.names[text]}, scored token {step}",
                expected="logits with a distribution",
                got=f"a log-sum-exp of {float(lse[worst])}: NaN or +inf among them, or −inf for every token",
                remedy="Run the members in bfloat16 or float32 rather than float16, and look at each one's own logits "
                "for this text (model.member_logits).",
            )
        # The combined logit of one column is its log-sum-exp. A column that a member lacks is −inf there: no shift.
        columns = [_column(z, self.targets) for z in rows]
        targets = ops.step(columns, weights, want=("lse",)).lse
        assert targets is not None
        # NaN and +inf there would be in the row too; −inf stays.
        return (targets[self.scored].double() - lse.double()), (found.argmax == self.targets)[self.scored]

    def open(self, weighing: Weighing) -> torch.Tensor:
        """`[n]`, bool: at which of the scored positions the formula's gate is open; at all without a gate."""
        base = self.members[0]
        assert base is not None
        return weighing.open(base)[self.scored]


def _weighed(
    weighing: Weighing | None, members: Sequence[torch.Tensor | None], steps: torch.Tensor
) -> tuple[list[torch.Tensor], Weights]:
    if weighing is None:
        return [x for x in members if x is not None], (1.0,)
    return weighing(members, steps)


def _divided(weights: Weights, temperature: float) -> Weights:
    """Weights of logits over a temperature."""
    if isinstance(weights, Combination):
        divided = _divided(weights.weights, temperature)
        assert not isinstance(divided, Combination)
        return replace(weights, weights=divided)
    return weights / temperature if isinstance(weights, torch.Tensor) else tuple(w / temperature for w in weights)


def _column(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """`[N, 1]`: each row's logit of its id; −inf past the end."""
    there = ids < logits.shape[1]
    return logits.gather(1, torch.where(there, ids, 0)[:, None]).masked_fill(~there[:, None], -torch.inf)


def parts_of_batch(
    ensemble: Ensemble, members: Sequence[Member], batch: list[int], texts: Texts, everyone: bool
) -> Iterator[Part]:
    """The parts of a batch of texts, in order; members read on from their caches."""
    device, count = members[0].device, len(batch)
    # Column c predicts column c + 1, so the last one is not read. Texts end together: each row's scored columns are
    # its last ones.
    end = max(len(texts.row(m.role, text)) for m in members for text in batch) - 1
    inputs = texts.padded("base", batch, end + 1)[0].to(device)
    begins = torch.tensor([end - texts.counts[text] for text in batch], device=device)  # [B], the first scored column
    first = end - max(texts.counts[text] for text in batch)
    passes = _Passes(ensemble, members, texts, batch, end, everyone)
    most = max(1, min(PART, PART_BYTES // _bytes_of_position(members)) // count)  # scored columns of a pass
    owners = torch.tensor(batch, device=device)
    start = first if passes.whole else 0
    while start < end:
        stop = min(end, start + max(1, PART // count), max(start, first) + most)
        kept = stop - max(start, first)
        logits = passes.read(start, stop, max(1, kept))
        start = stop
        if kept <= 0:
            continue
        columns = torch.arange(stop - kept, stop, device=device)
        scored = columns >= begins[:, None]  # [B, kept]
        members_rows: list[torch.Tensor | None] = []
        while logits:  # one after the other, so that copies to another device do not add up
            z = logits.pop(0)
            members_rows.append(None if z is None else _rows_on(device, z))
        base = members_rows[0]
        assert base is not None
        usable = ensemble.usable(base.shape[1])
        del base, z
        yield Part(
            members_rows,
            usable,
            inputs[:, columns + 1].flatten(),
            owners[:, None].expand(-1, kept).flatten(),
            (columns - begins[:, None]).clamp(min=0).flatten(),
            scored.flatten(),
            texts.names,
        )
        del members_rows


def _bytes_of_position(members: Sequence[Member]) -> int:
    return sum(m.rows * max(2, getattr(m.model, "dtype", torch.float32).itemsize) for m in members)


def _rows_on(device: torch.device, logits: torch.Tensor) -> torch.Tensor:
    """`[B, K, V]` as rows `[B · K, V]` on a device, in a dtype that `ops.step` takes; a view where it can be one."""
    dtype = logits.dtype if logits.dtype in DTYPES else torch.float32
    return logits.to(device, dtype, non_blocking=device.type != "cpu").flatten(0, 1)


class _Passes:
    """The passes over one batch of B texts, each after the last one.

    Attributes:
        whole: Whether each of them reads the whole text, since no cache serves.
    """

    def __init__(
        self, ensemble: Ensemble, members: Sequence[Member], texts: Texts, batch: list[int], end: int, everyone: bool
    ) -> None:
        """Prepare to read the first `end` columns of texts that end one column later."""
        self._ensemble, self._members = ensemble, members
        device = members[0].device
        of = {
            role: [x[:, :end].to(device) for x in texts.padded(role, batch, end + 1)] for role in ("base", *texts.own)
        }
        self._ids, mask = of.pop("base")
        self._mask = None if bool(mask.all()) else mask
        # Beyond a switch, all positions of a text have other frequencies: a part would not be what the text is.
        lengths = {m.role: max(len(texts.row(m.role, text)) for text in batch) - 1 for m in members}
        self.whole = any(is_beyond(m.switch, lengths[m.role], None) for m in members)
        self._cache = None
        if not self.whole:
            composed = ensemble.composed
            self._cache = DynamicCache(config=ensemble.model.config) if composed else empty_cache(members[0].config)
        self._options = {**ensemble.request(everyone=everyone), "use_cache": not self.whole}
        if of:
            ids, masks = ({role: pair[i] for role, pair in of.items()} for i in (0, 1))
            self._options[PROMPTS] = OwnPrompts(ids, masks)

    @torch.no_grad()
    def read(self, start: int, stop: int, kept: int) -> list[torch.Tensor | None]:
        """Read columns `start` to `stop`, and give each member's logits `[B, kept, V_i]` of the last `kept`."""
        ids, mask, keep = self._ids[:, start:stop], self._mask, kept
        if self.whole:
            ids = self._ids
            keep = torch.arange(stop - kept, stop, device=ids.device)  # type: ignore[assignment]
        elif mask is not None:
            mask = mask[:, :stop]
        if not self._ensemble.composed:
            (member,) = self._members
            positions = None if mask is None else positions_of(mask)[:, -ids.shape[1] :]
            return [
                member.forward(ids, attention_mask=mask, position_ids=positions, cache=self._cache, logits_to_keep=keep)
            ]
        outputs = self._ensemble.model(
            ids,
            attention_mask=mask,
            logits_to_keep=keep,
            **{CACHE: self._cache},
            is_first_iteration=start == 0,
            **self._options,
        )
        return self._ensemble.logits(outputs)
