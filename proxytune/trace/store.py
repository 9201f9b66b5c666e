"""Traces on disk: `NAME.npz` holds the arrays, `NAME.jsonl` beside it a line for the run and one for each text.

Format 1. The first line of `NAME.jsonl` is `{"format_version": 1, "run": id, "sources": […], "top": k, "about": {…}}`;
each other line is a text, without its arrays, which `NAME.npz` holds as `<number>/<field>`, beside the id as `run`. A
text counts once its line is whole, and its line is written after its arrays: a run that is killed loses the texts that
were being written, and no other.
"""

from __future__ import annotations

import io
import json
import os
import secrets
import shutil
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from proxytune.errors import InputError
from proxytune.json_files import check_form, refuse_unknown
from proxytune.trace.record import FIELDS, Trace, TracedText, refuse_mixed

__all__ = ["TraceWriter", "load", "refuse_other", "save"]

VERSION = 1
_OF_TEXT = ("prompt", "pieces", "names", "given", "answer", "grade", "facts")
_ARRAYS = ("prompt_ids", *FIELDS)
_RUN = "run"


class TraceWriter:
    """Appends texts to a trace on disk.

    Attributes:
        file: The `.npz` file.
        count: How many texts it holds.
    """

    def __init__(self, file: str | Path, *, sources: Iterable[str], top: int, about: Mapping[str, Any] | None = None):
        """Start a trace, or go on with one of the same sources and top.

        Raises:
            InputError: If the name does not end in .npz, or the file is a trace of other sources.
        """
        self.file = _named(file)
        self._empty = Trace(sources=tuple(sources), top=top, about=dict(about or {}))
        _texts_in(self.file, self._empty.sources, top, self._empty.about)  # before a file is made
        with _locked(_lines_of(self.file)):
            self.count, self._run = self._begun()

    def _begun(self) -> tuple[int, str]:
        """How many texts the file holds, and the name of its run; writes the first line where there is none."""
        mine, lines = self._empty, _lines_of(self.file)
        count, whole = _texts_in(self.file, mine.sources, mine.top, mine.about)
        if whole:
            if whole < lines.stat().st_size:  # a line that was cut off
                os.truncate(lines, whole)
            return count, str(_read(lines)[0]["run"])
        run = secrets.token_hex(8)
        of_run = {"run": run, "sources": mine.sources, "top": mine.top, "about": mine.about}
        lines.write_bytes(_line({"format_version": VERSION, **of_run}))
        return 0, run

    def add(self, texts: Iterable[TracedText]) -> None:
        """Append texts: all of these arrays first, in a copy that takes the file's place, then their lines.

        Several processes may append to one trace; each waits until the other one is done.
        """
        texts = list(texts)
        if not texts:
            return
        replace(self._empty, texts=tuple(texts))  # its check
        written = [_line({name: getattr(text, name) for name in _OF_TEXT}) for text in texts]
        with _locked(_lines_of(self.file)):
            self.count, self._run = self._begun()
            self._append(texts, written)

    def _append(self, texts: list[TracedText], written: list[bytes]) -> None:
        staged = self.file.with_name(f".{self.file.name}.{secrets.token_hex(8)}")
        try:
            if self.file.exists():
                shutil.copyfile(self.file, staged)
            with zipfile.ZipFile(staged, "a", zipfile.ZIP_DEFLATED) as archive:
                held = set(archive.namelist())
                if not held:
                    archive.writestr(f"{_RUN}.npy", _array_bytes(np.array([self._run])))
                for number, text in enumerate(texts, self.count):
                    for name in _ARRAYS:
                        entry = f"{number}/{name}.npy"
                        if entry in held:  # of a run that was killed before the text's line
                            entry = f"{number}/{name}.{secrets.token_hex(4)}.npy"
                        archive.writestr(entry, _array_bytes(getattr(text, name)))
            with open(staged, "rb") as done:
                os.fsync(done.fileno())
            os.replace(staged, self.file)
        finally:
            staged.unlink(missing_ok=True)
        with open(_lines_of(self.file), "ab") as end:
            end.writelines(written)
            end.flush()
            os.fsync(end.fileno())
        self.count += len(texts)


def save(trace: Trace, file: str | Path) -> Path:
    """Write a trace to a new file `NAME.npz`, and `NAME.jsonl` beside it. Returns the file.

    Raises:
        InputError: If one of them is there already.
    """
    path = _named(file)
    for one in (path, _lines_of(path)):
        if one.exists():
            raise InputError.of(
                str(path), expected="a new file", got=f"{one.name}, which is there", remedy="Give another name."
            )
    TraceWriter(path, sources=trace.sources, top=trace.top, about=trace.about).add(trace.texts)
    return path


