"""What a member's files tell: before a weight is read, whether they can be a member; afterwards, what was missing."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING
from transformers.utils import cached_file, is_peft_available

from proxytune.errors import MemberError, MemberNotFoundError, ProxytuneError, UnsupportedModelError
from proxytune.models.load_arguments import HUB_ARGUMENTS
from proxytune.recipe import MemberRef

__all__ = [
    "carrier_of",
    "check_checkpoint",
    "first_line",
    "is_custom_code",
    "not_found",
    "refuse_incomplete",
    "tokenizer_code",
]

_AUTO = ("AutoModelForCausalLM", "AutoModelForSeq2SeqLM")
_ADAPTER_FILE = "adapter_config.json"
_SHOWN = 4
# Checkpoints that score a text. Where the head for tokens is tied to the embeddings, none of their weights is missing.
_SCORERS = (
    *("ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering", "ForMultipleChoice"),
    *("RewardModel",),
)
_SCALE = re.compile(r"(.+\.weight)(?:_scale\w*|\.SCB)")
_LORA = re.compile(r"\.lora_(A|B|embedding_A|embedding_B)\b")
_LAYER = re.compile(r"(.*\b(?:layers|layer|blocks|h)\.)(\d+)\.(.+)")


# --- before a weight is read ---------------------------------------------------------------------------------------


def check_checkpoint(
    reference: MemberRef, role: str, arguments: Mapping[str, Any], allow: str, encoder_decoder: bool | None
) -> bool:
    """Whether a member is an encoder-decoder; refuse what its small files tell cannot be opened as a member.

    Args:
        reference: Where the member is.
        role: Its role, for messages.
        arguments: What it is loaded with.
        allow: How to allow its own code to run, as a sentence.
        encoder_decoder: Whether it has to be one; None if either will do.

    Raises:
        MemberNotFoundError: If there is no such folder, or none with a model.
        MemberError: If it would run code of its own, which `trust_remote_code` does not allow, or PEFT is missing.
        UnsupportedModelError: If it is of the other kind, or generates no text.
    """
    hub = {name: arguments[name] for name in HUB_ARGUMENTS if name in arguments}
    hub["revision"] = reference.revision or "main"
    _refuse_place(reference.id, role, arguments)
    if arguments.get("gguf_file") or arguments.get("config") is not None:  # these tell what the model is
        return bool(getattr(arguments.get("config"), "is_encoder_decoder", False))
    try:
        reference = _below_adapter(reference, role, hub)
        config, _ = PreTrainedConfig.get_config_dict(reference.id, **hub)
    except (OSError, ValueError) as error:
        raise not_found(reference, role, error) from error
    if not config:
        raise not_found(reference, role, None)
    _refuse_code(config, reference, role, arguments, allow)
    return _check_family(config, role, reference.id, encoder_decoder)


def not_found(reference: MemberRef, role: str, error: Exception | None) -> ProxytuneError:
    """The error about a member that transformers cannot open; None for a folder without a config."""
    name = reference.id
    place = f"{name!r}" + (f" at revision {reference.revision!r}" if reference.revision else "")
    there = os.path.isabs(name) or os.path.exists(name)
    return MemberNotFoundError.of(
        f"the {role}",
        expected="a hub id, or a folder with a config.json and weights",
        got=place + ("" if there else f" (there is no folder {os.path.abspath(name)})"),
        remedy="It has no config.json: name a model's folder."
        if error is None
        else f"transformers says: {first_line(error)}",
    )


def first_line(error: Exception) -> str:
    """The first line of a message."""
    return str(error).strip().splitlines()[0]


def _refuse_place(name: str, role: str, arguments: Mapping[str, Any]) -> None:
    place, found = Path(name), ""
    if place.is_file():
        found, cure = f"the file {name!r}", "Name its folder."
        if place.suffix == ".gguf":
            cure = _gguf_cure(role, str(place.parent), place.name)
    elif place.is_dir():
        folder = place / (arguments.get("subfolder") or "")
        files = sorted(file.name for file in folder.glob("*.gguf"))
        if files and not arguments.get("gguf_file") and not (folder / "config.json").exists():
            found, cure = f"{name!r}, which has GGUF files only", _gguf_cure(role, name, files[0])
        own = any((folder / file).exists() for file in ("config.json", _ADAPTER_FILE))
        saved = [int(part.name[11:]) for part in folder.glob("checkpoint-*") if part.name[11:].isdigit()]
        if saved and not own:
            last = f"checkpoint-{max(saved)}"
            found, cure = f"{name!r}, which holds {last} and no model itself", f"Name {str(folder / last)!r}."
    elif os.path.isabs(name) or name.startswith(("./", "../")):  # no hub id
        found, cure = f"{name!r}, where there is no folder", "Correct the path."
    if found:
        raise MemberNotFoundError.of(
            f"the {role}", expected="a hub id, or a folder with a config.json and weights", got=found, remedy=cure
        )


def _gguf_cure(role: str, folder: str, file: str) -> str:
    return (
        f"Pass {folder!r} as the {role}, with members={{{role!r}: {{'gguf_file': {file!r}}}}}; in a recipe, write "
        f'"load": {{"gguf_file": "{file}"}}. The gguf package has to be installed.'
    )


def carrier_of(reference: MemberRef, hub: Mapping[str, Any]) -> MemberRef | None:
    """The model that a PEFT adapter belongs to, for a reference to an adapter without one; else None."""
    try:
        found = _adapter_file(reference, hub)
    except OSError:
        return None
    name = None if found is None else _named_in(found)
    return None if name is None else MemberRef(name)


def _named_in(adapter: str) -> str | None:
    with open(adapter, encoding="utf-8") as opened:
        name = json.load(opened).get("base_model_name_or_path")
    return None if name is None else str(name)


def _adapter_file(reference: MemberRef, hub: Mapping[str, Any]) -> str | None:
    quiet = {f"_raise_exceptions_for_{what}": False for what in ("missing_entries", "gated_repo")}
    # Without a network, each look-up takes a while: the second one says so.
    if cached_file(reference.id, "config.json", **hub, **quiet, _raise_exceptions_for_connection_errors=False):
        return None
    found: str | None = cached_file(reference.id, _ADAPTER_FILE, **hub, **quiet)
    return found


def _below_adapter(reference: MemberRef, role: str, hub: Mapping[str, Any]) -> MemberRef:
    """The model that a PEFT adapter belongs to, for a reference to an adapter without one; else the reference."""
    if (adapter := _adapter_file(reference, hub)) is None:
        return reference
    if not is_peft_available():
        raise MemberError.of(
            f"the {role}",
            expected="a model, or PEFT for an adapter of one",
            got=f"{reference.id!r}, a PEFT adapter ({_ADAPTER_FILE}), and no peft in this environment",
            remedy="Run pip install peft, or pass a merged model.",
        )
    below = str(_named_in(adapter))
    if not os.path.isdir(below) and (os.path.isabs(below) or below.startswith(("./", "../"))):
        raise MemberNotFoundError.of(
            f"the {role}",
            expected="an adapter whose model is there",
            got=f"{reference.id!r}, an adapter of {below!r}, where there is no folder",
            remedy=f'Write where the model is now under "base_model_name_or_path" in {adapter}.',
        )
    return MemberRef(below)


def _refuse_code(
    config: Mapping[str, Any], reference: MemberRef, role: str, arguments: Mapping[str, Any], allow: str
) -> None:
    """Refuse a model whose class is neither transformers' nor trusted."""
    code = config.get("auto_map") or {}
    wanted = [code[name] for name in (*_AUTO, "AutoConfig") if name in code]
    family = _family(config)
    known = family in MODEL_FOR_CAUSAL_LM_MAPPING or family in MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING
    if arguments.get("trust_remote_code") or not wanted or known:
        return
    raise MemberError.of(
        f"the {role}",
        expected="a model whose class is transformers' own",
        got=f"{reference.id!r}, which would run {_file(wanted[0])} of its own",
        remedy=f"Read that file first. {allow}",
    )


