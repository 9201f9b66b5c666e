"""A hard limit on tokens: `TokenLedger` counts each token once."""

from proxytune.budget.ledger import Reservation, TokenLedger

__all__ = ["Reservation", "TokenLedger"]
