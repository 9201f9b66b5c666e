"""Members whose embedding accelerate keeps on the disk: their own device is `meta`."""

from pathlib import Path

import pytest
import torch
from support.tiny import shared
from transformers import AutoModelForCausalLM

import proxytune
from proxytune import FusedDecoding, ProxyTuningLogitsProcessor, SpeculativeDecoding
from proxytune.methods.speculation import BigramDraft

RUN = {"do_sample": False, "max_new_tokens": 4, "eos_token_id": None}


# transformers 5.17 warns of such a base, alone as well.
@pytest.mark.filterwarnings("ignore:You are calling .generate.. with the `input_ids` being on a device:UserWarning")
@pytest.mark.parametrize("role", ["base", "expert"])
def test_an_embedding_on_the_disk(role: str, tmp_path: Path) -> None:
    members = {"base": shared("qwen3", 1), "expert": shared("llama", 2), "antiexpert": shared("llama", 3)}
    ids = torch.randint(3, 240, (2, 9))
    want = proxytune.wrap(**members, check_vocabulary=False).generate(ids, **RUN)
    members[role].save_pretrained(tmp_path / "saved")
    places = dict.fromkeys(("model.layers", "model.norm", "model.rotary_emb", "lm_head"), "cpu")
    members[role] = AutoModelForCausalLM.from_pretrained(
        tmp_path / "saved", device_map=places | {"model.embed_tokens": "disk"}, offload_folder=tmp_path / "away"
    )
    assert members[role].device.type == "meta"
    model = proxytune.wrap(**members, check_vocabulary=False)
    assert model.device.type == "cpu"
    for loop in (None, FusedDecoding(), SpeculativeDecoding(), SpeculativeDecoding(draft=BigramDraft.of(model.base))):
        assert torch.equal(model.generate(ids, custom_generate=loop, **RUN), want)
    processor = ProxyTuningLogitsProcessor(members["expert"], members["antiexpert"], check_vocabulary=False)
    with processor.attach(members["base"]):
        assert torch.equal(members["base"].generate(ids, **RUN), want)
