"""Exact teacher-forced log-probabilities of given texts, under any causal LM, composed or plain.

Texts are read in parts, each of which goes on from the cache of the one before it, and only scored positions get
logits: the members' logits `[B, T, V]` of whole texts never exist. What one part needs does not depend on the texts'
length, but for the members' caches.

Other weights of the members need no other pass: `parts_of` gives each part's logits once, for any number of formulas
(`proxytune.search.tuning`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
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
from proxytune.ops.checks import DTYPES
from proxytune.validation import Ids, token_ids, whole

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Part", "Scores", "check_texts", "encode_pair", "parts_of", "score"]

PART = 1024
"""Rows × positions that a pass reads at most: enough to keep a GPU busy."""

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
        members: Raw logits `[N, V_i]` of each member, the base first, its columns those that can be drawn.
        targets: `[N]`, int64: the token that stands there.
        texts: `[N]`, int64: the number of its text.
        steps: `[N]`, int64: which scored token of its text it is, from 0.
        scored: `[N]`, bool: False where a shorter text has a token that is not scored, or padding; `steps` is 0 there.
        names: What errors call the texts.
    """

    members: list[torch.Tensor]
    targets: torch.Tensor
    texts: torch.Tensor
    steps: torch.Tensor
    scored: torch.Tensor
    names: Sequence[str]

    def logprobs(self, weights: Sequence[float] | torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Score the targets under the members' weighted sum.

        Args:
            weights: As in `proxytune.ops.step`.

        Returns:
            `[n]`, float64, nats, of the n scored positions; and `[n]`, bool, whether the target is the likeliest token.

        Raises:
            NumericalError: If a scored position has no distribution: NaN or +inf, or −inf for every token.
        """
        found = ops.step(self.members, weights, want=("lse", "argmax"))
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
        columns = [_column(z, self.targets) for z in self.members]
        targets = ops.step(columns, weights, want=("lse",)).lse
        assert targets is not None
        # NaN and +inf there would be in the row too; −inf stays.
        return (targets[self.scored].double() - lse.double()), (found.argmax == self.targets)[self.scored]


def score(
    model: Any,
    texts: Sequence[Ids | torch.Tensor],
    *,
    prompts: Sequence[Ids | torch.Tensor] | None = None,
    batch_size: int = 8,
    names: Sequence[str] | None = None,
) -> Scores:
    """Score texts under a model, composed or plain: log-probabilities of their tokens, and the perplexity.

    Args:
        model: A `ProxyTunedModel`, or any decoder-only causal LM of transformers; in evaluation mode.
        texts: R texts as token ids. Of a text without a prompt the first token is not scored: nothing predicts it.
            Put the BOS token first where the model was trained with one.
        prompts: R prompts as token ids, one for each text, which are read and not scored; an empty one is none.
        batch_size: How many texts are read at once. It decides memory and speed; results differ in rounding alone.
        names: What errors call the texts [text 0, text 1, …].

    Returns:
        The scores, in the order of the texts.

    Raises:
        InputError: If a text has nothing to score, is too long for a member, or has an id that a member cannot embed;
            if there are not as many prompts as texts; if the model is in training mode.
        NumericalError: If a position has no distribution.
        UnsupportedModelError: If the model is an encoder-decoder, or cannot be a member.

    The log-probabilities are those of lm-evaluation-harness (`loglikelihood` of 0.4.13) for the same ids: no sampling
    setting changes them, and arithmetic on logits is float32.
    """
    found: list[list[torch.Tensor]] = [[] for _ in texts]
    likeliest: list[list[torch.Tensor]] = [[] for _ in texts]
    weights = Ensemble.of(model).weights
    for part in parts_of(model, texts, prompts=prompts, batch_size=batch_size, names=names):
        logprobs, top = (x.cpu() for x in part.logprobs(weights))
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
    prompts: Sequence[Ids | torch.Tensor] | None = None,
    batch_size: int = 8,
    names: Sequence[str] | None = None,
) -> Iterator[Part]:
    """Read texts once, with arguments as in `score`, and yield the members' logits of their scored positions.

    A part's tensors are not kept: drop it before the next one is asked for.
    """
    ensemble = Ensemble.of(model)
    members = ensemble.members
    whole("batch_size", batch_size, "of texts", least=1)
    names = _names(texts) if names is None else names
    ids, starts = _checked(model, members, texts, prompts, names)
    for batch in _batches(ids, members, batch_size):
        yield from _parts_of_batch(ensemble, members, batch, ids, starts, names)


def check_texts(
    model: Any,
    texts: Sequence[Ids | torch.Tensor],
    *,
    prompts: Sequence[Ids | torch.Tensor] | None = None,
    names: Sequence[str] | None = None,
) -> None:
    """Raise what `score` would raise for these texts before it reads one."""
    _checked(model, Ensemble.of(model).members, texts, prompts, _names(texts) if names is None else names)


def _names(texts: Sequence[Any]) -> list[str]:
    return [f"text {number}" for number in range(len(texts))]


def encode_pair(tokenizer: PreTrainedTokenizerBase, prompt: str, text: str, **options: Any) -> tuple[Ids, Ids]:
    """Tokenize a prompt and the text after it as lm-evaluation-harness does: `(prompt ids, text ids)`.

    Both are tokenized together, and what goes beyond the prompt's own tokens is the text; spaces at the end of the
    prompt are the text's, since tokens begin with them. `options` are the tokenizer's (`add_special_tokens=False` for
    a prompt that a chat template wrote). An empty prompt gives no ids.
    """
    if not prompt:
        return [], _ids_of(tokenizer, text, **options)
    bare = prompt.rstrip()
    read = _ids_of(tokenizer, bare, **options)
    return read, _ids_of(tokenizer, prompt + text, **options)[len(read) :]


def _ids_of(tokenizer: PreTrainedTokenizerBase, text: str, **options: Any) -> list[int]:
    found: list[int] = tokenizer(text, **options)["input_ids"]
    return found


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


def _checked(
    model: Any,
    members: Sequence[Member],
    texts: Sequence[Ids | torch.Tensor],
    prompts: Sequence[Ids | torch.Tensor] | None,
    names: Sequence[str],
) -> tuple[list[torch.Tensor], list[int]]:
    """Each text's ids `[T]` after those of its prompt, and the index of the first that is scored."""
    _refuse_model(model, members)
    if len(texts) == 0 or isinstance(texts, str):
        raise InputError.of(
            "texts",
            expected="at least one text, as a sequence of token ids",
            got=repr(texts) if isinstance(texts, str) else f"{len(texts)} texts",
            remedy='Pass e.g. [tokenizer("some text")["input_ids"]].',
        )
    before = [()] * len(texts) if prompts is None else prompts
    if len(before) != len(texts):
        raise InputError.of(
            "prompts",
            expected=f"{len(texts)} prompts, one for each text",
            got=f"{len(before)}",
            remedy="Pass () for a text without a prompt.",
        )
    ids, starts = [], []
    for name, text, prompt in zip(names, texts, before, strict=True):
        of_prompt, of_text = _as_ids(f"the prompt of {name}", prompt), _as_ids(name, text)
        if len(of_text) < (1 if of_prompt else 2):
            raise InputError.of(
                name,
                expected="at least one token after the prompt" if of_prompt else "at least two tokens without a prompt",
                got=f"{len(of_text)}",
                remedy="Leave it out; or begin a text with the BOS token, so that its first word is scored."
                if of_text
                else "Leave it out.",
            )
        row = torch.tensor((*of_prompt, *of_text))
        check_ids(row, members, name=name)
        for member in members:
            if member.context is not None and len(row) - 1 > member.context:
                raise InputError.of(
                    name,
                    expected=f"at most {member.context + 1} tokens with its prompt: the {member.role} reads all but "
                    f"the last, and has max_position_embeddings={member.context}",
                    got=f"{len(row)}",
                    remedy="Shorten it, split it, or use a member with a longer context.",
                )
        ids.append(row)
        starts.append(max(1, len(of_prompt)))
    return ids, starts


def _as_ids(name: str, ids: Ids | torch.Tensor) -> tuple[int, ...]:
    return token_ids(name, ids.tolist() if isinstance(ids, torch.Tensor) else ids, empty=True)


def _batches(ids: Sequence[torch.Tensor], members: Sequence[Member], batch_size: int) -> Iterator[list[int]]:
    """The numbers of the texts of each batch: the longest first, so that memory is short at once or never.

    Texts of one batch are on one side of long-rope members' switches, and of one length if a member cannot be padded.
    """
    alike = not all(_can_pad(member) for member in members)

    def kind(text: int) -> tuple[Any, ...]:
        read = len(ids[text]) - 1
        return (*(is_beyond(m.switch, read, None) for m in members), read if alike else 0)

    order = sorted(range(len(ids)), key=lambda text: -len(ids[text]))
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
    ensemble: Ensemble,
    members: Sequence[Member],
    batch: list[int],
    ids: Sequence[torch.Tensor],
    starts: Sequence[int],
    names: Sequence[str],
) -> Iterator[Part]:
    device = members[0].device
    rows = [ids[text] for text in batch]
    width, count = max(map(len, rows)), len(rows)
    inputs, mask = torch.zeros(2, count, width, dtype=torch.int64).unbind()
    for i, row in enumerate(rows):
        inputs[i, width - len(row) :] = row
        mask[i, width - len(row) :] = 1
    # Column c predicts column c + 1, so the last one is not read. Texts end together: each row's scored columns are
    # its last ones.
    lengths = torch.tensor([len(row) - starts[text] for row, text in zip(rows, batch, strict=True)])
    end, inputs, mask = width - 1, inputs.to(device), mask.to(device)
    begins = (end - lengths).to(device)  # [B], the first scored column
    first = int(begins.min())
    read = None if bool(mask.all()) else mask[:, :end]
    passes = _Passes(ensemble, members, inputs[:, :end], read)
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
        members_rows = []
        while logits:  # one after the other, so that copies to another device do not add up
            members_rows.append(_rows_on(device, logits.pop(0)))
        usable = ensemble.usable(members_rows[0].shape[1])
        members_rows[0] = members_rows[0][:, :usable]
        yield Part(
            members_rows,
            inputs[:, columns + 1].flatten(),
            owners[:, None].expand(-1, kept).flatten(),
            (columns - begins[:, None]).clamp(min=0).flatten(),
            scored.flatten(),
            names,
        )
        del members_rows


