"""What the tokenizers of three members tell: ids that a member lacks, and chat templates that do not go together."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from proxytune.models.pair_probe import rendered
from proxytune.models.pair_report import Finding

__all__ = ["described", "id_findings", "listed", "template_findings"]


def described(tokenizers: Mapping[str, Any], rows: Mapping[str, int]) -> str:
    """How vocabularies with the same ids compare, in words; `rows` is role → how many ids a member embeds."""
    vocabularies = {role: tokenizer.get_vocab() for role, tokenizer in tokenizers.items()}
    said = f"{min(map(len, vocabularies.values())):,} tokens have the same ids in {listed(list(tokenizers))}"
    padded = {role: rows[role] - 1 - max(v.values(), default=-1) for role, v in vocabularies.items() if role in rows}
    more = [f"{role} {count:,}" for role, count in padded.items() if count > 0]
    return said + (f"; padding of the heads: {', '.join(more)} rows" if more else "")


def id_findings(tokenizers: Mapping[str, Any], rows: Mapping[str, int]) -> Iterator[Finding]:
    """Tokens that one member has and another lacks; the first role's tokenizer is the one that reads prompts."""
    (first, tokenizer), *others = tokenizers.items()
    vocabulary = tokenizer.get_vocab()
    for role, count in rows.items():
        if lost := sorted((i, token) for token, i in vocabulary.items() if i >= count):
            yield Finding(
                "note",
                f"the {role} embeds {count:,} ids and lacks {_tokens([token for _, token in lost])} of the {first}'s "
                "vocabulary: none of them is ever written, and a prompt with one is refused.",
            )
    for role, other in others:
        if more := sorted(other.get_vocab().keys() - vocabulary.keys()):
            yield Finding(
                "note",
                f"the {role}'s tokenizer also has {_tokens(more)}: prompts are read with the {first}'s, which takes "
                "them apart.",
            )


def template_findings(tokenizers: Mapping[str, Any], rows: Mapping[str, int]) -> Iterator[Finding]:
    """Chat templates that differ, or write tokens that a member lacks."""
    forms = {role: form for role, tokenizer in tokenizers.items() if (form := rendered(tokenizer, "…")) is not None}
    base, expert = forms.get("base"), forms.get("expert")
    if base is not None and expert is not None and base != expert:
        yield Finding(
            "note",
            f"chat templates differ: the base's, which is written, is {_shown(base)}; the expert's, in which it was "
            f"probably tuned, is {_shown(expert)}. Write prompts in the expert's if its tuning does not show.",
        )
    elif base is None and expert is not None and "base" in tokenizers:
        yield Finding("note", "the base's tokenizer has no chat template: --chat writes the expert's.")
    if expert is not None and "base" in tokenizers:
        there = tokenizers["base"].get_vocab()
        if missing := [t for t in tokenizers["expert"].get_added_vocab() if t in expert and t not in there]:
            yield Finding(
                "problem",
                f"the expert's chat template writes {_tokens(missing)}, which the base's tokenizer lacks and would "
                "take apart. Use a base of the same family, or add them to its tokenizer.",
            )
    for role, form in list(forms.items())[:1]:
        highest = max(tokenizers[role](form, add_special_tokens=False)["input_ids"], default=-1)
        for other, count in rows.items():
            if highest >= count:
                yield Finding(
                    "problem",
                    f"chat prompts hold id {highest}, and the {other} embeds {count:,} ids: each of them would be "
                    f"refused. Use another {other}, or one whose embedding was resized before it was tuned.",
                )


def listed(names: Sequence[str]) -> str:
    """Names as in a sentence: "base, expert and antiexpert"."""
    return " and ".join([", ".join(names[:-1]), names[-1]]) if len(names) > 1 else "".join(names)


def _tokens(names: Sequence[str]) -> str:
    shown = ", ".join(map(repr, names[:3])) + (", …" if len(names) > 3 else "")
    return f"the token {shown}" if len(names) == 1 else f"{len(names)} tokens ({shown})"


def _shown(form: str) -> str:
    return repr(form if len(form) < 80 else f"{form[:60]}…{form[-20:]}")
