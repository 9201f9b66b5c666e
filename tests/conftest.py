"""What every test has: one thread per worker, quiet transformers, no network."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
import transformers

# The models are tiny: a second thread only makes the workers of pytest-xdist fight for cores.
torch.set_num_threads(1)
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()


@pytest.fixture(autouse=True)
def seeded() -> None:
    """No test depends on which ran before it."""
    torch.manual_seed(0)
