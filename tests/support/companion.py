"""One model alone as a `PrefixCached`, for tests that ask it questions."""

from typing import Any

import torch
from transformers import PreTrainedModel

from proxytune.models.members.member import Member
from proxytune.models.members.prefix_cached import PrefixCached


class PrefixCachedMember(PrefixCached):
    """A group of one, which answers with one tensor."""

    def __init__(self, model: PreTrainedModel, role: str = "companion", *, memo: int = 32, self_test: bool = True):
        super().__init__([Member(model.eval(), role)], memo=memo)
        if self_test:
            self.member.examine()

    @property
    def member(self) -> Member:
        return self.members[0]

    def logits_for(self, *args: Any, **kwargs: Any) -> torch.Tensor:  # type: ignore[override]
        return super().logits_for(*args, **kwargs)[0]
