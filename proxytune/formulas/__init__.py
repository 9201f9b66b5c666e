"""How the members' logits become one row of logits."""

from proxytune.formulas.algebra import Linear
from proxytune.formulas.base import Formula, Term
from proxytune.formulas.contrastive import ContrastiveDecoding, DExperts
from proxytune.formulas.experts import DeRa, Experts, Nudging
from proxytune.formulas.gates import Gate
from proxytune.formulas.guidance import ClassifierFreeGuidance, ContextAware
from proxytune.formulas.plausibility import Plausibility
from proxytune.formulas.prompt_view import PromptView
from proxytune.formulas.proxy_tuning import EmulatedFineTuning, ProxyTuning
from proxytune.formulas.registry import FORMULAS
from proxytune.formulas.schedules import Schedule
from proxytune.formulas.view import View

__all__ = [
    "FORMULAS",
    "ClassifierFreeGuidance",
    "ContextAware",
    "ContrastiveDecoding",
    "DExperts",
    "DeRa",
    "EmulatedFineTuning",
    "Experts",
    "Formula",
    "Gate",
    "Linear",
    "Nudging",
    "Plausibility",
    "PromptView",
    "ProxyTuning",
    "Schedule",
    "Term",
    "View",
]
