#!/usr/bin/env bash
# transformers 5.24.0: ProphetNetForConditionalGeneration generates other tokens with its cache, which is on by default,
# than without it (`use_cache=False`), also for one source without padding. BART, here for comparison, does not. So in
# 5.17.0, too.
#
# Output seen (2026-11-30, torch 2.13.0 CPU), 7 tokens for a source of 8:
#   BART, use_cache=True: [47, 38, 13, 13, 55, 55, 55]
#   BART, use_cache=False: [47, 38, 13, 13, 55, 55, 55]
#   ProphetNet, use_cache=True: [32, 32, 32, 32, 29, 44, 32]
#   ProphetNet, use_cache=False: [32, 32, 29, 29, 29, 32, 32]
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install -q --disable-pip-version-check torch==2.13.0 transformers==5.24.0
HF_HUB_OFFLINE=1 "$work/venv/bin/python" - 2>"$work/noise" <<'PY' || { cat "$work/noise" >&2; exit 1; }
import torch
from transformers import (
    BartConfig, BartForConditionalGeneration, ProphetNetConfig, ProphetNetForConditionalGeneration,
)

ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2}
shared = {
    "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "max_position_embeddings": 64,
    "init_std": 0.3, "forced_eos_token_id": None,
}
kinds = {
    "BART": lambda: BartForConditionalGeneration(BartConfig(vocab_size=64, **shared, **ids)),
    "ProphetNet": lambda: ProphetNetForConditionalGeneration(
        ProphetNetConfig(
            vocab_size=64, hidden_size=32, num_encoder_layers=2, num_decoder_layers=2, num_encoder_attention_heads=4,
            num_decoder_attention_heads=4, encoder_ffn_dim=64, decoder_ffn_dim=64, max_position_embeddings=64,
            init_std=0.3, **ids,
        )
    ),
}
source = torch.tensor([[5, 9, 23, 41, 7, 33, 17, 2]])
texts = {}
for name, make in kinds.items():
    torch.manual_seed(0)
    model = make().eval()
    for part, weight in model.named_parameters():
        if weight.ndim > 1 and "position" not in part:
            weight.data.normal_(0, 1.2 / weight.shape[-1] ** 0.5)
    for cached in (True, False):
        settings = {"max_new_tokens": 7, "do_sample": False, "suppress_tokens": [0, 2], "use_cache": cached}
        texts[name, cached] = model.generate(source, **settings)[0, 1:].tolist()
        print(f"{name}, use_cache={cached}: {texts[name, cached]}")
assert texts["BART", True] == texts["BART", False], texts
assert texts["ProphetNet", True] != texts["ProphetNet", False], texts
PY
