"""The command line: `proxytune demo`, `generate`, `sample`, `calibrate`, `doctor` and `bench`.

This module and the ones beside it import torch and transformers inside their commands only, so that `--help` answers at
once. Whatever goes wrong ends in one line on stderr and an exit code: 2 where the call has to change (a wrong flag, a
model that does not fit), 1 where it failed while running.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from typing import Annotated

import typer

from proxytune._version import __version__
from proxytune.cli import bench, calibrate, demo, doctor, generate, sample, terminal
from proxytune.errors import ProxytuneError

__all__ = ["app", "main"]

WRONG_CALL = 2
FAILED = 1
INTERRUPTED = 130

app = typer.Typer(
    name="proxytune",
    help="Steer a large causal language model at decoding time with two small ones; no weight is changed.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("demo")(demo.demo)
app.command("generate")(generate.generate)
app.command("sample")(sample.sample)
app.command("calibrate")(calibrate.calibrate)
app.command("doctor")(doctor.doctor)
app.command("bench")(bench.bench)


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
) -> None:
    """Read the options that belong to no command; both are handled before it runs (see `main`)."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and end the process.

    Args:
        arguments: The words after `proxytune` [those of this process].

    Raises:
        SystemExit: Always, with the exit code.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    own = words[: words.index("--")] if "--" in words else words
    # Taken out here rather than parsed, so that it also works after the command's name, where one adds it when
    # something has just gone wrong.
    debug = "--debug" in own
    if debug:
        words.remove("--debug")
    sys.exit(_run(words, debug))


def _run(words: list[str], debug: bool) -> int:
    """Run one command and translate what went wrong into a line and an exit code."""
    with warnings.catch_warnings():
        warnings.showwarning = terminal.show_warning
        try:
            # Outside of standalone mode `typer.Exit` comes back as its code, and a command's own None means success.
            return app(words, prog_name="proxytune", standalone_mode=False) or 0
        except typer.TyperException as error:
            # Without any words the help has been printed already, and there is nothing left to say.
            if message := error.format_message():
                terminal.show_error(f"{message} (see proxytune --help)")
            return error.exit_code
        except typer.Abort:
            return INTERRUPTED
        except ProxytuneError as error:
            if debug:
                raise
            terminal.show_error(str(error))
            return WRONG_CALL
        except (OSError, RuntimeError, ValueError, TypeError, AssertionError) as error:
            # What torch, transformers and the file system raise for a call that parsed but cannot be carried out.
            if debug:
                raise
            terminal.show_error(f"{type(error).__name__}: {error} (--debug shows the traceback)")
            return FAILED
