#!/usr/bin/env bash
# transformers 5.24.0: BartForCausalLM generates other tokens from a prompt in a batch with a longer one than from the
# prompt alone, on whichever side it is padded (BART's page advises the right; `generate()` then warns and asks for the
# left, where it says nothing). It takes no `position_ids`, and counts columns, padding included. The same with MBart,
# Pegasus, Marian, Blenderbot, PLBart, MVP and BigBirdPegasus. OPT counts the mask and is right when padded on the left.
#
# Output seen (2026-11-30, torch 2.13.0 CPU), the same 6 tokens alone and beside a prompt of 10:
#   BART, alone: [19, 19, 19, 19, 19, 19]
#   BART, padded on the left: [26, 19, 19, 26, 19, 19], a warning to pad on the left: False
#   BART, padded on the right: [19, 26, 19, 19, 55, 19], a warning to pad on the left: True
#   OPT, alone: [26, 0, 30, 26, 30, 52]
#   OPT, padded on the left: [26, 0, 30, 26, 30, 52], a warning to pad on the left: False
#   OPT, padded on the right: [47, 10, 58, 0, 26, 30], a warning to pad on the left: True
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install -q --disable-pip-version-check torch==2.13.0 transformers==5.24.0
HF_HUB_OFFLINE=1 "$work/venv/bin/python" - 2>"$work/noise" <<'PY' || { cat "$work/noise" >&2; exit 1; }
import logging

import torch
from transformers import BartConfig, BartForCausalLM, OPTConfig, OPTForCausalLM

shared = {
    "max_position_embeddings": 64, "vocab_size": 64, "init_std": 0.3, "tie_word_embeddings": False, "bos_token_id": 1,
    "eos_token_id": None, "pad_token_id": 0,
}
kinds = {
    "BART": lambda: BartForCausalLM(
        BartConfig(
            encoder_layers=2, decoder_layers=2, d_model=32, decoder_ffn_dim=64, decoder_attention_heads=2, **shared,
            is_decoder=True, is_encoder_decoder=False, forced_eos_token_id=None,
        )
    ),
    "OPT": lambda: OPTForCausalLM(
        OPTConfig(
            hidden_size=32, ffn_dim=64, num_hidden_layers=2, num_attention_heads=2, word_embed_proj_dim=32, **shared
        )
    ),
}
told = []
handler = logging.Handler(logging.WARNING)
handler.emit = lambda record: told.append(record.getMessage())
logging.getLogger("transformers").addHandler(handler)

short, long = torch.tensor([[2, 11, 23, 37, 5, 41]]), torch.arange(20, 30)[None]
padding = torch.zeros(1, 4, dtype=torch.long)
sides = {"left": torch.cat([padding, short], 1), "right": torch.cat([short, padding], 1)}
texts, warned = {}, {}
for name, make in kinds.items():
    torch.manual_seed(0)
    model = make().eval()
    texts[name, "alone"] = model.generate(short, max_new_tokens=6, do_sample=False)[0, 6:].tolist()
    print(f"{name}, alone: {texts[name, 'alone']}")
    for side, padded in sides.items():
        batch = torch.cat([padded, long])
        told.clear()
        out = model.generate(batch, attention_mask=(batch != 0).long(), max_new_tokens=6, do_sample=False)
        texts[name, side] = out[0, 10:].tolist()
        warned[name, side] = any("right-padding was detected" in line for line in told)
        print(f"{name}, padded on the {side}: {texts[name, side]}, a warning to pad on the left: {warned[name, side]}")
assert texts["OPT", "left"] == texts["OPT", "alone"], texts
assert texts["BART", "left"] != texts["BART", "alone"] != texts["BART", "right"], texts
assert warned == {(name, side): side == "right" for name in kinds for side in sides}, warned
PY
