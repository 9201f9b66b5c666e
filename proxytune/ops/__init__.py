"""One decision on members' logits; the only place that picks Triton or torch."""

from proxytune.ops.step import *  # noqa: F403
