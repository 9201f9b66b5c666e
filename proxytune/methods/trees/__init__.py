"""Branches and siblings with exact weights."""
