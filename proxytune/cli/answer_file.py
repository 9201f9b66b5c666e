"""The JSON lines of a long run as a file that survives a kill and can be resumed.

Beside `answers.jsonl` lies `answers.jsonl.run.json`, a note of what the lines were made with, so that one file never
mixes two runs. It is written before the first line:

    {"format_version": 1, "lines": 2000, "lines_per_prompt": 1,
     "settings": {…the command line…}, "resolved": {…the resulting settings of generate()…}}

`lines` counts the whole run; with fewer lines in the file, the run is unfinished.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from proxytune.cli import terminal
from proxytune.errors import InputError

__all__ = ["AnswerFile", "check_out", "open_answers", "settings_of_run"]

_FORMAT_VERSION = 1
_KEYS = ("format_version", "lines", "lines_per_prompt", "settings", "resolved")
_SHOWN = 60


class AnswerFile:
    """A file of answers that is being written; a context manager.

    Attributes:
        done: Lines of this run already in the file.
        failed: Whether one of them is an error instead of an answer.
        finished: Whether nothing is left to do.
    """

    def __init__(
        self,
        path: Path,
        prompts: Sequence[Mapping[str, Any]],
        settings: Mapping[str, Any],
        *,
        resume: bool,
        overwrite: bool = False,
    ) -> None:
        """Open the file and check what it holds. Its content is not touched before `begin`.

        Args:
            path: The file. A pipe or `/dev/stdout` is written to, and cannot be resumed.
            prompts: All prompts of the run, each as the keys that every line of its answers begins with.
            settings: What decides the answers, as far as known before the models are loaded; JSON values.
            resume: Whether to continue a stopped run. A missing file, or one without lines, starts anew.
            overwrite: Whether to replace what the file holds.

        Raises:
            InputError: If it cannot be written, or another process writes to it; with `resume`, if it holds anything
                but the first answers to these prompts with these settings; without `overwrite`, if it holds anything.
        """
        self._prompts, self._settings, self._overwrite = prompts, dict(settings), overwrite
        self._on_disk = path.is_file() or not path.exists()
        if resume and not self._on_disk:
            raise InputError.of(
                "--resume", expected="--out with a file on a disk", got=str(path), remedy="Write to a file."
            )
        try:
            self._file = os.open(path, (os.O_RDWR | os.O_CREAT) if self._on_disk else os.O_WRONLY, 0o666)
        except OSError as error:
            missing = isinstance(error, FileNotFoundError)
            raise InputError.of(
                "--out",
                expected="a file that can be written",
                got=f"{path}: {(error.strerror or str(error)).lower()}",
                remedy=f"Make the folder {path.parent} first." if missing else "Choose another file.",
            ) from None
        self._path = path.resolve() if self._on_disk else path  # links resolved; the note lies beside the target
        self._note_path = self._path.with_name(f"{self._path.name}.run.json")
        self.done, self._end, self.failed, self.finished = 0, 0, False, False  # lines, bytes
        self._note: Mapping[str, Any] | None = None
        try:
            if self._on_disk:
                self._lock()
                self._look(resume)
        except BaseException:
            os.close(self._file)
            raise

    def begin(self, resolved: Mapping[str, Any], per_prompt: int) -> None:
        """Truncate the file to the lines to keep, and write the note, with the settings that `generate()` resolved.

        Raises:
            InputError: If the file was begun with other settings, or the note cannot be written.
        """
        if not self._on_disk:
            return
        if self.done:
            assert self._note is not None
            self._refuse_others(self._note["resolved"], resolved)
        os.ftruncate(self._file, self._end)
        os.lseek(self._file, self._end, os.SEEK_SET)
        note = {
            "format_version": _FORMAT_VERSION,
            "lines": len(self._prompts) * per_prompt,
            "lines_per_prompt": per_prompt,
            "settings": self._settings,
            "resolved": dict(resolved),
        }
        if note != self._note:
            from proxytune.json_files import exchange

            exchange(self._note_path, note, "note of the run")

    def append(self, lines: Sequence[str]) -> None:
        """Write lines (without line feeds) at once and sync them to disk. A kill drops them or, rarely, cuts them."""
        rest = memoryview("".join(f"{line}\n" for line in lines).encode("utf-8"))
        while rest:
            rest = rest[os.write(self._file, rest) :]
        if self._on_disk:
            os.fsync(self._file)
        self.done += len(lines)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        os.close(self._file)
        if kind is KeyboardInterrupt and self._on_disk:
            terminal.show_note(f"interrupted after {self.done} lines of {self._path}; --resume goes on from there")

    # --- existing content ---------------------------------------------------------------------------------------------

    def _lock(self) -> None:
        try:
            import fcntl
        except ImportError:  # no such locks on this system
            return
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # released when the process ends, however it ends
        except BlockingIOError:
            raise InputError.of(
                "--out",
                expected="a file that no other run writes to",
                got=f"{self._path}, which another run writes to",
                remedy="Wait for it, stop it, or choose another file.",
            ) from None
        except OSError:  # a file system without locks
            return

    def _look(self, resume: bool) -> None:
        if os.fstat(self._file).st_size == 0 or self._overwrite:
            return
        note = self._read_note()
        if not resume:
            lines = sum(1 for _ in self._lines())
            if note is None:
                got, remedy = f"{self._path}, which holds something else", "pass --overwrite to replace it"
            elif lines < note["lines"]:
                got = f"{self._path}, an unfinished run with {lines} of {note['lines']} lines"
                remedy = "pass --resume to continue it, or --overwrite to start anew"
            else:
                got = f"{self._path}, a finished run of {lines} lines"
                further = "" if "prompts" in note["settings"] else "--resume to add answers to further prompts, or "
                remedy = f"pass {further}--overwrite to replace it"
            raise InputError.of("--out", expected="a new file", got=got, remedy=f"Choose another file; or {remedy}.")
        for number, line in enumerate(self._lines()):
            if note is None:
                raise InputError.of(
                    "--resume",
                    expected=f"{self._note_path.name} beside {self._path}, the note of what its lines were made with",
                    got="none",
                    remedy="Choose another --out, or remove the file.",
                )
            if number == 0:
                self._refuse_others(note["settings"], self._settings)
            self.failed |= self._is_error(number, line, note["lines_per_prompt"])
            self.done, self._end = number + 1, self._end + len(line)
        self._note = note if self.done else None
        self.finished = self._note is not None and self.done == len(self._prompts) * self._note["lines_per_prompt"]

    def _lines(self) -> Iterator[bytes]:
        """The complete lines; text after the last line feed is an incomplete one."""
        with open(self._path, "rb") as file:
            for line in file:
                if line.endswith(b"\n"):
                    yield line

    def _read_note(self) -> Mapping[str, Any] | None:
        if not self._note_path.exists():
            return None
        from proxytune.json_files import check_form, read

        what = f"note of the run {self._note_path}"
        remedy = f"Remove it together with {self._path.name}, or choose another --out."
        data = read(self._note_path, what, remedy=remedy)
        data = check_form(data, what, version=_FORMAT_VERSION, keys=_KEYS, see="proxytune.cli.answer_file")
        counts = all(type(data[key]) is int and data[key] > 0 for key in ("lines", "lines_per_prompt"))
        if not counts or not all(isinstance(data[key], Mapping) for key in ("settings", "resolved")):
            got = ", ".join(f"{key}={_short(data[key])}" for key in _KEYS[1:])
            raise InputError.of(what, expected="counts above 0 and two objects of settings", got=got, remedy=remedy)
        return data

    def _is_error(self, number: int, line: bytes, per_prompt: int) -> bool:
        """Whether a line is an error instead of an answer; refuses one that belongs to another prompt."""
        found: Any = None
        with suppress(ValueError, RecursionError):
            found = json.loads(line)
        index = number // per_prompt
        if index >= len(self._prompts):
            expected, key = f"no more lines than {len(self._prompts)} prompts get", "prompt"
        else:
            prompt = self._prompts[index]
            there = found if isinstance(found, dict) else {}
            key = next((key for key in prompt if key not in there or there[key] != prompt[key]), "")
            if not key:
                return "error" in found
            expected = f"an answer to prompt {index + 1}, {_named(prompt, key)}"
        got = isinstance(found, dict) and isinstance(found.get("prompt", found.get("messages")), str | list)
        raise InputError.of(
            f"line {number + 1} of {self._path}",
            expected=expected,
            got=f"one to {_named(found, key)}" if got else "no answer at all",
            remedy="Give the run's original prompts, in their order; more may follow them.",
        )

    def _refuse_others(self, then: Mapping[str, Any], now: Mapping[str, Any]) -> None:
        then, now = _flat(then), _flat(now)
        for name in now | then:
            before, after = (values.get(name) for values in (then, now))
            if before != after:
                raise InputError.of(
                    f"--resume with {name}",
                    expected=f"{_short(before)}, with which {self._path} was begun",
                    got=_short(after),
                    remedy="Resume with the same, or choose another --out.",
                )


def open_answers(
    out: Path | None, prompts: Sequence[Mapping[str, Any]], said: Mapping[str, Any], *, resume: bool, overwrite: bool
) -> AnswerFile | nullcontext[None]:
    """The file of a run with these settings, which says what it holds already; for None, no file."""
    if out is None:
        return nullcontext()
    answers = AnswerFile(out, prompts, settings_of_run(**said), resume=resume, overwrite=overwrite)
    if answers.done:
        complete = ", the run is complete" if answers.finished else ""
        terminal.show_note(f"{answers.done} lines already written{complete}")
    return answers


def check_out(out: Path | None, file: str | None, *, resume: bool, overwrite: bool) -> None:
    """Refuse `--resume` and `--overwrite` without `--out` or together, and `--out` that is stdout or the prompts."""
    for option, given in (("--resume", resume), ("--overwrite", overwrite)):
        if given and out is None:
            raise InputError.of(
                option, expected="--out with it", got="none", remedy="Name the file, or drop the option."
            )
    if resume and overwrite:
        raise InputError.of(
            "--resume", expected="no --overwrite", got="both", remedy="Continue the run, or start it anew."
        )
    if str(out) == "-":
        raise InputError.of(
            "--out",
            expected="the name of a file",
            got="'-'",
            remedy="Leave it out: lines go to stdout, on a terminal with --json.",
        )
    prompts = None if file in (None, "-") else Path(str(file))
    if out is not None and prompts is not None and prompts.exists() and out.exists() and out.samefile(prompts):
        raise InputError.of(
            "--out",
            expected="another file than that of the prompts",
            got=f"{out}, which would be overwritten",
            remedy="Choose another --out.",
        )


def settings_of_run(**given: Any) -> dict[str, Any]:
    """What the answers depend on besides prompts and weights: `given`, and the library versions.

    torch's has its local part, such as "+cu130": two builds of one version can round differently, so that one file
    would mix two runs.
    """
    import torch
    import transformers

    from proxytune._version import __version__

    versions = {"proxytune": __version__, "torch": torch.__version__, "transformers": transformers.__version__}
    found: dict[str, Any] = json.loads(json.dumps({**given, "versions": versions}))  # as it is read back
    return found


def _flat(values: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    """`{"a": {"b": 1}}` → `{"a.b": 1}`."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= _flat(value, f"{before}{name}.") if isinstance(value, Mapping) else {f"{before}{name}": value}
    return flat


def _named(prompt: Mapping[str, Any], key: str) -> str:
    """A prompt by one of its keys, for a message."""
    value = _short(prompt.get(key))
    return value if key == "prompt" else f"{key} {value}"


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 1]}…"
