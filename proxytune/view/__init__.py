"""Traces, shown: in a terminal, and as a page."""

from __future__ import annotations

from proxytune.view.terminal import look

__all__ = ["look"]
