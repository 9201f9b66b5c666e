"""From samples to an answer: `vote` counts `Sample`s into a `Tally`; numpy only.

Confidence filters, early stopping and the choice of a vote are in `confidence`, `stopping` and `choice`.
"""

from proxytune.voting.choice import choose_vote
from proxytune.voting.stopping import OnlineFilter, consensus
from proxytune.voting.vote import Sample, Tally, vote

__all__ = ["OnlineFilter", "Sample", "Tally", "choose_vote", "consensus", "vote"]
