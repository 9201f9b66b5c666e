"""The exceptions of proxytune: every one says what was expected, what came, and what to do.

::

    ProxytuneError
    ├── InputError (also a ValueError)       an argument, a prompt or a mask that cannot be right
    │   └── CacheError                       a KV cache that this model did not fill
    ├── MemberError                          a model that cannot take part in the composition
    │   ├── MemberNotFoundError              its folder or hub id cannot be opened
    │   ├── UnsupportedModelError            its architecture is not supported (yet)
    │   └── VocabularyMismatchError          its token ids mean other tokens than the base's
    ├── RecipeError                          a `proxytune_config.json` that cannot be read or written
    ├── UnsupportedModeError                 a way of generating in which the result would be silently wrong
    ├── NumericalError                       logits of which no token can be drawn: NaN, +inf, or all −inf
    ├── BudgetError                          a token budget that would be exceeded; nothing was charged
    └── LabError                             the synthetic lab: a training run or a family folder that does not fit

    VocabularyWarning (a UserWarning)        token ids could not be compared, because a member has no tokenizer
    CalibrationWarning (a UserWarning)       an entropy threshold may not give the wanted share of forks
    DriftWarning (a UserWarning)             the share of forks has left its band: the threshold no longer fits
"""

from __future__ import annotations

__all__ = [
    "BudgetError",
    "CacheError",
    "CalibrationWarning",
    "DriftWarning",
    "InputError",
    "LabError",
    "MemberError",
    "MemberNotFoundError",
    "NumericalError",
    "ProxytuneError",
    "RecipeError",
    "UnsupportedModeError",
    "UnsupportedModelError",
    "VocabularyMismatchError",
    "VocabularyWarning",
]


class ProxytuneError(Exception):
    """The base of all errors that proxytune raises on purpose."""

    @classmethod
    def of(cls, what: str, *, expected: str, got: str, remedy: str) -> ProxytuneError:
        """Build an error in the one form all of them have.

        Args:
            what: The thing that is wrong, in a few words.
            expected: What would have been right.
            got: What came instead.
            remedy: What the reader can do now.

        Returns:
            An instance of the class it is called on, ready to be raised.
        """
        return cls(f"{what}: expected {expected}; got {got}. {remedy}")


class InputError(ProxytuneError, ValueError):
    """An argument, a prompt, an attention mask or an α that cannot be right."""


class CacheError(InputError):
    """A KV cache that was filled by another model: the members have not all seen its tokens."""


class MemberError(ProxytuneError):
    """A model that cannot take part in the composition."""


class MemberNotFoundError(MemberError):
    """A member's folder or hub id cannot be opened."""


class UnsupportedModelError(MemberError):
    """A member's architecture is not supported (yet)."""


class VocabularyMismatchError(MemberError):
    """A member's token ids mean other tokens than the base's."""


class RecipeError(ProxytuneError):
    """A recipe (`proxytune_config.json`) that cannot be read or written."""


class UnsupportedModeError(ProxytuneError):
    """A way of generating in which the result would be silently wrong."""


class NumericalError(ProxytuneError):
    """A row of logits of which no token can be drawn: NaN or +inf in it, or −inf throughout."""


class BudgetError(ProxytuneError):
    """A token budget that would be exceeded; nothing was charged."""


class LabError(ProxytuneError):
    """The synthetic lab: a training run or a family folder that does not fit."""


class VocabularyWarning(UserWarning):
    """Token ids could not be compared, because a member has no tokenizer at hand."""


class CalibrationWarning(UserWarning):
    """An entropy threshold may not give the wanted share of forks: tied entropies, or too little text."""


class DriftWarning(UserWarning):
    """The share of forks has left its band: the entropy threshold no longer fits model, temperature or text."""
