"""Spending a budget on one task; and choosing a formula's numbers, in `proxytune.search.tuning`.

`allocate` chooses between parallel samples and sequential extension by a `CalibrationRun`; `AnswerHistory` counts
answers across rounds, and `restart_points` says where a tree goes on. None of these needs torch; the policies
`Parallel` and `Sequential`, in `proxytune.search.policies`, do.
"""

from proxytune.search.allocate import Allocation, allocate
from proxytune.search.answer_history import AnswerHistory
from proxytune.search.calibration_run import CalibrationRun
from proxytune.search.policy import Policy, run_policies
from proxytune.search.restart import RestartPoint, restart_points

__all__ = [
    "Allocation",
    "AnswerHistory",
    "CalibrationRun",
    "Policy",
    "RestartPoint",
    "allocate",
    "restart_points",
    "run_policies",
]
