"""Tokens, counted once."""
