#!/usr/bin/env bash
# transformers 5.24.0: a DeepSeek V4 cache says that it can be cropped, and after crop(-6) the model continues a text
# otherwise than if it had never read the six tokens. The window is cropped; the compressed entries, the buffer of
# tokens that are in no entry yet and their count are not. (Beyond the window, crop raises an error.)
#
# Output seen (2026-11-30, torch 2.13.0 CPU):
#   cache.is_croppable: True
#   largest difference of the next token's log-probability: 0.238
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install -q --disable-pip-version-check torch==2.13.0 transformers==5.24.0
HF_HUB_OFFLINE=1 "$work/venv/bin/python" - 2>"$work/noise" <<'PY' || { cat "$work/noise" >&2; exit 1; }
import torch
from transformers import DeepseekV4Config, DeepseekV4ForCausalLM, DynamicCache

torch.manual_seed(0)
kinds = ["compressed_sparse_attention", "heavily_compressed_attention", "sliding_attention"]
model = DeepseekV4ForCausalLM(
    DeepseekV4Config(
        vocab_size=64, hidden_size=32, moe_intermediate_size=16, num_hidden_layers=3, num_attention_heads=4,
        head_dim=16, q_lora_rank=16, num_experts_per_tok=2, n_routed_experts=4, max_position_embeddings=256,
        partial_rotary_factor=0.5, layer_types=kinds, compress_rates=dict(zip(kinds, (4, 8))), hc_mult=2,
        mlp_layer_types=["moe"] * 3, sliding_window=64, o_groups=2, o_lora_rank=8, index_topk=8, index_head_dim=8,
        index_n_heads=16, initializer_range=0.3, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )
).eval()
with torch.no_grad():
    for weight in model.parameters():
        weight.add_(torch.randn_like(weight) * 0.1)
ids, rejected = torch.randint(3, 64, (1, 14)), torch.randint(3, 64, (1, 6))
with torch.no_grad():
    cache = DynamicCache(config=model.config)
    model(ids[:, :-1], cache=cache)
    print("cache.is_croppable:", cache.is_croppable)
    model(rejected, cache=cache)
    cache.crop(-6)
    cropped = model(ids[:, -1:], cache=cache).logits[0, -1].log_softmax(-1)
    alone = model(ids, use_cache=False).logits[0, -1].log_softmax(-1)
apart = float((cropped - alone).abs().max())
print(f"largest difference of the next token's log-probability: {apart:.3f}")
assert apart > 0.1
PY
