"""Every test of the contract runs once per implementation."""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

import numpy as np
import pytest
import torch
from support.decisions import RowsElsewhere, Run
from support.interpreter import patch_the_language_once_per_launch

from proxytune import ops
from proxytune.ops import StepOutput, dispatch


@pytest.fixture
def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(params=["torch", "torch without waiting", "triton"])
def impl(request: pytest.FixtureRequest) -> str:
    """ "torch without waiting" is what torch does on a device; where there is one, "torch" does it."""
    if request.param == "triton":
        if importlib.util.find_spec("triton") is None:
            pytest.skip("no Triton in this environment")
        if not hasattr(importlib.import_module("proxytune_kernels"), "step"):
            pytest.skip("proxytune_kernels has no step yet")
        if not torch.cuda.is_available():
            patch_the_language_once_per_launch()
    if request.param == "torch without waiting" and torch.cuda.is_available():
        pytest.skip("the device's own way of torch is tested as torch")
    return str(request.param)


@pytest.fixture
def slow_one(impl: str, device: str) -> bool:
    """Triton's interpreter takes a tenth of a second and more per row: it gets few and short rows."""
    return impl == "triton" and device == "cpu"


@pytest.fixture
def run(impl: str, monkeypatch: pytest.MonkeyPatch) -> Run:
    """`ops.step` with the implementation."""
    if impl == "torch without waiting":
        monkeypatch.setattr(dispatch, "MemberRows", RowsElsewhere)

    def step(*args: Any, **kwargs: Any) -> StepOutput:
        with np.errstate(all="ignore"):  # the interpreter's arithmetic is numpy's, and −inf − −inf a warning there
            return ops.step(*args, impl=impl.partition(" ")[0], **kwargs)  # type: ignore[arg-type]

    return step
