"""Exact teacher-forced log-probabilities of given texts, under any causal LM, composed or plain.

Texts are read in parts, each of which goes on from the cache of the one before it, and only scored positions get
logits: the members' logits `[B, T, V]` of whole texts never exist. What one part needs does not depend on the texts'
length, but for the members' caches.

Other weights of the members need no other pass: `parts_of` gives each part's logits once, for any number of formulas
(`proxytune.search.tuning`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from transformers.cache_utils import DynamicCache

from proxytune import ops
from proxytune.errors import InputError, NumericalError, UnsupportedModeError, UnsupportedModelError
from proxytune.models.ensemble import Ensemble
from proxytune.models.members.cache_name import CACHE
from proxytune.models.members.composite_cache import empty_cache
from proxytune.models.members.long_rope import is_beyond
from proxytune.models.members.member import Member, check_ids, positions_of
from proxytune.models.own_prompts import PROMPTS, OwnPrompts, roles_with_prompts
from proxytune.models.weighing import Weighing
from proxytune.ops.checks import DTYPES
from proxytune.ops.combination import Combination, Weights
from proxytune.validation import Ids, token_ids, whole

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Part", "Prompts", "Scores", "check_texts", "encode_pair", "parts_of", "score"]

PART = 1024
"""Rows × positions that a pass reads at most: enough to keep a GPU busy."""

Prompts = Sequence[Ids | torch.Tensor] | Mapping[str, Sequence[Ids | torch.Tensor]]
"""One prompt for each text; or role → prompts, for members that read their own."""

PART_BYTES = 1 << 28
"""What the members' logits of a pass may take, in bytes; one position of each row is always scored."""


@dataclass(frozen=True, eq=False)
class Scores:
    """What a model makes of R texts, on the CPU.

    Attributes:
        logprobs: For each text `[n]`, float64, nats: the log-probability of each scored token, given all tokens before
            it. −inf for a token that the model forbids.
        likeliest: For each text `[n]`, bool: whether the token is the one that greedy decoding would have taken.
    """

    logprobs: tuple[torch.Tensor, ...]
    likeliest: tuple[torch.Tensor, ...]

    @property
    def sums(self) -> torch.Tensor:
        """`[R]`, float64, nats: the log-probability of each text's scored tokens together."""
        return torch.stack([x.sum() for x in self.logprobs])

    @property
    def counts(self) -> torch.Tensor:
        """`[R]`, int64: how many tokens of each text were scored."""
        return torch.tensor([len(x) for x in self.logprobs])

    @property
    def greedy(self) -> torch.Tensor:
        """`[R]`, bool: whether greedy decoding would have written all scored tokens (lm-eval's `is_greedy`)."""
        return torch.stack([x.all() for x in self.likeliest])

    @property
    def perplexity(self) -> float:
        """exp(−mean log-probability) over the scored tokens of all texts; inf if one of them is forbidden."""
        return float(torch.exp(-self.sums.sum() / self.counts.sum()))


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


def score(
    model: Any,
    texts: Sequence[Ids | torch.Tensor],
    *,
    prompts: Prompts | None = None,
    batch_size: int = 8,
    names: Sequence[str] | None = None,
) -> Scores:
    """Score texts under a model, composed or plain: log-probabilities of their tokens, and the perplexity.

    Args:
        model: A `ProxyTunedModel`, or any decoder-only causal LM of transformers; in evaluation mode.
        texts: R texts as token ids. Of a text without a prompt the first token is not scored: nothing predicts it.
            Put the BOS token first where the model was trained with one.
        prompts: R prompts as token ids, one for each text, which are read and not scored; an empty one is none. For a
            model with members that read a prompt of their own: role → R prompts, "base" among them.
        batch_size: How many texts are read at once. It decides memory and speed; results differ in rounding alone.
        names: What errors call the texts [text 0, text 1, …].

    Returns:
        The scores, in the order of the texts.

    Raises:
        InputError: If a text has nothing to score, is too long for a member, or has an id that a member cannot embed;
            if there are not as many prompts as texts, or not for all members that read their own; if the model is in
            training mode.
        NumericalError: If a position has no distribution.
        UnsupportedModelError: If the model is an encoder-decoder, or cannot be a member.

    The log-probabilities are those of lm-evaluation-harness (`loglikelihood` of 0.4.13) for the same ids: no sampling
    setting changes them, and arithmetic on logits is float32.
    """
    found: list[list[torch.Tensor]] = [[] for _ in texts]
    likeliest: list[list[torch.Tensor]] = [[] for _ in texts]
    weighing = Ensemble.of(model).weighing
    for part in parts_of(model, texts, prompts=prompts, batch_size=batch_size, names=names):
        logprobs, top = (x.cpu() for x in part.logprobs(weighing))
        owners = part.texts[part.scored].cpu()
        for text in owners.unique().tolist():  # the tokens of a text come in their order
            found[text].append(logprobs[owners == text])
            likeliest[text].append(top[owners == text])
        del part  # before the next one is made
    return Scores(tuple(torch.cat(x) for x in found), tuple(torch.cat(x) for x in likeliest))


