#!/usr/bin/env bash
# transformers 5.24.0: a Qwen2.5-VL notes on itself (`rope_deltas`) how far the positions of a text run behind its columns
# for the images in it, and keeps that after `generate()`. A text without images that is then read in two parts over a
# cache gets the old offset in its second part, unless `position_ids` are passed, so its logits depend on which images
# the model saw last. A new model is right, and so is `generate()`, which sets the offset anew.
#
# Output seen (2026-11-30, torch 2.13.0 CPU):
#   a text in two parts against one pass, logits: 0.00 apart
#   the same after generate() with an image:      4.58 apart
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install -q --disable-pip-version-check torch==2.13.0 transformers==5.24.0
HF_HUB_OFFLINE=1 "$work/venv/bin/python" - 2>"$work/noise" <<'PY' || { cat "$work/noise" >&2; exit 1; }
import torch
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

torch.manual_seed(0)
model = Qwen2_5_VLForConditionalGeneration(
    Qwen2_5_VLConfig(
        text_config=dict(
            hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            vocab_size=128, initializer_range=0.3, bos_token_id=1, eos_token_id=None, pad_token_id=0,
            rope_parameters={"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0},
        ),
        vision_config=dict(
            depth=2, hidden_size=16, intermediate_size=32, num_heads=2, out_hidden_size=32, patch_size=4,
            window_size=16, fullatt_block_indexes=[1],
        ),
        image_token_id=120, video_token_id=121, vision_start_token_id=122, vision_end_token_id=123,
    )
).eval()
text = torch.tensor([[1, 5, 6, 7, 8, 9]])


@torch.no_grad()
def apart():
    first = model(text[:, :4], use_cache=True)
    second = model(text[:, 4:], cache=first.cache).logits
    return (second - model(text, use_cache=False).logits[:, 4:]).abs().max().item()


before = apart()
prompt = torch.tensor([[1, 122, 120, 120, 120, 120, 123, 5, 6]])
model.generate(
    prompt,
    pixel_values=torch.randn(16, 96),
    image_grid_thw=torch.tensor([[1, 4, 4]]),
    mm_token_type_ids=(prompt == 120).int(),
    max_new_tokens=2,
)
after = apart()
print(f"a text in two parts against one pass, logits: {before:.2f} apart")
print(f"the same after generate() with an image:      {after:.2f} apart")
assert before < 1e-3 < 0.1 < after, (before, after)
PY
