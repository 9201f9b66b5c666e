"""A composed model and a plain one."""

from __future__ import annotations

from typing import Any

import pytest
from support.tiny import shared
from support.trees import composed


@pytest.fixture(params=["composed", "plain"])
def model(request: pytest.FixtureRequest) -> Any:
    return composed() if request.param == "composed" else shared("llama", 1)
