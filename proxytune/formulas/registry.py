"""Formulas by the names that recipes use."""

from __future__ import annotations

from collections.abc import Callable

from proxytune.formulas.base import Formula
from proxytune.formulas.proxy_tuning import ProxyTuning

__all__ = ["FORMULAS"]

FORMULAS: dict[str, Callable[..., Formula]] = {ProxyTuning.name: ProxyTuning}
"""The formulas that a recipe can name: name → what makes one, given `alpha`.

A formula of one's own is added here before its recipes are opened.
"""