def load(file: str | Path) -> Trace:
    """Read a trace that a run wrote, or has written so far.

    Raises:
        InputError: If it is no trace, or one of a newer format.
    """
    path = _named(file)
    lines = _lines_of(path)
    if not lines.exists():
        raise InputError.of(
            str(path),
            expected=f"a trace, with {lines.name} beside it",
            got=f"no {lines.name}",
            remedy="Write one with `generate --trace run.npz` or proxytune.record, and keep its two files together.",
        )
    head, texts, _ = _read(lines)
    found = []
    if texts:
        try:
            with np.load(path, allow_pickle=False) as arrays:
                entries = _entries(arrays.files)
                if _RUN not in arrays.files or str(arrays[_RUN][0]) != head["run"]:
                    raise ValueError("they are of another run")
                for number, text in enumerate(texts):
                    of_text = {name: arrays[entries[f"{number}/{name}"]] for name in _ARRAYS}
                    found.append(TracedText(**of_text, **_of_json(text)))
        except (OSError, ValueError, KeyError, zipfile.BadZipFile) as failure:
            raise InputError.of(
                str(path),
                expected=f"the arrays of the {len(texts)} texts in {lines.name}",
                got=f"{type(failure).__name__}: {failure}",
                remedy="Keep the two files of a trace together, or record the run again.",
            ) from None
    return Trace(sources=tuple(head["sources"]), top=head["top"], texts=tuple(found), about=head["about"])


def refuse_other(
    file: str | Path, sources: Iterable[str] | None, top: int, about: Mapping[str, Any] | None = None
) -> None:
    """Refuse a place where a trace of these sources (None: not known yet) could not be written, before it is made.

    Raises:
        InputError: As `TraceWriter`, and if there is no such folder.
    """
    path = _named(file)
    if not path.parent.is_dir():
        raise InputError.of(
            str(path),
            expected="a file in a folder that is there",
            got=f"no folder {path.parent}",
            remedy="Make the folder first.",
        )
    _texts_in(path, None if sources is None else tuple(sources), top, about or {})


@contextmanager
def _locked(lines: Path) -> Iterator[None]:
    """Keep other processes from writing the same trace meanwhile, where the system has such locks."""
    try:
        import fcntl
    except ImportError:
        yield
        return
    with open(lines, "ab") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        yield


def _array_bytes(array: NDArray[Any]) -> bytes:
    out = io.BytesIO()
    np.lib.format.write_array(out, np.ascontiguousarray(array), allow_pickle=False)
    return out.getvalue()


def _texts_in(path: Path, sources: tuple[str, ...] | None, top: int, about: Mapping[str, Any]) -> tuple[int, int]:
    """How many texts a trace on disk holds, and the bytes of its whole lines; 0 and 0 where there is none yet."""
    lines = _lines_of(path)
    if lines.exists() and lines.stat().st_size:
        head, texts, whole = _read(lines)
        wanted = tuple(head["sources"]) if sources is None else sources
        if (tuple(head["sources"]), head["top"]) != (wanted, top):
            raise InputError.of(
                str(path),
                expected=f"a trace of {', '.join(wanted)}, top {top}",
                got=f"one of {', '.join(head['sources'])}, top {head['top']}",
                remedy="Give another file, or remove this one.",
            )
        refuse_mixed(str(path), head["about"], about)
        return len(texts), whole
    if path.exists():
        raise InputError.of(
            str(path),
            expected=f"a trace, with {lines.name} beside it",
            got="a file without one",
            remedy="Give another name: this would be overwritten.",
        )
    return 0, 0


def _named(file: str | Path) -> Path:
    path = Path(file)
    if path.suffix != ".npz":
        raise InputError.of("the trace's name", expected="NAME.npz", got=str(file), remedy=f"Write {path.stem}.npz.")
    return path


def _lines_of(file: Path) -> Path:
    return file.with_suffix(".jsonl")


def _line(value: Mapping[str, Any]) -> bytes:
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False).encode() + b"\n"
    except (TypeError, ValueError) as failure:  # NaN, half of a surrogate pair, an object
        raise InputError.of(
            "the trace", expected="facts and texts that JSON can hold", got=str(failure), remedy="Leave that one out."
        ) from None


def _read(lines: Path) -> tuple[Mapping[str, Any], list[Mapping[str, Any]], int]:
    """The head, the texts, and the bytes of the lines that are whole; the last line may be cut off."""
    raw = lines.read_bytes()
    whole = raw.rfind(b"\n") + 1
    try:
        parsed = [json.loads(line) for line in raw[:whole].decode("utf-8").split("\n")[:-1]]
    except ValueError as failure:
        raise InputError.of(
            str(lines), expected="a line of JSON for each text", got=str(failure), remedy="Record the run again."
        ) from None
    head = check_form(
        parsed[0] if parsed else None,
        str(lines),
        version=VERSION,
        keys=("format_version", "run", "sources", "top", "about"),
        see="proxytune.trace.store",
    )
    for text in parsed[1:]:
        refuse_unknown(text, _OF_TEXT, str(lines))
    return head, parsed[1:], whole


def _of_json(text: Mapping[str, Any]) -> dict[str, Any]:
    pieces, names = text.get("pieces"), text.get("names", {})
    return {
        **text,
        "pieces": None if pieces is None else tuple(pieces),
        "names": {int(token): name for token, name in names.items()},
    }


def _entries(files: Iterable[str]) -> dict[str, str]:
    """Field of a text → the entry that holds it: of several, the one written last."""
    return {
        "/".join((number, field.split(".")[0])): f"{number}/{field}"
        for number, _, field in (f.partition("/") for f in files)
    }