def parts_of(
    model: Any,
    texts: Sequence[Ids | torch.Tensor],
    *,
    prompts: Prompts | None = None,
    batch_size: int = 8,
    names: Sequence[str] | None = None,
    everyone: bool = False,
) -> Iterator[Part]:
    """Read texts once, with arguments as in `score`, and yield the members' logits of their scored positions.

    `everyone` lets members of weight 0 run too, for formulas in which they have another. A part's tensors are not kept:
    drop it before the next one is asked for.
    """
    ensemble = Ensemble.of(model)
    members = ensemble.members
    whole("batch_size", batch_size, "of texts", least=1)
    read = _Texts(model, members, texts, prompts, names)
    for batch in _batches(read, members, batch_size):
        yield from _parts_of_batch(ensemble, members, batch, read, everyone)


def check_texts(
    model: Any,
    texts: Sequence[Ids | torch.Tensor],
    *,
    prompts: Prompts | None = None,
    names: Sequence[str] | None = None,
) -> None:
    """Raise what `score` would raise for these texts before it reads one."""
    _Texts(model, Ensemble.of(model).members, texts, prompts, names)


def encode_pair(
    tokenizer: PreTrainedTokenizerBase, prompt: str, text: str, *, is_chat: bool = False
) -> tuple[list[int], list[int]]:
    """Tokenize a prompt and the text after it: `(prompt ids, text ids)`.

    As in lm-evaluation-harness, both are tokenized together, and what goes beyond the prompt's own tokens is the text;
    spaces at the end of the prompt are the text's, since tokens begin with them. An empty prompt gives no ids.

    `is_chat` says that a chat template wrote the prompt: its end and its special tokens stay as they are, as
    `generate()` reads them.
    """
    options = {"add_special_tokens": False} if is_chat else {}

    def ids_of(part: str) -> list[int]:
        found: list[int] = tokenizer(part, **options)["input_ids"]
        return found

    if not prompt:
        return [], ids_of(text)
    read, both = ids_of(prompt if is_chat else prompt.rstrip()), ids_of(prompt + text)
    if is_chat and both[: len(read)] != read:  # the end of the prompt would be another token
        return read, ids_of(text)
    return read, both[len(read) :]


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


def _refuse_model(model: Any, members: Sequence[Member]) -> None:
    """Refuse an encoder-decoder, and a model in training mode."""
    if getattr(model.config, "is_encoder_decoder", False):
        raise UnsupportedModelError.of(
            "the model",
            expected="a decoder-only model",
            got=f"{type(model).__name__}, an encoder-decoder",
            remedy="Take the loss of model(input_ids=source, labels=target), a mean in nats.",
        )
    if training := [m.role for m in members if m.model.training]:
        raise InputError.of(
            "the model",
            expected="a model in evaluation mode, since dropout would change the scores",
            got=f"training mode of {', '.join(training)}",
            remedy="Call model.eval().",
        )


