"""Estimators over samples; numpy only."""

from proxytune._homes import lazy_submodules

__getattr__ = lazy_submodules(__name__)
