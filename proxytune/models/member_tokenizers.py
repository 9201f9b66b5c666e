"""Tokenizers of members: found, and compared."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping
from typing import Any

from torch import nn
from transformers.utils import cached_file

from proxytune.errors import VocabularyWarning
from proxytune.models.checkpoints import (
    carrier_of,
    tokenizer_code,
)
from proxytune.models.references import reference_of
from proxytune.models.vocabulary import check_same_tokens
from proxytune.recipe import MemberRef

__all__ = ["check_vocabularies", "compared", "find_tokenizer", "places_of_tokens", "warn_uncompared"]


def places_of_tokens(
    references: Mapping[str, MemberRef | None], models: Mapping[str, nn.Module]
) -> dict[str, MemberRef | None]:
    """Where to look for each member's tokenizer: an adapter in memory has that of the model which carries it."""
    return {role: found or reference_of(models[role], below=True) for role, found in references.items()}


def check_vocabularies(
    references: Mapping[str, MemberRef | None],
    tokenizers: Mapping[str, Any] | None = None,
    *,
    trusted: Collection[str] = (),
    hub: Mapping[str, Mapping[str, Any]] | None = None,
) -> dict[str, Any]:
    """Compare all members' token ids with those of the first member whose tokenizer is known.

    `references` says where each member was loaded from, the base first; `tokenizers` holds those of members saved
    without one; `trusted` are the roles whose tokenizers may run code of their own; `hub` is role → `token`,
    `cache_dir` and the like. Returns role → tokenizer, as far as they were found.

    Raises:
        VocabularyMismatchError: If two members use the same id for different tokens.

    Warns:
        VocabularyWarning: If some member's tokenizer is not found, so it could not be compared.
    """
    found, unknown = compared(references, tokenizers, trusted, hub or {})
    warn_uncompared(unknown)
    return found


def compared(
    references: Mapping[str, MemberRef | None],
    tokenizers: Mapping[str, Any] | None,
    trusted: Collection[str],
    hub: Mapping[str, Mapping[str, Any]],
) -> tuple[dict[str, Any], list[str]]:
    """What `check_vocabularies` returns, and the members that could not be compared."""
    vocabularies: dict[str, Mapping[str, int]] = {}
    targets: dict[str, Mapping[str, int]] = {}
    seen: dict[MemberRef, Any] = {}
    found: dict[str, Any] = {}
    unknown: list[str] = []
    for role, reference in references.items():
        tokenizer = (tokenizers or {}).get(role)
        if tokenizer is None and reference is not None:
            if seen.get(reference) is None:
                where = hub.get(role, {})
                # A member whose code runs already has been trusted.
                trust = role in trusted or bool(reference.load.get("trust_remote_code"))
                seen[reference] = find_tokenizer(reference, trust_remote_code=trust, **where)
                if seen[reference] is None and not trust and (code := tokenizer_code(reference, **where)):
                    unknown.append(f"{role} (its tokenizer would run {code} of its own)")
                    continue
            tokenizer = seen[reference]
        if tokenizer is None:
            unknown.append(role)
        else:
            found[role], vocabularies[role] = tokenizer, tokenizer.get_vocab()
            # Some encoder-decoders have another vocabulary for what they write (Marian).
            targets[role] = getattr(tokenizer, "target_encoder", vocabularies[role])
    if vocabularies:
        # Without the base's tokenizer, companions are compared with each other.
        against, *others = vocabularies
        for role in others:
            check_same_tokens(vocabularies[against], vocabularies[role], role=role, against=against)
            if any(targets[each] is not vocabularies[each] for each in (against, role)):
                check_same_tokens(targets[against], targets[role], role=role, against=against)
    return found, unknown


def warn_uncompared(unknown: Collection[str]) -> None:
    """Warn of members whose tokenizers are not to be had."""
    if unknown:
        warnings.warn(
            f"the vocabularies were not compared: no tokenizer was found for {', '.join(unknown)}. If ids mean "
            "different tokens there, the output is noise. Pass tokenizers={role: tokenizer}, or check_vocabulary=False "
            "if you know that they agree.",
            VocabularyWarning,
            stacklevel=4,
        )


def find_tokenizer(reference: MemberRef, *, trust_remote_code: bool = False, **hub: Any) -> Any | None:
    """A member's tokenizer; None if it has none, even where transformers would make up an empty one.

    None, too, for one with code of its own that is not trusted, and for what transformers makes of a GGUF file: other
    ids than the original's, though the vocabularies are equal. An adapter saved without one has its model's.
    """
    # Not above: `from transformers import AutoTokenizer` may be what imports this module, and is not done by then.
    from transformers import AutoTokenizer

    inside = {"subfolder": reference.load["subfolder"]} if "subfolder" in reference.load else {}
    where: dict[str, Any] = {"revision": reference.revision or "main", **inside, **hub}
    try:
        tokenizer = AutoTokenizer.from_pretrained(reference.id, trust_remote_code=trust_remote_code, **where)
    except (OSError, ValueError, TypeError):  # the last where some classes miss their file
        if (carrier := carrier_of(reference, where)) is None:
            return None
        hub.pop("subfolder", None)  # of the adapter
        return find_tokenizer(carrier, trust_remote_code=trust_remote_code, **hub)
    names = set(tokenizer.vocab_files_names.values())

    def exists(name: str) -> bool:
        quiet = {f"_raise_exceptions_for_{what}": False for what in ("missing_entries", "connection_errors")}
        return cached_file(reference.id, name, **where, **quiet) is not None

    # A tokenizer of bytes or characters has no vocabulary file at all.
    if not names or any(exists(name) for name in ("tokenizer.json", *sorted(names), "tekken.json")):
        return tokenizer
    return None
