"""Writing an adapter folder completely or not at all.

The folder holds the recipe and what `from_pretrained(folder)` of transformers' Auto class needs to open it; no weights.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import transformers
from transformers import GenerationConfig

from proxytune.errors import RecipeError
from proxytune.models.member_tokenizers import find_tokenizer
from proxytune.recipe import RECIPE_FILE, Recipe

__all__ = ["save_adapter"]

_CODE_FILE = "modeling_proxytune.py"
# Run by transformers with trust_remote_code=True where proxytune has not been imported.
_CODE = '''"""Opens a proxytune recipe with transformers' Auto classes. Needs proxytune to be installed."""

from proxytune import ProxyTunedConfig, ProxyTunedModel

__all__ = ["ProxyTunedConfig", "ProxyTunedModel"]
'''


def save_adapter(
    folder: str | os.PathLike[str],
    recipe: Recipe,
    generation_config: GenerationConfig | None,
    carried: Mapping[str, Any] | None = None,
) -> None:
    """Write the recipe, a `config.json` that points at it, the generation defaults, and the base's tokenizer.

    `carried` is what the `config.json` says of the composition (`proxytune.models.config.CARRIED`).

    Pipelines and scorers look for a tokenizer beside a model; one that is already in the folder stays. Everything is
    written to a temporary folder first and then moved; on any error the target is restored.

    Raises:
        RecipeError: If the target is a file or a member's folder, or cannot be written to.
    """
    target = Path(folder).expanduser().resolve()
    if os.path.exists(target) and not target.is_dir():
        raise RecipeError.of("save_pretrained", expected="a folder", got=f"the file {target}", remedy="Name a folder.")
    for role, ref in recipe.members.items():
        if str(target) == ref.id:
            raise RecipeError.of(
                "save_pretrained",
                expected="a folder that is not a member's",
                got=f"{target}, the {role}'s, whose config.json would be overwritten",
                remedy="Name another folder.",
            )
    auto = "AutoModelForSeq2SeqLM" if (carried or {}).get("is_encoder_decoder") else "AutoModelForCausalLM"
    config = {
        "model_type": "proxytune",
        # Not one of our classes: programs that look the name up in transformers can then open the folder.
        "architectures": [auto],
        "auto_map": {
            "AutoConfig": f"{Path(_CODE_FILE).stem}.ProxyTunedConfig",
            auto: f"{Path(_CODE_FILE).stem}.ProxyTunedModel",
        },
        **(carried or {}),
        "transformers_version": transformers.__version__,
    }
    made = [place for place in (target, *target.parents) if not os.path.exists(place)]  # the deepest first
    try:
        target.mkdir(parents=True, exist_ok=True)
        # Staged inside the target: its parent may be on another disk, or not writable.
        with tempfile.TemporaryDirectory(dir=target, prefix=".saving-") as staging:
            staged = Path(staging) / "new"
            staged.mkdir()
            # Folders in or beside the target are written as relative ones: all can be moved together then.
            near = {role: ref.seen_from(target) for role, ref in recipe.members.items()}
            (staged / RECIPE_FILE).write_text(recipe.at(near).dumps(), encoding="utf-8")
            (staged / _CODE_FILE).write_text(_CODE, encoding="utf-8")
            if generation_config is not None:
                generation_config.save_pretrained(staged)
            trust = bool(recipe.base.load.get("trust_remote_code"))  # its code runs already
            if not (target / "tokenizer_config.json").exists() and (
                tokenizer := find_tokenizer(recipe.base, trust_remote_code=trust)
            ):
                tokenizer.save_pretrained(staged)
            # config.json is written and moved last: without it the folder does not open.
            (staged / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
            _move_in(staged, target, Path(staging) / "old")
        made = []
    except (OSError, ValueError, TypeError) as error:  # invalid generation settings, or values that JSON cannot hold
        raise RecipeError.of(
            "save_pretrained",
            expected="a folder that can be written",
            got=f"{target} ({error})",
            remedy="The folder is unchanged. Choose another folder, or fix the error shown.",
        ) from error
    finally:
        for place in made:
            with contextlib.suppress(OSError):  # it was never created, or someone else has written there
                place.rmdir()


def _move_in(staged: Path, target: Path, backup: Path) -> None:
    """Move the staged files into the folder; undo all moves if one fails."""
    files = [file.relative_to(staged) for file in staged.rglob("*") if file.is_file()]
    moved: list[Path] = []
    done = False
    try:
        for name in sorted(files, key=lambda f: f.name == "config.json"):
            for place in (target / name, backup / name):
                place.parent.mkdir(parents=True, exist_ok=True)
            if (target / name).exists():
                shutil.copy2(target / name, backup / name)
            os.replace(staged / name, target / name)
            moved.append(name)
        done = True
    finally:
        for name in () if done else moved:
            if (backup / name).exists():
                os.replace(backup / name, target / name)
            else:
                (target / name).unlink()
                if name.parent != Path():
                    with contextlib.suppress(OSError):  # not empty: it was there before
                        (target / name).parent.rmdir()
