"""The slow reference of all doors: no cache, no batch, no mask; every member forwards every prefix anew, in float32.

`Reference.forward` strips a row's padding and runs the members on what is left, one row and one position at a time. The
decoding loops are transformers' own (with `use_cache=False`); only the logits are ours, and here they are written out.
"""

from typing import Any

import torch
from transformers import GenerationConfig, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast


@torch.no_grad()
def next_logits(members: list[PreTrainedModel], alpha: float, ids: torch.Tensor) -> torch.Tensor:
    """Combined next-token logits `[V]` after one unpadded prefix `[T]`, written out by the definition."""
    base, expert, antiexpert = (m(ids[None], use_cache=False).logits[0, -1].float() for m in members)
    embeddable = min(m.get_input_embeddings().weight.shape[0] for m in members)
    shared = min(len(base), len(expert), len(antiexpert))
    combined = base.clone()
    combined[:shared] = base[:shared] + (alpha * expert[:shared] - alpha * antiexpert[:shared])
    combined[embeddable:] = float("-inf")
    return combined


class Reference(PreTrainedModel, GenerationMixin):
    """A model for transformers' loops whose every logit comes from `next_logits`."""

    config_class = None
    _supports_sdpa = True  # not used: the members compute, each with what it was loaded with
    main_input_name = "input_ids"

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        return True  # likewise

    def __init__(self, members: list[PreTrainedModel], alpha: float) -> None:
        super().__init__(members[0].config)
        self.__dict__["members"] = members
        self.alpha = alpha
        self.__dict__["memo"] = {}
        self.generation_config = GenerationConfig.from_dict(members[0].generation_config.to_dict())
        # Beam search and sampling ask where the model is; the members' parameters are not registered here.
        self.register_parameter("here", torch.nn.Parameter(torch.zeros(1)))

    def prepare_inputs_for_generation(self, input_ids: torch.Tensor, **kwargs: Any) -> dict[str, Any]:
        return {"input_ids": input_ids, "attention_mask": kwargs.get("attention_mask")}

    def after(self, ids: torch.Tensor) -> torch.Tensor:
        """`next_logits` after one unpadded prefix `[T]`; computed once, for all texts that begin with it."""
        memo: dict[tuple[int, ...], torch.Tensor] = self.__dict__["memo"]
        prefix = tuple(ids.tolist())
        if prefix not in memo:
            memo[prefix] = next_logits(self.__dict__["members"], self.alpha, ids)
        return memo[prefix]

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, **_: Any) -> Any:
        rows = []
        for i, ids in enumerate(input_ids):
            if attention_mask is not None:
                ids = ids[attention_mask[i].bool()]
            rows.append(self.after(ids))
        return CausalLMOutputWithPast(logits=torch.stack(rows)[:, None])

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        return super().generate(*args, use_cache=False, **kwargs)
