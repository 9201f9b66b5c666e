"""Tokens, counted once: `TokenLedger` is a hard limit over every method."""

from proxytune.budget.ledger import Reservation, TokenLedger

__all__ = ["Reservation", "TokenLedger"]
