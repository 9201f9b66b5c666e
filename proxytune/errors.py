"""The exceptions of proxytune. Every message says what was expected, what came, and what to do.

```text
ProxytuneError
├── InputError (also a ValueError)       an invalid argument, prompt or mask
│   └── CacheError                       a KV cache that this model did not fill
├── MemberError                          a model that cannot be a member of the composition
│   ├── MemberNotFoundError              its folder or hub id cannot be opened
│   ├── UnsupportedModelError            its architecture is not supported (yet)
│   └── VocabularyMismatchError          its token ids mean other tokens than the base's
├── RecipeError                          a `proxytune_config.json` that cannot be read or written
├── UnsupportedModeError                 a generation mode whose result would be silently wrong
├── NumericalError                       logits without a distribution: NaN, +inf, or all −inf
├── BudgetError                          the token budget would be exceeded; nothing was charged
└── LabError                             the synthetic lab: a training run or a family folder that does not fit

VocabularyWarning (a UserWarning)        token ids could not be compared, because a member has no tokenizer
CalibrationWarning (a UserWarning)       an entropy threshold may not give the wanted share of forks
BudgetWarning (a UserWarning)            the budget had no room for all texts that were planned
DriftWarning (a UserWarning)             the share of forks left its band: the threshold no longer fits
SteeringWarning (a UserWarning)          a steered model that probably does not do what was meant
RecordingWarning (a UserWarning)         a recording that ended without a text
```
"""

from __future__ import annotations

__all__ = [
    "BudgetError",
    "BudgetWarning",
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
    "RecordingWarning",
    "SteeringWarning",
    "UnsupportedModeError",
    "UnsupportedModelError",
    "VocabularyMismatchError",
    "VocabularyWarning",
]


class ProxytuneError(Exception):
    """Base class of the errors that proxytune raises on purpose."""

    @classmethod
    def of(cls, what: str, *, expected: str, got: str, remedy: str) -> ProxytuneError:
        """Build an error of this class in the common form: "what: expected …; got …. remedy".

        Args:
            what: What is wrong, in a few words.
            expected: What would have been right.
            got: What came instead: the value itself.
            remedy: What the reader can do now, as a sentence.
        """
        return cls(f"{what}: expected {expected}; got {got}. {remedy}")


class InputError(ProxytuneError, ValueError):
    """An invalid argument, prompt, attention mask or α."""


class CacheError(InputError):
    """A KV cache that another model filled: the members have not all seen its tokens."""


class MemberError(ProxytuneError):
    """A model that cannot be a member of the composition."""


class MemberNotFoundError(MemberError):
    """A member's folder or hub id cannot be opened."""


class UnsupportedModelError(MemberError):
    """A member's architecture is not supported (yet)."""


class VocabularyMismatchError(MemberError):
    """A member's token ids mean other tokens than the base's."""


class RecipeError(ProxytuneError):
    """A recipe (`proxytune_config.json`) that cannot be read or written."""


class UnsupportedModeError(ProxytuneError):
    """A generation mode whose result would be silently wrong."""


class NumericalError(ProxytuneError):
    """A row of logits without a distribution: NaN or +inf in it, or −inf only."""


class BudgetError(ProxytuneError):
    """The token budget would be exceeded; nothing was charged."""


class LabError(ProxytuneError):
    """The synthetic lab: a training run or a family folder that does not fit."""


class VocabularyWarning(UserWarning):
    """Token ids could not be compared, because a member has no tokenizer."""


class CalibrationWarning(UserWarning):
    """An entropy threshold may not give the wanted share of forks: tied entropies, or too little text."""


class BudgetWarning(UserWarning):
    """The budget had no room for all texts that were planned, or cut one: a vote over few is too sure."""


class DriftWarning(UserWarning):
    """The share of forks has left its band: the entropy threshold no longer fits model, temperature or text."""


class SteeringWarning(UserWarning):
    """A steered model that probably does not do what was meant: its roles, α, end tokens, or how it is asked."""


class RecordingWarning(UserWarning):
    """A recording ended without a text: `generate()` of the recorded model was not called."""
