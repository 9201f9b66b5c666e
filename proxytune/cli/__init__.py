"""The command line: `proxytune demo`, `generate`, `sample`, `see` and so on: one function a command.

The modules here import torch and transformers inside their commands only, so `--help` answers at once. An error is one
line on stderr and an exit code: 2 if the call has to change (a wrong flag, a model that does not fit), 1 if it failed
while running.
"""

from __future__ import annotations

import functools
import inspect
import re
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Annotated

import typer

from proxytune._version import __version__
from proxytune.cli import bench, calibrate, check, demo, doctor, generate, sample, score, terminal, tune, view
from proxytune.cli.prompt_command import PromptCommand
from proxytune.cli.settings import with_settings
from proxytune.errors import ProxytuneError

__all__ = ["app", "main"]

WRONG_CALL = 2
FAILED = 1
INTERRUPTED = 130

app = typer.Typer(
    name="proxytune",
    help="Steer a large causal language model at decoding time with two small ones; no weight is changed.",
    epilog="Start with proxytune demo, which needs no model of yours. The options of a command: proxytune COMMAND -h.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _add(name: str, command: Callable[..., None], *, prompts: bool = False) -> None:
    """Add a command, its docstring unwrapped: the terminal wraps it."""
    text = "\n\n".join(" ".join(part.split()) for part in inspect.cleandoc(command.__doc__ or "").split("\n\n"))
    app.command(name, help=text, cls=PromptCommand if prompts else None)(command)


_add("demo", demo.demo)
_add("generate", with_settings(generate.generate), prompts=True)
_add(
    "sample",
    with_settings(
        sample.sample,
        max_new_tokens="Most tokens of a text (default: 256).",
        min_new_tokens="Fewest tokens of a text.",
        do_sample="Draw tokens (the default), or let the main branch of a tree take the likeliest.",
        num_beams="",
        num_return_sequences="",
    ),
    prompts=True,
)
_add("see", view.see)
_add("view", view.view)
_add("report", view.report)
_add("calibrate", calibrate.calibrate, prompts=True)
_add("score", score.score, prompts=True)
_add("tune", tune.tune)
_add("check", check.check)
_add("doctor", doctor.doctor)
_add("bench", bench.bench)


def _show_version(wanted: bool) -> None:
    if wanted:
        terminal.output().print(f"proxytune {__version__}", highlight=False)
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_show_version, is_eager=True)
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error; allowed anywhere.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Show no progress; allowed anywhere.")] = False,
) -> None:
    """Read the options that belong to no command; all are handled before one runs (see `main`)."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line on `arguments` (default: those of this process), and exit the process.

    Raises:
        SystemExit: Always, with the exit code.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    own = words[: words.index("--")] if "--" in words else words
    # Taken out here instead of parsed, so that it also works after the command's name.
    debug, terminal.silent = "--debug" in own, "--quiet" in own
    for word in ("--debug", "--quiet"):
        if word in own:
            words.remove(word)
    sys.exit(_run(words, debug))


@functools.cache
def _command() -> Callable[..., int | None]:
    """The program, put together once: tests call it often."""
    return typer.main.get_command(app)


_FAILURES = (OSError, RuntimeError, ValueError, TypeError, AssertionError, ImportError, MemoryError)


def _run(words: list[str], debug: bool) -> int:
    """Run one command; turn an error into a line on stderr and an exit code."""
    with warnings.catch_warnings():
        warnings.showwarning = terminal.show_warning
        try:
            # Outside standalone mode `typer.Exit` is returned as its code; a command's None means success.
            return _command()(words, prog_name="proxytune", standalone_mode=False) or 0
        except typer.TyperException as error:
            # Without arguments the help has been printed already.
            if message := error.format_message():
                terminal.show_error(f"{message}{_got(message, words)} (see {_called(words)} --help)")
            return error.exit_code
        except typer.Abort:
            return INTERRUPTED
        except ProxytuneError as error:
            if debug:
                raise
            terminal.show_error(str(error))
            return WRONG_CALL
        except Exception as error:
            # From torch, transformers or the file system: the call parsed but failed. Other libraries have classes of
            # their own; any other error of ours or of Python's is a bug.
            own = type(error).__module__.partition(".")[0] in ("builtins", "proxytune", "proxytune_kernels")
            if debug or (own and not isinstance(error, _FAILURES)):
                raise
            terminal.show_error(f"{type(error).__name__}: {error} (--debug shows the traceback)")
            return FAILED


def _got(message: str, words: Sequence[str]) -> str:
    """What the message of a wrong value does not say: the value."""
    option = re.match(r"Invalid value for '(--[\w-]+)'", message)
    value = None
    for word, following in zip(words, [*words[1:], None], strict=True):
        if option and word.split("=")[0] == option[1]:
            value = word.split("=", 1)[1] if "=" in word else following
    return "" if value is None or repr(value) in message else f"; got {value!r}"


def _called(words: Sequence[str]) -> str:
    """What was called, as far as it exists: "proxytune sample", or "proxytune"; not every error of typer knows it."""
    word = next((word for word in words if not word.startswith("-")), None)
    return f"proxytune {word}" if word in (command.name for command in app.registered_commands) else "proxytune"
