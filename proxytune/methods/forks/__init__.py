"""Entropy thresholds and fork temperatures."""
