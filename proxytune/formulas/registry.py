"""Formulas by name. A registered formula runs through the formulas' contract test."""

from __future__ import annotations

from proxytune.formulas.proxy_tuning import ProxyTuning

__all__ = ["FORMULAS"]

FORMULAS: dict[str, type[ProxyTuning]] = {ProxyTuning.name: ProxyTuning}
"""The formulas that a recipe can name."""
