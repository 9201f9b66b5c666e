"""A token budget as a hard limit over all methods of a call; shared prefixes are paid for once.

Samples, branches, revisions and search generations charge the same `TokenLedger`. Its unit is one token of text, prompt
or generated, counted once however often it is read again; it does not measure forward passes. A method that forks first
calls `reserve(n)`, so that every child it starts can also be finished.

A prefix costs what it adds to the prefixes already paid for. They are kept in a trie of token ids, which is exact; with
hashes, a collision would count unpaid text as paid. Each node is a charged token, so the budget bounds its size.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Sequence
from types import TracebackType
from typing import Self

from proxytune.budget.prefix_trie import Prefixes
from proxytune.errors import BudgetError, InputError, ProxytuneError
from proxytune.validation import Ids, as_int, shown, token_ids, whole

__all__ = ["Reservation", "TokenLedger", "refuse_no_ledger"]

Key = Ids | str | int


def refuse_no_ledger(ledger: object) -> None:
    """Raise InputError unless `ledger` is a TokenLedger; a number of tokens is the usual mistake."""
    if not isinstance(ledger, TokenLedger):
        raise InputError.of(
            "ledger", expected="a TokenLedger", got=shown(ledger, 80), remedy="Pass e.g. TokenLedger(4096)."
        )


class TokenLedger:
    """The tokens of one call, prompts included, up to a hard limit `max_total_tokens`; thread-safe.

    Always true: `spent + held + left == max_total_tokens`, and the values of `by` sum to `spent`.
    """

    def __init__(self, max_total_tokens: int) -> None:
        """Open a ledger with nothing spent; InputError if the limit is not an integer ≥ 1."""
        self.max_total_tokens = whole("max_total_tokens", max_total_tokens, least=1)
        self._lock = threading.Lock()
        self._by: Counter[str] = Counter()
        self._spent = 0
        self._held = 0
        self._paid = Prefixes()
        self._named: dict[str | int, int] = {}  # tree node → tokens charged for it

    @property
    def spent(self) -> int:
        """Tokens charged so far."""
        with self._lock:
            return self._spent

    @property
    def held(self) -> int:
        """Tokens in open reservations that are not spent yet."""
        with self._lock:
            return self._held

    @property
    def left(self) -> int:
        """Tokens neither charged nor reserved."""
        with self._lock:
            return self._left()

    @property
    def by(self) -> dict[str, int]:
        """Label → tokens charged under it; a copy."""
        with self._lock:
            return dict(self._by)

    def can_afford(self, tokens: int) -> bool:
        """Whether a charge of `tokens` ≥ 0 would succeed now; another thread may charge first."""
        return whole("tokens", tokens) <= self.left

    def charge(self, tokens: int, *, label: str = "generated", text: Sequence[int] | None = None) -> None:
        """Charge tokens, or raise and charge nothing.

        Args:
            tokens: ≥ 0.
            label: The name in the report, e.g. the method's.
            text: The whole sequence that these tokens end. A later prompt that extends it (a revision) then pays only
                for what it adds.

        Raises:
            BudgetError: If fewer tokens are left.
            InputError: If `text` has more unpaid tokens than are charged.
        """
        tokens = whole("tokens", tokens)
        with self._lock:
            if tokens > self._left():
                raise self._refusal(f"{label!r}", tokens)
            self._spend(tokens, label, text)

    def charge_prefix(self, key: Key, length: int | None = None, *, label: str = "prompt") -> int:
        """Charge what a prefix adds to those already charged, or raise and charge nothing.

        Args:
            key: Token ids, as a sequence of ints or as `bytes` of `length` equally wide ints in the machine's byte
                order (`numpy.ndarray.tobytes`): they share their common start with every prefix and text charged
                before. Or the name of a node in the caller's tree, a str or int: only charges under the same name are
                shared.
            length: Number of tokens. Required for bytes and names; of ids the first `length`, all if None.
            label: The name in the report.

        Returns:
            The number of tokens that were new, hence charged.

        Raises:
            BudgetError: If fewer tokens are left than are new.
            InputError: If the key is neither, or the length does not fit it.
        """
        name, ids, length = _prefix(key, length)
        with self._lock:
            new = self._unpaid(name, ids, length)
            if new > self._left():
                raise self._refusal(f"{label!r} of {length} tokens, {length - new} of them already paid for,", new)
            self._book(new, label)
            if name is None:
                self._paid.add(ids)
            elif new:
                self._named[name] = length
            return new

    def cost_of_prefix(self, key: Key, length: int | None = None) -> int:
        """The tokens that `charge_prefix` would charge now; same arguments and InputError."""
        name, ids, length = _prefix(key, length)
        with self._lock:
            return self._unpaid(name, ids, length)

    def reserve(self, tokens: int, *, label: str = "generated") -> Reservation:
        """Reserve tokens that nothing else can take, to be spent under `label`; BudgetError if fewer are left.

        The reservation is a context manager that gives unspent tokens back on exit.
        """
        tokens = whole("tokens", tokens)
        with self._lock:
            if tokens > self._left():
                raise self._refusal(f"a reservation for {label!r}", tokens)
            self._held += tokens
        return Reservation(self, tokens, label)

    # --- under the lock ----------------------------------------------------------------------------------------------

    def _left(self) -> int:
        return self.max_total_tokens - self._spent - self._held

    def _spend(self, tokens: int, label: str, text: Sequence[int] | None) -> None:
        """Charge tokens after the caller has checked that they are left."""
        if text is not None:
            ids = token_ids("text", text)
            unpaid = len(ids) - self._paid.covered(ids)
            if unpaid > tokens:
                raise InputError.of(
                    "text",
                    expected=f"a sequence already paid for, except the last {tokens} tokens, which are charged now",
                    got=f"{unpaid} unpaid tokens of {len(ids)}",
                    remedy="Charge the prompt first with charge_prefix(), or leave text out.",
                )
            self._paid.add(ids)
        self._book(tokens, label)

    def _book(self, tokens: int, label: str) -> None:
        self._spent += tokens
        if tokens:
            self._by[label] += tokens

    def _unpaid(self, name: str | int | None, ids: Sequence[int], length: int) -> int:
        return max(0, length - (self._paid.covered(ids) if name is None else self._named.get(name, 0)))

    def _refusal(self, what: str, tokens: int) -> ProxytuneError:
        if tokens > self.max_total_tokens:
            remedy = f"It alone needs max_total_tokens of at least {tokens}: raise the limit or shorten it."
        else:
            remedy = "Stop here and vote over what is finished, ask for less, or raise max_total_tokens."
        return BudgetError.of(
            f"{what} costs {tokens} tokens",
            expected=f"at most {self._left()}, which are left of max_total_tokens={self.max_total_tokens}",
            got=f"{tokens}, with {self._spent} spent and {self._held} reserved",
            remedy=remedy,
        )


class Reservation:
    """Reserved tokens of a ledger, spent under `label`; made by `TokenLedger.reserve`."""

    def __init__(self, ledger: TokenLedger, tokens: int, label: str) -> None:
        self._ledger = ledger
        self._left = tokens
        self.label = label

    @property
    def left(self) -> int:
        """Tokens still reserved; 0 once released."""
        with self._ledger._lock:
            return self._left

    def spend(self, tokens: int, *, text: Sequence[int] | None = None) -> None:
        """Charge some of the reserved tokens, or raise and charge nothing; `text` as in `TokenLedger.charge`.

        Raises:
            BudgetError: If fewer are still reserved; a released reservation has none.
            InputError: As `TokenLedger.charge`.
        """
        tokens = whole("tokens", tokens)
        ledger = self._ledger
        with ledger._lock:
            if tokens > self._left:
                raise BudgetError.of(
                    f"the reservation for {self.label!r}",
                    expected=f"at most the {self._left} tokens that are still reserved",
                    got=f"{tokens}",
                    remedy="Reserve the most that the continuation can need, or charge() the rest to the ledger.",
                )
            ledger._spend(tokens, self.label, text)
            self._left -= tokens
            ledger._held -= tokens

    def extend(self, tokens: int) -> bool:
        """Reserve more, if the ledger has that many left; says whether it had."""
        tokens = whole("tokens", tokens)
        with self._ledger._lock:
            if tokens > self._ledger._left():
                return False
            self._ledger._held += tokens
            self._left += tokens
            return True

    def release(self) -> None:
        """Give unspent tokens back; a second call does nothing."""
        with self._ledger._lock:
            self._ledger._held -= self._left
            self._left = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.release()


def _prefix(key: Key, length: int | None) -> tuple[str | int | None, Sequence[int], int]:
    """(name, no ids, length) of a named node, or (None, ids, length)."""
    if length is not None:
        length = whole("length", length)
    named = key if isinstance(key, str) else as_int(key)
    if named is not None:
        if length is None:
            raise InputError.of(
                "length",
                expected=f"how many tokens the prefix named {named!r} has",
                got="None",
                remedy="Pass length=…, or the token ids instead of a name.",
            )
        return named, (), length
    what = "token ids, or the name of a tree node (a str or an int)"
    ids = token_ids("prefix", key, what, length=length)  # type: ignore[arg-type]
    if length is not None and len(ids) < length:
        raise InputError.of(
            "length",
            expected=f"at most the {len(ids)} ids that were given",
            got=f"{length}",
            remedy="Leave length out to charge all of them.",
        )
    return None, ids, len(ids)
