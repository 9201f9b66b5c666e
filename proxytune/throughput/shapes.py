"""Model shapes for the throughput bench: published ones, and scaled-down ones for a CPU."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import LlamaConfig, LlamaForCausalLM

__all__ = ["PUBLISHED", "SCALED", "TENTHS", "Shape", "Trio"]


@dataclass(frozen=True)
class Shape:
    """The shape of a Llama; `tied` if the head shares the embedding table."""

    width: int
    layers: int
    heads: int
    key_heads: int
    feed_forward: int
    vocabulary: int
    tied: bool = False

    def build(self, *, dtype: torch.dtype, device: str = "cpu", seed: int = 0) -> LlamaForCausalLM:
        """Make a model of this shape with random weights, in evaluation mode, without an end-of-text token.

        On the device "meta" it has no weights, to count them only.
        """
        config = LlamaConfig(
            vocab_size=self.vocabulary,
            hidden_size=self.width,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.key_heads,
            intermediate_size=self.feed_forward,
            max_position_embeddings=4096,
            tie_word_embeddings=self.tied,
            bos_token_id=None,
            eos_token_id=None,
            pad_token_id=0,
            dtype=dtype,
        )
        devices = [torch.device(device)] if device.startswith("cuda") else []
        with torch.random.fork_rng(devices=devices), torch.device(device):
            torch.manual_seed(seed)
            model: LlamaForCausalLM = LlamaForCausalLM._from_config(config, dtype=dtype)
        return model.eval()


@dataclass(frozen=True)
class Trio:
    """The shapes of a composition: of the base (and the tuned model), and of expert and antiexpert."""

    name: str
    base: Shape
    small: Shape


_7B = Shape(4096, 32, 32, 32, 11008, 32000)
PUBLISHED = (
    Trio("13B + 7B + 7B", Shape(5120, 40, 40, 40, 13824, 32000), _7B),
    Trio(
        "32B + 1.5B + 1.5B",
        Shape(5120, 64, 40, 8, 27648, 152064),
        Shape(1536, 28, 12, 2, 8960, 151936, tied=True),
    ),
    Trio("8B + 1B + 1B", Shape(4096, 32, 32, 8, 14336, 128256), Shape(2048, 16, 32, 8, 8192, 128256, tied=True)),
)
"""Llama 2, Qwen 2.5 (without the biases of its attention) and Llama 3."""

TENTHS = (
    Trio("13 + 7 + 7, a tenth", Shape(2048, 24, 16, 16, 5504, 32000), Shape(1536, 20, 12, 12, 4096, 32000)),
    Trio(
        "32 + 1.5 + 1.5, a tenth",
        Shape(2560, 30, 20, 4, 9216, 152064),
        Shape(512, 14, 8, 2, 1408, 151936, tied=True),
    ),
    Trio("8 + 1 + 1, a tenth", Shape(1280, 16, 10, 2, 4480, 128256), Shape(512, 8, 8, 2, 1408, 128256, tied=True)),
)
"""The same with about a tenth of the weights apart from the vocabulary, which is whole: made on a GPU in seconds."""

SCALED = (
    Trio("13 : 7 : 7", Shape(640, 8, 10, 10, 1728, 4096), Shape(512, 6, 8, 8, 1344, 4096)),
    Trio("32 : 1.5 : 1.5", Shape(768, 6, 12, 3, 4096, 4096), Shape(192, 3, 3, 1, 1216, 4096, tied=True)),
)
"""The first two, scaled down for a CPU; a pass still reads far more than its caches hold."""
