"""Members whose embedding a quantiser keeps in a form of its own: no plain matrix may be taken for granted."""

from typing import Any

import pytest
import torch
from support.tiny import build
from torch import nn

import proxytune
from proxytune import LatentDecoding, SpeculativeDecoding
from proxytune.costs.model_size import pass_work
from proxytune.errors import InputError, UnsupportedModelError
from proxytune.methods.speculation import BigramDraft
from proxytune.models.members.embedding_table import embedding_rows

IDS = torch.randint(3, 240, (2, 7), generator=torch.Generator().manual_seed(1))
RUN = {"do_sample": False, "max_new_tokens": 5, "eos_token_id": None, "pad_token_id": 0}


class Int8Tensor(torch.Tensor):
    """As of torchao: it looks like a matrix of floats, and can be looked up, moved and read, but not indexed."""

    whole: torch.Tensor
    scale: torch.Tensor

    @staticmethod
    def __new__(cls, whole: torch.Tensor, scale: torch.Tensor) -> "Int8Tensor":
        made: Any = torch.Tensor._make_wrapper_subclass(cls, whole.shape, dtype=torch.float32, device=whole.device)
        made.whole, made.scale = whole, scale
        return made  # type: ignore[no-any-return]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.embedding.default:
            return args[0].whole[args[1]] * args[0].scale[args[1]]
        if func is torch.ops.aten.detach.default:
            return cls(args[0].whole, args[0].scale)
        raise NotImplementedError(f"{func} of an Int8Tensor")


class Packed(nn.Embedding):
    """As of bitsandbytes: a subclass whose weight is a column of bytes."""

    def __init__(self, whole: torch.Tensor, scale: torch.Tensor) -> None:
        super().__init__(*whole.shape, _weight=torch.zeros(whole.shape))
        self.scale = scale
        self.weight = nn.Parameter(whole.flatten()[:, None], requires_grad=False)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return self.weight.view(-1, self.embedding_dim)[input] * self.scale[input]


class InBuffers(nn.Module):
    """As in prototypes of torchao: a module that is no `nn.Embedding`, and has no weight."""

    def __init__(self, whole: torch.Tensor, scale: torch.Tensor) -> None:
        super().__init__()
        self.num_embeddings = len(whole)
        self.register_buffer("whole", whole)
        self.register_buffer("scale", scale)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        rows: torch.Tensor = self.whole[input] * self.scale[input]  # type: ignore[index]
        return rows


def as_tensor(whole: torch.Tensor, scale: torch.Tensor) -> nn.Module:
    module = nn.Embedding(*whole.shape)
    module.weight = nn.Parameter(Int8Tensor(whole, scale), requires_grad=False)
    return module


KINDS = {"tensor": as_tensor, "packed": Packed, "buffers": InBuffers}


def quantised(make: Any) -> tuple[Any, Any]:
    """A model with such an embedding, and one with the same values as a plain matrix."""
    model, plain = build("llama", 1), build("llama", 1)
    table = plain.get_input_embeddings().weight
    scale = table.detach().abs().amax(1, keepdim=True) / 127
    whole = (table.detach() / scale).round().to(torch.int8)
    model.set_input_embeddings(make(whole, scale))
    table.data = whole * scale
    return model.eval(), plain


@pytest.mark.parametrize("kind", KINDS)
def test_it_does_what_the_same_values_in_a_plain_matrix_do(kind: str) -> None:
    model, plain = quantised(KINDS[kind])
    assert embedding_rows(model) == 256
    assert pass_work(model).bytes.cached == pass_work(plain).bytes.cached
    companions = {"expert": build("gpt2", 2), "antiexpert": build("gpt2", 3)}
    both = [(model, plain), tuple(proxytune.wrap(m, **companions, check_vocabulary=False) for m in (model, plain))]
    for one, other in both:
        for loop in (LatentDecoding("mean"), LatentDecoding("onehot"), None):
            want = other.generate(IDS, custom_generate=loop, **RUN)
            assert torch.equal(one.generate(IDS, custom_generate=loop, **RUN), want)
    composed, other = both[1]
    assert composed.usable_ids == other.usable_ids
    speculative = SpeculativeDecoding(draft=BigramDraft.of(model))
    assert torch.equal(composed.generate(IDS, custom_generate=speculative, **RUN), other.generate(IDS, **RUN))
    with pytest.raises(InputError, match=r"ids from 0 to 255.*got id 300"):
        composed(torch.tensor([[300]]))


def test_an_embedding_that_does_not_tell_its_size_is_refused_by_name() -> None:
    model, _ = quantised(InBuffers)
    del model.get_input_embeddings().num_embeddings
    with pytest.raises(UnsupportedModelError, match="the input embedding: .* got a InBuffers without them"):
        proxytune.wrap(model, expert=build("gpt2", 2), antiexpert=build("gpt2", 3), check_vocabulary=False)