def _file(class_ref: str) -> str:
    """The file of `"module.Class"`, or of `"owner/name--module.Class"` in another repository."""
    *repository, dotted = class_ref.split("--")
    return f"{dotted.split('.')[0]}.py" + "".join(f" (of {name})" for name in repository)


def _family(config: Mapping[str, Any]) -> type[PreTrainedConfig] | None:
    name = config.get("model_type")
    return CONFIG_MAPPING[name] if name in CONFIG_MAPPING else None  # noqa: SIM401 - it has no get() that imports


def _check_family(config: Mapping[str, Any], role: str, name: str, wanted: bool | None) -> bool:
    """Whether a model is an encoder-decoder; refuses other than the `wanted` kind, and what generates no text."""
    family, known = config.get("model_type"), _family(config)
    classes = [str(found) for found in config.get("architectures") or []]
    pair = bool(config.get("is_encoder_decoder")) and not any(found.endswith("ForCausalLM") for found in classes)
    kinds = ("a decoder-only model", "an encoder-decoder")
    if wanted is not None and pair != wanted:
        raise UnsupportedModelError.of(
            f"the {role}",
            expected=kinds[wanted],
            got=f"{name!r}, {', '.join(classes) or 'a model'} ({family}), {kinds[pair]}",
            remedy="Encoder-decoders are composed by proxytune.wrap, all three members or none.",
        )
    mapping = MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING if pair else MODEL_FOR_CAUSAL_LM_MAPPING
    if known is None or known in mapping or _AUTO[pair] in (config.get("auto_map") or {}):
        return pair
    seeing = any(key in config for key in ("vision_config", "audio_config"))
    raise UnsupportedModelError.of(
        f"the {role}",
        expected=f"{('a causal LM', kinds[1])[pair]} ({_AUTO[pair]})",
        got=f"{name!r}, {', '.join(classes) or 'a model'} ({family})"
        + (", which takes more than text" if seeing else ""),
        remedy="Load it yourself with AutoModelForImageTextToText.from_pretrained, and pass the model; it is used for "
        "text, and as the base for images too."
        if seeing
        else "Name a model that generates text.",
    )


