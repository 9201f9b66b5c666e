#!/usr/bin/env bash
# transformers 5.24.0: a Phi-3 with long RoPE rotates all positions of a pass by the long frequencies as soon as one of
# them is beyond `original_max_position_embeddings`. So a short prompt's text depends on the other prompts of its batch;
# a text read in two parts over a cache, across that length, has other logits than in one pass; and prompt lookup, whose
# drafts reach across it, gives other tokens than greedy decoding. Plain `generate()` of one prompt is right: it drops
# the cache there and reads the text again.
#
# Output seen (2026-11-30, torch 2.13.0 CPU), original_max_position_embeddings=16:
#   8 tokens, alone:              [10, 21, 25, 19, 37, 10]
#   beside a prompt of 8 + 2:     [10, 21, 25, 19, 37, 10]
#   beside a prompt of 8 + 16:    [57, 45, 31, 25, 25, 25]
#   10 + 6 tokens against 16, logits: 0.00 apart
#   10 + 14 tokens against 24, logits: 7.94 apart
#   14 + 10 tokens, no cache: [53, 19, 38, 55, 29, 21, 25, 6, 31, 19]
#   14 + 10 tokens, cache: [53, 19, 38, 55, 29, 21, 25, 6, 31, 19]
#   14 + 10 tokens, prompt lookup: [45, 25, 6, 55, 14, 55, 53, 55, 53, 55]
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install -q --disable-pip-version-check torch==2.13.0 transformers==5.24.0
HF_HUB_OFFLINE=1 "$work/venv/bin/python" - 2>"$work/noise" <<'PY' || { cat "$work/noise" >&2; exit 1; }
import torch
from transformers import Phi3Config, Phi3ForCausalLM

torch.manual_seed(0)
model = Phi3ForCausalLM(
    Phi3Config(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
        vocab_size=64, initializer_range=0.3, bos_token_id=1, eos_token_id=None, pad_token_id=0,
        max_position_embeddings=128, original_max_position_embeddings=16,
        rope_parameters={
            "rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 8, "long_factor": [4.0] * 8,
        },
    )
).eval()
ids = torch.randint(3, 64, (1, 24))
short = ids[:, :8]
asked = {"max_new_tokens": 6, "do_sample": False}

alone = model.generate(short, **asked, use_cache=False)[0, 8:].tolist()
batch = {}
for longest in (10, 24):
    rows = torch.cat([torch.cat([torch.zeros(1, longest - 8, dtype=torch.long), short], 1), ids[:, :longest]])
    batch[longest] = model.generate(rows, attention_mask=(rows != 0).long(), **asked)[0, longest:].tolist()
print(f"8 tokens, alone:              {alone}")
print(f"beside a prompt of 8 + 2:     {batch[10]}")
print(f"beside a prompt of 8 + 16:    {batch[24]}")

parts = {}
with torch.no_grad():
    for end in (16, 24):
        whole = model(ids[:, :end], use_cache=False).logits
        first = model(ids[:, :10], use_cache=True)
        second = model(ids[:, 10:end], cache=first.cache).logits
        parts[end] = (torch.cat([first.logits, second], 1) - whole).abs().max().item()
        print(f"10 + {end - 10} tokens against {end}, logits: {parts[end]:.2f} apart")

asked["max_new_tokens"] = 10
prompt = torch.cat([ids[:, :7], ids[:, :7]], 1)
ways = {"no cache": {"use_cache": False}, "cache": {}, "prompt lookup": {"prompt_lookup_num_tokens": 4}}
greedy = {}
for name, way in ways.items():
    greedy[name] = model.generate(prompt, **asked, **way)[0, 14:].tolist()
    print(f"14 + 10 tokens, {name}: {greedy[name]}")
assert batch[10] == alone != batch[24], (alone, batch)
assert parts[16] < 1e-3 < 0.1 < parts[24], parts
assert greedy["cache"] == greedy["no cache"] != greedy["prompt lookup"], greedy
PY
