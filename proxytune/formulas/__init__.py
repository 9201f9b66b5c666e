"""How the members' logits become one row of logits."""

from proxytune.formulas.base import Formula
from proxytune.formulas.proxy_tuning import ProxyTuning
from proxytune.formulas.registry import FORMULAS

__all__ = ["FORMULAS", "Formula", "ProxyTuning"]
