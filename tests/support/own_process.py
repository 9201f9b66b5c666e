"""`proxytune` in a process of its own, which begins where its imports are done: they would take longer than the run."""

from __future__ import annotations

import multiprocessing
import os
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch

import proxytune.models.model  # noqa: F401
from proxytune.cli import main

__all__ = ["start"]


def start(words: list[str], errors: Path, before: str = "") -> BaseProcess:
    """Run the command line with `words`; what it writes to stderr goes to the file `errors`.

    Args:
        words: Command and options.
        errors: Is written anew.
        before: Python that the process runs first.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    run = context.Process(target=_run, args=(words, errors, before))
    run.start()
    return run


def _run(words: list[str], errors: Path, before: str) -> None:
    torch.set_num_threads(1)
    with open(errors, "wb") as file:
        os.dup2(file.fileno(), 2)
    exec(before, {})
    main(words)
