"""Noise at the high-level state of models that recur."""
