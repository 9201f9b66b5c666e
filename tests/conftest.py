"""What every test has: one thread per worker, quiet transformers, no network."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
import transformers

# Helpers assert too: what they say when they fail is to be as full as in a test.
pytest.register_assert_rewrite("support")

# Triton reads this when it is imported, which torch and transformers leave to the first kernel. Without a GPU the
# kernels run in its interpreter; nothing takes that path unless it asks for impl="triton".
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# The models are tiny: a second thread only makes the workers of pytest-xdist fight for cores.
torch.set_num_threads(1)
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()


@pytest.fixture(autouse=True)
def seeded() -> None:
    """No test depends on which ran before it."""
    torch.manual_seed(0)
