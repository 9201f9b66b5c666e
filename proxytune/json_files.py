"""JSON files of a known format: read strictly, written atomically.

Unknown keys and newer formats are refused: a misspelt key must not be ignored, nor a newer file half understood.
"""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from proxytune.errors import InputError, ProxytuneError

__all__ = ["check_form", "exchange", "read", "refuse_unknown"]

Error = type[ProxytuneError]


def read(file: Path, what: str, *, sought: str = "a file", error: Error = InputError, remedy: str) -> Any:
    """Parse a JSON file without checking its content.

    Args:
        file: The file.
        what: What it holds, for the message.
        sought: What was expected at that path, for the message.
        error: The class of the error if the file does not exist, cannot be read, or is not JSON.
        remedy: What to do if the file does not exist.
    """
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise error.of(what, expected=sought, got=f"no file at {file}", remedy=remedy) from None
    except OSError as failure:
        raise error.of(
            what, expected="a file that can be read", got=str(failure), remedy="Give the file or its folder."
        ) from None
    except (ValueError, RecursionError) as failure:  # not JSON, not UTF-8, a number too long, or nested too deeply
        raise error.of(
            f"{what} {file}", expected="JSON", got=str(failure), remedy="Repair the file, or save it again."
        ) from None


def check_form(
    data: Any,
    what: str,
    *,
    version: int,
    keys: tuple[str, ...],
    optional: tuple[str, ...] = (),
    error: Error = InputError,
    see: str,
) -> Mapping[str, Any]:
    """Check that parsed JSON is an object of a known format, and return it.

    Args:
        data: The parsed file.
        what: What it holds, for the message.
        version: The newest known `format_version`.
        keys: Required keys, including `format_version`.
        optional: Optional keys.
        error: The class of the error if it is not an object, its format is newer, or keys are missing or unknown.
        see: The module that documents the format.
    """
    if not isinstance(data, Mapping):
        raise error.of(what, expected="a JSON object", got=type(data).__name__, remedy=f"See {see} for the form.")
    if not any(key in data for key in keys):
        some = ", ".join(map(repr, list(data)[:4])) or "an empty object"
        raise error.of(
            what, expected=f"an object with the keys {', '.join(keys)}", got=some, remedy=f"See {see} for the form."
        )
    found = data.get("format_version")
    if type(found) is not int or found < 1:  # not True, and JSON has no other numbers
        raise error.of(
            f"{what} format_version",
            expected=f"a whole number from 1 to {version}",
            got=repr(found),
            remedy=f'Write "format_version": {version}.',
        )
    if found > version:
        # Checked before the keys: a newer format may have new ones, and the version explains them better.
        raise error.of(
            f"{what} format_version",
            expected=f"at most {version}, the newest that this version of proxytune reads",
            got=str(found),
            remedy="Upgrade proxytune.",
        )
    refuse_unknown(data, (*keys, *optional), what, error=error)
    missing = [key for key in keys if key not in data]
    if missing:
        raise error.of(what, expected=f"the keys {', '.join(keys)}", got=f"no {', '.join(missing)}", remedy="Add them.")
    return data


def refuse_unknown(data: Mapping[str, Any], known: tuple[str, ...], where: str, *, error: Error = InputError) -> None:
    """Raise `error` if `data` has keys other than `known`; `where` names the object in the message."""
    unknown = [key for key in data if key not in known]
    if unknown:
        raise error.of(
            where,
            expected=f"only the keys {', '.join(known)}",
            got=f"unknown {', '.join(map(repr, unknown))}",
            remedy="Remove or correct them, or install the version of proxytune that knows them.",
        )


def exchange(file: Path, data: Any, what: str, *, error: Error = InputError) -> Path:
    """Write JSON values (no NaN or infinities) to a file atomically: all of it or nothing. Returns the file.

    An existing file keeps its permissions. If it cannot be written, `error` is raised and the old file is unchanged;
    `what` names the content in the message.
    """
    text = json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    # In the same folder, since os.replace is atomic within a file system only; created with the usual permissions.
    staged = file.with_name(f".{file.name}.{secrets.token_hex(8)}")
    try:
        with open(staged, "x", encoding="utf-8") as out:
            out.write(text)
            out.flush()
            os.fsync(out.fileno())  # the data must be on disk before the old file is replaced
        if file.exists():
            os.chmod(staged, file.stat().st_mode)
        os.replace(staged, file)
    except (OSError, UnicodeError) as failure:  # half of a surrogate pair cannot be encoded as UTF-8
        raise error.of(
            what, expected="a file that can be written", got=str(failure), remedy="The old file is unchanged."
        ) from None
    finally:
        staged.unlink(missing_ok=True)
    return file
