#!/usr/bin/env bash
# transformers 5.24.0: a BartForCausalLM's cache has as many layers as its config counts for the encoder, which the
# model does not have (`num_hidden_layers` means `encoder_layers`). With more decoder layers, `generate()` and a forward
# pass with a cache raise an IndexError that names neither; with fewer, the cache keeps layers that are never filled.
# Without a cache both are right. The same with MBart, Pegasus, Marian, Blenderbot, PLBart, MVP and BigBirdPegasus.
#
# Output seen (2026-11-30, torch 2.13.0 CPU):
#   encoder_layers=2, decoder_layers=2: the tokens of no cache; layers of the cache in use: [True, True]
#   encoder_layers=3, decoder_layers=1: the tokens of no cache; layers of the cache in use: [True, False, False]
#   encoder_layers=1, decoder_layers=3: IndexError: list index out of range
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install -q --disable-pip-version-check torch==2.13.0 transformers==5.24.0
HF_HUB_OFFLINE=1 "$work/venv/bin/python" - 2>"$work/noise" <<'PY' || { cat "$work/noise" >&2; exit 1; }
import torch
from transformers import BartConfig, BartForCausalLM

ids = torch.tensor([[2, 11, 23, 37, 5, 41]])
seen = {}
for encoder, decoder in ((2, 2), (3, 1), (1, 3)):
    torch.manual_seed(0)
    model = BartForCausalLM(
        BartConfig(
            encoder_layers=encoder, decoder_layers=decoder, d_model=32, decoder_ffn_dim=64, decoder_attention_heads=2,
            max_position_embeddings=64, vocab_size=64, init_std=0.3, is_decoder=True, is_encoder_decoder=False,
            bos_token_id=1, eos_token_id=None, forced_eos_token_id=None, pad_token_id=0,
        )
    ).eval()
    alone = model.generate(ids, max_new_tokens=6, use_cache=False)
    try:
        out = model.generate(ids, max_new_tokens=6, return_dict_in_generate=True)
        filled = [layer.is_initialized for layer in out.cache.layers]
        same = "the tokens of no cache" if torch.equal(out.sequences, alone) else "OTHER TOKENS"
        seen[encoder, decoder] = f"{same}; layers of the cache in use: {filled}"
    except IndexError as error:
        seen[encoder, decoder] = f"IndexError: {error}"
    print(f"encoder_layers={encoder}, decoder_layers={decoder}: {seen[encoder, decoder]}")
assert seen[2, 2] == "the tokens of no cache; layers of the cache in use: [True, True]", seen
assert seen[3, 1] == "the tokens of no cache; layers of the cache in use: [True, False, False]", seen
assert seen[1, 3].startswith("IndexError"), seen
PY
