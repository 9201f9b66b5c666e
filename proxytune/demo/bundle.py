"""Where the bundled weights are, and what was measured on them. Importing it needs no torch."""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from proxytune.errors import LabError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

MemberName = Literal["large-base", "tiny-base", "tiny-tuned", "large-tuned"]
MEMBERS: tuple[MemberName, ...] = get_args(MemberName)
RECORD_NAME = "family.json"


def bundled(member: MemberName) -> str:
    """The folder of a bundled model.

    Args:
        member: `"large-base"`, `"tiny-base"` (the antiexpert), `"tiny-tuned"` (the expert) or `"large-tuned"`.

    Returns:
        A path for `AutoModelForCausalLM.from_pretrained` and `AutoTokenizer.from_pretrained`. The weights are bfloat16;
        pass `dtype=torch.float32` to run them on a CPU.

    Raises:
        InputError: If there is no such member.
    """
    from proxytune.validation import choice  # not above: it imports NumPy, and --help does without

    choice("bundled model", member, tuple(MEMBERS))
    return str(bundled_family() / member)


def bundled_family() -> Path:
    """The folder that holds the bundled models and the family's record."""
    # The package is installed as plain files (wheel or editable), which from_pretrained needs anyway.
    return Path(str(resources.files("proxytune.demo"))) / "weights"


def bundled_record() -> dict[str, Any]:
    """The bundled family's record: `alpha` (chosen on validation), `seed`, `training` cost, `test` table and more."""
    return read_record(bundled_family())


def read_record(folder: Path) -> dict[str, Any]:
    """The content of a family folder's `family.json`; `LabError` if there is none."""
    path = folder / RECORD_NAME
    record: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    if "alpha" not in record:
        raise LabError.of(
            f"family folder {folder}",
            expected=f"a record {RECORD_NAME} with the chosen alpha",
            got=f"only {', '.join(record)}" if record else "none",
            remedy="Finish the training (see benches/README.md in the repository), which writes it, or pass an alpha "
            "(--alpha).",
        )
    return record


def load_family(folder: Path) -> tuple[dict[MemberName, PreTrainedModel], PreTrainedTokenizerBase]:
    """Load the members (float32, evaluation mode) of a family folder, and their shared tokenizer.

    Raises:
        LabError: If a member is missing.
    """
    missing = [member for member in MEMBERS if not (folder / member / "config.json").exists()]
    if missing:
        raise LabError.of(
            f"family folder {folder}",
            expected=f"one folder per member: {', '.join(MEMBERS)}",
            got=f"no {', '.join(missing)}",
            remedy="Finish the training (see benches/README.md in the repository), or take the bundled family.",
        )
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    models: dict[MemberName, PreTrainedModel] = {
        member: AutoModelForCausalLM.from_pretrained(folder / member, dtype=torch.float32).eval() for member in MEMBERS
    }
    return models, AutoTokenizer.from_pretrained(folder / MEMBERS[0])
