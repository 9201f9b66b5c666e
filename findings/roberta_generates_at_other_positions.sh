#!/usr/bin/env bash
# transformers 5.24.0: `generate()` tells RoBERTa's causal LMs positions that count from 0, while their own forward pass
# counts from pad_token_id + 1 (position pad_token_id is the padding's, a row of zeros). So a text is generated with
# other logits than those that the model is trained with and that score it, with or without a cache. The same with
# XLM-RoBERTa, XLM-RoBERTa-XL, CamemBERT, Data2VecText, RoBERTa-PreLayerNorm and X-MOD. BERT counts from 0 in both.
#
# Output seen (2026-11-30, torch 2.13.0 CPU), generate() against forward() on the text that came out:
#   BERT, use_cache=True: logits 0.00 apart, 8 of 8 tokens likeliest
#   BERT, use_cache=False: logits 0.00 apart, 8 of 8 tokens likeliest
#   RoBERTa, use_cache=True: logits 4.15 apart, 0 of 8 tokens likeliest
#   RoBERTa, use_cache=False: logits 4.15 apart, 0 of 8 tokens likeliest
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install -q --disable-pip-version-check torch==2.13.0 transformers==5.24.0
HF_HUB_OFFLINE=1 "$work/venv/bin/python" - 2>"$work/noise" <<'PY' || { cat "$work/noise" >&2; exit 1; }
import torch
from transformers import BertConfig, BertLMHeadModel, RobertaConfig, RobertaForCausalLM

sizes = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 64,
    "max_position_embeddings": 64, "initializer_range": 0.3, "is_decoder": True, "pad_token_id": 1, "bos_token_id": 0,
    "eos_token_id": None,
}
ids = torch.tensor([[0, 11, 23, 37, 5, 41]])
moved = {}
for name, make, config in (("BERT", BertLMHeadModel, BertConfig), ("RoBERTa", RobertaForCausalLM, RobertaConfig)):
    torch.manual_seed(4)
    model = make(config(**sizes)).eval()
    for use_cache in (True, False):
        asked = {"max_new_tokens": 8, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
        out = model.generate(ids, use_cache=use_cache, **asked)
        with torch.no_grad():
            scored = model(out.sequences[:, :-1]).logits[0, ids.shape[1] - 1 :]
        moved[name, use_cache] = (torch.cat(out.logits) - scored).abs().max().item()
        likeliest = (scored.argmax(-1) == out.sequences[0, ids.shape[1] :]).sum().item()
        apart = f"logits {moved[name, use_cache]:.2f} apart"
        print(f"{name}, use_cache={use_cache}: {apart}, {likeliest} of 8 tokens likeliest")
assert max(moved["BERT", True], moved["BERT", False]) < 1e-3, moved
assert min(moved["RoBERTa", True], moved["RoBERTa", False]) > 0.1, moved
PY
