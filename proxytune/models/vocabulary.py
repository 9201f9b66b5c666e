"""Whether two members mean the same tokens by the same ids: vocabularies are compared token → id, not by size.

Pure functions over `token → id` mappings, as `tokenizer.get_vocab()` gives them. A head that is only padded wider is no
difference: padding rows have no token.
"""

from __future__ import annotations

from collections.abc import Mapping

from proxytune.errors import VocabularyMismatchError

__all__ = ["check_same_tokens", "differing_tokens"]

_SHOWN = 5


def differing_tokens(base: Mapping[str, int], other: Mapping[str, int]) -> list[tuple[int, str | None, str | None]]:
    """List the ids on which two vocabularies contradict each other.

    An id that only one side uses is no contradiction (tokens added after training, a padded head), unless its token
    stands at another id on the other side.

    Args:
        base: The base's vocabulary, token → id.
        other: A companion's vocabulary, token → id.

    Returns:
        `(id, token in base or None, token in other or None)`, sorted by id; empty if the two agree.
    """
    of_base = {i: token for token, i in base.items()}
    of_other = {i: token for token, i in other.items()}
    moved = [t for t, i in base.items() if other.get(t, i) != i]
    ids = {base[t] for t in moved} | {other[t] for t in moved}
    ids |= {i for i, token in of_base.items() if of_other.get(i, token) != token}
    return [(i, of_base.get(i), of_other.get(i)) for i in sorted(ids)]


def check_same_tokens(base: Mapping[str, int], other: Mapping[str, int], *, role: str, against: str = "base") -> None:
    """Refuse a companion whose ids mean other tokens than the base's.

    Args:
        base: The base's vocabulary, token → id.
        other: The companion's vocabulary, token → id.
        role: What the companion is called in the message, e.g. `"expert"`.
        against: What the other side is called; another companion, where the base is not known.

    Raises:
        VocabularyMismatchError: If some id stands for two different tokens, or some token has two different ids. The
            message shows the first of them.
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
