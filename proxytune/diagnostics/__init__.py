"""What a policy has lost, read from traces alone; one file a diagnosis. NumPy only: no model, no torch.

Each function takes a `proxytune.trace.Trace` (or several), and returns a `Finding` with its figures, their intervals
over prompts, how much they rest on, and a sentence. What cannot be told from a trace is an `InputError` that says what
is missing; never a number from nothing.
"""

from proxytune.diagnostics.calibration import calibration
from proxytune.diagnostics.collapse import distinct_answers, formats
from proxytune.diagnostics.coverage_curves import coverage, crossing
from proxytune.diagnostics.degenerate import degenerate
from proxytune.diagnostics.entropy_law import entropy_law
from proxytune.diagnostics.entropy_profile import entropy_profile, fork_change, on_policy_signature
from proxytune.diagnostics.kl_drift import kl_drift
from proxytune.diagnostics.length import length_effect
from proxytune.diagnostics.losses import losses, ordered
from proxytune.diagnostics.prompts import Finding
from proxytune.diagnostics.search_scaling import search_scaling
from proxytune.diagnostics.spread import spread

__all__ = [
    "Finding",
    "calibration",
    "coverage",
    "crossing",
    "degenerate",
    "distinct_answers",
    "entropy_law",
    "entropy_profile",
    "fork_change",
    "formats",
    "kl_drift",
    "length_effect",
    "losses",
    "on_policy_signature",
    "ordered",
    "search_scaling",
    "spread",
]
