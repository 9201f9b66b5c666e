#!/usr/bin/env bash
# transformers 5.24.0: GIT without an image (it is an AutoModelForCausalLM) generates other tokens from a left-padded
# prompt with a cache than without one, without a word. From the second token on, its padding mask is widened on the
# left by as many columns as an image has, though no image is in the cache: it shows padding, and hides text. With an
# image it is right.
#
# Output seen (2026-11-30, torch 2.13.0 CPU), the same prompt:
#   text, alone, use_cache=False: [49, 49, 49, 56, 19, 25, 49, 49]
#   text, alone, use_cache=True: [49, 49, 49, 56, 19, 25, 49, 49]
#   text, padded, use_cache=False: [49, 49, 49, 56, 19, 25, 49, 49]
#   text, padded, use_cache=True: [49, 18, 56, 38, 3, 10, 59, 3]
#   image and text, alone, use_cache=False: [49, 19, 25, 49, 49, 19, 44, 3]
#   image and text, alone, use_cache=True: [49, 19, 25, 49, 49, 19, 44, 3]
#   image and text, padded, use_cache=False: [49, 19, 25, 49, 49, 19, 44, 3]
#   image and text, padded, use_cache=True: [49, 19, 25, 49, 49, 19, 44, 3]
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install -q --disable-pip-version-check torch==2.13.0 transformers==5.24.0
HF_HUB_OFFLINE=1 "$work/venv/bin/python" - 2>"$work/noise" <<'PY' || { cat "$work/noise" >&2; exit 1; }
import torch
from transformers import GitConfig, GitForCausalLM

torch.manual_seed(1)
vision = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 32,
    "patch_size": 16,
}
model = GitForCausalLM(
    GitConfig(
        vision_config=vision, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        vocab_size=64, max_position_embeddings=64, initializer_range=0.3, bos_token_id=1, eos_token_id=None,
        pad_token_id=0,
    )
).eval()
ids = torch.randint(3, 64, (1, 10))
padded = torch.cat([torch.zeros(1, 3, dtype=torch.long), ids], 1)
image = torch.randn(1, 3, 32, 32)
seen = {}
for what, pixels in (("text", {}), ("image and text", {"pixel_values": image})):
    for how, given in (("alone", ids), ("padded", padded)):
        for use_cache in (False, True):
            asked = {"max_new_tokens": 8, "do_sample": False, "use_cache": use_cache}
            out = model.generate(given, attention_mask=(given != 0).long(), **asked, **pixels)
            seen[what, how, use_cache] = out[0, given.shape[1] :].tolist()
            print(f"{what}, {how}, use_cache={use_cache}: {seen[what, how, use_cache]}")
text = seen["text", "alone", False]
assert seen["text", "alone", True] == seen["text", "padded", False] == text != seen["text", "padded", True], seen
assert len({str(tokens) for (what, _, _), tokens in seen.items() if what != "text"}) == 1, seen
PY