def tokenizer_code(reference: MemberRef, **hub: Any) -> str | None:
    """The file of its own that a tokenizer would run; None if it has none."""
    # Not above, see `proxytune.models.member_tokenizers.find_tokenizer`.
    from transformers.models.auto.tokenization_auto import get_tokenizer_config

    try:
        code = get_tokenizer_config(reference.id, revision=reference.revision or "main", **hub).get("auto_map") or {}
    except (OSError, ValueError):
        return None
    wanted: Any = code.get("AutoTokenizer") if isinstance(code, Mapping) else code
    classes: Sequence[Any] = [wanted] if isinstance(wanted, str) else wanted or []
    return next((_file(found) for found in classes if found), None)


# --- afterwards ----------------------------------------------------------------------------------------------------


def refuse_incomplete(
    model: nn.Module,
    info: Mapping[str, Collection[Any]] | None,
    role: str,
    place: str,
    given: Collection[str] = (),
) -> None:
    """Refuse a model some of whose weights were not in its checkpoint, or had another shape there, or were left over.

    transformers draws such weights at random, and only logs it. Tied weights are not missing. Left over may be what
    does no harm, such as heads and old buffers; what the text depends on is refused.

    Args:
        model: The loaded model.
        info: What `from_pretrained(output_loading_info=True)` told; None if it told nothing.
        role: Its role, for messages.
        place: The hub id or folder, as shown in messages.
        given: The names of the arguments it was loaded with.
    """
    info = info or {}
    missing = set(map(str, info.get("missing_keys", ())))
    adapted = hasattr(model, "peft_config")
    if adapted:
        # The loading info is the adapter's then. transformers marks each weight that it has read, and PEFT puts aside
        # those that the adapter replaces.
        missing |= {
            name
            for name, weight in model.named_parameters()
            if not getattr(weight, "_is_hf_initialized", False) and ".original_module." not in name
        }
    if missing:  # a tied weight is one with what was found
        named = dict(model.named_parameters(remove_duplicate=False))
        found = {id(weight) for name, weight in named.items() if name not in missing}
        missing = {name for name in missing if id(named.get(name)) not in found}
    lost = sorted(missing)
    shapes = sorted((str(name), list(held), list(wanted)) for name, held, wanted in info.get("mismatched_keys", ()))
    said = [f"{name} ({held} there, {wanted} in the model)" for name, held, wanted in shapes]
    classes = [str(name) for name in getattr(getattr(model, "config", None), "architectures", None) or []]
    of = f"{place}, a checkpoint of {classes[0]}," if classes else place
    if lost or said:
        parts = [f"without {_some(lost)}"] * bool(lost) + [f"with another shape of {_some(said)}"] * bool(said)
        raise MemberError.of(
            f"the {role}",
            expected=f"a checkpoint with all weights of {type(model).__name__}",
            got=f"{of} {' and '.join(parts)}",
            remedy="transformers would draw these weights at random. "
            + (
                "Load the adapter with peft.PeftModel.from_pretrained, and pass the model."
                if adapted
                else "Name a causal LM; a reward model or an encoder is none."
            ),
        )
    if not adapted and "gguf_file" not in given:
        _refuse_left_over(model, sorted(map(str, info.get("unexpected_keys", ()))), role, place, given)
    if classes and all(name.endswith(_SCORERS) for name in classes):
        raise MemberError.of(
            f"the {role}",
            expected="a model that was trained to generate text",
            got=f"{of} which scores texts",
            remedy="Name a causal LM.",
        )


