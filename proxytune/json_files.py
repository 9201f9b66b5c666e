"""JSON files of a known format: read strictly, and exchanged as a whole or left as they were.

A misspelt key must not be ignored, and a file of a newer format must not be half understood.
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
    """Read a file's JSON, without looking at what it says.

    Args:
        file: The file.
        what: What it holds, for the message.
        sought: What there should be.
        error: The class of the error.
        remedy: What to do where there is no such file.

    Returns:
        The parsed JSON.

    Raises:
        ProxytuneError: Of the class `error`, if there is no such file, it cannot be read, or it is no JSON.
    """
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise error.of(what, expected=sought, got=f"no file at {file}", remedy=remedy) from None
    except OSError as failure:
        raise error.of(
            what, expected="a file that can be read", got=str(failure), remedy="Give the file or its folder."
        ) from None
    except (ValueError, RecursionError) as failure:  # no JSON, no UTF-8, a number of too many digits, nested too deep
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
    """Check that parsed JSON is an object of a known format.

    Args:
        data: The parsed file.
        what: What it holds, for the message.
        version: The newest `format_version` that is known.
        keys: The keys that there have to be, `format_version` among them.
        optional: Those that there may be.
        error: The class of the error.
        see: The module that describes the form.

    Returns:
        The object.

    Raises:
        ProxytuneError: Of the class `error`, if it is no object, its format is newer, or keys are missing or unknown.
    """
    if not isinstance(data, Mapping):
        raise error.of(what, expected="a JSON object", got=type(data).__name__, remedy=f"See {see} for the form.")
    found = data.get("format_version")
    if type(found) is not int or found < 1:  # not True, and JSON has no other numbers
        raise error.of(
            f"{what} format_version",
            expected=f"a whole number from 1 to {version}",
            got=repr(found),
            remedy=f'Write "format_version": {version}.',
        )
    if found > version:
        # Before the keys: a newer format may well have new ones, and the version is the better explanation.
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
    """Refuse keys by name.

    Args:
        data: The object.
        known: The keys that it may have.
        where: What it is, for the message.
        error: The class of the error.

    Raises:
        ProxytuneError: Of the class `error`, if it has others.
    """
    unknown = [key for key in data if key not in known]
    if unknown:
        raise error.of(
            where,
            expected=f"only the keys {', '.join(known)}",
            got=f"unknown {', '.join(map(repr, unknown))}",
            remedy="Remove or correct them, or install the version of proxytune that knows them.",
        )


def exchange(file: Path, data: Any, what: str, *, error: Error = InputError) -> Path:
    """Write JSON to a file, in place of what was there; all of it or nothing.

    Args:
        file: The file; an old one keeps its permissions.
        data: JSON values, without NaN and infinities.
        what: What it holds, for the message.
        error: The class of the error.

    Returns:
        The file.

    Raises:
        ProxytuneError: Of the class `error`, if it cannot be written; the old file is left as it was.
    """
    text = json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    # In the same folder, since a file is exchanged in one go on one disk only; opened with the usual permissions.
    staged = file.with_name(f".{file.name}.{secrets.token_hex(8)}")
    try:
        with open(staged, "x", encoding="utf-8") as out:
            out.write(text)
            out.flush()
            os.fsync(out.fileno())  # before it takes the place of what is on the disk
        if file.exists():
            os.chmod(staged, file.stat().st_mode)
        os.replace(staged, file)
    except (OSError, UnicodeError) as failure:  # a text with half of a surrogate pair has no UTF-8
        raise error.of(
            what, expected="a file that can be written", got=str(failure), remedy="It was left as it was."
        ) from None
    finally:
        staged.unlink(missing_ok=True)
    return file
