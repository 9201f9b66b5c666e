"""The record of a run: what was decided at each generated token, and what each member wanted there.

Everything that looks at a run reads a `Trace`, and nothing else. Needs NumPy alone: a trace is made where the models
are, and read anywhere.
"""

from __future__ import annotations

from proxytune.trace.grading import graded, words_of
from proxytune.trace.record import FIELDS, SIGNALS, UNKNOWN, Trace, TracedText
from proxytune.trace.store import TraceWriter, load, save

__all__ = ["FIELDS", "SIGNALS", "UNKNOWN", "Trace", "TraceWriter", "TracedText", "graded", "load", "save", "words_of"]
