"""The version, in one place: hatchling reads it for the package, recipes record it."""

__version__ = "0.1.0"
