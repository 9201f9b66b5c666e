"""One ledger of tokens: a hard limit over every method of a call, with shared prefixes paid for once.

Parallel samples, branches, revisions and search generations all charge the same `TokenLedger`. A unit is one token,
of a prompt or generated, counted once however often it is read again: the ledger measures text, not forward passes.

A tree that forks asks first and spends later: `reserve(n)` sets tokens aside that nobody else can take, so that
children which were started can also be finished.

A prefix costs what it adds to those already paid for. They are kept in a trie of token ids, which is exact: were they
kept as hashes, a collision would pass for text that was paid for, and the limit would not be hard. Each node of the
trie is a token that was charged, so its size is bounded by the budget.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Sequence
from types import TracebackType
from typing import Self

from proxytune.budget.prefix_trie import Prefixes
from proxytune.errors import BudgetError, InputError, ProxytuneError
from proxytune.validation import Ids, as_int, token_ids, whole

__all__ = ["Reservation", "TokenLedger"]

Key = Ids | str | int


class TokenLedger:
    """The tokens of one call. Any number of threads may use it.

    Always true: `spent + held + left == max_total_tokens`, and the values of `by` add up to `spent`.

    Attributes:
        max_total_tokens: The hard limit, in tokens.
    """

    def __init__(self, max_total_tokens: int) -> None:
        """Open a ledger with nothing spent.

        Args:
            max_total_tokens: The most tokens that all methods together may use, prompts included; at least 1.

        Raises:
            InputError: If it is no whole number of at least 1.
        """
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
        """Tokens that open reservations have set aside and not spent."""
        with self._lock:
            return self._held

    @property
    def left(self) -> int:
        """Tokens that are neither charged nor set aside."""
        with self._lock:
            return self._left()

    @property
    def by(self) -> dict[str, int]:
        """Label → tokens charged under it; a copy. The values add up to `spent`."""
        with self._lock:
            return dict(self._by)

    def can_afford(self, tokens: int) -> bool:
        """Whether a charge of so many tokens would go through now; another thread may be quicker.

        Args:
            tokens: At least 0.

        Returns:
            Whether they are left.

        Raises:
            InputError: If it is no whole number of at least 0.
        """
        return whole("tokens", tokens) <= self.left

    def charge(self, tokens: int, *, label: str = "generated", text: Sequence[int] | None = None) -> None:
        """Charge tokens, or raise and charge nothing.

        Args:
            tokens: At least 0.
            label: The name in the report, e.g. the method's name.
            text: The whole sequence that these tokens end. With it, a later prompt that goes on from this text
                (a revision) pays for what it adds only.

        Raises:
            BudgetError: If fewer tokens are left.
            InputError: If `tokens` is no whole number of at least 0, or `text` has more unpaid tokens than are charged.
        """
        tokens = whole("tokens", tokens)
        with self._lock:
            if tokens > self._left():
                raise self._refusal(f"{label!r}", tokens)
            self._spend(tokens, label, text)

    def charge_prefix(self, key: Key, length: int | None = None, *, label: str = "prompt") -> int:
        """Charge what a prefix adds to those already charged, or raise and charge nothing.

        Args:
            key: The prefix. Token ids, as a sequence of ints or as `bytes` of `length` equally wide ints in the
                machine's byte order (`numpy.ndarray.tobytes`); they share what they have in common with every prefix
                and text charged before. Or the name of a node in the caller's tree, a str or an int: then only earlier
                charges under the same name count.
            length: How many tokens. Needed for bytes and names; of ids the first `length`, all if None.
            label: The name in the report.

        Returns:
            How many tokens were new, and charged.

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
        """What `charge_prefix` would charge now.

        Args:
            key: As there.
            length: As there.

        Returns:
            Tokens; 0 if all of it is paid for.

        Raises:
            InputError: As there.
        """
        name, ids, length = _prefix(key, length)
        with self._lock:
            return self._unpaid(name, ids, length)

    def reserve(self, tokens: int, *, label: str = "generated") -> Reservation:
        """Set tokens aside for one purpose.

        Args:
            tokens: At least 0.
            label: The name under which they will be spent.

        Returns:
            The reservation; a context manager that gives back at its end what was not spent.

        Raises:
            BudgetError: If fewer tokens are left.
            InputError: If it is no whole number of at least 0.
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
        """Charge tokens for which there is room."""
        if text is not None:
            ids = token_ids("text", text)
            unpaid = len(ids) - self._paid.covered(ids)
            if unpaid > tokens:
                raise InputError.of(
                    "text",
                    expected=f"a sequence that is paid for but for its last {tokens} tokens, which are charged now",
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
            remedy = f"It needs max_total_tokens of at least {tokens} for itself alone: raise the limit or shorten it."
        else:
            remedy = "Stop here and vote over what is finished, ask for less, or raise max_total_tokens."
        return BudgetError.of(
            f"{what} costs {tokens} tokens",
            expected=f"at most {self._left()}, which are left of max_total_tokens={self.max_total_tokens}",
            got=f"{tokens}, with {self._spent} spent and {self._held} reserved",
            remedy=remedy,
        )


class Reservation:
    """Tokens of a ledger set aside for one purpose; made by `TokenLedger.reserve`.

    Attributes:
        label: The name under which they are spent.
    """

    def __init__(self, ledger: TokenLedger, tokens: int, label: str) -> None:
        self._ledger = ledger
        self._left = tokens
        self.label = label

    @property
    def left(self) -> int:
        """Tokens that are still set aside; 0 once released."""
        with self._ledger._lock:
            return self._left

    def spend(self, tokens: int, *, text: Sequence[int] | None = None) -> None:
        """Charge some of the reserved tokens, or raise and charge nothing.

        Args:
            tokens: At least 0.
            text: As in `TokenLedger.charge`.

        Raises:
            BudgetError: If fewer are still set aside; a released reservation has none.
            InputError: As `TokenLedger.charge`.
        """
        tokens = whole("tokens", tokens)
        ledger = self._ledger
        with ledger._lock:
            if tokens > self._left:
                raise BudgetError.of(
                    f"the reservation for {self.label!r}",
                    expected=f"at most the {self._left} tokens that are still set aside",
                    got=f"{tokens}",
                    remedy="Reserve what the continuation can need at most, or charge() the rest to the ledger.",
                )
            ledger._spend(tokens, self.label, text)
            self._left -= tokens
            ledger._held -= tokens

    def release(self) -> None:
        """Give back what was not spent; without effect the second time."""
        with self._ledger._lock:
            self._ledger._held -= self._left
            self._left = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.release()


def _prefix(key: Key, length: int | None) -> tuple[str | int | None, Sequence[int], int]:
    """A prefix as (name, no ids, length) or (None, ids, length)."""
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
