"""Traces, shown: in a terminal, as a page, and in notebooks once this is imported."""

from __future__ import annotations

from proxytune.trace.record import show_in_notebooks
from proxytune.view.html import framed, page, write_page
from proxytune.view.terminal import look

__all__ = ["look", "page", "write_page"]

show_in_notebooks(framed)
