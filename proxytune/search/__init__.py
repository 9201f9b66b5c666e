"""Spending a budget on one task."""
