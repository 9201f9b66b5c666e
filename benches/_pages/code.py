"""The code of a page, run from top to bottom as a reader would, beside what the page says it prints.

A page is a Markdown file. Its Python blocks share one namespace, and all its blocks one folder, empty at the start. A
`text` block after a `python` or `sh` block shows what that prints; a line `…` in it stands for any lines.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

from _pages.records import ROOT

__all__ = ["ROOT", "Block", "blocks_of", "pages", "run_blocks", "same", "unseen", "with_outputs"]

FENCE = re.compile(r"^```(?P<language>\w*)\n(?P<content>.*?)^```$", re.DOTALL | re.MULTILINE)
ANY_FENCE = re.compile(r"^[ \t>]*(?:[-*+] |\d+\. )?[ \t]*(?:`{3,}|~{3,}).*$", re.MULTILINE)
RUN = ("python", "sh")
# Commands that make an environment, or stand for a place.
NOT_RUN = ("python3 -m venv", ".venv/", "git ", "cd ")
# These run for minutes, and have tests of their own: their options are looked up.
LONG = ("demo", "bench")


@dataclass(frozen=True)
class Block:
    """One block of code of a page.

    Attributes:
        language: `python` or `sh`.
        line: The page's line of its first line of code, from 1.
        shown: What the page says it prints, or None.
        span: Where that stands in the page.
    """

    language: str
    code: str
    line: int
    shown: str | None
    span: tuple[int, int] | None


def pages() -> list[Path]:
    """Every page of the checkout; those in an environment or a build folder beside it are not its own."""
    folders = ("proxytune", "kernels", "tests", "benches", "findings")
    found = [*ROOT.glob("*.md"), *(page for folder in folders for page in (ROOT / folder).rglob("*.md"))]
    return sorted(
        path for path in found if not any(part.startswith((".", "_")) for part in path.relative_to(ROOT).parts)
    )


def unseen(text: str) -> list[str]:
    """The lines of a page that open or close a block which is neither run nor compared with what one prints.

    Those in another form than `python`, `sh` or `text` behind three backticks that begin a line, and outputs that show
    nothing but `…`.
    """
    found = list(FENCE.finditer(text))
    inside = [(block.start(), block.end()) for block in found]
    out = [
        line[0].strip()
        for line in ANY_FENCE.finditer(text)
        if not any(start <= line.start() <= end for start, end in inside)
    ]
    out += [f"```{block['language']}" for block in found if block["language"] not in (*RUN, "text")]
    out += ["…" for block in found if set(block["content"].split()) <= {"…"}]
    return out


def blocks_of(text: str) -> list[Block]:
    """The blocks of a page that run, in order."""
    found = list(FENCE.finditer(text))
    out = []
    for this, after in zip_longest(found, found[1:]):
        if this["language"] not in RUN:
            continue
        shown = after if after is not None and after["language"] == "text" else None
        out.append(
            Block(
                this["language"],
                this["content"],
                text.count("\n", 0, this.start()) + 2,
                None if shown is None else shown["content"],
                None if shown is None else shown.span("content"),
            )
        )
    return out


def run_blocks(page: Path, folder: Path) -> Iterator[tuple[Block, str]]:
    """Run a page's blocks in `folder`, and yield each with what it printed.

    Raises:
        SystemExit: If a command fails, or is none that a page may show.
    """
    text = page.read_text(encoding="utf-8")
    namespace: dict[str, Any] = {"__name__": "__main__"}
    for block in blocks_of(text):
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed), _inside(folder):
            if block.language == "python":
                # Line numbers of the page, so that a traceback points there; without this file's __future__ imports.
                code = compile("\n" * (block.line - 1) + block.code, str(page), "exec", dont_inherit=True)
                exec(code, namespace)
            else:
                for command in _commands(block.code):
                    _run_command(command, f"{page}:{block.line}")
        yield block, printed.getvalue()


@contextlib.contextmanager
def _inside(folder: Path) -> Iterator[None]:
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def _commands(code: str) -> list[str]:
    lines = code.replace("\\\n", " ").splitlines()
    return [line for line in lines if line.strip() and not line.lstrip().startswith("#")]


def _run_command(command: str, place: str) -> None:
    match shlex.split(command, comments=True):
        case ["proxytune", name, *words] if name in LONG:
            helped = _proxytune([name, "--help"], place)
            for option in (word for word in words if word.startswith("--")):
                if not re.search(rf"(?<![\w-]){re.escape(option)}(?![\w-])", helped):
                    raise SystemExit(f"{place}: `proxytune {name}` has no option {option}")
        case ["proxytune", *words]:
            print(_proxytune(words, place), end="")
        case ["python" | ".venv/bin/python", *words]:
            _look_up(words, place)
        case [".venv/bin/pytest", *words]:
            for path in (word for word in words if "/" in word):
                if not (ROOT / path.partition("::")[0]).exists():
                    raise SystemExit(f"{place}: there is no {path}")
        case _ if not command.startswith(NOT_RUN):
            raise SystemExit(f"{place}: expected a command that a test can run or look up; got `{command}`")


def _proxytune(words: list[str], place: str) -> str:
    """What a command prints; SystemExit if it fails."""
    from proxytune.cli import main

    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        try:
            main(words)
        except SystemExit as ended:
            if ended.code:
                raise SystemExit(
                    f"{place}: `proxytune {shlex.join(words)}` ended with exit code {ended.code}\n{printed.getvalue()}"
                ) from None
    return printed.getvalue()


def _look_up(words: list[str], place: str) -> None:
    """`python benches/….py --option` and `python -m lab …`: the file is there, and it has the options."""
    file = ROOT / ("benches/lab/__main__.py" if words[:2] == ["-m", "lab"] else words[0])
    if not file.is_file():
        raise SystemExit(f"{place}: there is no {words[0]}")
    source = file.read_text(encoding="utf-8")
    # Options are declared by name: "--write", or as the parameter of a function.
    for option in (word for word in words if word.startswith("--")):
        name = re.escape(option[2:])
        if not re.search(rf'"(?:--)?{name}"|^\s+{name}: Annotated\[', source, re.MULTILINE):
            raise SystemExit(f"{place}: {words[0]} has no option {option}")


def same(shown: str, printed: str) -> bool:
    """Whether a page shows what was printed; trailing spaces do not count, a line `…` stands for any lines."""
    parts = [re.escape(line.rstrip()) for line in shown.strip().splitlines()]
    pattern = "\n".join(r"(?:.*\n)*?.*" if part == re.escape("…") else part for part in parts)
    return re.fullmatch(pattern, "\n".join(line.rstrip() for line in printed.strip().splitlines())) is not None


def with_outputs(page: Path, folder: Path) -> str:
    """A page's text with what its code prints, where it shows something else."""
    text = page.read_text(encoding="utf-8")
    found = [(block, printed) for block, printed in run_blocks(page, folder)]
    for block, printed in reversed(found):
        if block.span is not None and not same(block.shown or "", printed):
            lines = "\n".join(line.rstrip() for line in printed.splitlines()).strip("\n")
            text = text[: block.span[0]] + lines + "\n" + text[block.span[1] :]
    return text
