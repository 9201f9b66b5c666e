"""Whether two members use the same ids for the same tokens.

Vocabularies are compared as `token → id` mappings (`tokenizer.get_vocab()`), not by size. A wider padded head is no
difference: padding rows have no token.
"""

from __future__ import annotations

from collections.abc import Mapping

from proxytune.errors import VocabularyMismatchError

__all__ = ["check_same_tokens", "differing_tokens"]

_SHOWN = 5


def differing_tokens(base: Mapping[str, int], other: Mapping[str, int]) -> list[tuple[int, str | None, str | None]]:
    """List the ids on which two vocabularies (token → id) contradict each other.

    An id that only one side uses is no contradiction (tokens added after training, a padded head), unless its token has
    another id on the other side.

    Returns:
        `(id, token in base or None, token in other or None)`, sorted by id.
    """
    of_base = {i: token for token, i in base.items()}
    of_other = {i: token for token, i in other.items()}
    moved = [t for t, i in base.items() if other.get(t, i) != i]
    ids = {base[t] for t in moved} | {other[t] for t in moved}
    ids |= {i for i, token in of_base.items() if of_other.get(i, token) != token}
    return [(i, of_base.get(i), of_other.get(i)) for i in sorted(ids)]


def check_same_tokens(base: Mapping[str, int], other: Mapping[str, int], *, role: str, against: str = "base") -> None:
    """Raise VocabularyMismatchError, with examples, if two vocabularies (token → id) contradict each other.

    `role` and `against` name the two sides in the message; `against` is another companion if the base is not known.
    """
    differing = differing_tokens(base, other)
    if not differing:
        return

    def show(token: str | None) -> str:
        return "nothing" if token is None else repr(token)

    first = "; ".join(f"id {i}: {show(b)} in the {against}, {show(o)} in the {role}" for i, b, o in differing[:_SHOWN])
    more = f"; and {len(differing) - _SHOWN} more" if len(differing) > _SHOWN else ""
    raise VocabularyMismatchError.of(
        f"vocabulary of the {role}",
        expected=f"the {against}'s token ids (only the padding of the head may differ)",
        got=f"{len(differing)} ids that mean different tokens ({first}{more})",
        remedy=f"Adding logits id by id would mix unrelated tokens. Use an {role} with the {against}'s tokenizer.",
    )
