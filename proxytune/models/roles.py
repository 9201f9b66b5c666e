"""Whether the members are what their roles say: what is certainly wrong is refused, what probably is, is said."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from proxytune.errors import InputError, MemberError, SteeringWarning
from proxytune.formulas.base import Formula, terms_of
from proxytune.formulas.schedules import Schedule
from proxytune.models.end_tokens import ends_of
from proxytune.models.members.adapter_state import runs_as, states_of
from proxytune.models.members.innermost import innermost
from proxytune.models.references import reference_of
from proxytune.recipe import ROLES, MemberRef

__all__ = ["refuse_folded", "refuse_no_shift", "warn_of_roles", "warn_of_size"]

_TUNED = frozenset(
    ("aligned", "chat", "dpo", "finetuned", "ft", "instruct", "instruction", "it", "rlhf", "sft", "tuned")
)
_UNTUNED = frozenset(("base", "pretrained", "pretrain", "pt", "untuned"))
_LARGER = 1.7
"""How many times the base's parameters, embeddings not counted, a companion may have."""


def refuse_no_shift(
    expert: Any,
    antiexpert: Any,
    formula: Formula,
    *,
    revisions: Mapping[str, str] | None = None,
    members: Mapping[str, Mapping[str, Any]] | None = None,
) -> None:
    """Refuse an expert that certainly is the antiexpert: one object, one adapter's modules, or one folder or hub id.

    Call it with what was given, before anything is loaded, and with the models; `revisions` and `members` are those of
    `proxytune.wrap`. A formula whose weights do not cancel may have one model in both roles.

    Raises:
        MemberError: If expert and antiexpert are the same.
    """
    if sum(formula.weights()):
        return
    same = None
    if all(isinstance(given, str | os.PathLike | MemberRef) for given in (expert, antiexpert)):
        revisions = revisions if isinstance(revisions, Mapping) else {}
        own = members if isinstance(members, Mapping) else {}
        reference = reference_of(expert, revisions.get("expert"))
        alike = reference == reference_of(antiexpert, revisions.get("antiexpert"))
        if reference is not None and alike and own.get("expert") == own.get("antiexpert"):
            same = f"{reference.id!r} for both" + (f", revision {reference.revision!r}" if reference.revision else "")
    elif (inner := innermost(expert)) is not None and inner is innermost(antiexpert) and _alike(expert, antiexpert):
        same = f"one {type(expert).__name__} for both" + (
            "" if expert is antiexpert else ", in which the same adapters are active for both"
        )
    if same is not None:
        raise MemberError.of(
            "the antiexpert",
            expected="another model than the expert",
            got=f"{same}: expert - antiexpert is 0, so only the base is left",
            remedy="Pass the model that the expert was tuned from. For the base alone, set alpha=0.",
        )


def refuse_taken_names(model: Any, roles: Iterable[str]) -> None:
    """Raise InputError for roles that cannot be attributes of the composed model, which has others of that name."""
    later = {"members", "weighing", "overlap", "split_threads", "cache_owner", "formula", *type(model).__annotations__}
    for role in roles:
        if role not in ROLES and (role.startswith("_") or role in later or hasattr(model, role)):
            raise InputError.of(
                f"the role {role!r}",
                expected="a name that is no attribute of a model, since members become attributes",
                got=f"{role!r}, which is one",
                remedy="Call it something else in the formula, such as 'helper'.",
            )


def refuse_folded(models: Mapping[str, Any], index: Mapping[str, int], formula: Any) -> None:
    """Refuse a shift of which nothing is left, since its roles are one member; role → model, and role → member.

    Raises:
        MemberError: If all companions' weights cancel.
    """
    left: dict[int, float] = {}
    wanted = [term for term in terms_of(formula) if term.weight != 0.0]
    for term in wanted:
        if isinstance(term.weight, Schedule):
            return
        left[index[term.member]] = left.get(index[term.member], 0.0) + term.weight
    companions = [term.member for term in wanted if term.member != "base"]
    if not companions or any(weight for i, weight in left.items() if i) or left.get(0, 0.0) != 1.0:
        return
    model = models[companions[0]]
    alike = " and ".join(("the base", *companions)) if index[companions[0]] == 0 else " and ".join(companions)
    raise MemberError.of(
        "the antiexpert" if {*companions} == {"expert", "antiexpert"} else "the companions",
        expected="another model than the expert" if "expert" in companions else "other models than each other",
        got=f"one {type(model).__name__} for {alike}: their weights add up to 0, so only the base is left",
        remedy="Pass the model that the expert was tuned from. For the base alone, set alpha=0."
        if "expert" in companions
        else "Pass another model, or a View of it with another prompt or adapter state.",
    )


def _alike(expert: Any, antiexpert: Any) -> bool:
    """Whether two wrappers of one module run with the same adapters."""
    pair = {"expert": expert, "antiexpert": antiexpert}
    one, other = (runs_as(pair[role], state) for role, state in states_of(pair).items())
    return one == other