def _bytes_of_position(members: Sequence[Member]) -> int:
    return sum(m.rows * max(2, getattr(m.model, "dtype", torch.float32).itemsize) for m in members)


def _rows_on(device: torch.device, logits: torch.Tensor) -> torch.Tensor:
    """`[B, K, V]` as rows `[B · K, V]` on a device, in a dtype that `ops.step` takes; a view where it can be one."""
    dtype = logits.dtype if logits.dtype in DTYPES else torch.float32
    return logits.to(device, dtype, non_blocking=device.type != "cpu").flatten(0, 1)


class _Passes:
    """The passes over one batch `[B, T]`, each after the last one.

    Attributes:
        whole: Whether each of them reads the whole text, since no cache serves.
    """

    def __init__(
        self, ensemble: Ensemble, members: Sequence[Member], input_ids: torch.Tensor, mask: torch.Tensor | None
    ) -> None:
        self._ensemble, self._members, self._ids, self._mask = ensemble, members, input_ids, mask
        # Beyond a switch, all positions of a text have other frequencies: a part would not be what the text is.
        self.whole = any(is_beyond(m.switch, input_ids.shape[1], mask) for m in members)
        self._cache = None
        if not self.whole:
            composed = ensemble.composed
            self._cache = DynamicCache(config=ensemble.model.config) if composed else empty_cache(members[0].config)

    @torch.no_grad()
    def read(self, start: int, stop: int, kept: int) -> list[torch.Tensor]:
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
            use_cache=self._cache is not None,
            is_first_iteration=start == 0,
            **self._ensemble.request(),
        )
        return self._ensemble.logits(outputs)
