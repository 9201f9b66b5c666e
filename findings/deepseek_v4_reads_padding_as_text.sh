#!/usr/bin/env bash
# transformers 5.24.0: DeepSeek V4 generates other tokens from a left-padded prompt than from the same prompt alone,
# without a word. Its compressed layers count windows of tokens from the left edge, padding included, and compress
# padding as if it were text; queries count theirs from the first token.
#
# Output seen (2026-11-30, torch 2.13.0 CPU), the same prompt, greedy:
#   alone:          [46, 20, 31, 47, 55, 31, 47, 47]
#   padded by five: [46, 31, 26, 46, 20, 7, 47, 4]
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
ids = torch.randint(3, 64, (1, 14))
padded = torch.cat([torch.zeros(1, 5, dtype=torch.long), ids], 1)
seen = []
for how, given in (("alone:         ", ids), ("padded by five:", padded)):
    out = model.generate(given, attention_mask=(given != 0).long(), max_new_tokens=8, do_sample=False, eos_token_id=None)
    seen.append(out[0, given.shape[1] :].tolist())
    print(how, seen[-1])
assert seen[0] != seen[1]
PY