def warn_of_roles(members: Mapping[str, Any], formula: Formula) -> None:
    """Say what is probably a mistake in the roles.

    `members` is role → model; without the base for a processor, which calls `warn_of_size` when it is attached.

    Warns:
        SteeringWarning: If expert and antiexpert have equal weights, other sizes, look swapped, or are larger than the
            base.
    """
    if not members.keys() >= {"expert", "antiexpert"}:
        return
    expert, antiexpert = members["expert"], members["antiexpert"]
    weights = formula.weights()
    if antiexpert is not expert and not sum(weights) and _equal_weights(expert, antiexpert):
        _warn(
            "expert and antiexpert have equal weights, so expert - antiexpert is 0 and only the base is left: pass the "
            "tuned model as the expert, and the one that it was tuned from as the antiexpert."
        )
    elif weights[0] > 0 and (reason := _swapped(members)):
        _warn(
            f"expert and antiexpert look swapped: {reason}. Steered so, texts move away from what was tuned. The "
            "expert is the tuned model; the antiexpert is the one that it was tuned from."
        )
    if "base" in members:
        warn_of_size(members["base"], members, formula)


def _warn_of_pair(base: Any, companions: Mapping[str, Any]) -> None:
    """Say that the antiexpert cannot be the model that the expert was tuned from."""
    expert, antiexpert = companions["expert"], companions["antiexpert"]
    # The base in both roles checks exactness, or is contrastive decoding.
    if any(m is base or (_name(m) and _name(m) == _name(base)) for m in (expert, antiexpert)):
        return
    for field in ("num_hidden_layers", "hidden_size"):
        sizes = [getattr(m.config.get_text_config(decoder=True), field, None) for m in (expert, antiexpert)]
        if None not in sizes and sizes[0] != sizes[1]:
            _warn(
                f"the antiexpert is another model than the expert was tuned from: {field} is {sizes[1]}, the expert's "
                f"{sizes[0]}. The antiexpert is the expert's own model before it was tuned."
            )
            return


def _name(model: Any) -> str:
    return str(getattr(getattr(model, "config", None), "name_or_path", "") or "")


def warn_of_size(base: Any, companions: Mapping[str, Any], formula: Formula) -> None:
    """Say that a companion is larger than the base, or else that they differ in size. Warns: SteeringWarning."""
    size, larger = _parameters(base), False
    for role, model in companions.items():
        if model is base or not size or (own := _parameters(model)) <= _LARGER * size:
            continue
        larger = True
        _warn(
            f"the {role} is larger than the base ({own:,} parameters without embeddings, the base {size:,}): the "
            "base is the large model, expert and antiexpert are small. Check that they were not interchanged."
        )
    if not larger and not sum(formula.weights()):
        _warn_of_pair(base, companions)


def _swapped(members: Mapping[str, Any]) -> str | None:
    """Why expert and antiexpert look swapped; None if they do not."""
    expert, antiexpert = members["expert"], members["antiexpert"]
    names = {role: _name(m) for role, m in members.items()}
    for adapter in dict(getattr(antiexpert, "peft_config", None) or {}).values():
        source = getattr(adapter, "base_model_name_or_path", None)
        if source and source == names["expert"] and not getattr(expert, "peft_config", None):
            return f"the antiexpert is an adapter of {source!r}, which is the expert"
    tuned, plain = _words(names["antiexpert"]), _words(names["expert"])
    if tuned & _TUNED and not plain & _TUNED and tuned - _TUNED - _UNTUNED == plain - _UNTUNED:
        return f"the antiexpert is {names['antiexpert']!r}, the expert {names['expert']!r}"
    ends = set(ends_of(expert))
    own = [i for i in ends_of(antiexpert) if i not in ends]
    if own and "base" in members and ends and ends <= (base := set(ends_of(members["base"]))) and not base & set(own):
        return f"the antiexpert has end tokens of its own (ids {', '.join(map(str, own))}), the expert has the base's"
    return None


def _words(name: str) -> set[str]:
    return set(re.split(r"[^a-z0-9.]+", name.rstrip("/").rsplit("/", 1)[-1].lower())) - {""}


def _parameters(model: Any) -> int:
    """How many parameters a model has without its embeddings; 0 where that is not known (packed weights)."""
    model = innermost(model)
    count = None if getattr(model, "hf_quantizer", None) else getattr(model, "num_parameters", None)
    return int(count(exclude_embeddings=True)) if callable(count) else 0


def _equal_weights(one: Any, other: Any) -> bool:
    """Whether two models have equal parameters; False where that cannot be told here (offloaded, sharded, packed)."""
    # Not state_dict(): that of some quantised members changes them.
    ours, theirs = dict(one.named_parameters()), dict(other.named_parameters())
    if not ours or ours.keys() != theirs.keys():
        return False
    # The small ones first: two different models mostly differ in their first norm.
    pairs = [(ours[name].data, theirs[name].data) for name in sorted(ours, key=lambda name: ours[name].numel())]
    for a, b in pairs:
        plain = type(a) is torch.Tensor and type(b) is torch.Tensor and a.device == b.device != torch.device("meta")
        if not plain or a.shape != b.shape or a.dtype != b.dtype:
            return False
    return all(torch.equal(a, b) for a, b in pairs)


def _warn(text: str) -> None:
    warnings.warn(text, SteeringWarning, stacklevel=4)