class _Texts:
    """Texts that were checked, each after its prompts.

    Attributes:
        names: What errors call them.
        rows: For each text `[T]`: the base's prompt and the text.
        own: Role → the same after the prompts of a member that reads its own.
        counts: How many tokens are scored, the last of each row.
    """

    def __init__(
        self,
        model: Any,
        members: Sequence[Member],
        texts: Sequence[Ids | torch.Tensor],
        prompts: Prompts | None,
        names: Sequence[str] | None,
    ) -> None:
        _refuse_model(model, members)
        if len(texts) == 0 or isinstance(texts, str):
            raise InputError.of(
                "texts",
                expected="at least one text, as a sequence of token ids",
                got=repr(texts) if isinstance(texts, str) else f"{len(texts)} texts",
                remedy='Pass e.g. [tokenizer("some text")["input_ids"]].',
            )
        self.names = [f"text {number}" for number in range(len(texts))] if names is None else names
        given = _prompts_by_role(prompts, len(texts), roles_with_prompts(members))
        self.counts: list[int] = []
        self.rows: list[torch.Tensor] = []
        self.own: dict[str, list[torch.Tensor]] = {role: [] for role in given if role != "base"}
        for i, (name, text) in enumerate(zip(self.names, texts, strict=True)):
            after, first = _as_ids(name, text), _as_ids(f"the prompt of {name}", given["base"][i])
            if len(after) < (1 if first else 2):
                raise InputError.of(
                    name,
                    expected="at least one token after the prompt" if first else "at least two tokens without a prompt",
                    got=f"{len(after)}",
                    remedy="Leave it out; or begin a text with the BOS token, so that its first word is scored."
                    if after
                    else "Leave it out.",
                )
            self.counts.append(len(after) - (0 if first else 1))
            self.rows.append(torch.tensor((*first, *after)))
            for role, rows in self.own.items():
                before = _as_ids(f"the {role}'s prompt of {name}", given[role][i])
                if first and not before:
                    raise InputError.of(
                        f"the {role}'s prompt of {name}",
                        expected="at least one token, from which the text's first one can be predicted",
                        got="0",
                        remedy="Begin it with the BOS token, or with a line feed.",
                    )
                rows.append(torch.tensor((*before, *after)))
            for member in members:
                _check_row(name, member, self.row(member.role, i))

    def row(self, role: str, text: int) -> torch.Tensor:
        """What a member reads of a text, and the last token, `[T]`."""
        return self.own.get(role, self.rows)[text]

    def padded(self, role: str, batch: Sequence[int], width: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids and mask `[B, width]` of a batch, padded on the left."""
        ids, mask = torch.zeros(2, len(batch), width, dtype=torch.int64).unbind()
        for i, text in enumerate(batch):
            row = self.row(role, text)
            ids[i, width - len(row) :] = row
            mask[i, width - len(row) :] = 1
        return ids, mask


def _prompts_by_role(
    prompts: Prompts | None, count: int, roles: Sequence[str]
) -> dict[str, Sequence[Ids | torch.Tensor]]:
    """Role → as many prompts as texts; the base's, and those of `roles`, which read their own."""
    if not isinstance(prompts, Mapping):
        prompts = {"base": [()] * count if prompts is None else prompts}
    given = {"base": [()] * count, **prompts}
    if given.keys() != {"base", *roles}:
        raise InputError.of(
            "prompts",
            expected=f"role → prompts, for base, {', '.join(roles)}" if roles else "the prompts that all members read",
            got=f"prompts for {', '.join(map(str, prompts))}",
            remedy="Pass a mapping with the prompts of each member that reads its own.",
        )
    for role, each in given.items():
        if len(each) != count:
            raise InputError.of(
                "prompts" if len(given) == 1 else f"prompts[{role!r}]",
                expected=f"{count} prompts, one for each text",
                got=f"{len(each)}",
                remedy="Pass () for a text without a prompt.",
            )
    return given


def _check_row(name: str, member: Member, row: torch.Tensor) -> None:
    check_ids(row, [member], name=name)
    if member.context is not None and len(row) - 1 > member.context:
        raise InputError.of(
            name,
            expected=f"at most {member.context + 1} tokens with its prompt: the {member.role} reads all but the last, "
            f"and has max_position_embeddings={member.context}",
            got=f"{len(row)}",
            remedy="Shorten it, split it, or use a member with a longer context.",
        )


def _as_ids(name: str, ids: Ids | torch.Tensor) -> tuple[int, ...]:
    return token_ids(name, ids.tolist() if isinstance(ids, torch.Tensor) else ids, empty=True)


def _batches(texts: _Texts, members: Sequence[Member], batch_size: int) -> Iterator[list[int]]:
    """The numbers of the texts of each batch: the longest first, so that memory is short at once or never.

    Texts of one batch are on one side of long-rope members' switches, and of one length if a member cannot be padded.
    """
    alike = not all(_can_pad(member) for member in members)

    def kind(text: int) -> tuple[Any, ...]:
        read = [len(texts.row(m.role, text)) - 1 for m in members]
        sides = [is_beyond(m.switch, length, None) for m, length in zip(members, read, strict=True)]
        return (*sides, *(read if alike else ()))

    order = sorted(range(len(texts.rows)), key=lambda text: -len(texts.rows[text]))
    kinds = dict.fromkeys(map(kind, order))
    for one in kinds:
        same = [text for text in order if kind(text) == one]
        yield from (same[i : i + batch_size] for i in range(0, len(same), batch_size))


def _can_pad(member: Member) -> bool:
    try:
        member.refuse_padding(torch.tensor([[0, 1], [1, 1]]))
    except UnsupportedModeError:
        return False
    return True


def _parts_of_batch(
    ensemble: Ensemble, members: Sequence[Member], batch: list[int], texts: _Texts, everyone: bool
) -> Iterator[Part]:
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
        self, ensemble: Ensemble, members: Sequence[Member], texts: _Texts, batch: list[int], end: int, everyone: bool
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
