"""What a calibration run finds: the threshold above which a given share of entropies lies, and how it is written down.

Needs no torch, so that a recipe can be read without it.
"""

from __future__ import annotations

__all__ = []
