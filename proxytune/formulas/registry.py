"""Formulas by the names that recipes use."""

from __future__ import annotations

from proxytune.formulas.proxy_tuning import ProxyTuning

__all__ = ["FORMULAS"]

FORMULAS: dict[str, type[ProxyTuning]] = {ProxyTuning.name: ProxyTuning}
"""The formulas that a recipe can name."""