def _refuse_left_over(model: Any, names: Sequence[str], role: str, place: str, given: Collection[str]) -> None:
    """Refuse a checkpoint with scales of its weights, LoRA matrices, or further layers that the model does not have.

    `names` are those that transformers neither ignores nor renames.
    """
    own = {name for name, _ in model.named_parameters()} if names else set()
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    # Heads were saved without the prefix at times.
    own |= {name.removeprefix(prefix) for name in own}
    scales = [name for name in names if (found := _SCALE.fullmatch(name)) and found[1] in own]
    lora = [name for name in names if _LORA.search(name)]
    if scales and getattr(model, "hf_quantizer", None) is None:
        what, cure = scales, "Put its quantization_config back into config.json, or name the weights unquantised."
    elif lora:
        what, cure = lora, "They are an adapter's: merge it into the weights before saving, or save it by itself."
    else:
        what = [] if any("layer" in name or name == "config" for name in given) else _further_layers(model, names, own)
        cure = (
            "Correct the number of layers in its config.json. If fewer are meant, pass that number, e.g. "
            f"members={{{role!r}: {{'num_hidden_layers': …}}}}."
        )
    if what:
        raise MemberError.of(
            f"the {role}",
            expected=f"a checkpoint whose weights {type(model).__name__} takes",
            got=f"{place} with {_some(what)}, which transformers would leave out",
            remedy=cure,
        )


def _further_layers(model: Any, names: Sequence[str], own: Collection[str]) -> list[str]:
    """The names of whole layers like the model's, beyond its last; layers that predict further tokens are none."""
    config = getattr(model, "config", None)
    layers: dict[tuple[str, int], dict[str, str]] = {}
    for name in names:
        if found := _LAYER.fullmatch(name):
            layers.setdefault((found[1], int(found[2])), {})[found[3]] = name
    held: dict[str, set[str]] = {}
    last: dict[str, int] = {}
    for name in own if layers else ():
        if found := _LAYER.fullmatch(name):
            held.setdefault(found[1], set()).add(found[3])
            last[found[1]] = max(last.get(found[1], 0), int(found[2]))
    if not layers or getattr(config, "num_nextn_predict_layers", None):
        return []
    return [
        name
        for (stack, index), parts in layers.items()
        if index > last.get(stack, index) and parts.keys() <= held[stack]
        for name in parts.values()
    ]


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")


def is_custom_code(model: Any) -> bool:
    """Whether a model's class, or its config's, is from its own repository."""
    return any(
        type(part).__module__.startswith("transformers_modules") for part in (model, getattr(model, "config", None))
    )
