"""Tiny vision-language models, prompts with images, and the slow reference of a composition that sees."""

import functools
from typing import Any

import torch
from support.reference import Reference
from transformers import (
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedModel,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
)
from transformers.modeling_outputs import CausalLMOutputWithPast

VOCAB = 128
PICTURE, START, END = 120, 122, 123  # the placeholder, and ordinary tokens around an image
PATCHES = 4  # placeholders of one image

TEXT: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.3,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


@functools.cache
def seeing(kind: str) -> PreTrainedModel:
    """A random float32 model that tests share; they must not change it."""
    torch.manual_seed(0)
    if kind == "llava":
        sizes = {"intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 16}
        vision = {"model_type": "clip_vision_model", "hidden_size": 16, "projection_dim": 16, "patch_size": 8, **sizes}
        text = {**TEXT, "model_type": "llama"}
        config = LlavaConfig(vision_config=vision, text_config=text, image_token_id=PICTURE, image_token_index=PICTURE)
        return LlavaForConditionalGeneration(config).eval()
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
    vision = {"depth": 2, "hidden_size": 16, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 32}
    vision |= {"patch_size": 4, "window_size": 16, "fullatt_block_indexes": [1], "in_channels": 3}
    config = Qwen2_5_VLConfig(
        text_config={**TEXT, "rope_parameters": rope},
        vision_config=vision,
        image_token_id=PICTURE,
        video_token_id=121,
        vision_start_token_id=START,
        vision_end_token_id=END,
    )
    return Qwen2_5_VLForConditionalGeneration(config).eval()


def prompts(kind: str, *rows: list[int], seed: int = 0) -> dict[str, Any]:
    """What a processor makes of rows of ids, padded at the left; −1 is an image, of random pixels."""
    image = [START, *[PICTURE] * PATCHES, END]
    ids = [[token for i in row for token in (image if i == -1 else [i])] for row in rows]
    width, count = max(map(len, ids)), sum(row.count(-1) for row in rows)
    random = torch.Generator().manual_seed(seed)
    out: dict[str, Any] = {
        "input_ids": torch.tensor([[0] * (width - len(row)) + row for row in ids]),
        "attention_mask": torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in ids]),
    }
    if kind == "llava":
        return out | {"pixel_values": torch.randn(count, 3, 16, 16, generator=random)}
    return out | {
        "pixel_values": torch.randn(count * 16, 3 * 2 * 4 * 4, generator=random),
        "image_grid_thw": torch.tensor([[1, 4, 4]] * count),
        "mm_token_type_ids": (out["input_ids"] == PICTURE).int(),
    }


class SeeingReference(Reference):
    """Every logit by whole passes: the base's over one row with its images, the companions' over its text."""

    def __init__(self, members: list[PreTrainedModel], alpha: float, kind: str, given: dict[str, Any]) -> None:
        super().__init__(members, alpha)
        ids = given["input_ids"]
        images = given["pixel_values"].split(1 if kind == "llava" else 16)
        counts = [int((row == PICTURE).sum()) // PATCHES for row in ids]
        ends = [sum(counts[: i + 1]) for i in range(len(counts))]
        of_rows = [images[end - count : end] for count, end in zip(counts, ends, strict=True)]
        self.__dict__.update(kind=kind, prompts=of_rows, width=ids.shape[1])

    @torch.no_grad()
    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, **_: Any) -> Any:
        base, *companions = self.__dict__["members"]
        kind, images, width = (self.__dict__[name] for name in ("kind", "prompts", "width"))
        rows = []
        for i, row in enumerate(input_ids):
            real = torch.ones_like(row).bool() if attention_mask is None else attention_mask[i].bool()
            ids, own = row[real][None], images[i * len(images) // len(input_ids)]
            given: dict[str, Any] = {"input_ids": ids, "use_cache": False}
            if own:
                given["pixel_values"] = torch.cat(own)
                if kind != "llava":
                    given["image_grid_thw"] = torch.tensor([[1, 4, 4]] * len(own))
                    given["mm_token_type_ids"] = (ids == PICTURE).int()
            if kind != "llava":
                base.model.rope_deltas = None
            z = base(**given).logits[0, -1].clone()
            text = row[real & ((row != PICTURE) | (torch.arange(len(row)) >= width))][None]
            expert, antiexpert = (m(text, use_cache=False).logits[0, -1] for m in companions)
            z[: len(expert)] += self.alpha * (expert - antiexpert)
            z[len(expert) :] = -torch.inf
            rows.append(z)
        return CausalLMOutputWithPast(logits=torch.stack(rows)[:, None])
