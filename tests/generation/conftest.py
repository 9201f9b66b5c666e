"""A composed model and a plain one."""

from typing import Any

import pytest
from support.fused import composed
from support.tiny import shared


@pytest.fixture(params=["composed", "plain"])
def model(request: pytest.FixtureRequest) -> Any:
    return composed() if request.param == "composed" else shared("llama", 1)
