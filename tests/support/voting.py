"""Samples that vote, for the tests of votes and of what they stand on."""

from typing import Any

import numpy as np
from hypothesis import strategies as st

from proxytune.voting.vote import Sample

# Quarters: sums are exact, so ties are ties however they are scaled.
CONFIDENCES = st.lists(st.integers(0, 120).map(lambda n: n / 4), min_size=1, max_size=12)


def samples_of(*answers: Any, **kwargs: Any) -> list[Sample]:
    return [Sample(answer, **kwargs) for answer in answers]


SURE = [Sample("a", np.array([1.0]), self_certainty=1.0, margins=np.array([0.5]))]
